"""The selective scan (Gu & Dao 2023, algorithm 2) for TPU, forward and backward.

    h_t[n, e] = exp(delta_t[e] A[n, e]) h_(t-1)[n, e] + delta_t[e] u_t[e] B_t[n]
    out_t[e]  = (sum_n C_t[n] h_t[n, e] + D[e] u_t[e]) silu(z_t[e])

One vector register (8 x 128) holds 1024 channels of one mode n, so a step in time is elementwise. The grid runs over
(rows, chunks of time, blocks of 1024 channels); the states of all channels stay in VMEM while time goes on. B and C, scalars
to the channels, are copied to all lanes once per chunk and read by all blocks.

Arrays in HBM have time along sublanes, and a step wants channels there. `_spread` and `_gather` change between the two with
strided stores and loads; what is elementwise in time and channels (softplus, skip, gate) is done before and after, in HBM's
layout.

The backward pass runs each chunk again from its kept state, with all states in VMEM, and then back through it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from seqjax.ops.kernels.selective_scan import Inputs

SUBLANES, LANES = 8, 128
CHANNELS = SUBLANES * LANES
PITCH = SUBLANES + 1
"""Rows from one step's channels to the next's. An odd pitch spreads strided accesses over all memory banks: one instruction
for a register. A pitch of 8 needs two."""
ROWS = 16
"""Tokens handled together before and after the recurrence: a tile of bfloat16."""
MODES_FORWARD, MODES_BACKWARD = 16, 8
"""States that a loop over time carries in registers. More spill, fewer repeat the work per step."""
UNROLL_FORWARD, UNROLL_RECOMPUTE, UNROLL_BACKWARD = 8, 16, 8
REPLICATED_ROWS = 64
"""Tokens of B or C copied to all lanes together: registers that share one setting of the permute unit."""
LOG2_E, LN_2 = math.log2(math.e), math.log(2)
FORGET = 3e38
"""In place of a step size where a segment starts: the decay is then exactly 0, and the loop has no instruction for it. So A
must not be positive, and a state that overflowed to infinity spoils the next segment."""
LEAST_DECAY = 1e-36
"""A is at least this negative where there are segments, so that `FORGET` works for an A that underflowed to zero."""


def forward(
    inputs: Inputs, *, softplus: bool, reverse: bool, chunk_size: int, keep_states: bool
) -> tuple[Float[Array, "R L E"], Float[Array, "R N E"], Float[Array, "R Q N E"] | None]:
    """The scan over whole sequences.

    Args:
      inputs: see `Inputs`.
      softplus: the step sizes are `softplus(dt + dt_bias)` instead of `dt + dt_bias`.
      reverse: run from the last token to the first; the state is then zero before the last token of a segment.
      chunk_size: steps between kept states, a multiple of 16. 128 is fast, and fits into VMEM up to N = 128 and E = 8192.
      keep_states: also return the states that `backward` needs.
    Returns:
      Outputs `[R, L, E]` in the dtype of `u`, the last state `[R, N, E]` float32, and the state before each chunk
      `[R, ceil(L / chunk_size), N, E]` float32 in the order of processing, or None.
    Raises:
      ValueError: the chunk size is not a positive multiple of 16.
    """
    plan = _plan(inputs, MODES_FORWARD, softplus, reverse, chunk_size)
    x = _prepare(plan, inputs)
    R, N, E = inputs.h0.shape
    tokens, state = _specs(plan, lambda k: k)
    at_first, at_last = state(0), state(plan.chunks - 1)
    outputs = _Forward(
        out=_Output(tokens(CHANNELS), inputs.u),
        last=_Output(at_last, jax.ShapeDtypeStruct((R, N, E), jnp.float32)),
        states=_Output(
            pl.BlockSpec((None, None, N, CHANNELS), lambda r, k, e: (r, k, 0, e)),
            jax.ShapeDtypeStruct((R, plan.chunks, N, E), jnp.float32),
        )
        if keep_states
        else None,
    )
    scratch = _ForwardScratch(
        A=_vmem(plan.blocks, N * PITCH, LANES),
        h=_vmem(plan.blocks, N * PITCH, LANES),
        B=_vmem(N, plan.size, LANES),
        C=_vmem(N, plan.size, LANES),
        **_step_scratch(plan, x.starts is not None),
        y=_vmem(plan.size * PITCH, LANES),
    )
    found = _call(_forward_kernel, plan, (x,), (_input_specs(plan, tokens, at_first, x),), outputs, scratch)
    return found.out, found.last, found.states


def backward(
    inputs: Inputs,
    states: Float[Array, "R Q N E"],
    d_out: Float[Array, "R L E"],
    d_last: Float[Array, "R N E"],
    *,
    softplus: bool,
    reverse: bool,
    chunk_size: int,
) -> Inputs:
    """Gradients of `forward`.

    Args:
      inputs, softplus, reverse, chunk_size: as given to `forward`.
      states: as returned by `forward`.
      d_out: cotangent of the outputs `[R, L, E]`.
      d_last: cotangent of the last state `[R, N, E]` float32.
    Returns:
      Gradients of `inputs`: float32 for A, D, dt_bias and h0, the dtype of the argument for the others, None for `starts` and
      for arguments that were None.
    Raises:
      ValueError: the chunk size is not a positive multiple of 16.
    """
    plan = _plan(inputs, MODES_BACKWARD, softplus, reverse, chunk_size)
    x = _prepare(plan, inputs)
    R, N, E = inputs.h0.shape
    tokens, state = _specs(plan, lambda k: plan.chunks - 1 - k)
    at_first, at_last = state(0), state(plan.chunks - 1)
    channel = pl.BlockSpec((None, 1, CHANNELS), lambda r, k, e: (r, 0, jnp.where(k == plan.chunks - 1, e, 0)))
    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    of_states = _Output(at_last, f32(R, N, E))
    of_channels = _Output(channel, f32(R, 1, E))
    outputs = Inputs(
        u=_Output(tokens(CHANNELS), x.u),
        dt=_Output(tokens(CHANNELS), x.dt),
        A=of_states,
        B=_Output(tokens(N), x.B),
        C=_Output(tokens(N), x.C),
        D=None if x.D is None else of_channels,
        z=None if x.z is None else _Output(tokens(CHANNELS), x.z),
        dt_bias=None if x.dt_bias is None else of_channels,
        h0=of_states,
        starts=None,
    )
    tile = _vmem(plan.size * PITCH, LANES)
    all_states = _vmem(plan.blocks, N * PITCH, LANES)
    scratch = _BackwardScratch(
        A=all_states,
        dA=all_states,
        dh=all_states,
        B=_vmem(N, plan.size, LANES),
        C=_vmem(N, plan.size, LANES),
        dB=_vmem(plan.size, N),
        dC=_vmem(plan.size, N),
        kept=_vmem(N * PITCH, LANES),
        h=_vmem(plan.modes, (plan.size + 1) * PITCH, LANES),
        to_B=_vmem(plan.modes, plan.size * PITCH, LANES),
        **_step_scratch(plan, x.starts is not None),
        y=None if x.z is None else tile,
        dy=_vmem((plan.size + 1) * PITCH, LANES),
        d_drive=tile,
        d_exponent=tile,
        dD=None if x.D is None else _vmem(plan.blocks, SUBLANES, CHANNELS),
        d_bias=None if x.dt_bias is None else _vmem(plan.blocks, SUBLANES, CHANNELS),
    )
    kept = pl.BlockSpec((None, None, N, CHANNELS), lambda r, k, e: (r, plan.chunks - 1 - k, 0, e))
    cotangents = _Cotangents(states, d_out, d_last)
    specs = (_input_specs(plan, tokens, None, x), _Cotangents(kept, tokens(CHANNELS), at_first))
    grads = _call(_backward_kernel, plan, (x._replace(h0=None), cotangents), specs, outputs, scratch)
    by_group = lambda a: None if a is None else a.reshape(-1, plan.groups, *a.shape[1:]).sum(0)
    flat = lambda a: None if a is None else a[:, 0]
    return grads._replace(A=by_group(grads.A), D=flat(by_group(grads.D)), dt_bias=flat(by_group(grads.dt_bias)))


class _Plan(NamedTuple):
    """What is known at compile time."""

    rows: int
    length: int
    width: int
    state_dim: int
    groups: int
    size: int  # tokens of a chunk
    chunks: int
    blocks: int  # of 1024 channels
    modes: int  # states of one pass over time
    softplus: bool
    reverse: bool


class _Forward(NamedTuple):
    out: Any
    last: Any
    states: Any


class _Cotangents(NamedTuple):
    """What the backward pass takes beside the inputs."""

    states: Any
    out: Any
    last: Any


class _Output(NamedTuple):
    spec: Any
    array: Any


class _ForwardScratch(NamedTuple):
    A: Any  # [E / 1024, N * PITCH, 128], times log2(e), of all channels
    h: Any  # same, the states
    B: Any  # [N, chunk, 128], the same in all lanes
    C: Any
    delta: Any  # [chunk * PITCH, 128], of one block of channels
    decay_delta: Any  # `delta`, or FORGET where a segment starts
    drive: Any  # delta * u
    y: Any


class _BackwardScratch(NamedTuple):
    A: Any
    dA: Any
    dh: Any
    B: Any
    C: Any
    dB: Any  # [chunk, N]
    dC: Any
    kept: Any  # [N * PITCH, 128], states before the chunk
    h: Any  # [modes, (chunk + 1) * PITCH, 128], before the first step and after every step; then, times dy, the terms of dC
    to_B: Any  # [modes, chunk * PITCH, 128], the terms of dB
    delta: Any
    decay_delta: Any
    drive: Any
    y: Any  # only for the gate's gradient
    dy: Any  # [(chunk + 1) * PITCH, 128], where the state after the step is in `h`
    d_drive: Any
    d_exponent: Any  # sum over modes of the gradient of `delta A log2(e)`, times A log2(e)
    dD: Any  # [E / 1024, 8, 1024]
    d_bias: Any


def _plan(inputs: Inputs, modes: int, softplus: bool, reverse: bool, chunk_size: int) -> _Plan:
    if chunk_size < 1 or chunk_size % ROWS:
        raise ValueError(f"chunk_size={chunk_size} is not a positive multiple of {ROWS}.")
    R, L, E = inputs.u.shape
    G, N, _ = inputs.A.shape
    size = min(chunk_size, pl.cdiv(L, ROWS) * ROWS)
    return _Plan(R, L, E, N, G, size, pl.cdiv(L, size), pl.cdiv(E, CHANNELS), math.gcd(N, modes), softplus, reverse)


def _prepare(plan: _Plan, inputs: Inputs) -> Inputs:
    """Vectors of channels become rows, and starts a column of steps before which the state is forgotten."""
    row = lambda a: None if a is None else a[:, None]
    starts = inputs.starts
    if starts is not None:
        if plan.reverse:
            starts = jnp.pad(starts[:, 1:], [(0, 0), (0, 1)])
        starts = starts.astype(jnp.float32)[..., None]
    return inputs._replace(D=row(inputs.D), dt_bias=row(inputs.dt_bias), starts=starts)


def _specs(plan: _Plan, order: Callable) -> tuple[Callable, Callable]:
    """Blocks of tokens, whose k-th chunk in processing order is `order(k)`, and of states used at one step of the grid's time
    only: at other times the index stays where it is, and nothing is copied."""
    place = (lambda k: plan.chunks - 1 - order(k)) if plan.reverse else order

    def tokens(width: int) -> pl.BlockSpec:
        block = (lambda r, k, e: (r, place(k), e)) if width == CHANNELS else (lambda r, k, e: (r, place(k), 0))
        return pl.BlockSpec((None, plan.size, width), block)

    def state(when: int) -> pl.BlockSpec:
        rest = 0 if when else plan.blocks - 1
        return pl.BlockSpec((None, plan.state_dim, CHANNELS), lambda r, k, e: (r, 0, jnp.where(k == when, e, rest)))

    return tokens, state


def _input_specs(plan: _Plan, tokens: Callable, h0: pl.BlockSpec | None, x: Inputs) -> Inputs:
    group = lambda r: jax.lax.rem(r, plan.groups)
    channel = lambda a: None if a is None else pl.BlockSpec((None, 1, CHANNELS), lambda r, k, e: (group(r), 0, e))
    once = lambda r, k, e: (group(r), 0, jnp.where(k == 0, e, plan.blocks - 1))
    return Inputs(
        u=tokens(CHANNELS),
        dt=tokens(CHANNELS),
        A=pl.BlockSpec((None, plan.state_dim, CHANNELS), once),
        B=tokens(plan.state_dim),
        C=tokens(plan.state_dim),
        D=channel(x.D),
        z=None if x.z is None else tokens(CHANNELS),
        dt_bias=channel(x.dt_bias),
        h0=h0,
        starts=None if x.starts is None else tokens(1),
    )


def _vmem(*shape: int) -> Any:
    return pltpu.VMEM(shape, jnp.float32)


def _step_scratch(plan: _Plan, starts: bool) -> dict[str, Any]:
    tile = _vmem(plan.size * PITCH, LANES)
    return {"delta": tile, "decay_delta": tile if starts else None, "drive": tile}


def _call(kernel: Callable, plan: _Plan, arrays: tuple, specs: tuple, outputs: Any, scratch: Any) -> Any:
    is_output = lambda a: isinstance(a, _Output)
    out_specs = jax.tree.map(lambda o: o.spec, outputs, is_leaf=is_output)
    shapes = jax.tree.map(lambda o: jax.ShapeDtypeStruct(o.array.shape, o.array.dtype), outputs, is_leaf=is_output)
    (found,) = pl.pallas_call(
        functools.partial(kernel, plan),
        grid=(plan.rows, plan.chunks, plan.blocks),
        in_specs=list(specs),
        out_specs=[out_specs],
        out_shape=[shapes],
        scratch_shapes=[scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=_vmem_bytes((arrays, shapes), (specs, out_specs), scratch),
        ),
        name=kernel.__name__.strip("_"),
    )(*arrays)
    return found


def _vmem_bytes(arrays: Any, specs: Any, scratch: Any) -> int:
    """Room for the scratch, two buffers of each block, and the compiler's own."""

    def padded(shape: Sequence[int], itemsize: int) -> int:
        *leading, rows, lanes = shape
        return math.prod(leading) * pl.cdiv(rows, ROWS) * ROWS * pl.cdiv(lanes, LANES) * LANES * itemsize

    blocks = jax.tree.leaves(specs, is_leaf=lambda a: isinstance(a, pl.BlockSpec))
    buffers = zip(jax.tree.leaves(arrays), blocks, strict=True)
    of_blocks = sum(2 * padded([n for n in spec.block_shape if n], a.dtype.itemsize) for a, spec in buffers)
    return of_blocks + sum(padded(s.shape, 4) for s in jax.tree.leaves(scratch)) + 4 * 2**20


