"""Combiner: softmax attention to single tokens and, through a summary of each, to spans of earlier ones.

A query's direct tokens and spans tile all that it may see, so it attends to every earlier token, at a cost below that of all
pairs (Ren et al. 2021, eqs. 7 and 9): one softmax over direct keys and span keys, and within a span a softmax of its own.

Positions, and so blocks, count from the start of each segment; tokens are kept at the places they came at. A block of n tokens
ends in only one of the windows of n places `j n .. j n + n - 1`, and slot j of the spans of that size is where it is kept.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seqjax.ops.attention import flash_attention, merge_attention

FACTORIZATIONS = ("axial", "fixed", "logsparse")


class Tokens(NamedTuple):
    """What is kept of every token; `origins` is the place at which its segment starts, -1 for an empty slot."""

    queries: Float[Array, "B S H K"]
    keys: Float[Array, "B S H K"]
    values: Float[Array, "B S H K"]
    origins: Int[Array, "B S"]


class Spans(NamedTuple):
    """Summaries of whole blocks of one size; `origins` as in `Tokens`."""

    keys: Float[Array, "B N H K"]
    values: Float[Array, "B N H K"]
    origins: Int[Array, "B N"]


class CombinerCache(NamedTuple):
    """What a continued sequence needs of the tokens before.

    Attributes:
      tokens: all of them.
      spans: of each size of block, smallest first; none for "axial".
      outcomes: for "axial", each token's attention to its whole row, once that is complete; else None.
      index: tokens seen so far, the same for all rows.
    """

    tokens: Tokens
    spans: tuple[Spans, ...]
    outcomes: Float[Array, "B S H K"] | None
    index: int | Int[Array, ""]

    @classmethod
    def fresh(
        cls, batch_size: int, capacity: int, num_heads: int, head_dim: int, dtype, *, factorization: str, span_length: int
    ) -> CombinerCache:
        """Before the first token, with room for `capacity` tokens."""
        capacity = -(-capacity // span_length) * span_length if factorization == "axial" else capacity
        zeros = lambda count: jnp.zeros((batch_size, count, num_heads, head_dim), dtype)
        nowhere = lambda count: jnp.full((batch_size, count), -1, jnp.int32)
        counts = [capacity // size + 2 for size in span_sizes(capacity, factorization, span_length)]
        return cls(
            Tokens(zeros(capacity), zeros(capacity), zeros(capacity), nowhere(capacity)),
            tuple(Spans(zeros(count), zeros(count), nowhere(count)) for count in counts),
            zeros(capacity) if factorization == "axial" else None,
            jnp.zeros((), jnp.int32),
        )


def span_sizes(capacity: int, factorization: str, span_length: int) -> tuple[int, ...]:
    """Sizes of the blocks that are kept as summaries, for sequences up to `capacity`."""
    if factorization == "logsparse":
        return tuple(2**level for level in range(max(capacity - 1, 0).bit_length()))
    return (span_length,) if factorization == "fixed" else ()


def combiner_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H K"],
    positions: Int[Array, "#B T"],
    cache: CombinerCache | None = None,
    *,
    factorization: str,
    span_length: int,
    scale: float | None = None,
) -> tuple[Float[Array, "B T H K"], CombinerCache | None]:
    """Causal attention by a factorisation of Combiner.

    - "fixed": blocks of `span_length`; the own block directly, and each earlier block as a span. A span's key and query are
      the greatest of its tokens' in each feature.
    - "logsparse": the own token directly, and before it blocks of sizes that are powers of 2, as the position's binary digits
      say; summaries as above. `span_length` has no effect.
    - "axial": rows of `span_length`; the own row directly, and each earlier row as a span. Its summary differs by column: the
      token in the query's column attends to its whole row, and gives its own key (the axial row-major form; the authors' key
      is a trained map of that outcome, or as here the token's).

    Args:
      positions: of each token within its segment.
      cache: of the tokens before (`CombinerCache.fresh`); None for a whole sequence.
      scale: of the logits, default `1 / sqrt(K)`.
    Returns:
      The mixed values, and the next cache if one was given. An overrun cache gives NaN.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    batch, length, heads, width = q.shape
    options = {"factorization": factorization, "span_length": span_length}
    whole = cache is None
    if whole:
        cache = CombinerCache.fresh(batch, length, heads, width, k.dtype, **options)._replace(index=0)
    index = cache.index
    origins = jnp.broadcast_to(index + jnp.arange(length, dtype=jnp.int32) - positions, (batch, length))
    tokens = Tokens(*(_put(old, new, index) for old, new in zip(cache.tokens, (q, k, v, origins))))
    sizes = span_sizes(tokens.origins.shape[1], **options)
    spans = tuple(_completed(old, size, tokens, origins, index, scale) for old, size in zip(cache.spans, sizes))
    outcomes = cache.outcomes
    if factorization == "axial":
        outcomes = _completed_rows(outcomes, span_length, tokens, origins, index, scale)
        mixed = _axial(q, tokens, outcomes, origins, index, span_length, scale)
    elif factorization == "fixed":
        mixed = _fixed(q, tokens, spans[0], origins, index, span_length, scale)
    else:
        mixed = _logsparse(q, k, v, spans, sizes, origins, index, scale)
    if whole:
        return mixed, None
    mixed = jnp.where(index + length > tokens.origins.shape[1], jnp.nan, mixed)
    return mixed, CombinerCache(tokens, spans, outcomes, index + length)


