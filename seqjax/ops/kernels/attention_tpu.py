"""Softmax attention by blocks (Dao et al. 2022) for TPU, forward and backward, of the pairs that `AttentionMask` allows.

A tile is the pairs of a block of queries and a block of keys. Its logits stand with keys along sublanes and queries along
lanes: what belongs to a query (the running maximum and sum, the log-sum-exp, its segment) is then a row, reductions over keys
are elementwise but for the last eight, and both passes read one mask. The softmax is to base 2.

The grid's last axis runs over a list, made when the program is compiled, of the tiles in which any pair may attend. A table in
scalar memory says of each whether it is dead, whole or needs masks: that may depend on positions and segments which only the
arrays know. A dead tile computes nothing, and copies nothing, for the table names the blocks that are there already.

The forward pass takes all keys of a block of queries, then the next block. The backward pass takes all queries of a block of
keys, of all query heads that share it, while the gradient of all these queries stays in VMEM: five products a tile, where
separate passes for queries and keys need seven.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from seqjax.ops.attention_mask import AttentionMask, AttentionSpec, Blocks, live_blocks, static_blocks, whole_blocks
from seqjax.ops.blockwise_attention import row_terms

LANES = 128
BLOCK = 1024
"""Most tokens of a block; a multiple of 128."""
CHUNK = 512
"""Most keys of a tile taken at once; divides a full block."""
VMEM_BYTES = 40 * 2**20
"""Room for blocks and a tile's logits, beside `QUERY_BYTES`."""
QUERY_BYTES = 20 * 2**20
"""Room for the gradient of the queries of one part of a backward pass: 40,960 tokens of one head of width 128."""
TABLE_SIZE = 2**16
"""Most entries of the table of tiles. Where more would tell rows apart, they share what holds for all of them."""
LOG2_E, LN_2 = math.log2(math.e), math.log(2)
LOWEST = float(jnp.finfo(jnp.float32).min)  # not -inf: the difference of two of them is a number
DEAD, MASKED, WHOLE = 0, 1, 2
KIND_BITS = 2
"""An entry of the table is a block's number and, in so many low bits, the tile's kind."""