def _forward_kernel(plan: _Plan, x: Inputs, to: _Forward, s: _ForwardScratch) -> None:
    k, e = pl.program_id(1), pl.program_id(2)
    chunk = _chunk(plan, k)
    A, h = s.A.at[e], s.h.at[e]

    @pl.when(k == 0)
    def _():
        _spread(x.A, A, LOG2_E, least=x.starts is not None)
        _spread(x.h0, h)

    @pl.when(e == 0)
    def _():
        _replicate(plan, chunk, x.B, s.B)
        _replicate(plan, chunk, x.C, s.C)

    if to.states is not None:
        _gather(h, to.states)
    _prepare_steps(plan, chunk, x, s)
    decay_delta = s.delta if s.decay_delta is None else s.decay_delta
    single = plan.modes == plan.state_dim

    def modes(first: Any) -> None:
        A_tiles = [A[_tile(first + n), :] for n in range(plan.modes)]

        def step(i: Array, states: tuple) -> tuple:
            t = _time(plan, i)
            tile = _tile(t)
            delta, drive = decay_delta[tile, :], s.drive[tile, :]
            y = None if single else s.y[tile, :]
            after = []
            for n, (a, state) in enumerate(zip(A_tiles, states)):
                state = jnp.exp2(delta * a) * state + drive * _row(s.B, first + n, t)
                y = _add(y, state * _row(s.C, first + n, t))
                after.append(state)
            s.y[tile, :] = y
            return tuple(after)

        states = tuple(h[_tile(first + n), :] for n in range(plan.modes))
        for n, state in enumerate(_repeat(plan.size, UNROLL_FORWARD, step, states)):
            h[_tile(first + n), :] = state

    if not single:
        s.y[...] = jnp.zeros_like(s.y)
    _each_modes(plan, modes)

    def finish(rows: Any, first: Any, lane: int) -> None:
        lanes = _lanes(lane)
        y = s.y[_strided(first, lane, ROWS), :]
        if x.D is not None:
            y += x.D[:, lanes] * x.u[rows, lanes].astype(jnp.float32)
        if x.z is not None:
            z = x.z[rows, lanes].astype(jnp.float32)
            y *= z * _sigmoid(z)
        to.out[rows, lanes] = y.astype(to.out.dtype)

    _each_rows(plan, finish)

    @pl.when(k == plan.chunks - 1)
    def _():
        _gather(h, to.last)


