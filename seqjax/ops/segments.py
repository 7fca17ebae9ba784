"""Packed documents: where a segment starts, and what a row must remember to continue one.

A segment is a maximal run of equal ids, so `[1, 1, 2, 1]` holds three segments. Without ids, a row is one segment.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class SegmentState(NamedTuple):
    """What each row remembers between chunks. A fresh row has seen nothing and stands in segment id 0.

    Attributes:
      last_id: id of the last token seen.
      run: how many segments have started before that one, on this row.
      position: position within its segment that the next token takes if it continues it.
    """

    last_id: Int[Array, "B"]
    run: Int[Array, "B"]
    position: Int[Array, "B"]

    @classmethod
    def fresh(cls, batch_size: int) -> SegmentState:
        return cls(*(jnp.zeros((batch_size,), jnp.int32) for _ in range(3)))


class Segments(NamedTuple):
    """Per token: whether a segment starts here, which run of its row it is in, and its position within the segment."""

    starts: Bool[Array, "B L"]
    runs: Int[Array, "B L"]
    positions: Int[Array, "B L"]


def segments(segment_ids: Int[Array, "B L"] | None, state: SegmentState, length: int) -> tuple[Segments, SegmentState]:
    """Locate the segments of a chunk that follows `state`, and the state after it.

    Args:
      segment_ids: any integers; None continues each row's last segment.
      state: of the tokens before this chunk (`SegmentState.fresh` for none).
      length: L.
    """
    batch_size = state.last_id.shape[0]
    if segment_ids is None:
        shape = (batch_size, length)
        found = Segments(
            jnp.zeros(shape, bool),
            jnp.broadcast_to(state.run[:, None], shape),
            state.position[:, None] + jnp.arange(length),
        )
        return found, state._replace(position=state.position + length)
    ids = segment_ids.astype(jnp.int32)
    starts = ids != jnp.concatenate([state.last_id[:, None], ids[:, :-1]], axis=1)
    runs = _computed_once(state.run[:, None] + jnp.cumsum(starts, axis=1, dtype=jnp.int32))
    steps = jnp.arange(length, dtype=jnp.int32)
    last_start = jax.lax.cummax(jnp.where(starts, steps, -1), axis=1)
    positions = jnp.where(last_start >= 0, steps - last_start, state.position[:, None] + steps)
    return Segments(starts, runs, positions), SegmentState(ids[:, -1], runs[:, -1], positions[:, -1] + 1)


def reversed_starts(starts: Bool[Array, "B L"] | None) -> Bool[Array, "B L"] | None:
    """Where segments start when tokens run from the last to the first: at the last token of each but the last segment."""
    return None if starts is None else jnp.pad(jnp.flip(starts[:, 1:], 1), [(0, 0), (1, 0)])


def segment_ends(starts: Bool[Array, "B L"]) -> Bool[Array, "B L"]:
    """The last tokens of segments, given the first; the last segment ends with its row."""
    return jnp.pad(starts[:, 1:], [(0, 0), (0, 1)], constant_values=True)


def _computed_once(runs: Int[Array, "B L"]) -> Int[Array, "B L"]:
    """The same numbers. XLA for CPU fuses a running sum into every mask that reads it, and then takes it anew for every
    pair of tokens: a third of a training step. Runs are sorted already, and a sort is never fused."""
    return jax.lax.platform_dependent(runs, cpu=lambda r: jax.lax.sort(r, dimension=1), default=lambda r: r)
