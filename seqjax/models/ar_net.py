"""AR-Net: the linear autoregression, with sparse coefficients found by gradient descent."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seqjax.config import ConfigError, choose
from seqjax.mixers.base import Costs
from seqjax.models.base import DTYPES
from seqjax.models.heads import ending_at_last
from seqjax.models.series import check_series, series_rows
from seqjax.ops.segments import SegmentState, segments
from seqjax.registry import register_architecture

STEEPNESS, ROOT = 3.0, 3.0  # c_1 and c_2 of the paper's regulariser
SMALLEST = 1e-4  # weights this near 0 are pulled no further: there the regulariser's derivative grows beyond bounds


class ARNetState(NamedTuple):
    """The last `order - 1` inputs, oldest first, in at least float32; and the current segment."""

    tail: Float[Array, "B P C"]
    segment: SegmentState


@register_architecture("ar_net", example={"input_dim": 3, "order": 6}, inputs=("continuous",))
class ARNet(nn.Module):
    """Linear autoregression of order p by gradient descent (Triebe et al. 2019, "AR-Net").

    With weights `theta` `[T, p]`, the same for every channel, `theta[:, i]` on the input i steps before the newest:

    - head "regression": for every token the next value, `y_t = sum_i theta[0, i] x_(t-i) + b`, `[B, L, C]`;
    - head "forecast": from a window the next T = `horizon` values, `[B, T, C]`, all from its last p inputs.

    Inputs before a segment's start count as 0. The regulariser of the paper is sown in `losses`:
    `regularization (1 / sparsity - 1) R(theta)`, `R = mean(2 / (1 + exp(-c_1 |theta|^(1 / c_2))) - 1)`, `c_1 = c_2 = 3`.

    Attributes:
      order: p.
      input_dim: channels C.
      head: "regression" or "forecast"; horizon: steps of a forecast.
      use_bias: learn `b`, one for each step.
      sparsity: expected share of weights that are not 0, above 0; 1 does not regularise.
      regularization: strength of the regulariser; the paper takes a hundredth of the noise's standard deviation.
      series_norm: of forecasts, see `seqjax.models.series`.
      dtype: of the computation, "float32", "bfloat16" or "float64"; param_dtype: of the parameters.
    """

    order: int
    input_dim: int | None = None
    head: str = "regression"
    horizon: int = 1
    use_bias: bool = True
    sparsity: float = 1.0
    regularization: float = 0.01
    series_norm: str = "none"
    dtype: str = "float32"
    param_dtype: str = "float32"

    vocab_size: ClassVar[None] = None
    causal: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        choose({"regression": 0, "forecast": 0}, self.head, "model.head")
        if self.input_dim is None:
            raise ConfigError("model.input_dim was not given: ar_net takes continuous inputs of so many channels, not tokens.")
        for key in ("order", "input_dim", "horizon"):
            if getattr(self, key) < 1:
                raise ConfigError(f"model.{key}={getattr(self, key)} is not positive; allowed: 1 and above.")
        if not 0.0 < self.sparsity <= 1.0:
            raise ConfigError(f"model.sparsity={self.sparsity} is out of range; allowed: above 0.0, up to 1.0.")
        if self.regularization < 0:
            raise ConfigError(f"model.regularization={self.regularization} is negative; allowed: 0.0 and above.")
        check_series(self.series_norm, False, self.head, self.input_dim)
        for key in ("dtype", "param_dtype"):
            choose(DTYPES, getattr(self, key), f"model.{key}")

    @property
    def forecasts(self) -> bool:
        return self.head == "forecast"

    @property
    def steps(self) -> int:
        """T: how many values are predicted at once."""
        return self.horizon if self.forecasts else 1

    @nn.compact
    def __call__(
        self,
        inputs: Float[Array, "B L C"],
        state: ARNetState | None = None,
        *,
        segment_ids: Int[Array, "B L"] | None = None,
        train: bool = False,
    ) -> tuple[Array, ARNetState | None]:
        """Predictions, and the next state if one was given.

        Args:
          inputs: values; a window of `order` or more for the head "forecast".
          state: from `init_state`, or a previous call; for the head "regression".
          segment_ids: a new segment starts wherever the id changes; nothing crosses. 0 is padding of a window.
          train: sow the regulariser.
        """
        self._check_inputs(inputs, state)
        shape = (self.steps, self.order)
        kernel = self.param("kernel", _named(nn.initializers.zeros, 2), shape, self.param_dtype)
        bias = self.param("bias", _named(nn.initializers.zeros, 1), shape[:1], self.param_dtype) if self.use_bias else None
        if train and self.sparsity < 1:
            self.sow("losses", "sparsity", self.regularization * (1 / self.sparsity - 1) * sparsity_penalty(kernel))
        if self.forecasts:
            return self._forecast(inputs, segment_ids, kernel, bias), None
        before = self.init_state(inputs.shape[0], inputs.shape[1]) if state is None else state
        found, segment = segments(segment_ids, before.segment, inputs.shape[1])
        series = jnp.concatenate([before.tail, inputs.astype(before.tail.dtype)], axis=1)
        lags = jnp.arange(self.order)
        past = series[:, jnp.arange(inputs.shape[1])[:, None] + self.order - 1 - lags]
        past = jnp.where((found.positions[..., None] >= lags)[..., None], past, 0)  # [B, L, p, C]
        outputs = self._predict("blpc,tp->bltc", past, kernel, bias)[:, :, 0]
        if state is not None:
            state = ARNetState(series[:, inputs.shape[1] :], segment)
        return outputs, state

    def _forecast(self, inputs: Array, segment_ids: Array | None, kernel: Array, bias: Array | None) -> Float[Array, "B T C"]:
        rows, _, restore = series_rows(inputs, segment_ids, self.series_norm, channel_independent=False)
        rows = ending_at_last(rows, segment_ids)
        return restore(self._predict("bpc,tp->btc", rows[:, : -self.order - 1 : -1], kernel, bias))

    def _predict(self, sums: str, past: Array, kernel: Array, bias: Array | None) -> Array:
        predictions = jnp.einsum(sums, past.astype(self.dtype), kernel.astype(self.dtype))
        return predictions if bias is None else predictions + bias.astype(self.dtype)[:, None]

    @nn.nowrap
    def _check_inputs(self, inputs: Array, state: ARNetState | None) -> None:
        if inputs.ndim != 3 or inputs.shape[-1] != self.input_dim or not jnp.issubdtype(inputs.dtype, jnp.floating):
            takes = f"this model takes [B, L, C] floats with {self.input_dim} channels"
            raise ConfigError(f"inputs of shape {inputs.shape}, {inputs.dtype}: {takes}.")
        if self.forecasts and inputs.shape[1] < self.order:
            raise ConfigError(f"model.order={self.order} is longer than the window; allowed: up to {inputs.shape[1]}.")
        if self.forecasts and state is not None:
            self._refuse_state()

    @nn.nowrap
    def _refuse_state(self) -> None:
        raise ConfigError("model.head='forecast' reads the whole sequence at once, so the model carries no state.")

    @nn.nowrap
    def init_state(self, batch_size: int, max_length: int) -> ARNetState:
        """The state before the first token; its size does not depend on `max_length`.

        Raises:
          ConfigError: the head forecasts from whole windows.
        """
        if self.forecasts:
            self._refuse_state()
        shape = (batch_size, self.order - 1, self.input_dim)
        return ARNetState(jnp.zeros(shape, jnp.promote_types(self.dtype, jnp.float32)), SegmentState.fresh(batch_size))

    @nn.nowrap
    def costs(self, length: int) -> Costs:
        """Parameters, FLOPs and state of one sequence of `length` tokens."""
        parameters = self.steps * (self.order + self.use_bias)
        flops = 2 * self.steps * self.order * self.input_dim
        if self.forecasts:
            return Costs(parameters=parameters, flops=flops)
        tail = (self.order - 1) * self.input_dim * jnp.promote_types(self.dtype, jnp.float32).itemsize
        return Costs(parameters=parameters, flops=flops * length, state_bytes=tail + 12)


def sparsity_penalty(weights: Float[Array, "T P"]) -> Float[Array, ""]:
    """`R(theta)` of AR-Net: about the share of weights that are not 0. It sees no weight nearer to 0 than SMALLEST."""
    magnitudes = jnp.maximum(jnp.abs(weights.astype(jnp.promote_types(weights.dtype, jnp.float32))), SMALLEST)
    return jnp.mean(2.0 * jax.nn.sigmoid(STEEPNESS * magnitudes ** (1.0 / ROOT)) - 1.0)


def _named(initializer: nn.initializers.Initializer, axes: int) -> nn.initializers.Initializer:
    """Parameters are few: no axis is split over devices."""
    return nn.with_logical_partitioning(initializer, (None,) * axes)