def forward(spec: AttentionSpec, mask: AttentionMask, q: Array, k: Array, v: Array, bias: None) -> tuple[Array, Array]:
    """Attention of whole sequences.

    Args:
      spec, mask: see `AttentionSpec` and `AttentionMask`.
      q, k, v: `[B, T, H, K]`, `[B, S, G, K]`, `[B, S, G, W]`, all float32 or all bfloat16; no length is 0.
      bias: None.
    Returns:
      Output `[B, T, H, W]` in the dtype of `v`, and each row's log-sum-exp `[B, T, H]` float32.
    """
    del bias
    plan = _Plan(spec, _blocks(q.shape[1]), _blocks(k.shape[1]), q.shape[2] // k.shape[2], heads=1, by_key=False)
    tiles, kinds = _tiles(plan, mask)
    x = _inputs(plan, mask, q, k, v)
    specs = _input_specs(plan, x)
    (B, H, length, _), W, size = x.q.shape, v.shape[-1], plan.queries.size
    outputs = _Forward(
        out=_Output(_tokens(plan, W, of_queries=True), (B, H, length, W), v.dtype),
        log_sum=_Output(_rows(plan), (B, H, 1, length), jnp.float32),
    )
    scratch = _ForwardScratch(_vmem(1, size), _vmem(1, size), _vmem(W, size))
    kernel = functools.partial(_forward_kernel, plan, kinds)
    found = _call("forward_kernel", kernel, (B, H, tiles.outer.size, 1), tiles, (x,), (specs,), outputs, scratch, VMEM_BYTES)
    return _by_token(found.out, q.shape[1]), _by_token(found.log_sum.reshape(B, H, length, 1), q.shape[1])[..., 0]


def backward(
    spec: AttentionSpec,
    mask: AttentionMask,
    operands: tuple[Array, Array, Array, None],
    outputs: tuple[Array, Array],
    cotangents: tuple[Array, Array],
) -> tuple[Array, Array, Array, None]:
    """Gradients of `forward`.

    Args:
      spec, mask, operands: as given to `forward`.
      outputs: as returned by `forward`.
      cotangents: of the outputs.
    Returns:
      Gradients of q, k and v in their dtypes, and None.
    """
    q, k, v, _ = operands
    terms = (cotangents[0], *row_terms(outputs, cotangents, jnp.dtype(jnp.float32)))
    most = QUERY_BYTES // (4 * _padded(q.shape[-1])) // BLOCK * BLOCK

    def part(start: int) -> tuple[Array, Array, Array]:
        cut = lambda a: a[:, start : start + most]
        return _backward(*_from_query(spec, mask, start, most), cut(q), k, v, *map(cut, terms))

    dq, dk, dv = zip(*map(part, range(0, q.shape[1], most)))
    return jnp.concatenate(dq, axis=1), sum(dk).astype(k.dtype), sum(dv).astype(v.dtype), None


def _backward(
    spec: AttentionSpec, mask: AttentionMask, q: Array, k: Array, v: Array, d_out: Array, log_sum: Array, inner: Array
) -> tuple[Array, Array, Array]:
    """Gradients of queries that fit into VMEM, one head of them at least, and of all keys and values from these queries."""
    queries, keys, repeats = _blocks(q.shape[1]), _blocks(k.shape[1]), q.shape[2] // k.shape[2]
    length, K, W = queries.count * queries.size, q.shape[-1], v.shape[-1]
    of_head = 4 * length * _padded(K)
    heads = max(n for n in range(1, repeats + 1) if repeats % n == 0 and (n == 1 or n * of_head <= QUERY_BYTES))
    plan = _Plan(spec, queries, keys, repeats, heads, by_key=True)
    tiles, kinds = _tiles(plan, mask)
    x = _inputs(plan, mask, q, k, v)
    row = lambda a: _by_head(a[..., None], queries).reshape(*x.q.shape[:2], 1, length)
    terms = _Terms(_by_head(d_out, queries), row(log_sum * LOG2_E), row(inner))
    term_specs = _Terms(_tokens(plan, W, of_queries=True), _rows(plan), _rows(plan))
    batch, groups = x.q.shape[0], x.q.shape[1] // heads
    sums = jnp.float32 if heads < repeats else k.dtype
    outputs = _Gradients(
        q=_Output(_drained(plan, tiles.outer.size, K), x.q.shape, q.dtype),
        k=_Output(_sums(plan, K), (batch, groups, *x.k.shape[2:]), sums),
        v=_Output(_sums(plan, W), (batch, groups, *x.v.shape[2:]), sums),
    )
    scratch = _Gradients(_vmem(heads, length, K), _vmem(keys.size, K), _vmem(keys.size, W))
    kernel = functools.partial(_backward_kernel, plan, kinds)
    found = _call(
        "backward_kernel",
        kernel,
        (batch, groups, tiles.outer.size, heads),
        tiles,
        (x, terms),
        (_input_specs(plan, x), term_specs),
        outputs,
        scratch,
        VMEM_BYTES + max(QUERY_BYTES, heads * of_head),
    )
    over_parts = lambda a: a if heads == repeats else a.reshape(batch, k.shape[2], -1, *a.shape[2:]).sum(2)
    dk, dv = (_by_token(over_parts(a), k.shape[1]) for a in (found.k, found.v))
    return _by_token(found.q, q.shape[1]), dk, dv


class _Plan(NamedTuple):
    """What is known at compile time."""

    spec: AttentionSpec
    queries: Blocks
    keys: Blocks
    repeats: int  # query heads of one key head
    heads: int  # query heads that one place in the grid's second axis takes
    by_key: bool  # the outer blocks are of keys, not of queries


class _Tiles(NamedTuple):
    """What scalar memory holds."""

    outer: Any  # [steps], the outer block of each step
    inner: Any  # [#B, steps], the inner block that is in VMEM, and the tile's kind
    offset: Any  # [#B], the first query's position
    slopes: Any  # [H] float32, ALiBi's, times log2(e), or None


class _Inputs(NamedTuple):
    """Lengths are whole blocks: beyond the end stand zeros, and ids that match none."""

    q: Any  # [B, H, T, K]
    k: Any  # [B, G, S, K]
    v: Any  # [B, G, S, W]
    q_ids: Any  # [#B, 1, T] or None
    k_ids: Any  # [#B, 1, S] or None
    k_at: Any  # [1, 1, S], positions, or None


class _Terms(NamedTuple):
    """What the backward pass takes of each query beside the inputs."""

    d_out: Any  # [B, H, T, W]
    log_sum: Any  # [B, H, 1, T], to base 2
    inner: Any  # [B, H, 1, T]


class _Forward(NamedTuple):
    out: Any
    log_sum: Any


class _ForwardScratch(NamedTuple):
    top: Any  # [1, block], to base 2
    total: Any  # [1, block]
    mixed: Any  # [W, block]


class _Gradients(NamedTuple):
    q: Any
    k: Any
    v: Any


class _Output(NamedTuple):
    spec: Any
    shape: tuple[int, ...]
    dtype: Any


def _blocks(length: int) -> Blocks:
    """Blocks of equal size, as few as there can be, and made of few chunks."""
    size = pl.cdiv(length, pl.cdiv(length, BLOCK))
    return Blocks(length, _padded(size) if size <= CHUNK else pl.cdiv(size, CHUNK // 2) * CHUNK // 2)


def _padded(lanes: int) -> int:
    return pl.cdiv(lanes, LANES) * LANES


def _by_head(a: Array, blocks: Blocks) -> Array:
    """`[B, L, H, K]` to `[B, H, L, K]`, whole blocks with zeros beyond the end."""
    return _whole(a.transpose(0, 2, 1, 3), blocks, 2, 0)


def _by_token(a: Array, length: int) -> Array:
    return a[:, :, :length].transpose(0, 2, 1, 3)


def _whole(a: Array, blocks: Blocks, axis: int, value: int) -> Array:
    padding = [(0, 0)] * a.ndim
    padding[axis] = (0, blocks.count * blocks.size - blocks.length)
    return jnp.pad(a, padding, constant_values=value)


def _from_query(spec: AttentionSpec, mask: AttentionMask, start: int, length: int) -> tuple[AttentionSpec, AttentionMask]:
    """The masks of `length` queries from one on."""
    if spec.q_offset is not None:
        spec = spec._replace(q_offset=spec.q_offset + start)
    else:
        mask = mask._replace(q_offset=mask.q_offset + start)
    if mask.segment_ids is not None:
        q_ids, k_ids = mask.segment_ids
        mask = mask._replace(segment_ids=(q_ids[:, start : start + length], k_ids))
    return spec, mask


def _inputs(plan: _Plan, mask: AttentionMask, q: Array, k: Array, v: Array) -> _Inputs:
    q_ids = k_ids = k_at = None
    if mask.segment_ids is not None:  # negative ids become those that match none
        q_ids, k_ids = mask.segment_ids
        k_ids = _whole(jnp.maximum(k_ids, -1), plan.keys, 1, -1)[:, None]
        q_ids = _whole(jnp.where(q_ids < 0, -2, q_ids), plan.queries, 1, -2)[:, None]
    if mask.kv_positions is not None:
        k_at = _whole(mask.kv_positions[None], plan.keys, 1, 0)[:, None]
    return _Inputs(_by_head(q, plan.queries), _by_head(k, plan.keys), _by_head(v, plan.keys), q_ids, k_ids, k_at)


def _tiles(plan: _Plan, mask: AttentionMask) -> tuple[_Tiles, set[int]]:
    """The steps of the grid's third axis, and of what kinds their tiles may be, but for dead ones."""
    cuts = plan.spec, mask, plan.queries, plan.keys
    some, every = static_blocks(*cuts)
    live, whole = live_blocks(*cuts), whole_blocks(*cuts)
    if plan.keys.length % plan.keys.size:
        every, whole = every.copy(), whole.at[:, :, -1].set(False)
        every[:, -1] = False
    known = mask.known_positions and mask.segment_ids is None
    kinds = {MASKED} if (some & ~every).any() else set()
    kinds |= {WHOLE} if every.any() or not known else set()
    listed = some.T if plan.by_key else some
    # An outer block without live tiles is written all the same.
    listed = listed | (~listed.any(axis=1, keepdims=True) & (np.arange(listed.shape[1]) == 0))
    outer, inner = np.nonzero(listed)
    if live.shape[0] * outer.size > TABLE_SIZE:
        live, whole = live.any(axis=0, keepdims=True), whole.all(axis=0, keepdims=True)
    at = (inner, outer) if plan.by_key else (outer, inner)
    kind = jnp.where(live, jnp.where(whole, WHOLE, MASKED), DEAD)[:, *at]
    if plan.by_key:  # then the queries' gradients leave VMEM
        outer, inner = (np.pad(a, (0, plan.queries.count), mode="edge") for a in (outer, inner))
        kind = jnp.pad(kind, [(0, 0), (0, plan.queries.count)], constant_values=DEAD)
    loaded = jax.lax.cummax(jnp.where(kind == DEAD, 0, np.arange(outer.size)), axis=1)
    table = (jnp.asarray(inner)[loaded] << KIND_BITS) | kind
    offset = jnp.full(1, plan.spec.q_offset) if mask.q_offset is None else mask.q_offset
    slopes = None if mask.alibi_slopes is None else mask.alibi_slopes.astype(jnp.float32) * LOG2_E
    i32 = lambda a: jnp.asarray(a, jnp.int32)
    return _Tiles(i32(outer), i32(table), i32(offset), slopes), kinds


def _of_row(ref: Any, b: Any) -> Any:
    return b if ref.shape[0] > 1 else 0


def _tile(plan: _Plan, tiles: _Tiles, b: Any, t: Any) -> tuple[Any, Any, Any]:
    """Block of queries, block of keys and kind of a step's tile; of a dead tile, blocks that are in VMEM."""
    entry = tiles.inner[_of_row(tiles.inner, b), t]
    outer, inner = tiles.outer[t], entry >> KIND_BITS
    q_block, k_block = (inner, outer) if plan.by_key else (outer, inner)
    return q_block, k_block, entry & ((1 << KIND_BITS) - 1)


def _q_head(plan: _Plan, g: Any, r: Any, kind: Any) -> Any:
    """The head of the queries in VMEM: before a dead tile, the last head of a live one was there."""
    return g * plan.heads + jnp.where(kind == DEAD, plan.heads - 1, r)


def _tokens(plan: _Plan, width: int, *, of_queries: bool) -> pl.BlockSpec:
    """Blocks of `[B, heads, length, width]`."""

    def index(b, g, t, r, tiles):
        q_block, k_block, kind = _tile(plan, tiles, b, t)
        if of_queries:
            return b, _q_head(plan, g, r, kind), q_block, 0
        return b, jax.lax.div(g * plan.heads, plan.repeats), k_block, 0

    return pl.BlockSpec((None, None, (plan.queries if of_queries else plan.keys).size, width), index)


def _rows(plan: _Plan) -> pl.BlockSpec:
    """Blocks of `[B, H, 1, T]`."""

    def index(b, g, t, r, tiles):
        q_block, _, kind = _tile(plan, tiles, b, t)
        return b, _q_head(plan, g, r, kind), 0, q_block

    return pl.BlockSpec((None, None, 1, plan.queries.size), index)


def _ids(plan: _Plan, a: Array | None, *, of_queries: bool) -> pl.BlockSpec | None:
    """Blocks of `[#B, 1, length]`."""
    if a is None:
        return None

    def index(b, g, t, r, tiles):
        q_block, k_block, _ = _tile(plan, tiles, b, t)
        return _of_row(a, b), 0, q_block if of_queries else k_block

    return pl.BlockSpec((None, 1, (plan.queries if of_queries else plan.keys).size), index)


def _sums(plan: _Plan, width: int) -> pl.BlockSpec:
    """Blocks of the gradients of keys and values, of each place in the grid's second axis."""
    return pl.BlockSpec((None, None, plan.keys.size, width), lambda b, g, t, r, tiles: (b, g, tiles.outer[t], 0))


def _drained(plan: _Plan, steps: int, width: int) -> pl.BlockSpec:
    """Blocks of the gradients of queries, which leave in the last steps: before, the first one waits."""

    def index(b, g, t, r, tiles):
        block = t - (steps - plan.queries.count)
        return b, g * plan.heads + jnp.where(block < 0, 0, r), jnp.maximum(block, 0), 0

    return pl.BlockSpec((None, None, plan.queries.size, width), index)


def _input_specs(plan: _Plan, x: _Inputs) -> _Inputs:
    tokens = lambda a, of_queries: _tokens(plan, a.shape[-1], of_queries=of_queries)
    return _Inputs(
        q=tokens(x.q, True),
        k=tokens(x.k, False),
        v=tokens(x.v, False),
        q_ids=_ids(plan, x.q_ids, of_queries=True),
        k_ids=_ids(plan, x.k_ids, of_queries=False),
        k_at=_ids(plan, x.k_at, of_queries=False),
    )


def _vmem(*shape: int) -> Any:
    return pltpu.VMEM(shape, jnp.float32)


def _call(
    name: str,
    kernel: Callable,
    grid: tuple[int, ...],
    tiles: _Tiles,
    arrays: tuple,
    specs: tuple,
    outputs: Any,
    scratch: Any,
    vmem_bytes: int,
) -> Any:
    each = lambda take: jax.tree.map(take, outputs, is_leaf=lambda a: isinstance(a, _Output))
    (found,) = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=list(specs),
            out_specs=[each(lambda o: o.spec)],
            scratch_shapes=[scratch],
        ),
        out_shape=[each(lambda o: jax.ShapeDtypeStruct(o.shape, o.dtype))],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=vmem_bytes
        ),
        name=name,
    )(tiles, *arrays)
    return found


