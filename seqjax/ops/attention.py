"""Softmax attention: exact, grouped heads, causal, sliding window, packed segments, ALiBi.

Shapes: queries `[B, T, H, K]`, keys `[B, S, G, K]`, values `[B, S, G, W]`; G divides H (grouped-query attention, Ainslie et
al. 2023; G = 1 is multi-query), query head h reads key head `h // (H / G)`.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seqjax.ops.dispatch import dispatch


def flash_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G W"],
    *,
    causal: bool = True,
    window: int | None = None,
    segment_ids: tuple[Int[Array, "#B T"], Int[Array, "#B S"]] | None = None,
    q_offset: int | Int[Array, ""] = 0,
    kv_positions: Int[Array, "S"] | None = None,
    alibi_slopes: Float[Array, "H"] | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T H W"]:
    """`softmax(scale * q k^T - slope * distance) v` over the pairs that the masks allow, one head group at a time.

    Args:
      q, k, v: any float dtype; scores and the softmax are computed in at least float32.
      causal: a query sees only keys at its own position or before.
      window: a query sees keys less than `window` positions away (before it, and when not causal also after it).
      segment_ids: of queries and of keys; a pair attends only where the two are equal. A negative key id is never seen.
      q_offset: position of the first query, where the first key stands at 0 (queries that continue a cache).
      kv_positions: positions of the keys where they are not 0, 1, 2, ... (a ring buffer).
      alibi_slopes: per-head slope of the linear distance penalty (Press et al. 2022).
      scale: default `1 / sqrt(K)`.
      implementation: "xla", "reference" (plain, materialises all pairs), or None for the platform's fastest.
    Returns:
      In the dtype of `v`; a query that may see no key gets zeros.
    Raises:
      ValueError: G does not divide H, the window is not positive, or the implementation does not serve this call.
    """
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} key heads.")
    if window is not None and window < 1:
        raise ValueError(f"window={window} is not positive.")
    static_offset = q_offset if isinstance(q_offset, int) else None
    pairs = _Pairs(causal, window, static_offset, 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale)
    masks = _Masks(None if static_offset is not None else q_offset, kv_positions, segment_ids, alibi_slopes)
    available = {"xla": functools.partial(_xla, pairs), "reference": functools.partial(_reference, pairs)}
    return dispatch(implementation, available, q, k, v, masks)


def attended_pairs(length: int, *, causal: bool, window: int | None) -> int:
    """How many (query, key) pairs one sequence of `length` tokens needs."""
    reach = length if window is None else min(window, length)
    before = reach * (reach + 1) // 2 + (length - reach) * reach  # each query's keys at or before it
    return before if causal else 2 * before - length


class _Pairs(NamedTuple):
    """What is known at compile time of the pairs that attend; `q_offset` is None where it is an array."""

    causal: bool
    window: int | None
    q_offset: int | None
    scale: float

    def key_range(self, q_from: int, q_to: int, masks: _Masks, num_keys: int) -> tuple[int, int]:
        """Bounds on the keys that queries `q_from..q_to` can see; all keys where positions are not static."""
        if masks.kv_positions is not None or self.q_offset is None:
            return 0, num_keys
        first, last = q_from + self.q_offset, q_to - 1 + self.q_offset
        start = 0 if self.window is None else max(0, first - self.window + 1)
        stop = num_keys
        if self.causal:
            stop = min(stop, last + 1)
        elif self.window is not None:
            stop = min(stop, last + self.window)
        return min(start, num_keys), max(stop, 0)


class _Masks(NamedTuple):
    """The arrays that decide which pairs attend, and their distance penalty; see `flash_attention`."""

    q_offset: Array | None
    kv_positions: Array | None
    segment_ids: tuple[Array, Array] | None
    alibi_slopes: Array | None


def _masked(scores: Array, pairs: _Pairs, masks: _Masks, block: _Block, repeats: int) -> Array:
    """`scores [B, G, R * t, s]` of a block's queries and keys, less the penalty; -inf where masked."""
    queries, keys = block.queries, block.keys
    q_offset = masks.q_offset if pairs.q_offset is None else pairs.q_offset
    # Rows run over the R heads of a group and, for each, over the queries.
    q_at = jnp.tile(jnp.arange(queries.start, queries.stop) + q_offset, repeats)
    k_at = jnp.arange(keys.start, keys.stop) if masks.kv_positions is None else masks.kv_positions
    distance = q_at[:, None] - k_at[None, :]
    if masks.alibi_slopes is not None:
        slopes = masks.alibi_slopes.astype(scores.dtype).reshape(-1, repeats)
        slopes = jnp.repeat(slopes, queries.stop - queries.start, axis=1)[:, :, None]
        scores = scores - slopes * jnp.abs(distance).astype(scores.dtype)
    seen = []
    if pairs.causal:
        seen.append(distance >= 0)
    if pairs.window is not None:
        seen.append(jnp.abs(distance) < pairs.window)
    if masks.segment_ids is not None:
        q_ids = jnp.tile(masks.segment_ids[0][:, queries], (1, repeats))[:, :, None]
        k_ids = masks.segment_ids[1][:, None, keys]
        seen.append(((q_ids == k_ids) & (k_ids >= 0))[:, None])
    return jnp.where(functools.reduce(jnp.logical_and, seen), scores, -jnp.inf) if seen else scores


def _reference(pairs: _Pairs, q: Array, k: Array, v: Array, masks: _Masks) -> Array:
    """All pairs at once, differentiated by JAX."""
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    batch, length, heads, width = q.shape
    q = q.astype(dtype).reshape(batch, length, k.shape[2], heads // k.shape[2], width)
    everything = _Block(slice(0, length), slice(0, k.shape[1]))
    scores = pairs.scale * jnp.einsum("btgrk,bsgk->bgrts", q, k.astype(dtype))
    scores = _split_rows(_masked(_merge_rows(scores), pairs, masks, everything, scores.shape[2]), scores.shape[2])
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total == 0, 1, total)
    mixed = jnp.einsum("bgrts,bsgw->btgrw", weights, v.astype(dtype))
    return mixed.reshape(batch, length, heads, v.shape[-1]).astype(v.dtype)


