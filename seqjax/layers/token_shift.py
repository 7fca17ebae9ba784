"""Token shift: each token mixed with the one before it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seqjax.ops.segments import SegmentState, segments


class ShiftState(NamedTuple):
    """The last token, in the computation's dtype, and its segment."""

    token: Float[Array, "B D"]
    segment: SegmentState

    @classmethod
    def fresh(cls, batch_size: int, width: int, dtype: Any) -> ShiftState:
        return cls(jnp.zeros((batch_size, width), dtype), SegmentState.fresh(batch_size))


def shift_tokens(
    x: Float[Array, "B L D"], state: ShiftState | None, segment_ids: Int[Array, "B L"] | None
) -> tuple[Float[Array, "B L D"], Array | None, ShiftState]:
    """The token before each, zeros for the first of a segment; where segments start (None without ids); the next state."""
    if state is None:
        state = ShiftState.fresh(x.shape[0], x.shape[-1], x.dtype)
    found, segment = segments(segment_ids, state.segment, x.shape[1])
    before = jnp.concatenate([state.token[:, None].astype(x.dtype), x[:, :-1]], axis=1)
    starts = None if segment_ids is None else found.starts
    if starts is not None:
        before = jnp.where(starts[..., None], 0, before)
    return before, starts, ShiftState(x[:, -1], segment)