def _backward_kernel(plan: _Plan, x: Inputs, given: _Cotangents, to: Inputs, s: _BackwardScratch) -> None:
    k, e = pl.program_id(1), pl.program_id(2)
    chunk = _chunk(plan, plan.chunks - 1 - k)
    A, dA, dh = s.A.at[e], s.dA.at[e], s.dh.at[e]
    # Sums over channels: those beyond the width must be zeros.
    width = None if plan.width % CHANNELS == 0 else plan.width - CHANNELS * e

    @pl.when(k == 0)
    def _():
        _spread(x.A, A, LOG2_E, least=x.starts is not None, width=width)
        _spread(given.last, dh, width=width)
        dA[...] = jnp.zeros_like(dA)
        for sums in (s.dD, s.d_bias):
            if sums is not None:
                sums[e] = jnp.zeros_like(sums[e])

    @pl.when(e == 0)
    def _():
        _replicate(plan, chunk, x.B, s.B)
        _replicate(plan, chunk, x.C, s.C)
        s.dB[...] = jnp.zeros_like(s.dB)
        s.dC[...] = jnp.zeros_like(s.dC)

    _spread(given.states, s.kept, width=width)
    _prepare_steps(plan, chunk, x, s, width)

    def prepare(rows: Any, first: Any, lane: int) -> None:
        dy = _load(plan, chunk, given.out, rows, first, lane, width)
        if x.z is not None:
            z = _load(plan, chunk, x.z, rows, first, lane, width)
            dy *= z * _sigmoid(z)
        s.dy[_strided(_after(plan, first), lane, ROWS), :] = dy

    _each_rows(plan, prepare)
    decay_delta = s.delta if s.decay_delta is None else s.decay_delta
    single = plan.modes == plan.state_dim

    def modes(first: Any) -> None:
        def recompute(i: Array, states: tuple) -> tuple:
            t = _time(plan, i)
            tile = _tile(t)
            delta, drive = decay_delta[tile, :], s.drive[tile, :]
            y = None if single or s.y is None else s.y[tile, :]
            after = []
            for n, state in enumerate(states):
                state = jnp.exp2(delta * A[_tile(first + n), :]) * state + drive * _row(s.B, first + n, t)
                s.h[n, _tile(_after(plan, t)), :] = state
                if s.y is not None:
                    y = _add(y, state * _row(s.C, first + n, t))
                after.append(state)
            if s.y is not None:
                s.y[tile, :] = y
            return tuple(after)

        def back(i: Any, carry: tuple) -> tuple:
            t = _time(plan, plan.size - 1 - i)
            tile = _tile(t)
            before, after = _tile(_before(plan, t)), _tile(_after(plan, t))
            delta, decay, drive = s.delta[tile, :], decay_delta[tile, :], s.drive[tile, :]
            dy, dy_before = s.dy[after, :], s.dy[before, :]
            d_drive = None if single else s.d_drive[tile, :]
            d_exponent = None if single else s.d_exponent[tile, :]
            carried = []
            for n, d_state in enumerate(carry):
                a = A[_tile(first + n), :]
                d_state = d_state + dy * _row(s.C, first + n, t)
                d_drive = _add(d_drive, d_state * _row(s.B, first + n, t))
                s.to_B[n, tile, :] = d_state * drive
                d_state = d_state * jnp.exp2(decay * a)
                # Read once: the step before this one needs this state only times its own dy.
                state = s.h[n, before, :]
                s.h[n, before, :] = state * dy_before
                d_decay = d_state * state
                d_exponent = _add(d_exponent, d_decay * a)
                dA[_tile(first + n), :] += d_decay * delta
                carried.append(d_state)
            s.d_drive[tile, :] = d_drive
            s.d_exponent[tile, :] = d_exponent
            return tuple(carried)

        states = tuple(s.kept[_tile(first + n), :] for n in range(plan.modes))
        for n, state in enumerate(states):
            s.h[n, _tile(plan.size if plan.reverse else 0), :] = state
        end = _tile(0 if plan.reverse else plan.size)
        for n, state in enumerate(_repeat(plan.size, UNROLL_RECOMPUTE, recompute, states)):
            s.h[n, end, :] = state * s.dy[end, :]
        carry = tuple(dh[_tile(first + n), :] for n in range(plan.modes))
        for n, d_state in enumerate(_repeat(plan.size, UNROLL_BACKWARD, back, carry)):
            dh[_tile(first + n), :] = d_state
        _reduce(plan, first, (s.to_B, 0, s.dB), (s.h, _after(plan, 0), s.dC))

    if not single:
        for sums in (s.y, s.d_drive, s.d_exponent):
            if sums is not None:
                sums[...] = jnp.zeros_like(sums)
    _each_modes(plan, modes)

    def finish(rows: Any, first: Any, lane: int) -> None:
        lanes, tiles = _lanes(lane), _strided(first, lane, ROWS)
        load = lambda ref: _load(plan, chunk, ref, rows, first, lane, width)
        u, dy, d_drive = load(x.u), s.dy[_strided(_after(plan, first), lane, ROWS), :], s.d_drive[tiles, :]
        delta = s.delta[tiles, :]
        du = d_drive * delta
        d_dt = d_drive * u + s.d_exponent[tiles, :] * LN_2
        if x.D is not None:
            D = x.D[:, lanes]
            du += dy * D
            s.dD[e, :, lanes] += _halves(dy * u)
        if x.z is not None:
            z, y = load(x.z), s.y[tiles, :]
            if x.D is not None:
                y += D * u
            gate = _sigmoid(z)
            to.z[rows, lanes] = (load(given.out) * y * gate * (1 + z * (1 - gate))).astype(to.z.dtype)
        if plan.softplus:
            # softplus'(a) = sigmoid(a) = exp(a - softplus(a))
            d_dt *= jnp.exp(_with_bias(load(x.dt), x.dt_bias, lanes) - delta)
        if x.dt_bias is not None:
            d_dt = _mask(plan, chunk, d_dt, first, lane, width)
            s.d_bias[e, :, lanes] += _halves(d_dt)
        to.u[rows, lanes] = du.astype(to.u.dtype)
        to.dt[rows, lanes] = d_dt.astype(to.dt.dtype)

    _each_rows(plan, finish)

    @pl.when(e == plan.blocks - 1)
    def _():
        to.B[...] = s.dB[...].astype(to.B.dtype)
        to.C[...] = s.dC[...].astype(to.C.dtype)

    @pl.when(k == plan.chunks - 1)
    def _():
        _gather(dh, to.h0)
        _gather(dA, to.A)
        for sums, total in ((s.dD, to.D), (s.d_bias, to.dt_bias)):
            if sums is not None:
                total[...] = jnp.sum(sums[e], axis=0, keepdims=True)