def _xla(pairs: _Pairs, q: Array, k: Array, v: Array, masks: _Masks) -> Array:
    """Query blocks in a Python loop, so that a causal or windowed block never touches keys it cannot see.

    Half of the pairs are skipped at compile time, a block's scores stay in cache, and the backward pass makes them again
    from the log-sum-exp of each row (Dao et al. 2022), so that nothing quadratic in length is kept.
    """
    batch, length, heads, width = q.shape
    groups = k.shape[2]
    q = q.reshape(batch, length, groups, heads // groups, width).transpose(0, 2, 3, 1, 4)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    mixed = _blocks(pairs, q, k, v, masks)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, v.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocks(pairs: _Pairs, q: Array, k: Array, v: Array, masks: _Masks) -> Array:
    """Attention of `q [B, G, R, T, K]` over `k [B, G, S, K]`, `v [B, G, S, W]`, with R query heads per key head."""
    return _blocks_forward(pairs, q, k, v, masks)[0]


def _blocks_forward(pairs: _Pairs, q: Array, k: Array, v: Array, masks: _Masks) -> tuple[Array, tuple]:
    outputs, log_sums = [], []
    for block in _query_blocks(pairs, masks, q.shape[3], k.shape[2]):
        scores = _scores(block, pairs, masks, q, k)
        top = jnp.max(scores, axis=-1, keepdims=True, initial=-jnp.inf)
        top = jnp.where(jnp.isfinite(top), top, 0)
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        total = jnp.where(total == 0, 1, total)
        mixed = _matmul("bgqs,bgsw->bgqw", weights.astype(v.dtype), v[:, :, block.keys]) / total
        outputs.append(_split_rows(mixed.astype(v.dtype), q.shape[2]))
        log_sums.append(_split_rows(top + jnp.log(total), q.shape[2]))
    mixed, log_sum = (jnp.concatenate(a, axis=3) if len(a) > 1 else a[0] for a in (outputs, log_sums))
    return mixed, (q, k, v, masks, mixed, log_sum)


def _blocks_backward(pairs: _Pairs, saved: tuple, d_mixed: Array) -> tuple:
    q, k, v, masks, mixed, log_sum = saved
    wide = jnp.promote_types(q.dtype, jnp.float32)
    # The softmax's Jacobian needs <row's weights, their gradient>, which is <output, its gradient>.
    inner = jnp.sum(mixed.astype(wide) * d_mixed.astype(wide), axis=-1, keepdims=True)
    dq, dk, dv = [], jnp.zeros(k.shape, wide), jnp.zeros(v.shape, wide)
    for block in _query_blocks(pairs, masks, q.shape[3], k.shape[2]):
        rows = [_merge_rows(a[:, :, :, block.queries]) for a in (q, d_mixed, log_sum, inner)]
        block_q, block_d, block_log_sum, block_inner = rows
        weights = jnp.exp(_scores(block, pairs, masks, q, k) - block_log_sum)
        d_weights = _matmul("bgqw,bgsw->bgqs", block_d, v[:, :, block.keys])
        d_scores = (weights * (d_weights - block_inner) * pairs.scale).astype(q.dtype)
        dq.append(_split_rows(_matmul("bgqs,bgsk->bgqk", d_scores, k[:, :, block.keys]), q.shape[2]))
        dk = dk.at[:, :, block.keys].add(_matmul("bgqs,bgqk->bgsk", d_scores, block_q))
        dv = dv.at[:, :, block.keys].add(_matmul("bgqs,bgqw->bgsw", weights.astype(v.dtype), block_d))
    dq = jnp.concatenate(dq, axis=3) if len(dq) > 1 else dq[0]
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_blocks.defvjp(_blocks_forward, _blocks_backward)


class _Block(NamedTuple):
    """A range of queries and the keys that any of them can see."""

    queries: slice
    keys: slice


def _query_blocks(pairs: _Pairs, masks: _Masks, length: int, num_keys: int) -> list[_Block]:
    size = _block_size(length)
    edges = [(start, min(start + size, length)) for start in range(0, length, size)]
    return [_Block(slice(*edge), slice(*pairs.key_range(*edge, masks, num_keys))) for edge in edges]


def _scores(block: _Block, pairs: _Pairs, masks: _Masks, q: Array, k: Array) -> Array:
    """Masked scores `[B, G, R * t, s]` of one block."""
    rows = _merge_rows(q[:, :, :, block.queries] * pairs.scale)
    scores = _matmul("bgqk,bgsk->bgqs", rows, k[:, :, block.keys])
    return _masked(scores, pairs, masks, block, q.shape[2])


def _merge_rows(a: Array) -> Array:
    """`[B, G, R, t, ...]` to `[B, G, R * t, ...]`: one axis of rows makes every product a plain matrix product."""
    return a.reshape(*a.shape[:2], a.shape[2] * a.shape[3], a.shape[-1])


def _split_rows(a: Array, repeats: int) -> Array:
    return a.reshape(*a.shape[:2], repeats, a.shape[2] // repeats, a.shape[-1])


def _block_size(length: int) -> int:
    """128 queries a block on short sequences, 256 on long ones; at most 64 blocks, to bound the size of the program."""
    return max(128 if length <= 1024 else 256, -(-length // 64))


def _matmul(spec: str, a: Array, b: Array) -> Array:
    """An einsum that accumulates in at least float32."""
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))