def _put(old: Array, new: Array, index: int | Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), index, axis=1)


class _Blocks(NamedTuple):
    """Blocks that end in a chunk, in slots `first ..`.

    Attributes:
      members: places of each block's tokens; of no meaning in a slot where none ended.
      ended: in which slots one did.
      origins: where their segments start; -1 where none ended.
    """

    first: int | Array
    members: Int[Array, "B n size"]
    ended: Array
    origins: Int[Array, "B n"]

    def keep(self, old: Array, new: Array) -> Array:
        """`old [B, N, ...]` with the slots of these blocks set to `new [B, n, ...]`."""
        before = jax.lax.dynamic_slice_in_dim(old, self.first, new.shape[1], axis=1)
        ended = self.ended.reshape(*self.ended.shape, *[1] * (new.ndim - 2))
        return _put(old, jnp.where(ended, new.astype(old.dtype), before), self.first)


def _ending_blocks(origins: Array, index: int | Array, size: int) -> _Blocks:
    batch, length = origins.shape
    at = index + jnp.arange(length, dtype=jnp.int32)
    ends = jnp.where((at - origins + 1) % size == 0, at, -1)
    first = index // size
    count = (length - 1) // size + 2  # windows that the tokens can reach into
    if isinstance(index, int):  # from place 0 on they reach into one fewer, and none ends in less than a block
        count = count - 1 if length >= size else 0
    slots = jnp.full((batch, count), -1, jnp.int32).at[:, at // size - first].max(ends)
    ended = slots >= 0
    members = jnp.maximum(slots[..., None] - size + 1, 0) + jnp.arange(size)
    starts = jnp.take_along_axis(origins, jnp.clip(slots - index, 0, length - 1), axis=1)
    return _Blocks(first, members, ended, jnp.where(ended, starts, -1))


def _at(a: Array, places: Int[Array, "B *N"]) -> Array:
    """`a [B, S, ...]` at each row's own places."""
    rows = jnp.arange(a.shape[0]).reshape(-1, *[1] * (places.ndim - 1))
    return a[rows, places]


def _softmax(logits: Array) -> Array:
    return jax.nn.softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), axis=-1)


def _completed(old: Spans, size: int, tokens: Tokens, origins: Array, index: int | Array, scale: float) -> Spans:
    """Spans with the blocks that end in the newest tokens, of these origins, which the tokens hold already."""
    blocks = _ending_blocks(origins, index, size)
    queries, keys, values = (_at(a, blocks.members) for a in tokens[:3])
    weights = _softmax(scale * jnp.einsum("bnhk,bnshk->bnhs", queries.max(axis=2), keys))
    summary = jnp.einsum("bnhs,bnshk->bnhk", weights.astype(values.dtype), values)
    return Spans(*(blocks.keep(a, b) for a, b in zip(old, (keys.max(axis=2), summary, blocks.origins))))


def _completed_rows(old: Array, size: int, tokens: Tokens, origins: Array, index: int | Array, scale: float) -> Array:
    """Each token's attention to its row, for rows that end in the newest tokens."""
    blocks = _ending_blocks(origins, index, size)
    queries, keys, values = (_at(a, blocks.members) for a in tokens[:3])
    weights = _softmax(scale * jnp.einsum("bnthk,bnshk->bnhts", queries, keys))
    outcomes = jnp.einsum("bnhts,bnshk->bnthk", weights.astype(values.dtype), values)
    places = jnp.where(blocks.ended[..., None], blocks.members, old.shape[1])
    rows = jnp.arange(old.shape[0])[:, None, None]
    return old.at[rows, places].set(outcomes.astype(old.dtype), mode="drop")


