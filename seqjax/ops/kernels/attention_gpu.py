"""Attention for NVIDIA Hopper GPUs, in Pallas Mosaic GPU, forward and backward.

Forward (Shah et al. 2024, FlashAttention-3), a thread block owns two tiles of queries of one head, one for each of two
warpgroups, and a third warpgroup brings blocks of keys and values to shared memory by asynchronous copies, a few ahead. The
softmax is to base 2 and runs in registers, and a rendezvous keeps one warpgroup's softmax beside the other's products.

Backward, two kernels make the weights again from the log-sum-exp of each row: one owns queries and runs over keys, for the
gradient of the queries; one owns keys and runs over the queries of all heads that share them, for those of keys and values.
Nothing is summed by atomics: two runs give the same bits.

Which blocks a tile meets is data: a table gives, for each tile, the range of blocks in which a pair attends, and the range in
which all do; only blocks out of the second are masked. Copies fill with zeros what lies over the end of an array.

Needs jax 0.11 or newer.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from seqjax.ops.attention_mask import AttentionMask, AttentionSpec, Blocks, live_blocks, whole_blocks
from seqjax.ops.blockwise_attention import row_terms

F32 = jnp.float32
I32 = jnp.int32
LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)
L2_BYTES = 32 * 2**20
"""What thread blocks that run side by side may read again and again: it stays in the second-level cache."""
PAIR_BYTES = 4
"""Of a number of the keys and one of the values, or of the queries and of the output's gradient, in half precision."""
ROWS = 64
"""Rows of a tile: one warpgroup's matrix product has so many."""
WARPGROUPS = 2
SHARED_WEIGHTS = 2
"""Tiles of weights on their way from one warpgroup to the other."""
WITH_ROWS = {"q": "lse", "d_out": "inner"}
"""Blocks that arrive together with a number for each of their rows."""
LOWEST = -1e30
"""The running maximum of a row that has seen no key: not -inf, whose difference from itself is no number."""

Refs = dict[str, Any]


class _Sizes(NamedTuple):
    """Of the blocks that a tile meets.

    Attributes:
      block: their length.
      stages: how many blocks of one array, and of the other, are in shared memory at once.
    """

    block: int
    stages: tuple[int, int]


FORWARD = {64: _Sizes(128, (4, 4)), 128: _Sizes(128, (2, 2)), 256: _Sizes(64, (2, 2))}
"""By head width: blocks of keys and values."""
BACKWARD_QUERIES = {64: _Sizes(128, (2, 2)), 128: _Sizes(64, (3, 3)), 256: _Sizes(64, (2, 1))}
"""The same where tiles of queries look for their gradients."""
BACKWARD_KEYS = {64: _Sizes(64, (3, 3)), 128: _Sizes(64, (3, 3)), 256: _Sizes(64, (2, 2))}
"""Blocks of queries and of the output's gradients, which tiles of keys meet."""


def forward(spec: AttentionSpec, mask: AttentionMask, q: Array, k: Array, v: Array, bias: Array | None) -> tuple[Array, Array]:
    """Output `[B, T, H, K]` in the dtype of `v`, and each row's log-sum-exp `[B, T, H]` float32."""
    sizes = FORWARD[q.shape[-1]]
    call = _Call.of(spec, mask, q, k, WARPGROUPS * ROWS, sizes.block)
    arguments = {"q": q, "k": k, "v": v, **call.masks(mask)}
    results = {"out": jax.ShapeDtypeStruct(q.shape, v.dtype), "lse": call.of_rows()}
    scratch = {"lse_s": plgpu.SMEM((WARPGROUPS, ROWS), F32), "turn": plgpu.Barrier(num_arrivals=WARPGROUPS)}
    scratch |= _held(q=_tiles(WARPGROUPS, ROWS, q)) | call.ring(sizes, k=k, v=v)
    kernel = functools.partial(_forward_kernel, call=call, order=call.by_query())
    out, lse = _launch("attention_forward", kernel, call.by_query(), arguments, results, scratch)
    return out, lse[:, :, : q.shape[1]].transpose(0, 2, 1)