def _forward_kernel(plan: _Plan, kinds: set[int], tiles: _Tiles, x: _Inputs, to: _Forward, s: _ForwardScratch) -> None:
    first, last = _edges(tiles)

    @pl.when(first)
    def _():
        s.top[...] = jnp.full_like(s.top, LOWEST)
        s.total[...] = jnp.zeros_like(s.total)
        s.mixed[...] = jnp.zeros_like(s.mixed)

    def fold(keys: Any, logits: Array, _: Array | None) -> None:
        top = s.top[...]
        peak = jnp.maximum(top, jnp.max(logits, axis=0, keepdims=True))
        weights, kept = jnp.exp2(logits - peak), jnp.exp2(top - peak)
        s.top[...] = peak
        s.total[...] = kept * s.total[...] + jnp.sum(weights, axis=0, keepdims=True)
        s.mixed[...] = kept * s.mixed[...] + _dot(x.v[keys, :], weights.astype(x.v.dtype), 0, 0)

    _each_tile(plan, kinds, tiles, x, fold)

    @pl.when(last)
    def _():
        total = s.total[...]
        seen = total > 0
        total = jnp.where(seen, total, 1)
        to.out[...] = (s.mixed[...] / total).T.astype(to.out.dtype)
        to.log_sum[...] = jnp.where(seen, LN_2 * (s.top[...] + jnp.log2(total)), -jnp.inf)