def _own_block(q: Array, tokens: Tokens, origins: Array, index: int | Array, size: int, scale: float) -> tuple[Array, Array]:
    """Attention to the own block so far, and its log-sum-exp."""
    length, capacity = q.shape[1], tokens.origins.shape[1]
    start = lambda at, origin: at - (at - origin) % size
    own = start(index + jnp.arange(length), origins)
    places = jnp.arange(capacity)
    theirs = jnp.where(tokens.origins < 0, -1, start(places, tokens.origins))
    masks = {"window": size, "segment_ids": (own, theirs), "q_offset": index}
    return flash_attention(q, tokens.keys, tokens.values, scale=scale, return_lse=True, **masks)


def _fixed(
    q: Array, tokens: Tokens, spans: Spans, origins: Array, index: int | Array, size: int, scale: float
) -> Float[Array, "B T H K"]:
    own = _own_block(q, tokens, origins, index, size, scale)
    at = index + jnp.arange(q.shape[1])
    before = at - (at - origins) % size - 1  # the last place in front of the own block
    earlier = jnp.arange(spans.origins.shape[1]) <= (before // size)[..., None]
    seen = earlier & (spans.origins[:, None] == origins[..., None])
    bias = jnp.where(seen, 0.0, -jnp.inf).astype(jnp.promote_types(q.dtype, jnp.float32))[:, None]
    others = flash_attention(q, spans.keys, spans.values, causal=False, bias=bias, scale=scale, return_lse=True)
    return merge_attention(*zip(own, others))[0]


def _logsparse(
    q: Array, k: Array, v: Array, spans: tuple[Spans, ...], sizes: tuple[int, ...], origins: Array, index, scale: float
) -> Float[Array, "B T H K"]:
    at = index + jnp.arange(q.shape[1])
    positions = at - origins
    seen, keys, values = [jnp.ones(positions.shape, bool)], [k], [v]
    for size, level in zip(sizes, spans):
        seen.append(positions // size % 2 == 1)
        slots = jnp.maximum(at - positions % size - 1, 0) // size
        keys.append(_at(level.keys, slots))
        values.append(_at(level.values, slots))
    keys, values = (jnp.stack(a, axis=2) for a in (keys, values))
    logits = scale * jnp.einsum("bthk,btehk->bthe", q, keys)
    weights = _softmax(jnp.where(jnp.stack(seen, axis=-1)[:, :, None], logits, -jnp.inf))
    return jnp.einsum("bthe,btehk->bthk", weights.astype(values.dtype), values)


def _axial(
    q: Array, tokens: Tokens, outcomes: Array, origins: Array, index: int | Array, size: int, scale: float
) -> Float[Array, "B T H K"]:
    own = _own_block(q, tokens, origins, index, size, scale)
    others = _columns(q, tokens, outcomes, origins, index, size, scale)
    return merge_attention(*zip(own, others))[0]


def _columns(
    q: Array, tokens: Tokens, outcomes: Array, origins: Array, index: int | Array, size: int, scale: float
) -> tuple[Array, Array]:
    """Attention to earlier tokens of the same column, whose values are their rows' outcomes.

    Within a segment, columns by position are columns by place: the places are folded into rows, and each column attends alone.
    Where two tokens of a segment are in one column, the earlier one's row is complete."""
    batch, length = origins.shape
    ahead = index % size
    options = {"q_offset": index // size - 1, "scale": scale, "return_lse": True}
    if length == 1:  # reads its own column alone
        pick = lambda a: jax.lax.dynamic_index_in_dim(a.reshape(batch, -1, size, *a.shape[2:]), ahead, 2, keepdims=False)
        ids = (origins, pick(tokens.origins))
        return flash_attention(q, pick(tokens.keys), pick(outcomes), segment_ids=ids, **options)
    aligned = -(-(length + size - 1) // size) * size if not isinstance(index, int) else -(-length // size) * size
    room = lambda a, fill: _put(jnp.full((batch, aligned, *a.shape[2:]), fill, a.dtype), a, ahead)
    fold = lambda a: jnp.moveaxis(a.reshape(batch, -1, size, *a.shape[2:]), 2, 1).reshape(batch * size, -1, *a.shape[2:])
    unfold = lambda a: jnp.moveaxis(a.reshape(batch, size, -1, *a.shape[2:]), 1, 2).reshape(batch, -1, *a.shape[2:])
    ids = (fold(room(origins, -1)), fold(tokens.origins))
    found = flash_attention(fold(room(q, 0)), fold(tokens.keys), fold(outcomes), segment_ids=ids, **options)
    return tuple(jax.lax.dynamic_slice_in_dim(unfold(a), ahead, length, axis=1) for a in found)