def backward(
    spec: AttentionSpec,
    mask: AttentionMask,
    operands: tuple[Array, Array, Array, Array | None],
    outputs: tuple[Array, Array],
    cotangents: tuple[Array, Array],
) -> tuple[Array, Array, Array, Array | None]:
    """Cotangents of `operands = (q, k, v, bias)` from those of `outputs = (out, log_sum)` of `forward`."""
    q, k, v, _ = operands
    log_sum, inner = row_terms(outputs, cotangents, jnp.dtype(F32))
    # A row that sees no key has weights of zero, and so have rows over the end.
    log_sum = jnp.where(outputs[1] > -jnp.inf, log_sum * LOG2_E, jnp.inf)
    more = -q.shape[1] % (WARPGROUPS * ROWS)
    by_row = lambda a, fill: jnp.pad(a.transpose(0, 2, 1), [(0, 0), (0, 0), (0, more)], constant_values=fill)
    arguments = {"q": q, "k": k, "v": v, "d_out": cotangents[0].astype(q.dtype)}
    arguments |= {"lse": by_row(log_sum, jnp.inf), "inner": by_row(inner, 0)}
    dq = _query_gradient(spec, mask, arguments)
    dk, dv = _key_gradients(spec, mask, arguments)
    return dq, dk, dv, None


def _query_gradient(spec: AttentionSpec, mask: AttentionMask, arguments: dict[str, Array]) -> Array:
    q, k, v = (arguments[name] for name in ("q", "k", "v"))
    sizes = BACKWARD_QUERIES[q.shape[-1]]
    call = _Call.of(spec, mask, q, k, WARPGROUPS * ROWS, sizes.block)
    held = _tiles(WARPGROUPS, ROWS, q)
    scratch = _held(q=held, d_out=held) | call.ring(sizes, k=k, v=v)
    kernel = functools.partial(_query_gradient_kernel, call=call, order=call.by_query())
    results = {"d_q": jax.ShapeDtypeStruct(q.shape, q.dtype)}
    [dq] = _launch("attention_d_q", kernel, call.by_query(), arguments | call.masks(mask), results, scratch)
    return dq


def _key_gradients(spec: AttentionSpec, mask: AttentionMask, arguments: dict[str, Array]) -> tuple[Array, Array]:
    q, k, v, d_out = (arguments[name] for name in ("q", "k", "v", "d_out"))
    sizes, wide = BACKWARD_KEYS[q.shape[-1]], q.shape[-1] > 128
    call = _Call.of(spec, mask, q, k, sizes.block, ROWS if wide else WARPGROUPS * ROWS)
    held = _tiles(1 if wide else WARPGROUPS, ROWS, k)
    scratch = _held(k=held, v=held) | call.ring(sizes, q=q, d_out=d_out)
    for name, stages in zip(("lse", "inner"), sizes.stages):
        scratch[f"{name}_s"] = plgpu.SMEM((stages, sizes.block), F32)
    if wide:
        scratch["weights_s"] = _tiles(SHARED_WEIGHTS, ROWS, q, sizes.block)
        scratch |= {f"weights_{state}": plgpu.Barrier(num_barriers=SHARED_WEIGHTS) for state in ("ready", "free")}
    kernel = functools.partial(_wide_key_gradients_kernel if wide else _key_gradients_kernel, call=call, order=call.by_key())
    results = {"d_k": jax.ShapeDtypeStruct(k.shape, k.dtype), "d_v": jax.ShapeDtypeStruct(v.shape, v.dtype)}
    arguments = arguments | call.masks(mask, by_key=True)
    return _launch("attention_d_k_d_v", kernel, call.by_key(), arguments, results, scratch)