def _backward_kernel(
    plan: _Plan, kinds: set[int], tiles: _Tiles, x: _Inputs, rows: _Terms, to: _Gradients, s: _Gradients
) -> None:
    t, r = pl.program_id(2), pl.program_id(3)
    first, last = _edges(tiles)
    size = plan.queries.size
    q_block, _, _ = _tile(plan, tiles, pl.program_id(0), t)

    of_queries = lambda block: (r, pl.ds(pl.multiple_of(block * size, LANES), size), slice(None))

    @pl.when(t == 0)
    def _():
        @pl.loop(0, plan.queries.count)
        def _(block):
            s.q[of_queries(block)] = jnp.zeros((size, s.q.shape[-1]), jnp.float32)

    @pl.when(first & (r == 0))
    def _():
        s.k[...] = jnp.zeros_like(s.k)
        s.v[...] = jnp.zeros_like(s.v)

    def fold(keys: Any, logits: Array, slope: Array | None) -> None:
        d_out = rows.d_out[...]
        weights = jnp.exp2(logits - rows.log_sum[...])
        s.v[keys, :] += _dot(weights.astype(d_out.dtype), d_out, 1, 0)
        d_logits = weights * (_dot(x.v[keys, :], d_out, 1, 1) - rows.inner[...])
        d_scores = (d_logits if slope is None else d_logits * slope).astype(x.q.dtype)
        s.k[keys, :] += _dot(d_scores, x.q[...], 1, 0)
        s.q[of_queries(q_block)] += _dot(d_scores.T, x.k[keys, :], 1, 0)

    _each_tile(plan, kinds, tiles, x, fold)

    @pl.when(last & (r == plan.heads - 1))
    def _():
        to.k[...] = (plan.spec.scale * s.k[...]).astype(to.k.dtype)
        to.v[...] = s.v[...].astype(to.v.dtype)

    drained = t - (tiles.outer.shape[0] - plan.queries.count)

    @pl.when(drained >= 0)
    def _():
        to.q[...] = (plan.spec.scale * s.q[of_queries(drained)]).astype(to.q.dtype)


