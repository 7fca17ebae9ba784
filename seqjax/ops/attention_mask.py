"""Which queries attend to which keys: the one description that every implementation of attention reads, whole or by blocks.

What is known when a program is compiled stands in `AttentionSpec`; arrays stand in `AttentionMask`. A kernel needs no more
than these two, beside queries, keys, values and bias.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


class AttentionSpec(NamedTuple):
    """What is known at compile time of one call. Hashable, so that it can choose a kernel.

    Attributes:
      causal: a query sees no key at a later position.
      window: a query sees no key `window` or more positions away; None for no bound.
      q_offset: position of the first query; None where it is an array, `AttentionMask.q_offset`.
      scale: factor of the products of queries and keys.
      softcap: scaled products x become `softcap * tanh(x / softcap)`; None leaves them.
    """

    causal: bool
    window: int | None
    q_offset: int | None
    scale: float
    softcap: float | None

    def reach(self, nearest: np.ndarray | Array, farthest: np.ndarray | Array) -> tuple:
        """Of pairs whose distances, query less key, run from `nearest` to `farthest`: whether any, and whether all attend."""
        some, every = True, True
        if self.causal:
            some, every = some & (farthest >= 0), every & (nearest >= 0)
        if self.window is not None:
            some = some & (nearest < self.window) & (farthest > -self.window)
            every = every & (farthest < self.window) & (nearest > -self.window)
        return some, every


class AttentionMask(NamedTuple):
    """The arrays that decide which pairs attend, and their distance penalty. None where a call has none.

    Attributes:
      q_offset: position of each row's first query, where it is not static; of length 1 where all rows agree.
      kv_positions: positions of the keys where they are not 0, 1, 2, ...
      segment_ids: of queries and of keys; a pair attends only where they are equal and not negative.
      alibi_slopes: each head's penalty per position of distance.
    """

    q_offset: Int[Array, "#B"] | None
    kv_positions: Int[Array, "S"] | None
    segment_ids: tuple[Int[Array, "#B T"], Int[Array, "#B S"]] | None
    alibi_slopes: Float[Array, "H"] | None

    @property
    def known_positions(self) -> bool:
        """Whether all positions are known when the program is compiled."""
        return self.q_offset is None and self.kv_positions is None


class Blocks(NamedTuple):
    """A sequence of `length` tokens cut into `count` blocks of `size`; the last one may stand over the end."""

    length: int
    size: int

    @property
    def count(self) -> int:
        return -(-self.length // self.size)

    def tokens(self) -> np.ndarray:
        """Indices `[count, size]`; those over the end repeat the last token."""
        return np.minimum(np.arange(self.count * self.size), self.length - 1).reshape(self.count, self.size)


def distances(
    spec: AttentionSpec, mask: AttentionMask, queries: Int[Array, "t"], keys: Int[Array, "s"]
) -> Int[Array, "#B t s"]:
    """Position of each query less that of each key, of the tokens with these indices."""
    offset = jnp.asarray(spec.q_offset).reshape(1) if mask.q_offset is None else mask.q_offset
    k_at = keys if mask.kv_positions is None else mask.kv_positions[keys]
    return (offset[:, None] + queries)[:, :, None] - k_at


def visible(spec: AttentionSpec, mask: AttentionMask, queries: Int[Array, "t"], keys: Int[Array, "s"]) -> Bool[Array, "#B t s"]:
    """Which of the pairs of these tokens attend."""
    distance = distances(spec, mask, queries, keys)
    seen = jnp.broadcast_to(spec.reach(distance, distance)[0], distance.shape)
    if mask.segment_ids is not None:
        q_ids, k_ids = mask.segment_ids[0][:, queries, None], mask.segment_ids[1][:, None, keys]
        seen = seen & (q_ids == k_ids) & (k_ids >= 0)
    return seen


def static_blocks(spec: AttentionSpec, mask: AttentionMask, queries: Blocks, keys: Blocks) -> tuple[np.ndarray, np.ndarray]:
    """What is known at compile time of pairs of blocks, `[query blocks, key blocks]`: whether any pair in them may attend,
    and whether all of them do."""
    shape = (queries.count, keys.count)
    if not mask.known_positions:
        return np.ones(shape, bool), np.zeros(shape, bool)
    q_at, k_at = queries.tokens() + spec.q_offset, keys.tokens()
    some, every = spec.reach(q_at[:, :1] - k_at[:, -1], q_at[:, -1:] - k_at[:, 0])
    return np.broadcast_to(some, shape), np.broadcast_to(every & (mask.segment_ids is None), shape)


def live_blocks(spec: AttentionSpec, mask: AttentionMask, queries: Blocks, keys: Blocks) -> Bool[Array, "#B q k"]:
    """Whether any pair in a pair of blocks may attend, by the range of positions and of segment ids that each block holds.

    Never False where a pair attends; exact where ids never fall along a row."""
    nearest, farthest = _extremes(spec, mask, queries, keys)
    live = jnp.broadcast_to(spec.reach(nearest, farthest)[0], nearest.shape)
    if mask.segment_ids is not None:
        (q_low, q_high), (k_low, k_high) = _id_ranges(mask, queries, keys)
        live = live & (q_high >= jnp.maximum(k_low, 0)) & (q_low <= k_high)
    return live


def whole_blocks(spec: AttentionSpec, mask: AttentionMask, queries: Blocks, keys: Blocks) -> Bool[Array, "#B q k"]:
    """Whether all pairs in a pair of blocks attend: exactly."""
    nearest, farthest = _extremes(spec, mask, queries, keys)
    whole = jnp.broadcast_to(spec.reach(nearest, farthest)[1], nearest.shape)
    if mask.segment_ids is not None:
        (q_low, q_high), (k_low, k_high) = _id_ranges(mask, queries, keys)
        whole = whole & (k_low >= 0) & (q_low == q_high) & (k_low == k_high) & (q_low == k_low)
    return whole


def _extremes(
    spec: AttentionSpec, mask: AttentionMask, queries: Blocks, keys: Blocks
) -> tuple[Int[Array, "#B q k"], Int[Array, "#B q k"]]:
    """The least and the greatest distance of the pairs in each pair of blocks."""
    q_tokens, k_tokens = queries.tokens(), keys.tokens()
    offset = jnp.asarray(spec.q_offset).reshape(1) if mask.q_offset is None else mask.q_offset
    q_first, q_last = (offset[:, None, None] + q_tokens[:, edge, None] for edge in (0, -1))
    k_at = k_tokens if mask.kv_positions is None else mask.kv_positions[k_tokens]
    return q_first - k_at.max(axis=1), q_last - k_at.min(axis=1)


def _id_ranges(mask: AttentionMask, queries: Blocks, keys: Blocks) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """The least and the greatest segment id of each block of queries `[#B, q, 1]`, and of keys `[#B, 1, k]`."""
    q_ids, k_ids = (ids[:, blocks.tokens()] for ids, blocks in zip(mask.segment_ids, (queries, keys)))
    q_range, k_range = ((ids.min(axis=2), ids.max(axis=2)) for ids in (q_ids, k_ids))
    return tuple(a[:, :, None] for a in q_range), tuple(a[:, None] for a in k_range)