@dataclasses.dataclass(frozen=True)
class _Call:
    """What is known of a call when it is compiled."""

    spec: AttentionSpec
    segments: bool
    batch: int
    heads: int
    groups: int
    width: int
    queries: Blocks
    keys: Blocks

    @classmethod
    def of(cls, spec: AttentionSpec, mask: AttentionMask, q: Array, k: Array, rows: int, columns: int) -> _Call:
        queries, keys = Blocks(q.shape[1], rows), Blocks(k.shape[1], columns)
        return cls(spec, mask.segment_ids is not None, q.shape[0], q.shape[2], k.shape[2], q.shape[3], queries, keys)

    @property
    def repeats(self) -> int:
        return self.heads // self.groups

    @property
    def masked(self) -> bool:
        return bool(self.spec.causal or self.spec.window or self.segments or self.keys.length % self.keys.size)

    def of_rows(self) -> jax.ShapeDtypeStruct:
        """A number for each query of each head, in whole tiles: copies start at multiples of 16 bytes."""
        return jax.ShapeDtypeStruct((self.batch, self.heads, self.queries.count * self.queries.size), F32)

    def by_query(self) -> _Order:
        """Tiles of queries; with a causal mask the last ones have the most work."""
        unit = self.keys.length * self.width // self.repeats
        return _Order.of(self.batch * self.heads, self.queries.count, PAIR_BYTES * unit, late_first=True)

    def by_key(self) -> _Order:
        """Tiles of keys; with a causal mask the first ones have the most work."""
        unit = self.queries.length * self.width * self.repeats
        return _Order.of(self.batch * self.groups, self.keys.count, PAIR_BYTES * unit, late_first=False)

    def ring(self, sizes: _Sizes, **arrays: Array) -> Refs:
        """Shared memory and barriers of blocks that arrive in turn."""
        scratch: Refs = {}
        for (name, like), stages in zip(arrays.items(), sizes.stages):
            arrivals = 2 if name in WITH_ROWS else 1
            scratch[f"{name}_s"] = _tiles(stages, sizes.block, like)
            scratch[f"{name}_ready"] = plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages)
            scratch[f"{name}_free"] = plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages)
        return scratch

    def masks(self, mask: AttentionMask, by_key: bool = False) -> dict[str, Array]:
        """The kernels' arguments: of each tile of queries (or of keys) the blocks that it meets, and the ids of segments."""
        live, whole = (f(self.spec, mask, self.queries, self.keys) for f in (live_blocks, whole_blocks))
        if self.keys.length % self.keys.size and not by_key:  # what tiles of keys find for keys over the end is not kept
            whole = whole.at[:, :, -1].set(False)
        if by_key:
            live, whole = live.swapaxes(1, 2), whole.swapaxes(1, 2)
        offset = jnp.asarray(self.spec.q_offset).reshape(1) if mask.q_offset is None else mask.q_offset
        arguments = {"ranges": _ranges(live, whole), "offset": offset.astype(I32)}
        if self.segments:
            for name, ids, blocks, none in zip(("q_ids", "k_ids"), mask.segment_ids, (self.queries, self.keys), (-2, -1)):
                ids = jnp.where(ids < 0, none, ids).astype(I32)
                more = blocks.count * blocks.size - blocks.length
                arguments[name] = jnp.pad(ids, [(0, 0), (0, more)], constant_values=none)
        return arguments


def _ranges(live: Array, whole: Array) -> Array:
    """Of each row of `[#B, n, m]`, `[#B, n, 4]` int32: all that is live lies from the first to the second, and from the
    third to the fourth all is whole."""
    count = live.shape[-1]
    numbers = jnp.arange(count, dtype=I32)
    first = jnp.argmax(live, axis=-1).astype(I32)
    end = jnp.max(jnp.where(live, numbers + 1, 0), axis=-1)
    start = jnp.argmax(whole, axis=-1).astype(I32)
    stop = jnp.min(jnp.where(~whole & (numbers >= start[..., None]), numbers, count), axis=-1)
    return jnp.stack([first, jnp.maximum(first, end), start, stop], axis=-1).astype(I32)