def _edges(tiles: _Tiles) -> tuple[Array, Array]:
    """Whether this step is the first, and the last, of its outer block."""
    t, end = pl.program_id(2), tiles.outer.shape[0] - 1
    differs = lambda other: tiles.outer[other] != tiles.outer[t]
    return (t == 0) | differs(jnp.maximum(t - 1, 0)), (t == end) | differs(jnp.minimum(t + 1, end))


def _each_tile(plan: _Plan, kinds: set[int], tiles: _Tiles, x: _Inputs, fold: Callable) -> None:
    """Call `fold(keys, logits, slope)` on ranges of keys of this step's tile, unless it is dead: logits `[keys, queries]` to
    base 2, and their derivative by the scaled products, None for 1."""
    b, g, t, r = (pl.program_id(axis) for axis in range(4))
    q_block, k_block, found = _tile(plan, tiles, b, t)
    q_first = tiles.offset[_of_row(tiles.offset, b)] + q_block * plan.queries.size
    alibi = None if tiles.slopes is None else tiles.slopes[g * plan.heads + r]
    size = math.gcd(plan.keys.size, CHUNK)

    def run(masked: bool, i: Any) -> None:
        first = pl.multiple_of(i * size, LANES)
        keys = pl.ds(first, size)
        spec, slope = plan.spec, None
        logits = _dot(x.k[keys, :], x.q[...], 1, 1)
        if spec.softcap is None:
            logits = (spec.scale * LOG2_E) * logits
        else:
            squashed = jnp.tanh((spec.scale / spec.softcap) * logits)
            logits, slope = (spec.softcap * LOG2_E) * squashed, 1 - squashed * squashed
        k_at = _along(0, logits.shape, k_block * plan.keys.size + first)
        distance = _along(1, logits.shape, q_first) - (k_at if x.k_at is None else x.k_at[:, keys].T)
        if alibi is not None:
            logits = logits - alibi * jnp.abs(distance).astype(jnp.float32)
        if masked:
            seen, _ = spec.reach(distance, distance)
            if x.k_ids is not None:
                seen = seen & (x.q_ids[...] == x.k_ids[:, keys].T)
            elif plan.keys.length % plan.keys.size:
                seen = seen & (k_at < plan.keys.length)
            logits = jnp.where(seen, logits, -jnp.inf)
        fold(keys, logits, slope)

    for kind in sorted(kinds):

        @pl.when(found == kind)
        def _(masked=kind == MASKED):
            pl.loop(0, plan.keys.size // size)(functools.partial(run, masked))


def _along(axis: int, shape: tuple[int, int], first: Any) -> Array:
    """Numbers from `first` on, along an axis."""
    return first + jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _dot(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    return jax.lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32)