def _chunk(plan: _Plan, k: Any) -> Any:
    """Which chunk, counted from the first token, is k-th in the order of the forward pass."""
    return plan.chunks - 1 - k if plan.reverse else k


def _time(plan: _Plan, i: Any) -> Any:
    return plan.size - 1 - i if plan.reverse else i


def _before(plan: _Plan, t: Any) -> Any:
    """Where the state before step t is among the `size + 1` states of a chunk."""
    return t + 1 if plan.reverse else t


def _after(plan: _Plan, t: Any) -> Any:
    return t if plan.reverse else t + 1


def _tile(index: Any) -> Any:
    """Rows of the 1024 channels of one step, or of one mode."""
    return pl.ds(index * PITCH, SUBLANES)


def _strided(first: Any, lane: int, count: int) -> Any:
    """Rows of channels `128 lane` to `128 lane + 127` of `count` steps, or modes."""
    return pl.ds(first * PITCH + lane, count, stride=PITCH)


def _lanes(lane: int) -> slice:
    return slice(LANES * lane, LANES * (lane + 1))


def _row(ref: Any, n: Any, t: Any) -> Array:
    return jnp.broadcast_to(ref[n, pl.ds(t, 1), :], (SUBLANES, LANES))


def _add(total: Array | None, term: Array) -> Array:
    return term if total is None else total + term


