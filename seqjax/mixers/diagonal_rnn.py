"""What recurrences share whose features do not mix within a step: an inner width, a short convolution, a state."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import chex
import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from seqjax.config import ConfigError
from seqjax.layers.convolution import ShortConvolution
from seqjax.layers.dense import Dense
from seqjax.mixers.base import Costs, Mixer
from seqjax.ops.convolution import Tail
from seqjax.ops.segments import SegmentState, segments


@chex.dataclass(frozen=True)
class DiagonalRecurrenceState:
    """The last inputs of the convolution, the cell's state in at least float32, and the current segment."""

    convolution: Tail
    cell: Any
    segment: SegmentState


class Before(NamedTuple):
    """What a call continues from, and where segments start in it."""

    cell: Any
    tail: Tail | None
    starts: Bool[Array, "B L"] | None
    opens: Bool[Array, "#B L"]  # first tokens of their segments
    runs: Int[Array, "B L"] | None
    segment: SegmentState  # after the call


class DiagonalRecurrence(Mixer):
    """A mixer whose state is `components` arrays of the inner width.

    Attributes:
      expand: inner width, in units of `embed_dim`.
      conv_width: taps of the depthwise convolution before the recurrence; 1 leaves it out.
      conv_bias: of the convolution.
    """

    expand: int = 1
    conv_width: int = 4
    conv_bias: bool = True

    components: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("expand", "conv_width"):
            if getattr(self, key) < 1:
                raise ConfigError(f"model.{key}={getattr(self, key)} is not positive; allowed: 1 and above.")

    @property
    def inner(self) -> int:
        return self.expand * self.embed_dim

    @property
    def convolved(self) -> int:
        """Width that the convolution works at."""
        return self.inner

    @property
    def wide(self) -> Any:
        return jnp.promote_types(self.param_dtype, jnp.float32)

    def located(self, x: Array, state: DiagonalRecurrenceState | None, segment_ids: Array | None) -> Before:
        before = SegmentState.fresh(1 if segment_ids is None else x.shape[0]) if state is None else state.segment
        found, after = segments(segment_ids, before, x.shape[1])
        starts = None if segment_ids is None else found.starts
        runs = None if segment_ids is None and state is None else jnp.broadcast_to(found.runs, x.shape[:2])
        cell, tail = (self.zeros(x.shape[0]), None) if state is None else (state.cell, state.convolution)
        return Before(cell, tail, starts, found.positions == 0, runs, after)

    def convolve(self, u: Float[Array, "B L E"], before: Before) -> tuple[Float[Array, "B L E"], Tail | None]:
        if self.conv_width == 1:
            return u, before.tail
        convolution = ShortConvolution(self.conv_width, 0, self.conv_bias, self.param_dtype, name="conv")
        return convolution(u, runs=before.runs, tail=before.tail)

    def dense(self, name: str, features: int | tuple, axes: tuple, **options: Any) -> Dense:
        return Dense(features, axes, dtype=self.dtype, param_dtype=self.param_dtype, name=name, **options)

    @nn.nowrap
    def zeros(self, batch_size: int) -> Any:
        parts = tuple(jnp.zeros((batch_size, self.inner), self.wide) for _ in range(self.components))
        return parts if self.components > 1 else parts[0]

    @nn.nowrap
    def init_state(self, batch_size: int, max_length: int) -> DiagonalRecurrenceState:
        return DiagonalRecurrenceState(
            convolution=Tail.fresh(batch_size, self.conv_width - 1, self.convolved, self.dtype),
            cell=self.zeros(batch_size),
            segment=SegmentState.fresh(batch_size),
        )

    @nn.nowrap
    def frame_costs(self, length: int) -> Costs:
        """Of the convolution, and the state."""
        taps = self.conv_width if self.conv_width > 1 else 0
        tail = self.convolved * jnp.dtype(self.dtype).itemsize + 4
        return Costs(
            parameters=(taps + (self.conv_bias and taps > 0)) * self.convolved,
            flops=2 * length * taps * self.convolved,
            state_bytes=(self.conv_width - 1) * tail + self.components * self.inner * jnp.dtype(self.wide).itemsize + 12,
        )
