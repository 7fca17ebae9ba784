"""Selective scan for NVIDIA GPUs from Hopper on, in Pallas Mosaic GPU, forward and backward.

A block of four warps owns some channels of one row and runs over the tokens in order. A channel's state lies in the
registers of one thread, or of a few neighbouring lanes (`_Threads`). Tiles of tokens arrive in shared memory by
asynchronous copies, a few tiles ahead. Four float32 operations and one `exp2` update a state: `A` is multiplied by log2(e)
beforehand, and at a segment start an addition makes the time step so long that nothing is left of the state.

The backward pass runs over tiles of `BACK_TILE` tokens from the last to the first. It recomputes the states of a tile from
the state before it, keeps them in shared memory, and runs back through them. The gradients of B and C are summed over the
channels of a block by shuffles, and over blocks by XLA, in a fixed order: two runs give the same bits.

Where rows and channels are too few to fill the machine, the length is divided into parts that run side by side. A first
pass finds what each part adds to the state; the decay of a part is known from the sum of its time steps.

Needs jax 0.11 or newer.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from seqjax.ops.kernels.selective_scan import Inputs

TILE = 16
"""Tokens that one asynchronous copy brings in the forward pass."""
BACK_TILE = 8
"""The same in the backward pass, whose shared memory holds all states of a tile: two blocks fit on a multiprocessor."""
MAX_STATE_DIM = 128

WARPS = 4
LANES = 32
STAGES = 3
BACK_STAGES = 2
MULTIPROCESSORS = 132
RESET = 1e30
LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)
F32 = jnp.float32

Refs = dict[str, Any]


def forward(
    inputs: Inputs, *, softplus: bool, reverse: bool, chunk_size: int, keep_states: bool, parts: int | None = None
) -> tuple[Array, Array, Array | None]:
    """Run the scan.

    Args:
      inputs: see `Inputs`; N is at most 128.
      softplus: the time step is `softplus(dt + dt_bias)`, else `dt + dt_bias`.
      reverse: run from the last token to the first.
      chunk_size: tokens between kept states, a multiple of 8.
      keep_states: also return the states that `backward` starts from.
      parts: into how many parts the length is divided; default 1 where rows and channels fill the machine.
    Returns:
      The output `[R, L, E]` in the dtype of `u`, the state after the last step `[R, N, E]` float32, and the states before
      each chunk in the order of processing, `[R, ceil(L / chunk_size), N, E]` float32, or None.
    Raises:
      ValueError: N is above 128, or chunk_size is not a multiple of 8.
    """
    _check(inputs, chunk_size)
    length = inputs.u.shape[1]
    inputs = _with_resets(inputs, reverse)
    threads = _Threads.forward(inputs.A.shape[1])
    chunks = -(-length // chunk_size)
    split = _Split.into(parts or _parts(inputs, threads, chunks), length, chunk_size, reverse)
    folded = split.fold(inputs)
    if split.parts > 1:
        ends, spans = _scan(folded, threads, split, softplus, ("last", "spans"))
        folded = folded._replace(h0=split.carried(ends, spans, inputs.A, inputs.h0))
    wanted = ("out", "last", "states") if keep_states else ("out", "last")
    out, last, *states = _scan(folded, threads, split, softplus, wanted, chunk_size)
    return split.unfold(out), split.ends(last), split.unfold_chunks(states[0])[:, :chunks] if keep_states else None


def backward(
    inputs: Inputs,
    states: Array,
    d_out: Array,
    d_last: Array,
    *,
    softplus: bool,
    reverse: bool,
    chunk_size: int,
    parts: int | None = None,
) -> Inputs:
    """The gradients of `forward`.

    Args:
      inputs, softplus, reverse, chunk_size: what `forward` was given.
      states: what it kept, `[R, ceil(L / chunk_size), N, E]`. Chunks of more than `BACK_TILE` tokens are run again first,
        side by side, to keep a state every `BACK_TILE` tokens.
      d_out: gradient of the output, `[R, L, E]`.
      d_last: gradient of the last state, `[R, N, E]` float32.
      parts: into how many parts the length is divided; default 1 where rows and channels fill the machine.
    Returns:
      Gradients of u, dt, B, C, z in their dtypes, of A, D, dt_bias, h0 in float32; None where the input was None, and for
      starts.
    Raises:
      ValueError: as `forward`.
    """
    _check(inputs, chunk_size)
    rows, length, _ = inputs.u.shape
    inputs = _with_resets(inputs, reverse)
    d_out = d_out.astype(inputs.u.dtype)
    threads = _Threads.backward(inputs.A.shape[1])
    tiles = -(-length // BACK_TILE)
    if chunk_size > BACK_TILE:
        again = _Split(length, states.shape[1], chunk_size, reverse)
        h0 = again.fold_chunks(states).reshape(-1, *states.shape[2:])
        folded = again.fold(inputs)._replace(h0=h0)
        [states] = _scan(folded, _Threads.forward(inputs.A.shape[1]), again, softplus, ("states",), BACK_TILE)
        states = again.unfold_chunks(states)
    split = _Split.into(parts or _parts(inputs, threads, tiles), length, BACK_TILE, reverse)
    states = split.fold_chunks(states[:, :tiles])
    folded, d_out = split.fold(inputs), split.fold_tokens(d_out)
    if split.parts > 1:
        back = dataclasses.replace(split, reverse=not reverse)
        adjoint = folded._replace(u=d_out, B=folded.C, h0=jnp.zeros_like(folded.h0))
        ends, spans = _scan(adjoint, _Threads.forward(inputs.A.shape[1]), split, softplus, ("last", "spans"), adjoint=True)
        d_last = back.carried(ends, spans, inputs.A, d_last)
    d = _scan_back(folded, threads, split, softplus, states, d_out, d_last)

    def of_group(x: Array | None) -> Array | None:
        if x is None:
            return None
        groups = inputs.A.shape[0]
        return x.reshape(rows // groups, groups, split.parts, *x.shape[1:]).sum((0, 2))

    return Inputs(
        u=split.unfold(d.u),
        dt=split.unfold(d.dt),
        A=of_group(d.A),
        B=split.unfold(d.B).astype(inputs.B.dtype),
        C=split.unfold(d.C).astype(inputs.C.dtype),
        D=of_group(d.D),
        z=None if d.z is None else split.unfold(d.z),
        dt_bias=of_group(d.dt_bias),
        h0=dataclasses.replace(split, reverse=not reverse).ends(d.h0),
        starts=None,
    )


def _check(inputs: Inputs, chunk_size: int) -> None:
    if inputs.A.shape[1] > MAX_STATE_DIM:
        raise ValueError(f"state_dim={inputs.A.shape[1]} is too large; the GPU kernel takes at most {MAX_STATE_DIM}.")
    if chunk_size < BACK_TILE or chunk_size % BACK_TILE:
        raise ValueError(f"chunk_size={chunk_size} does not suit the GPU kernel; it must be a multiple of {BACK_TILE}.")


def _with_resets(inputs: Inputs, reverse: bool) -> Inputs:
    """`starts` becomes what is added to the time step for the decay: nothing, or so much that the state is lost."""
    if inputs.starts is None:
        return inputs
    resets = jnp.pad(inputs.starts[:, 1:], [(0, 0), (0, 1)]) if reverse else inputs.starts
    return inputs._replace(starts=jnp.where(resets, F32(RESET), F32(0)))


def _parts(inputs: Inputs, threads: _Threads, chunks: int) -> int:
    """Enough parts for two blocks on each multiprocessor, if without them half the multiprocessors were idle: the first
    pass costs most of another."""
    rows, _, width = inputs.u.shape
    blocks = rows * -(-width // threads.channels)
    return 1 if 2 * blocks > MULTIPROCESSORS else min(chunks, 2 * MULTIPROCESSORS // blocks)


@dataclasses.dataclass(frozen=True)
class _Split:
    """The length, padded where processing ends and divided into parts that become rows."""

    length: int
    parts: int
    part: int
    reverse: bool

    @classmethod
    def into(cls, parts: int, length: int, unit: int, reverse: bool) -> _Split:
        """At most `parts` parts of equally many whole units."""
        units = -(-length // unit)
        each = -(-units // parts)
        return cls(length, -(-units // each), each * unit, reverse)

    @property
    def padded(self) -> int:
        return self.parts * self.part

    def fold_tokens(self, x: Array) -> Array:
        """`[R, L, ...]` to `[R * parts, part, ...]`."""
        after = self.padded - self.length
        x = jnp.pad(x, [(0, 0), (after, 0) if self.reverse else (0, after), *[(0, 0)] * (x.ndim - 2)])
        return x.reshape(-1, self.part, *x.shape[2:])

    def fold(self, inputs: Inputs) -> Inputs:
        """All inputs; the parts start from zero, and only if there is one part from `h0`."""
        tokens = {name: getattr(inputs, name) for name in ("u", "dt", "B", "C", "z", "starts")}
        tokens = {name: self.fold_tokens(x) for name, x in tokens.items() if x is not None}
        rows = inputs.h0.shape[0] * self.parts
        h0 = inputs.h0 if self.parts == 1 else jnp.zeros((rows, *inputs.h0.shape[1:]), F32)
        return inputs._replace(**tokens, h0=h0)

    def unfold(self, x: Array) -> Array:
        """`[R * parts, part, ...]` to `[R, L, ...]`."""
        x = x.reshape(-1, self.padded, *x.shape[2:])
        return x[:, self.padded - self.length :] if self.reverse else x[:, : self.length]

    def _in_order(self, x: Array) -> Array:
        """Parts `[R, parts, ...]` from the order of tokens to that of processing, or back."""
        return jnp.flip(x, 1) if self.reverse else x

    def fold_chunks(self, x: Array) -> Array:
        """`[R, chunks, ...]` in the order of processing to `[R * parts, chunks of a part, ...]`."""
        chunks = -(-x.shape[1] // self.parts)
        x = jnp.pad(x, [(0, 0), (0, chunks * self.parts - x.shape[1]), *[(0, 0)] * (x.ndim - 2)])
        return self._in_order(x.reshape(-1, self.parts, chunks, *x.shape[2:])).reshape(-1, chunks, *x.shape[2:])

    def unfold_chunks(self, x: Array) -> Array:
        """The inverse of `fold_chunks`, with the padding."""
        chunks = self._in_order(x.reshape(-1, self.parts, *x.shape[1:]))
        return chunks.reshape(chunks.shape[0], -1, *x.shape[2:])

    def ends(self, x: Array) -> Array:
        """What the last part left: `[R * parts, ...]` to `[R, ...]`."""
        return self._in_order(x.reshape(-1, self.parts, *x.shape[1:]))[:, -1]

    def carried(self, ends: Array, spans: Array, A: Array, h0: Array) -> Array:
        """The states before each part, `[R * parts, N, E]`.

        Args:
          ends: what each part leaves when it starts from zero, `[R * parts, N, E]`.
          spans: the sum of each part's time steps, `[R * parts, E]`.
          A: `[G, N, E]`.
          h0: the state before the first part, `[R, N, E]`.
        """
        rows = h0.shape[0]
        A = jnp.tile(A, (rows // A.shape[0], 1, 1))

        def across(h: Array, part: tuple[Array, Array]) -> tuple[Array, Array]:
            end, span = part
            return jnp.exp(A * span[:, None]) * h + end, h

        by_part = [jnp.moveaxis(self._in_order(x.reshape(rows, self.parts, *x.shape[1:])), 1, 0) for x in (ends, spans)]
        _, before = lax.scan(across, h0, tuple(by_part))
        return self._in_order(jnp.moveaxis(before, 0, 1)).reshape(-1, *h0.shape[1:])


def _layout(*tiles: tuple[int, ...], warp: int, lanes: Sequence[int]) -> Any:
    """A layout of register arrays; vectors lie along the last dimension."""
    of = mgpu.TiledLayout(plgpu.Tiling(tiles), (warp,), tuple(lanes), -1, _check_canonical=False).canonicalize()
    return plgpu.Layout.TILED(of.tiling, of.warp_dims, of.lane_dims, of.vector_dim)


@dataclasses.dataclass(frozen=True)
class _Threads:
    """How a block's states lie in its threads' registers.

    The states of a block are `states` arrays of shape `[lanes, WARPS, warp_channels]`: entry (s, w, c) of array i belongs to
    state i * lanes + s of channel c of warp w. A thread has `channels_each` neighbouring channels of one s.
    """

    lanes: int
    """Lanes that share a channel."""
    channels_each: int
    states: int

    @classmethod
    def forward(cls, state_dim: int) -> _Threads:
        """A thread to a channel while its states fit in registers: sums over the state then need no shuffles."""
        lanes = 1 if state_dim <= 32 else 2 if state_dim <= 64 else 4
        return cls(lanes, 1, _state_dim(state_dim) // lanes)

    @classmethod
    def backward(cls, state_dim: int) -> _Threads:
        """Four channels to a thread: most of the sum over channels needs no shuffles."""
        lanes = 4 if state_dim <= 16 else 8 if state_dim <= 64 else 16
        return cls(lanes, 4, _state_dim(state_dim) // lanes)

    @property
    def state_dim(self) -> int:
        return self.lanes * self.states

    @property
    def warp_channels(self) -> int:
        return LANES // self.lanes * self.channels_each

    @property
    def channels(self) -> int:
        return WARPS * self.warp_channels

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.lanes, WARPS, self.warp_channels)

    @functools.cached_property
    def layout(self) -> Any:
        return _layout(self.shape, (1, 1, self.channels_each), warp=-5, lanes=(-6, -4))

    def load(self, ref: Any) -> Array:
        return _load(ref, self.layout)

    def load_channels(self, ref: Any) -> Array:
        return _load(ref, self.layout.reduce(0))

    def of_channels(self, x: Array) -> Array:
        """`[WARPS, warp_channels]` repeated over the states."""
        return plgpu.layout_cast(lax.broadcast_in_dim(x, self.shape, (1, 2)), self.layout)

    def of_states(self, ref: Any, first: int, i: int) -> Array:
        """Values `[state_dim]` from `ref[first]` on, those of array i, the same for all channels."""
        if self.lanes == 1:
            return ref[first + i]
        x = _load(ref.at[self.rows(i, first)], self.layout.reduce((1, 2)))
        return plgpu.layout_cast(lax.broadcast_in_dim(x, self.shape, (0,)), self.layout)

    def rows(self, i: int, first: Any = 0) -> Any:
        """Where array i's states are along a state axis."""
        return pl.ds(first + i * self.lanes, self.lanes)

    def load_states(self, ref: Any, channels: Any) -> tuple[Array, ...]:
        """All arrays from `ref[state_dim, blocks of channels, warp_channels]`."""
        return tuple(self.load(ref.at[self.rows(i), channels]) for i in range(self.states))

    def store_states(self, ref: Any, channels: Any, arrays: Sequence[Array]) -> None:
        for i, x in enumerate(arrays):
            _store(ref.at[self.rows(i), channels], x)