class _Order(NamedTuple):
    """In which order thread blocks run: heads by sections whose keys and values the cache holds, and in a section the tiles
    with the most work first, so that none of them is left over at the end."""

    tiles: int
    units: int
    section: int
    late_first: bool

    @classmethod
    def of(cls, units: int, tiles: int, unit_bytes: int, late_first: bool) -> _Order:
        section = max(1, min(units, L2_BYTES // max(1, unit_bytes)))
        section = next(size for size in range(section, 0, -1) if units % size == 0)
        return cls(tiles, units, section, late_first)

    def here(self) -> tuple[Array, Array]:
        """This thread block's unit, a head of one row, and its tile."""
        number = lax.axis_index("block")
        section, within = _divide(number, self.tiles * self.section)
        tile, unit = _divide(within, self.section)
        return section * self.section + unit, self.tiles - 1 - tile if self.late_first else tile


def _divide(number: Array, by: int) -> tuple[Array, Array]:
    return lax.div(number, jnp.int32(by)), lax.rem(number, jnp.int32(by))


def _tiles(count: int, rows: int, like: Array, width: int | None = None) -> Any:
    """Shared memory of tiles `[rows, K]` in the dtype of `like`, in the layout of matrix products."""
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM((count, rows, width or like.shape[-1]), like.dtype, transforms=transforms)


def _held(**tiles: Any) -> Refs:
    """Shared memory of tiles that stay, and their barriers."""
    barriers = {f"{name}_ready": plgpu.Barrier(num_barriers=memory.shape[0]) for name, memory in tiles.items()}
    return {f"{name}_s": memory for name, memory in tiles.items()} | barriers


def _launch(name: str, kernel: Callable, order: _Order, arguments: dict[str, Array], results: Refs, scratch: Refs) -> Any:
    """Run `kernel(refs by name)` in a thread block for each tile of each unit."""
    names = [*arguments, *results, *scratch]

    def body(*refs: Any) -> None:
        kernel(dict(zip(names, refs)))

    body.__name__ = name  # shown by profilers
    return plgpu.kernel(
        body,
        out_type=tuple(results.values()),
        scratch_types=tuple(scratch.values()),
        grid=(order.units * order.tiles,),
        grid_names=("block",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(*arguments.values())


ROW_LAYOUT = plgpu.Layout.WGMMA.reduce(1)
COLUMN_LAYOUT = plgpu.Layout.WGMMA.reduce(0)


def _full(shape: tuple[int, ...], value: float, layout: Any = plgpu.Layout.WGMMA) -> Array:
    return plgpu.layout_cast(jnp.full(shape, value, F32), layout)


def _load(ref: Any, layout: Any) -> Array:
    return plgpu.load(ref, layout=layout, optimized=False)


def _over(x: Array, shape: tuple[int, int], axis: int = 0) -> Array:
    """A vector repeated along the other axis."""
    return lax.broadcast_in_dim(x, shape, (axis,))


def _multiply(terms: Sequence[tuple[Array, Any, Any]], meanwhile: Callable[[], None] = lambda: None) -> Sequence[Array]:
    """`sums + a b` of all `(sums, a, b)`, of which `a` may be an array in registers; `meanwhile()` runs beside the products."""

    def compute(refs: Sequence[Any]) -> None:
        for ref, (_, a, b) in zip(refs, terms):
            plgpu.wgmma(ref, a, b)
        meanwhile()

    return pl.run_state(compute)(tuple(plgpu.ACC.init(sums) for sums, _, _ in terms))


class _Meeting:
    """The blocks that a tile meets, and the tile's place in the arrays."""

    def __init__(self, ref: Refs, call: _Call, batch: Array, tile: Array) -> None:
        shared = ref["ranges"].shape[0] == 1
        row = jnp.int32(0) if shared else batch
        self.ref, self.call, self.batch = ref, call, batch
        self.first, end, self.start, self.stop = (ref["ranges"][row, tile, i] for i in range(4))
        self.count = end - self.first
        self.offset = ref["offset"][jnp.int32(0) if ref["offset"].shape[0] == 1 else batch]

    def ids(self, name: str, first: Array, count: int, layout: Any) -> Array | None:
        if not self.call.segments:
            return None
        ref = self.ref[name]
        row = jnp.int32(0) if ref.shape[0] == 1 else self.batch
        return _load(ref.at[row, pl.ds(first, count)], layout)

    def head_and_block(self, i: Array) -> tuple[Array, Array]:
        """Of the ith of the blocks of queries that a tile of keys meets, the head in its group, and the number."""
        count = jnp.maximum(self.count, 1)
        return lax.div(i, count), self.first + lax.rem(i, count)

    def weights_by_key(self, products: Array, i: Array, k_at: Array, k_ids: Array | None, lse: Any) -> Array:
        """Weights `[keys, queries]` of the ith block of queries, from its products and the log-sum-exp of its rows."""
        _, number = self.head_and_block(i)
        block = self.call.queries.size
        q_at = number * block
        ids = lambda: (k_ids, self.ids("q_ids", q_at, block, COLUMN_LAYOUT))
        products = self.hidden(products, number, q_at, k_at, ids, by_key=True)
        return jnp.exp2(products * (self.call.spec.scale * LOG2_E) - _over(_load(lse, COLUMN_LAYOUT), products.shape, 1))

    def hidden(
        self, logits: Array, number: Array, q_at: Array, k_at: Array, ids: Callable[[], tuple], by_key: bool = False
    ) -> Array:
        """Logits with -inf where block `number` needs masks and a pair does not attend.

        Args:
          q_at, k_at: index of the first query and of the first key.
          ids: gives the segments of rows and of columns.
          by_key: the rows are keys and the columns queries, else the other way round.
        """
        if not self.call.masked:
            return logits
        whole = (self.start <= number) & (number < self.stop)

        def mask() -> Array:
            row = plgpu.broadcasted_iota(I32, logits.shape[:1], 0, layout=ROW_LAYOUT)
            column = plgpu.broadcasted_iota(I32, logits.shape, 1, layout=plgpu.Layout.WGMMA)
            masked = logits
            for seen in self._seen(row, column, q_at, k_at, by_key):
                masked = jnp.where(seen, masked, -jnp.inf)
            if self.call.segments:
                row_ids, column_ids = ids()
                alike = _over(row_ids, logits.shape) == _over(column_ids, logits.shape, 1)
                masked = jnp.where(alike, masked, -jnp.inf)
            return masked

        return lax.cond(whole, lambda: logits, mask)

    def _seen(self, row: Array, column: Array, q_at: Array, k_at: Array, by_key: bool) -> Iterator[Array]:
        """By positions, which pairs attend: bounds of each row's columns, so that comparisons are all that pairs cost."""
        spec, keys, shape = self.call.spec, self.call.keys, column.shape
        shift = self.offset + q_at - k_at  # distance of the first query from the first key
        if by_key:
            low, high = row - shift, row - shift + (spec.window or 0)
            if spec.window is not None:
                yield column < _over(high, shape)
            if spec.causal:
                yield column >= _over(low, shape)
            elif spec.window is not None:
                yield column > _over(low - spec.window, shape)
            return
        low, high = row + shift - (spec.window or 0), row + shift
        if spec.causal:
            yield column <= _over(high, shape)
        elif spec.window is not None:
            yield column < _over(high + spec.window, shape)
        if spec.window is not None:
            yield column > _over(low, shape)
        if keys.length % keys.size and not self.call.segments:  # no query has the id of padding
            yield column < keys.length - k_at


def _slot(memory: Any, i: Array) -> Array:
    return lax.rem(i, jnp.int32(memory.shape[0]))


def _anew(memory: Any, slot: Any) -> Any:
    """`memory.at[slot]`, whose address the compiler does not know before this point: it would find the descriptors of all
    products before a loop, and spill them. The index of the warpgroup is a shuffle, which stays where it is."""
    zero = lax.div(lax.axis_index("warpgroup"), jnp.int32(WARPGROUPS + 1))
    return memory.at[slot + zero]


def _bring(ref: Refs, names: Sequence[str], count: Array, source: Callable[[str, Array], Any]) -> None:
    """What the third warpgroup does: copy the `count` blocks `source(name, i)` of each array to its ring, as slots get free."""
    plgpu.set_max_registers(40, action="decrease")

    @pl.loop(0, count)
    def _(i: Array) -> None:
        for name in names:
            slot = _slot(ref[f"{name}_s"], i)

            @pl.when(i >= ref[f"{name}_s"].shape[0])
            def _(name: str = name, slot: Array = slot) -> None:
                plgpu.barrier_wait(ref[f"{name}_free"].at[slot])

            for part in (name, WITH_ROWS[name]) if name in WITH_ROWS else (name,):
                plgpu.copy_gmem_to_smem(source(part, i), ref[f"{part}_s"].at[slot], ref[f"{name}_ready"].at[slot])

    for name in names:
        _drain(ref[f"{name}_free"], count)


def _drain(free: Any, count: Array) -> None:
    """Wait until all slots are free after `count` turns: no barrier goes before its last arrival."""
    slots = free.shape[0]

    @pl.loop(jnp.maximum(count - slots, 0), count)
    def _(i: Array) -> None:
        plgpu.barrier_wait(free.at[_slot(free, i)])


def _bring_keys(ref: Refs, meeting: _Meeting, group: Array) -> None:
    block = meeting.call.keys.size
    source = lambda name, i: ref[name].at[meeting.batch, pl.ds((meeting.first + i) * block, block), group]
    _bring(ref, ("k", "v"), meeting.count, source)


def _release(*free: Any) -> None:
    """Slots from which threads themselves have read, not only products, may be written by copies."""
    plgpu.commit_smem()
    for barrier in free:
        plgpu.barrier_arrive(barrier)


def _hold(ref: Refs, sources: dict[str, Any], slot: Any) -> list[Any]:
    """Bring each array's tile to its slot, and wait for all."""
    for name, source in sources.items():
        plgpu.copy_gmem_to_smem(source, ref[f"{name}_s"].at[slot], ref[f"{name}_ready"].at[slot])
    for name in sources:
        plgpu.barrier_wait(ref[f"{name}_ready"].at[slot])
    return [ref[f"{name}_s"].at[slot] for name in sources]


def _hand_out(tiles: Sequence[tuple[Array, Any, Any]]) -> None:
    """Each `(array, shared memory, destination)` by way of shared memory, in its dtype."""
    for x, memory, _ in tiles:
        memory[...] = x.astype(memory.dtype)
    plgpu.commit_smem()
    for _, memory, destination in tiles:
        plgpu.copy_smem_to_gmem(memory, destination)
    plgpu.wait_smem_to_gmem(0)


def _forward_kernel(ref: Refs, call: _Call, order: _Order) -> None:
    unit, tile = order.here()
    batch, head = _divide(unit, call.heads)
    group, _ = _divide(head, call.repeats)
    warpgroup = lax.axis_index("warpgroup")
    meeting = _Meeting(ref, call, batch, tile)
    pl.when(warpgroup == WARPGROUPS)(functools.partial(_bring_keys, ref, meeting, group))

    @pl.when(warpgroup < WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers(232, action="increase")
        rows = pl.ds(tile * call.queries.size + warpgroup * ROWS, ROWS)
        q_ids = meeting.ids("q_ids", rows.start, ROWS, ROW_LAYOUT)
        [q_s] = _hold(ref, {"q": ref["q"].at[batch, rows, head]}, warpgroup)
        mixed, top, total = _softmax_loop(ref, call, meeting, q_s, rows.start, q_ids)
        seen = total > 0
        divisor = jnp.where(seen, total, 1.0)
        mixed = mixed * _over(1.0 / divisor, mixed.shape)
        log_sum = jnp.where(seen, top * LN_2 + jnp.log(divisor), -jnp.inf)
        lse_s = ref["lse_s"].at[warpgroup]
        _hand_out([(mixed, q_s, ref["out"].at[batch, rows, head]), (log_sum, lse_s, ref["lse"].at[batch, head, rows])])


def _softmax_loop(
    ref: Refs, call: _Call, meeting: _Meeting, q_s: Any, q_at: Array, q_ids: Array | None
) -> tuple[Array, Array, Array]:
    """One warpgroup's running output, and the maximum and the sum of each row's weights, to base 2."""
    width, block = q_s.shape[1], call.keys.size
    shape, factor = (ROWS, block), call.spec.scale * LOG2_E
    warpgroup = lax.axis_index("warpgroup")

    def meet() -> None:
        plgpu.barrier_arrive(ref["turn"])
        plgpu.barrier_wait(ref["turn"])

    def step(i: Array, running: tuple[Array, ...]) -> tuple[Array, ...]:
        mixed, top, total = running
        slot, number = _slot(ref["k_s"], i), meeting.first + i
        [products] = _multiply([(_full(shape, 0.0), q_s, ref["k_s"].at[slot].transpose((1, 0)))], meet)
        plgpu.barrier_arrive(ref["k_free"].at[slot])
        k_at = number * block
        ids = lambda: (q_ids, meeting.ids("k_ids", k_at, block, COLUMN_LAYOUT))
        products = meeting.hidden(products, number, q_at, k_at, ids)
        peak = jnp.maximum(top, jnp.max(products, axis=1) * factor)
        kept = jnp.exp2(top - peak)
        weights = jnp.exp2(products * factor - _over(peak, shape))
        mixed = mixed * _over(kept, mixed.shape)
        total = total * kept
        narrow = weights.astype(q_s.dtype)
        total = total + jnp.sum(weights, axis=1)
        mixed, total, peak, narrow = lax.optimization_barrier((mixed, total, peak, narrow))
        plgpu.barrier_arrive(ref["turn"])
        plgpu.barrier_wait(ref["v_ready"].at[slot])
        plgpu.barrier_wait(ref["turn"])

        def wait_for_next() -> None:
            @pl.when(i + 1 < meeting.count)
            def _() -> None:
                plgpu.barrier_wait(ref["k_ready"].at[_slot(ref["k_s"], i + 1)])

        [mixed] = _multiply([(mixed, narrow, ref["v_s"].at[slot])], wait_for_next)
        plgpu.barrier_arrive(ref["v_free"].at[slot])
        return mixed, peak, total

    @pl.when(meeting.count > 0)
    def _() -> None:
        plgpu.barrier_wait(ref["k_ready"].at[0])

    pl.when(warpgroup == 1)(meet)
    start = _full((ROWS, width), 0.0), _full((ROWS,), LOWEST, ROW_LAYOUT), _full((ROWS,), 0.0, ROW_LAYOUT)
    found = lax.fori_loop(jnp.int32(0), meeting.count, step, start)
    pl.when(warpgroup == 0)(meet)
    return found


def _query_gradient_kernel(ref: Refs, call: _Call, order: _Order) -> None:
    unit, tile = order.here()
    batch, head = _divide(unit, call.heads)
    group, _ = _divide(head, call.repeats)
    warpgroup = lax.axis_index("warpgroup")
    meeting = _Meeting(ref, call, batch, tile)
    pl.when(warpgroup == WARPGROUPS)(functools.partial(_bring_keys, ref, meeting, group))

    @pl.when(warpgroup < WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers(232, action="increase")
        rows = pl.ds(tile * call.queries.size + warpgroup * ROWS, ROWS)
        q_ids = meeting.ids("q_ids", rows.start, ROWS, ROW_LAYOUT)
        lse, inner = (_load(ref[name].at[batch, head, rows], ROW_LAYOUT) for name in ("lse", "inner"))
        held, _ = _hold(ref, {name: ref[name].at[batch, rows, head] for name in ("q", "d_out")}, warpgroup)
        block = call.keys.size
        zeros = _full((ROWS, block), 0.0)

        def step(i: Array, d_q: Array) -> Array:
            number, slot, v_slot = meeting.first + i, _slot(ref["k_s"], i), _slot(ref["v_s"], i)
            k_s, v_s = ref["k_s"].at[slot], _anew(ref["v_s"], v_slot)
            q_s, d_out_s = (_anew(ref[name], warpgroup) for name in ("q_s", "d_out_s"))
            plgpu.barrier_wait(ref["k_ready"].at[slot])
            plgpu.barrier_wait(ref["v_ready"].at[v_slot])
            products, d_weights = _multiply([(zeros, q_s, k_s.transpose((1, 0))), (zeros, d_out_s, v_s.transpose((1, 0)))])
            plgpu.barrier_arrive(ref["v_free"].at[v_slot])
            k_at = number * block
            ids = lambda: (q_ids, meeting.ids("k_ids", k_at, block, COLUMN_LAYOUT))
            products = meeting.hidden(products, number, rows.start, k_at, ids)
            weights = jnp.exp2(products * (call.spec.scale * LOG2_E) - _over(lse, zeros.shape))
            d_logits = weights * (d_weights - _over(inner, zeros.shape))
            [d_q] = _multiply([(d_q, d_logits.astype(q_s.dtype), k_s)])
            plgpu.barrier_arrive(ref["k_free"].at[slot])
            return d_q

        d_q = lax.fori_loop(jnp.int32(0), meeting.count, step, _full(held.shape, 0.0))
        _hand_out([(d_q * call.spec.scale, held, ref["d_q"].at[batch, rows, head])])


def _bring_queries(ref: Refs, meeting: _Meeting, group: Array) -> None:
    """The blocks of queries of each head of the group, one head after the other."""
    block = meeting.call.queries.size

    def source(name: str, i: Array) -> Any:
        head, number = meeting.head_and_block(i)
        head, tokens = group * meeting.call.repeats + head, pl.ds(number * block, block)
        return ref[name].at[(meeting.batch, head, tokens) if name in ("lse", "inner") else (meeting.batch, tokens, head)]

    _bring(ref, ("q", "d_out"), meeting.count * meeting.call.repeats, source)


def _key_gradients_kernel(ref: Refs, call: _Call, order: _Order) -> None:
    unit, tile = order.here()
    batch, group = _divide(unit, call.groups)
    warpgroup = lax.axis_index("warpgroup")
    meeting = _Meeting(ref, call, batch, tile)
    pl.when(warpgroup == WARPGROUPS)(functools.partial(_bring_queries, ref, meeting, group))

    @pl.when(warpgroup < WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers(232, action="increase")
        rows = pl.ds(tile * call.keys.size + warpgroup * ROWS, ROWS)
        k_ids = meeting.ids("k_ids", rows.start, ROWS, ROW_LAYOUT)
        held_k, held_v = _hold(ref, {name: ref[name].at[batch, rows, group] for name in ("k", "v")}, warpgroup)
        zeros = _full((ROWS, call.queries.size), 0.0)

        def step(i: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
            d_k, d_v = sums
            slot, d_slot = _slot(ref["q_s"], i), _slot(ref["d_out_s"], i)
            q_s, d_out_s = ref["q_s"].at[slot], ref["d_out_s"].at[d_slot]
            k_s, v_s = (_anew(ref[name], warpgroup) for name in ("k_s", "v_s"))
            plgpu.barrier_wait(ref["q_ready"].at[slot])
            plgpu.barrier_wait(ref["d_out_ready"].at[d_slot])
            products, d_weights = _multiply([(zeros, k_s, q_s.transpose((1, 0))), (zeros, v_s, d_out_s.transpose((1, 0)))])
            weights = meeting.weights_by_key(products, i, rows.start, k_ids, ref["lse_s"].at[slot])
            inner = _load(ref["inner_s"].at[d_slot], COLUMN_LAYOUT)
            d_logits = weights * (d_weights - _over(inner, zeros.shape, 1))
            d_v, d_k = _multiply([(d_v, weights.astype(q_s.dtype), d_out_s), (d_k, d_logits.astype(q_s.dtype), q_s)])
            _release(ref["q_free"].at[slot], ref["d_out_free"].at[d_slot])
            return d_k, d_v

        start = (_full(held_k.shape, 0.0),) * 2
        d_k, d_v = lax.fori_loop(jnp.int32(0), meeting.count * call.repeats, step, start)
        place = (batch, rows, group)
        _hand_out([(d_k * call.spec.scale, held_k, ref["d_k"].at[place]), (d_v, held_v, ref["d_v"].at[place])])


def _wide_key_gradients_kernel(ref: Refs, call: _Call, order: _Order) -> None:
    """Heads so wide that the registers of one warpgroup hold one gradient: the first warpgroup finds that of the values and
    hands the weights to the second, which finds that of the keys."""
    unit, tile = order.here()
    batch, group = _divide(unit, call.groups)
    warpgroup = lax.axis_index("warpgroup")
    meeting = _Meeting(ref, call, batch, tile)
    rows = pl.ds(tile * call.keys.size, ROWS)
    place = (batch, rows, group)
    zeros = lambda: _full((ROWS, call.queries.size), 0.0)
    run = lambda step: lax.fori_loop(jnp.int32(0), meeting.count * call.repeats, step, _full((ROWS, call.width), 0.0))
    pl.when(warpgroup == WARPGROUPS)(functools.partial(_bring_queries, ref, meeting, group))

    @pl.when(warpgroup == 0)
    def _() -> None:
        plgpu.set_max_registers(232, action="increase")
        k_ids = meeting.ids("k_ids", rows.start, ROWS, ROW_LAYOUT)
        [k_s] = _hold(ref, {"k": ref["k"].at[place]}, 0)

        def step(i: Array, d_v: Array) -> Array:
            slot, d_slot, shared = (_slot(ref[name], i) for name in ("q_s", "d_out_s", "weights_s"))
            plgpu.barrier_wait(ref["q_ready"].at[slot])
            [products] = _multiply([(zeros(), k_s, ref["q_s"].at[slot].transpose((1, 0)))])
            weights = meeting.weights_by_key(products, i, rows.start, k_ids, ref["lse_s"].at[slot]).astype(k_s.dtype)
            _release(ref["q_free"].at[slot])

            @pl.when(i >= SHARED_WEIGHTS)
            def _() -> None:
                plgpu.barrier_wait(ref["weights_free"].at[shared])

            ref["weights_s"].at[shared][...] = weights
            plgpu.barrier_arrive(ref["weights_ready"].at[shared])
            plgpu.barrier_wait(ref["d_out_ready"].at[d_slot])
            [d_v] = _multiply([(d_v, weights, ref["d_out_s"].at[d_slot])])
            plgpu.barrier_arrive(ref["d_out_free"].at[d_slot])
            return d_v

        d_v = run(step)
        _drain(ref["weights_free"], meeting.count * call.repeats)
        _hand_out([(d_v, k_s, ref["d_v"].at[place])])

    @pl.when(warpgroup == 1)
    def _() -> None:
        plgpu.set_max_registers(232, action="increase")
        [v_s] = _hold(ref, {"v": ref["v"].at[place]}, 0)

        def step(i: Array, d_k: Array) -> Array:
            slot, d_slot, shared = (_slot(ref[name], i) for name in ("q_s", "d_out_s", "weights_s"))
            plgpu.barrier_wait(ref["d_out_ready"].at[d_slot])
            [d_weights] = _multiply([(zeros(), v_s, ref["d_out_s"].at[d_slot].transpose((1, 0)))])
            inner = _load(ref["inner_s"].at[d_slot], COLUMN_LAYOUT)
            _release(ref["d_out_free"].at[d_slot])
            plgpu.barrier_wait(ref["weights_ready"].at[shared])
            weights = _load(ref["weights_s"].at[shared], plgpu.Layout.WGMMA).astype(F32)
            plgpu.barrier_arrive(ref["weights_free"].at[shared])
            d_logits = weights * (d_weights - _over(inner, weights.shape, 1))
            plgpu.barrier_wait(ref["q_ready"].at[slot])
            [d_k] = _multiply([(d_k, d_logits.astype(v_s.dtype), ref["q_s"].at[slot])])
            plgpu.barrier_arrive(ref["q_free"].at[slot])
            return d_k

        _hand_out([(run(step) * call.spec.scale, v_s, ref["d_k"].at[place])])
