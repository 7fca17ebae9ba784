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

F32 = jnp.float32
I32 = jnp.int32
LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)
L2_BYTES = 32 * 2**20
"""What thread blocks that run side by side may read again and again: it stays in the second-level cache."""

ROWS = 64
"""Rows of a tile: one warpgroup's matrix product has so many."""
WARPGROUPS = 2
LOWEST = -1e30
"""The running maximum of a row that has seen no key: not -inf, whose difference from itself is no number."""

Refs = dict[str, Any]


class _Sizes(NamedTuple):
    """Lengths of the blocks that tiles meet, and how many are in shared memory at once."""

    block: int
    stages: int


FORWARD = {64: _Sizes(128, 4), 128: _Sizes(128, 2), 256: _Sizes(64, 2)}
"""By head width."""


def forward(
    spec: AttentionSpec, mask: AttentionMask, q: Array, k: Array, v: Array, bias: Array | None
) -> tuple[Array, Array]:
    """Output `[B, T, H, K]` in the dtype of `v`, and each row's log-sum-exp `[B, T, H]` float32."""
    sizes = FORWARD[q.shape[-1]]
    call = _Call.of(spec, mask, q, k, WARPGROUPS * ROWS, sizes.block)
    arguments = {"q": q, "k": k, "v": v, **call.masks(mask)}
    results = {
        "out": jax.ShapeDtypeStruct(q.shape, v.dtype),
        "lse": jax.ShapeDtypeStruct((call.batch, call.heads, call.queries.count * call.queries.size), F32),
    }
    scratch = {
        "q_s": _tiles(WARPGROUPS, ROWS, q),
        "k_s": _tiles(sizes.stages, sizes.block, k),
        "v_s": _tiles(sizes.stages, sizes.block, v),
        "lse_s": plgpu.SMEM((WARPGROUPS, ROWS), F32),
        "q_ready": plgpu.Barrier(num_barriers=WARPGROUPS),
        "k_ready": plgpu.Barrier(num_barriers=sizes.stages),
        "v_ready": plgpu.Barrier(num_barriers=sizes.stages),
        "k_free": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=sizes.stages),
        "v_free": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=sizes.stages),
        "turn": plgpu.Barrier(num_arrivals=WARPGROUPS),
    }
    order = _Order.of(call.batch * call.heads, call.queries.count, 4 * k.shape[1] * q.shape[-1] // call.repeats, late_first=True)
    kernel = functools.partial(_forward_kernel, call=call, order=order)
    out, lse = _launch("attention_forward", kernel, order, arguments, results, scratch)
    return out, lse[:, :, : q.shape[1]].transpose(0, 2, 1)


@dataclasses.dataclass(frozen=True)
class _Call:
    """What is known of a call when it is compiled."""

    spec: AttentionSpec
    segments: bool
    batch: int
    heads: int
    groups: int
    queries: Blocks
    keys: Blocks

    @classmethod
    def of(cls, spec: AttentionSpec, mask: AttentionMask, q: Array, k: Array, rows: int, columns: int) -> _Call:
        queries, keys = Blocks(q.shape[1], rows), Blocks(k.shape[1], columns)
        return cls(spec, mask.segment_ids is not None, q.shape[0], q.shape[2], k.shape[2], queries, keys)

    @property
    def repeats(self) -> int:
        return self.heads // self.groups

    @property
    def masked(self) -> bool:
        return bool(self.spec.causal or self.spec.window or self.segments or self.keys.length % self.keys.size)

    def masks(self, mask: AttentionMask, by_key: bool = False) -> dict[str, Array]:
        """The kernels' arguments: of each tile of queries (or of keys) the blocks that it meets, and the ids of segments."""
        live, whole = (f(self.spec, mask, self.queries, self.keys) for f in (live_blocks, whole_blocks))
        if self.keys.length % self.keys.size:
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


def _tiles(count: int, rows: int, like: Array) -> Any:
    """Shared memory of tiles `[rows, K]`, in the layout of matrix products."""
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM((count, rows, like.shape[-1]), like.dtype, transforms=transforms)


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
        return plgpu.load(ref.at[row, pl.ds(first, count)], layout=layout, optimized=False)

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


def _forward_kernel(ref: Refs, call: _Call, order: _Order) -> None:
    unit, tile = order.here()
    batch, head = _divide(unit, call.heads)
    group, _ = _divide(head, call.repeats)
    warpgroup = lax.axis_index("warpgroup")
    meeting = _Meeting(ref, call, batch, tile)
    stages, block = ref["k_s"].shape[0], call.keys.size
    slot_of = lambda i: lax.rem(i, jnp.int32(stages))

    @pl.when(warpgroup == WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers(40, action="decrease")

        @pl.loop(0, meeting.count)
        def _(i: Array) -> None:
            slot = slot_of(i)
            for name in ("k", "v"):

                @pl.when(i >= stages)
                def _(name: str = name) -> None:
                    plgpu.barrier_wait(ref[f"{name}_free"].at[slot])

                source = ref[name].at[batch, pl.ds((meeting.first + i) * block, block), group]
                plgpu.copy_gmem_to_smem(source, ref[f"{name}_s"].at[slot], ref[f"{name}_ready"].at[slot])

    @pl.when(warpgroup < WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers(232, action="increase")
        rows = pl.ds(tile * call.queries.size + warpgroup * ROWS, ROWS)
        q_s, lse_s = ref["q_s"].at[warpgroup], ref["lse_s"].at[warpgroup]
        plgpu.copy_gmem_to_smem(ref["q"].at[batch, rows, head], q_s, ref["q_ready"].at[warpgroup])
        q_ids = meeting.ids("q_ids", rows.start, ROWS, ROW_LAYOUT)
        plgpu.barrier_wait(ref["q_ready"].at[warpgroup])
        mixed, top, total = _softmax_loop(ref, call, meeting, q_s, rows.start, q_ids, slot_of)
        seen = total > 0
        inverse = 1.0 / jnp.where(seen, total, 1.0)
        q_s[...] = (mixed * _over(inverse, mixed.shape)).astype(q_s.dtype)
        lse_s[...] = jnp.where(seen, top * LN_2 + jnp.log(jnp.where(seen, total, 1.0)), -jnp.inf)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_s, ref["out"].at[batch, rows, head])
        plgpu.copy_smem_to_gmem(lse_s, ref["lse"].at[batch, head, rows])
        plgpu.wait_smem_to_gmem(0)


def _softmax_loop(
    ref: Refs, call: _Call, meeting: _Meeting, q_s: Any, q_at: Array, q_ids: Array | None, slot_of: Callable
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
        slot, number = slot_of(i), meeting.first + i
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
                plgpu.barrier_wait(ref["k_ready"].at[slot_of(i + 1)])

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