def _state_dim(state_dim: int) -> int:
    """The state size that the kernels use: copies need 16 bytes, and lanes that share a channel equal shares."""
    step = 4 if state_dim <= 16 else 8 if state_dim <= 64 else 16
    return -(-state_dim // step) * step


class _Where:
    """Which part of the work a block does, and where its tokens are."""

    def __init__(self, split: _Split, tile: int, groups: int) -> None:
        block, row, parts = lax.axis_index("channels"), lax.axis_index("rows"), jnp.int32(split.parts)
        part = lax.rem(row, parts)
        self.split, self.tile, self.block, self.row = split, tile, block, row
        self.channels = pl.ds(block * WARPS, WARPS)
        self.group = lax.rem(lax.div(row, parts), jnp.int32(groups))
        self.before = (parts - 1 - part if split.reverse else part) * split.part

    @property
    def tiles(self) -> int:
        return self.split.part // self.tile

    def first(self, k: Any) -> Any:
        """The first token of the kth tile in the order of processing."""
        return (self.tiles - 1 - k if self.split.reverse else k) * self.tile

    def tokens(self, k: Any) -> Any:
        return pl.ds(self.first(k), self.tile)

    def token(self, j: Any) -> Any:
        """Within a tile, the jth token in the order of processing."""
        return self.tile - 1 - j if self.split.reverse else j

    def steps(self, k: Any) -> Any:
        """How many tokens of the kth tile are no padding."""
        if self.split.padded == self.split.length:
            return jnp.int32(self.tile)
        return jnp.clip(self.split.length - self.before - k * self.tile, 0, self.tile)


@dataclasses.dataclass(frozen=True)
class _Ring:
    """Asynchronous copies of tiles to shared memory, as many tiles ahead as there are slots."""

    pairs: Sequence[tuple[Callable[[Any], Any], Any]]
    """What to copy for the ith tile, and the slots."""
    ready: Any
    tiles: int
    slots: int

    def slot(self, i: Any) -> Any:
        return lax.rem(i, jnp.int32(self.slots))

    def fetch(self, i: Any) -> None:
        for source, slots in self.pairs:
            plgpu.copy_gmem_to_smem(source(i), slots.at[self.slot(i)], self.ready.at[self.slot(i)])

    def start(self) -> None:
        for i in range(min(self.slots, self.tiles)):
            self.fetch(jnp.int32(i))

    def wait(self, i: Any) -> Any:
        plgpu.barrier_wait(self.ready.at[self.slot(i)])
        return self.slot(i)

    def release(self, i: Any) -> None:
        """All threads have read the ith tile: its slot is free for another."""
        plgpu.commit_smem()

        @pl.when(i + self.slots < self.tiles)
        def _() -> None:
            self.fetch(i + self.slots)


def _store(ref: Any, x: Array) -> None:
    """In the dtype of `ref`."""
    x = x.astype(ref.dtype)
    if hasattr(plgpu, "store"):  # from JAX 0.12 on, which refuses by default to store single bfloat16 values
        plgpu.store(ref, x, optimized=False)
    else:
        ref[...] = x


def _load(ref: Any, layout: Any) -> Array:
    return plgpu.load(ref, layout=layout, optimized=False)


def _reciprocal(x: Array) -> Array:
    """1 / x for x >= 1, with one special-function instruction; a division takes ten instructions."""
    root = lax.rsqrt(x)
    return root * root


def _sigmoid(x: Array) -> Array:
    return _reciprocal(1 + jnp.exp2(x * -LOG2_E))


def _softplus(x: Array) -> Array:
    """max(x, 0) + log1p(exp(-|x|)), with log1p(e) = 2 artanh(e / (2 + e)) as a series: `log2` of the hardware has an absolute
    error of 2^-22, too much for small time steps."""
    e = jnp.exp2(jnp.abs(x) * -LOG2_E)
    s = e * _reciprocal(2 + e)
    square = s * s
    series = 2 / 13
    for k in (11, 9, 7, 5, 3, 1):
        series = series * square + 2 / k
    return jnp.maximum(x, 0) + s * series


def _sum(terms: Sequence[Array]) -> Array:
    """In sequence: a product and its addition become one instruction."""
    return functools.reduce(jnp.add, terms)


def _scan_kernel(ref: Refs, threads: _Threads, split: _Split, softplus: bool, chunk_size: int, adjoint: bool) -> None:
    at = _Where(split, ref["u_s"].shape[1], ref["A"].shape[0])
    ring = _ring(ref, at, STAGES, backwards=adjoint)
    A = threads.load_states(ref["A"].at[at.group], at.channels)
    h = threads.load_states(ref["h0"].at[at.row], at.channels)
    D = threads.load_channels(ref["D"].at[at.group, at.channels]) if "D" in ref else None
    bias = threads.load_channels(ref["dt_bias"].at[at.group, at.channels]) if "dt_bias" in ref else None
    no_time = plgpu.layout_cast(jnp.zeros(threads.shape[1:], F32), threads.layout.reduce(0))

    def step(slot: Any, k: Any, steps: Any, j: Any, carry: tuple) -> tuple:
        h, span = carry
        t = at.token(steps - 1 - j if adjoint else j)
        bc = ref["bc_s"].at[slot, t]
        u = threads.load_channels(ref["u_s"].at[slot, t]).astype(F32)
        delta = threads.load_channels(ref["dt_s"].at[slot, t]).astype(F32)
        delta = delta if bias is None else delta + bias
        delta = _softplus(delta) if softplus else delta
        decay = delta + ref["resets_s"][slot, t, 0] if "resets" in ref else delta
        gate = None
        if "z" in ref:
            z = threads.load_channels(ref["z_s"].at[slot, t]).astype(F32)
            gate = z * _sigmoid(z)
        entering = (u if gate is None else u * gate) if adjoint else delta * u
        entering, decays = threads.of_channels(entering), threads.of_channels(decay)
        after, y = [], []
        for i in range(threads.states):
            a, x = jnp.exp2(decays * A[i]), entering * threads.of_states(bc, 0, i)
            after.append(a * (h[i] + x) if adjoint else a * h[i] + x)
            if "out" in ref:
                y.append(after[i] * threads.of_states(bc, threads.state_dim, i))
        if "out" in ref:
            out = jnp.sum(_sum(y), axis=0)
            out = out if D is None else out + D * u
            out = out if gate is None else out * gate
            _store(ref["out"].at[at.row, at.first(k) + t, at.channels], out)
        return tuple(after), span + decay if "spans" in ref else span

    def tile(i: Any, carry: tuple) -> tuple:
        k = at.tiles - 1 - i if adjoint else i
        if "states" in ref:
            tiles = jnp.int32(chunk_size // at.tile)

            @pl.when(lax.rem(k, tiles) == 0)
            def _() -> None:
                threads.store_states(ref["states"].at[at.row, lax.div(k, tiles)], at.channels, carry[0])

        slot, steps = ring.wait(i), at.steps(k)
        carry = lax.fori_loop(jnp.int32(0), steps, functools.partial(step, slot, k, steps), carry)
        ring.release(i)
        return carry

    h, span = lax.fori_loop(jnp.int32(0), jnp.int32(at.tiles), tile, (h, no_time))
    if "last" in ref:
        threads.store_states(ref["last"].at[at.row], at.channels, h)
    if "spans" in ref:
        _store(ref["spans"].at[at.row, at.channels], span)


def _scan(
    inputs: Inputs,
    threads: _Threads,
    split: _Split,
    softplus: bool,
    wanted: Sequence[str],
    chunk_size: int = TILE,
    adjoint: bool = False,
) -> list[Array]:
    """One launch of `_scan_kernel`.

    Args:
      inputs: rows are parts; `starts` holds what is added to the time step.
      wanted: which of out, last, states and spans, the sums of the time steps `[R, E]`.
      adjoint: run from the end: h = a (h + x B) with x = u silu(z), what a part adds to the gradient of the state before it
        if `u` is the gradient of the output and B is C.
    """
    tile = math.gcd(TILE, split.part, chunk_size)
    blocks = _Blocks(threads, inputs)
    arguments = blocks.arguments(inputs, ("B", "C") if "out" in wanted else ("B",))
    for name in () if "out" in wanted else ("D",) if adjoint else ("D", "z"):
        arguments.pop(name, None)
    results = {
        "out": blocks.struct((blocks.rows, split.part), inputs.u.dtype),
        "last": blocks.struct((blocks.rows, threads.state_dim)),
        "states": blocks.struct((blocks.rows, split.part // chunk_size, threads.state_dim)),
        "spans": blocks.struct((blocks.rows,)),
    }
    results = {name: results[name] for name in wanted}
    scratch = _slots(arguments, STAGES, tile)
    name = "selective_scan_adjoint" if adjoint else "selective_scan"
    how = {"threads": threads, "split": split, "softplus": softplus, "chunk_size": chunk_size, "adjoint": adjoint}
    found = blocks.launch(name, functools.partial(_scan_kernel, **how), arguments, results, scratch)
    whole = [blocks.whole(found[name]) for name in wanted]
    return [x[..., : inputs.A.shape[1], :] if name in ("last", "states") else x for name, x in zip(wanted, whole)]


TOKEN_ARGUMENTS = ("u", "dt", "z", "d_out")
"""Arguments `[R, L, blocks of channels, warp_channels]`."""
SHARED_ARGUMENTS = ("bc", "resets")
"""Arguments `[R, L, values of all channels]`."""


def _slots(arguments: dict[str, Array], slots: int, tile: int) -> Refs:
    """The shared memory of a `_ring`."""
    shapes = {name: (WARPS, arguments[name].shape[3]) for name in TOKEN_ARGUMENTS if name in arguments}
    shapes |= {name: arguments[name].shape[2:] for name in SHARED_ARGUMENTS if name in arguments}
    scratch: Refs = {f"{name}_s": plgpu.SMEM((slots, tile, *shape), arguments[name].dtype) for name, shape in shapes.items()}
    scratch["ready"] = plgpu.Barrier(num_arrivals=len(shapes), num_barriers=slots)
    return scratch


def _ring(ref: Refs, at: _Where, slots: int, backwards: bool) -> _Ring:
    """The tiles of all arguments that have tokens, on their way."""

    def source(name: str, i: Any) -> Any:
        tokens = at.tokens(at.tiles - 1 - i if backwards else i)
        return ref[name].at[at.row, tokens, at.channels] if name in TOKEN_ARGUMENTS else ref[name].at[at.row, tokens]

    names = [name for name in TOKEN_ARGUMENTS + SHARED_ARGUMENTS if name in ref]
    ring = _Ring([(functools.partial(source, name), ref[f"{name}_s"]) for name in names], ref["ready"], at.tiles, slots)
    ring.start()
    return ring


class _Blocks:
    """Arrays as the kernels see them: channels `[E]` are `[blocks of channels, warp_channels]`, padded with zeros."""

    def __init__(self, threads: _Threads, inputs: Inputs) -> None:
        self.threads = threads
        self.rows, _, self.width = inputs.u.shape
        self.count = -(-self.width // threads.channels)

    def divided(self, x: Array) -> Array:
        """`[..., E]` to blocks."""
        x = jnp.pad(x, [*[(0, 0)] * (x.ndim - 1), (0, self.count * self.threads.channels - self.width)])
        return x.reshape(*x.shape[:-1], self.count * WARPS, self.threads.warp_channels)

    def states(self, x: Array) -> Array:
        """`[..., N, E]` to blocks, with the kernel's state size."""
        more = self.threads.state_dim - x.shape[-2]
        return self.divided(jnp.pad(x, [*[(0, 0)] * (x.ndim - 2), (0, more), (0, 0)]))

    def whole(self, x: Array) -> Array:
        """The inverse of `divided`."""
        return x.reshape(*x.shape[:-2], self.count * self.threads.channels)[..., : self.width]

    def struct(self, shape: tuple[int, ...], dtype: Any = F32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*shape, self.count * WARPS, self.threads.warp_channels), dtype)

    def arguments(self, inputs: Inputs, shared: Sequence[str]) -> dict[str, Array]:
        """Without what is None; those of B and C that are in `shared` lie beside each other."""
        more = self.threads.state_dim - inputs.A.shape[1]
        bc = [jnp.pad(getattr(inputs, name).astype(F32), [(0, 0), (0, 0), (0, more)]) for name in shared]
        arguments = {name: getattr(inputs, name) for name in ("u", "dt", "z", "D", "dt_bias")}
        arguments = {name: self.divided(x) for name, x in arguments.items() if x is not None}
        arguments |= {"bc": jnp.concatenate(bc, axis=-1)}
        arguments |= {"A": self.states(inputs.A * LOG2_E), "h0": self.states(inputs.h0)}
        if inputs.starts is not None:  # a copy needs 16 bytes
            arguments["resets"] = jnp.broadcast_to(inputs.starts[..., None], (*inputs.starts.shape, 4))
        return arguments

    def launch(
        self, name: str, kernel: Callable, arguments: dict[str, Array], results: Refs, scratch: Refs
    ) -> dict[str, Array]:
        """Run `kernel(refs by name)` in a block for each row and each `threads.channels` channels."""
        names = [*arguments, *results, *scratch]

        def body(*refs: Any) -> None:
            kernel(dict(zip(names, refs)))

        body.__name__ = name  # shown by profilers
        # No automatic barriers: the kernels wait where threads read what copies or other warps wrote.
        found = plgpu.kernel(
            body,
            out_type=tuple(results.values()),
            scratch_types=tuple(scratch.values()),
            grid=(self.count, self.rows),  # the last axis may have more than 65535 blocks
            grid_names=("channels", "rows"),
            compiler_params=plgpu.CompilerParams(
                approx_math=True, unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
            ),
        )(*arguments.values())
        return dict(zip(results, found))


@dataclasses.dataclass(frozen=True)
class _Tokens:
    """Work on single tokens and channels of a tile, `[tile, WARPS, warp_channels]`, each by one thread."""

    tile: int
    warp_channels: int

    @functools.cached_property
    def layout(self) -> Any:
        return _layout((LANES // self.warp_channels, WARPS, self.warp_channels), (1, 1, 1), warp=-5, lanes=(-6, -4))

    def load(self, ref: Any) -> Array:
        return _load(ref, self.layout).astype(F32)

    def load_channels(self, ref: Any) -> Array:
        """`[WARPS, warp_channels]`, the same for all tokens."""
        x = _load(ref, self.layout.reduce(0))
        return plgpu.layout_cast(lax.broadcast_in_dim(x, (self.tile, *x.shape), (1, 2)), self.layout)

    def zeros(self) -> Array:
        return plgpu.layout_cast(jnp.zeros((WARPS, self.warp_channels), F32), self.layout.reduce(0))

    def before(self, steps: Any, at: _Where) -> Array:
        """Which tokens are among the first `steps` in the order of processing."""
        shape = (self.tile, WARPS, self.warp_channels)
        return at.token(plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=self.layout)) < steps


def _sum_of_warps(ref: Any) -> Array:
    """`[M, WARPS]` to `[M]`; M is a multiple of 128, or 64."""
    rows = min(ref.shape[0], LANES * WARPS)
    layout = _layout((rows, WARPS), (rows // WARPS, WARPS), (1, rows // LANES), warp=-6, lanes=(-4, -3))
    return jnp.sum(_load(ref, layout), axis=1)


def _backward_kernel(ref: Refs, threads: _Threads, split: _Split, softplus: bool) -> None:
    at = _Where(split, BACK_TILE, ref["A"].shape[0])
    ring = _ring(ref, at, BACK_STAGES, backwards=True)
    single = _Tokens(at.tile, threads.warp_channels)
    A = threads.load_states(ref["A"].at[at.group], at.channels)
    D = threads.load_channels(ref["D"].at[at.group, at.channels]) if "D" in ref else None
    bias = single.load_channels(ref["dt_bias"].at[at.group, at.channels]) if "dt_bias" in ref else None
    zero = plgpu.layout_cast(jnp.zeros(threads.shape, F32), threads.layout)

    def kept(k: Any) -> tuple[Array, ...]:
        return threads.load_states(ref["states"].at[at.row, k], at.channels)

    def rate(slot: Any) -> Array:
        dt = single.load(ref["dt_s"].at[slot])
        return dt if bias is None else dt + bias

    def read(slot: Any, t: Any) -> tuple:
        u = threads.load_channels(ref["u_s"].at[slot, t]).astype(F32)
        delta = threads.load_channels(ref["delta_s"].at[t])
        decay = delta + ref["resets_s"][slot, t, 0] if "resets" in ref else delta
        return u, delta, threads.of_channels(decay), threads.of_channels(delta * u), ref["bc_s"].at[slot, t]

    def prepare(slot: Any, steps: Any) -> Array | None:
        """Time steps, and gradients of the output before the gate; the tile's gradient of D."""
        delta = _softplus(rate(slot)) if softplus else rate(slot)
        if split.padded > split.length:  # padding takes no time, so that it has no part in the gradient of dt_bias
            delta = jnp.where(single.before(steps, at), delta, 0.0)
        _store(ref["delta_s"], delta)
        d_y = single.load(ref["d_out_s"].at[slot])
        if "z" in ref:
            z = single.load(ref["z_s"].at[slot])
            d_y = d_y * (z * _sigmoid(z))
        _store(ref["d_y_s"], d_y)
        return jnp.sum(d_y * single.load(ref["u_s"].at[slot]), axis=0)

    def again(slot: Any, j: Any, h: tuple) -> tuple:
        """A step forward; the state before it is kept."""
        t = at.token(j)
        _, _, decay, entering, bc = read(slot, t)
        threads.store_states(ref["h_s"].at[t], slice(None), h)
        return tuple(jnp.exp2(decay * A[i]) * h[i] + entering * threads.of_states(bc, 0, i) for i in range(threads.states))

    def back(slot: Any, steps: Any, j: Any, carry: tuple) -> tuple:
        """A step back. What no later step reads makes room: the gradient of u for that of y, of the time step for itself."""
        g, d_A = carry
        t = at.token(steps - 1 - j)
        u, delta, decay, entering, bc = read(slot, t)
        d_y = threads.load_channels(ref["d_y_s"].at[t])
        deltas, d_ys = threads.of_channels(delta), threads.of_channels(d_y)
        before, of_A, y, of_input, of_decay = [], [], [], [], []
        for i in range(threads.states):
            B, C = threads.of_states(bc, 0, i), threads.of_states(bc, threads.state_dim, i)
            a = jnp.exp2(decay * A[i])
            remaining = a * threads.load(ref["h_s"].at[t, threads.rows(i)])
            h = remaining + entering * B
            d_h = g[i] + d_ys * C
            first = t * (2 * threads.state_dim)
            _store(ref["d_bc_s"].at[threads.rows(i, first)], jnp.sum(d_h * entering, axis=2))
            _store(ref["d_bc_s"].at[threads.rows(i, first + threads.state_dim)], jnp.sum(d_ys * h, axis=2))
            d_exponent = d_h * remaining
            of_input.append(d_h * B)
            of_decay.append(d_exponent * A[i])
            of_A.append(d_A[i] + d_exponent * deltas)
            before.append(d_h * a)
            y.append(h * C)
        d_entering = jnp.sum(_sum(of_input), axis=0)
        d_u = delta * d_entering
        _store(ref["d_y_s"].at[t], d_u if D is None else d_u + D * d_y)
        _store(ref["delta_s"].at[t], u * d_entering + jnp.sum(_sum(of_decay), axis=0) * LN_2)
        if "z" in ref:
            total = jnp.sum(_sum(y), axis=0)
            _store(ref["y_s"].at[t], total if D is None else total + D * u)
        return tuple(before), tuple(of_A)

    def finish(slot: Any, k: Any) -> Array:
        """Gradients of a tile's tokens go out; the tile's gradient of dt_bias."""
        out = (at.row, at.tokens(k), at.channels)
        _store(ref["d_u"].at[out], single.load(ref["d_y_s"]))
        d_rate = single.load(ref["delta_s"])
        d_rate = d_rate * _sigmoid(rate(slot)) if softplus else d_rate
        _store(ref["d_dt"].at[out], d_rate)
        if "z" in ref:
            z = single.load(ref["z_s"].at[slot])
            s = _sigmoid(z)
            d_z = single.load(ref["d_out_s"].at[slot]) * single.load(ref["y_s"]) * (s * (1 + z * (1 - s)))
            _store(ref["d_z"].at[out], d_z)
        values = 2 * threads.state_dim
        tokens = pl.ds(at.first(k) * values, at.tile * values)
        _store(ref["d_bc"].at[at.block, at.row, tokens], _sum_of_warps(ref["d_bc_s"]))
        return jnp.sum(d_rate, axis=0)

    def tile(i: Any, carry: tuple) -> tuple:
        h, g, d_A, d_D, d_bias = carry
        k = at.tiles - 1 - i
        slot, steps = ring.wait(i), at.steps(k)
        d_D = d_D + prepare(slot, steps)
        h_before = kept(jnp.maximum(k - 1, 0))  # on its way while this tile is at work
        plgpu.commit_smem()
        lax.fori_loop(jnp.int32(0), steps, functools.partial(again, slot), h)
        g, d_A = lax.fori_loop(jnp.int32(0), steps, functools.partial(back, slot, steps), (g, d_A))
        plgpu.commit_smem()
        d_bias = d_bias + finish(slot, k)
        ring.release(i)
        return h_before, g, d_A, d_D, d_bias

    g = threads.load_states(ref["h0"].at[at.row], at.channels)
    carry = (kept(jnp.int32(at.tiles - 1)), g, (zero,) * threads.states, single.zeros(), single.zeros())
    _, g, d_A, d_D, d_bias = lax.fori_loop(jnp.int32(0), jnp.int32(at.tiles), tile, carry)
    threads.store_states(ref["d_A"].at[at.row], at.channels, d_A)
    threads.store_states(ref["d_h0"].at[at.row], at.channels, g)
    _store(ref["d_D"].at[at.row, at.channels], d_D)
    _store(ref["d_dt_bias"].at[at.row, at.channels], d_bias)


def _scan_back(
    inputs: Inputs, threads: _Threads, split: _Split, softplus: bool, states: Array, d_out: Array, d_last: Array
) -> Inputs:
    """One launch of `_backward_kernel`: rows are parts, and have gradients of their own of A, D and dt_bias. `starts` is as
    in `_scan`."""
    blocks = _Blocks(threads, inputs)
    arguments = blocks.arguments(inputs._replace(h0=d_last), ("B", "C"))
    arguments |= {"d_out": blocks.divided(d_out), "states": blocks.states(states)}
    of_token = blocks.struct((blocks.rows, split.part), inputs.u.dtype)
    of_state, of_channel = blocks.struct((blocks.rows, threads.state_dim)), blocks.struct((blocks.rows,))
    values = 2 * threads.state_dim
    results = {"d_u": of_token, "d_dt": of_token} | ({} if inputs.z is None else {"d_z": of_token})
    results |= {"d_A": of_state, "d_h0": of_state, "d_D": of_channel, "d_dt_bias": of_channel}
    results["d_bc"] = jax.ShapeDtypeStruct((blocks.count, blocks.rows, split.part * values), F32)
    single = plgpu.SMEM((BACK_TILE, WARPS, threads.warp_channels), F32)
    scratch = _slots(arguments, BACK_STAGES, BACK_TILE) | {"delta_s": single, "d_y_s": single}
    scratch |= {} if inputs.z is None else {"y_s": single}
    scratch["h_s"] = plgpu.SMEM((BACK_TILE, threads.state_dim, WARPS, threads.warp_channels), F32)
    scratch["d_bc_s"] = plgpu.SMEM((BACK_TILE * values, WARPS), F32)
    kernel = functools.partial(_backward_kernel, threads=threads, split=split, softplus=softplus)
    found = blocks.launch("selective_scan_backward", kernel, arguments, results, scratch)
    state_dim = inputs.A.shape[1]
    d_bc = found.pop("d_bc").sum(0).reshape(blocks.rows, split.part, 2, threads.state_dim)[..., :state_dim]
    d = {name: blocks.whole(x) for name, x in found.items()}
    return Inputs(
        u=d["d_u"],
        dt=d["d_dt"],
        A=d["d_A"][:, :state_dim],
        B=d_bc[:, :, 0],
        C=d_bc[:, :, 1],
        D=None if inputs.D is None else d["d_D"],
        z=d.get("d_z"),
        dt_bias=None if inputs.dt_bias is None else d["d_dt_bias"],
        h0=d["d_h0"][:, :state_dim],
        starts=None,
    )
