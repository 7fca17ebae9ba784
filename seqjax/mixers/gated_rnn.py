"""GRU and LSTM: nonlinear recurrences whose features mix at every step, so that tokens follow one another."""

from __future__ import annotations

from typing import Any, ClassVar

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from seqjax.config import ConfigError
from seqjax.layers.dense import Dense, scaled_init
from seqjax.mixers.base import Costs, Mixer
from seqjax.ops.cells import gru_cell, lstm_cell
from seqjax.ops.recurrence import recurrence
from seqjax.ops.segments import SegmentState, segments
from seqjax.registry import register_mixer


@chex.dataclass(frozen=True)
class RecurrentState:
    """The cell's state in at least float32, and the segment that the next token may continue."""

    cell: Any
    segment: SegmentState


class GatedRecurrence(Mixer):
    """What both share: one map of the inputs to all gates, the recurrence, a map back to the residual stream.

    Attributes:
      hidden_dim: width of the state; None is `embed_dim`.
    """

    hidden_dim: int | None = None

    gates: ClassVar[int]
    components: ClassVar[int]
    """Arrays in the cell's state."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_dim is not None and self.hidden_dim < 1:
            raise ConfigError(f"model.hidden_dim={self.hidden_dim} is not positive; allowed: 1 and above.")

    @property
    def width(self) -> int:
        return self.hidden_dim or self.embed_dim

    @property
    def wide(self) -> Any:
        return jnp.promote_types(self.param_dtype, jnp.float32)

    @nn.compact
    def __call__(self, x, state=None, *, segment_ids=None, train=False):
        before = SegmentState.fresh(1 if segment_ids is None else x.shape[0]) if state is None else state.segment
        found, after = segments(segment_ids, before, x.shape[1])
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        shape = (self.gates, self.width)
        inputs = Dense(shape, ("embed", None, "mlp"), use_bias=False, name="in", **types)(x).astype(self.wide)
        inputs = inputs + self.parameter("bias", self.initial_bias, shape, (None, "mlp"))
        weights = self.parameter("recurrent", _orthogonal, (self.width, *shape), (None, None, "mlp"))
        cell = self.zeros(x.shape[0]) if state is None else state.cell
        hidden, cell = self.run(weights, cell, inputs, None if segment_ids is None else found.starts)
        init = scaled_init(self.residual_init)
        y = Dense(self.embed_dim, ("mlp", "embed"), kernel_init=init, name="out", **types)(hidden.astype(self.dtype))
        return y, None if state is None else RecurrentState(cell=cell, segment=after)

    def run(self, weights: Array, cell: Any, inputs: Array, starts: Array | None) -> tuple[Float[Array, "B L E"], Any]:
        """Hidden states `[B, L, E]` and the cell's last state."""
        raise NotImplementedError

    @nn.nowrap
    def initial_bias(self, key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        return jnp.zeros(shape, dtype)

    def parameter(self, name: str, init: Any, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> Array:
        value = self.param(name, nn.with_logical_partitioning(init, axes), shape, self.param_dtype)
        return value.astype(self.wide)

    @nn.nowrap
    def zeros(self, batch_size: int) -> Any:
        parts = tuple(jnp.zeros((batch_size, self.width), self.wide) for _ in range(self.components))
        return parts if self.components > 1 else parts[0]

    @nn.nowrap
    def init_state(self, batch_size: int, max_length: int) -> RecurrentState:
        return RecurrentState(cell=self.zeros(batch_size), segment=SegmentState.fresh(batch_size))

    @nn.nowrap
    def costs(self, length: int) -> Costs:
        kernels = self.gates * self.width * (self.embed_dim + self.width) + self.width * self.embed_dim
        return Costs(
            parameters=kernels + self.gates * self.width + self.embed_dim,
            flops=2 * length * kernels,
            state_bytes=self.components * self.width * jnp.dtype(self.wide).itemsize + 12,
        )


@register_mixer("gru")
class GRU(GatedRecurrence):
    """Gated recurrent unit (Cho et al. 2014) with the reset gate after the matrix, `ops.cells.gru_cell`, and a map out."""

    gates = 3
    components = 1

    def run(self, weights, cell, inputs, starts):
        bias = self.parameter("recurrent_bias", nn.initializers.zeros, (self.width,), ("mlp",))
        return recurrence(gru_cell, (weights, bias), cell, inputs, starts=starts)

    @nn.nowrap
    def costs(self, length: int) -> Costs:
        return super().costs(length) + Costs(parameters=self.width)


@register_mixer("lstm")
class LSTM(GatedRecurrence):
    """Long short-term memory with a forget gate (Gers et al. 2000), `ops.cells.lstm_cell`, and a map out. The forget gate's
    bias starts at 1 (Jozefowicz et al. 2015)."""

    gates = 4
    components = 2

    def run(self, weights, cell, inputs, starts):
        return recurrence(lstm_cell, weights, cell, inputs, starts=starts)

    @nn.nowrap
    def initial_bias(self, key, shape, dtype):
        return jnp.zeros(shape, dtype).at[1].set(1)


def _orthogonal(key: Array, shape: tuple[int, int, int], dtype: Any) -> Array:
    """An orthogonal matrix for each gate."""
    width, gates, _ = shape
    draw = nn.initializers.orthogonal()
    return jnp.stack([draw(k, (width, width), dtype) for k in jax.random.split(key, gates)], axis=1)