def _halves(a: Array) -> Array:
    return a[:SUBLANES] + a[SUBLANES:]


def _with_bias(dt: Array, bias: Any, lanes: slice) -> Array:
    return dt if bias is None else dt + bias[:, lanes]


def _pairwise(terms: list) -> Array:
    """Their sum, in as few dependent additions as there can be."""
    while len(terms) > 1:
        terms = [_add(*pair) for pair in zip(terms[::2], terms[1::2])]
    return terms[0]


def _sigmoid(a: Array) -> Array:
    """Without a division: an exact one costs twice the instructions of all of this."""
    return jnp.exp(-jnp.log(1 + jnp.exp(-a)))


def _repeat(count: int, unroll: int, step: Callable, carry: Any) -> Any:
    def several(i: Any, carry: Any) -> Any:
        for j in range(unroll):
            carry = step(i * unroll + j, carry)
        return carry

    return jax.lax.fori_loop(0, count // unroll, several, carry)


def _each_modes(plan: _Plan, run: Callable) -> None:
    passes = plan.state_dim // plan.modes
    if passes == 1:
        run(0)
    else:
        pl.loop(0, passes)(lambda i: run(i * plan.modes))


def _each_rows(plan: _Plan, run: Callable) -> None:
    """Call `run(rows, first row, lane)` for all pieces [16, 128] of a block [chunk, 1024]."""

    @pl.loop(0, plan.size // ROWS)
    def _(i):
        first = pl.multiple_of(i * ROWS, ROWS)
        for lane in range(SUBLANES):
            run(pl.ds(first, ROWS), first, lane)


def _mask(plan: _Plan, chunk: Any, a: Array, first: Any, lane: int = 0, width: Any = None) -> Array:
    """Zeros beyond the length, and beyond the width where it is given."""
    if plan.length % plan.size:
        row = first + jax.lax.broadcasted_iota(jnp.int32, a.shape, 0)
        a = jnp.where(row < plan.length - chunk * plan.size, a, 0)
    return _mask_width(a, lane, width)


def _mask_width(a: Array, lane: int, width: Any) -> Array:
    if width is None:
        return a
    return jnp.where(LANES * lane + jax.lax.broadcasted_iota(jnp.int32, a.shape, 1) < width, a, 0)


def _load(plan: _Plan, chunk: Any, ref: Any, rows: Any, first: Any, lane: int, width: Any) -> Array:
    return _mask(plan, chunk, ref[rows, _lanes(lane)].astype(jnp.float32), first, lane, width)


def _spread(source: Any, tiles: Any, scale: float = 1, *, least: bool = False, width: Any = None) -> None:
    """From `[N, 1024]` to tiles `[N * PITCH, 128]`."""
    for lane in range(SUBLANES):
        a = source[:, _lanes(lane)] * scale
        if least:
            a = jnp.minimum(a, -LEAST_DECAY)
        tiles[_strided(0, lane, a.shape[0]), :] = _mask_width(a, lane, width)


def _gather(tiles: Any, to: Any) -> None:
    for lane in range(SUBLANES):
        to[:, _lanes(lane)] = tiles[_strided(0, lane, to.shape[0]), :]


def _replicate(plan: _Plan, chunk: Any, source: Any, to: Any) -> None:
    """Copy `[chunk, N]` to all lanes of `[N, chunk, 128]`."""

    rows = math.gcd(plan.size, REPLICATED_ROWS)

    @pl.loop(0, plan.size // rows)
    def _(i):
        first = pl.multiple_of(i * rows, rows)
        a = _mask(plan, chunk, source[pl.ds(first, rows), :].astype(jnp.float32), first)
        for n in range(plan.state_dim):
            to[n, pl.ds(first, rows), :] = jnp.broadcast_to(a[:, n : n + 1], (rows, LANES))


def _prepare_steps(plan: _Plan, chunk: Any, x: Inputs, s: Any, width: Any = None) -> None:
    """Step sizes and what drives the states. Steps beyond the length keep the state: both are zero."""

    def prepare(rows: Any, first: Any, lane: int) -> None:
        delta = _with_bias(x.dt[rows, _lanes(lane)].astype(jnp.float32), x.dt_bias, _lanes(lane))
        if plan.softplus:
            delta = jnp.maximum(delta, 0) + jnp.log1p(jnp.exp(-jnp.abs(delta)))
        delta = _mask(plan, chunk, delta, first, lane, width)
        tiles = _strided(first, lane, ROWS)
        s.delta[tiles, :] = delta
        s.drive[tiles, :] = delta * _load(plan, chunk, x.u, rows, first, lane, width)
        if x.starts is not None:
            forgetting = jnp.where(x.starts[rows, :] != 0, FORGET, delta)
            s.decay_delta[tiles, :] = _mask(plan, chunk, forgetting, first, lane, width)

    _each_rows(plan, prepare)


def _reduce(plan: _Plan, first_mode: Any, *pairs: tuple[Any, int, Any]) -> None:
    """Add the sums over channels of products `[modes, chunk * PITCH, 128]`, from a step on, to columns of `[chunk, N]`."""

    @pl.loop(0, plan.size // ROWS)
    def _(i):
        first = pl.multiple_of(i * ROWS, ROWS)
        for products, offset, sums in pairs:
            column = jax.lax.broadcasted_iota(jnp.int32, (ROWS, plan.state_dim), 1)
            total = jnp.zeros(column.shape, jnp.float32)
            for n in range(plan.modes):
                parts = [products[n, _strided(first + offset, lane, ROWS), :] for lane in range(SUBLANES)]
                channels = jnp.sum(_pairwise(parts), axis=1, keepdims=True)
                total = jnp.where(column == first_mode + n, channels, total)
            sums[pl.ds(first, ROWS), :] += total
