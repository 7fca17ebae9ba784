"""Gated linear attention: a decay for each channel of the keys, made of the token."""

from __future__ import annotations

import flax.linen as nn
import jax
from jaxtyping import Array

from seqjax.config import ConfigError
from seqjax.layers.dense import Dense
from seqjax.layers.feature_maps import FEATURE_MAPS
from seqjax.mixers.base import Costs
from seqjax.mixers.linear_attention import MatrixStateMixer
from seqjax.registry import register_mixer


@register_mixer("gla")
class GLA(MatrixStateMixer):
    """Gated linear attention (Yang et al. 2023, section 4): `S_t = diag(alpha_t) S_(t-1) + k_t v_t^T`.

    `alpha = sigmoid(x W_1 W_2 + b)^(1 / tau)`, then `W_o (silu(x W_g) * norm(y))`.

    Attributes:
      gate_rank: of `W_1 W_2`.
      gate_temperature: tau, which divides the logarithm; larger remembers longer.
    """

    expand_k: float = 0.5
    output_gate: str | None = "silu"
    gate_rank: int = 16
    gate_temperature: float = 16.0

    kernel_init = staticmethod(nn.initializers.variance_scaling(2.0**-5, "fan_avg", "uniform"))
    channel_decay = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gate_rank < 1:
            raise ConfigError(f"model.gate_rank={self.gate_rank} is not positive; allowed: 1 and above.")
        if not self.gate_temperature > 0:
            raise ConfigError(f"model.gate_temperature={self.gate_temperature} is not positive; allowed: above 0.")

    @property
    def _decays(self) -> int:
        """Channels of a head that decay: those of the image of the keys."""
        return FEATURE_MAPS[self.feature_map].width(self.key_dim)

    def log_decay(self, x: Array) -> Array:
        types = {"dtype": self.wide, "param_dtype": self.param_dtype, "kernel_init": self.kernel_init}
        low = Dense(self.gate_rank, ("embed", None), use_bias=False, name="decay_in", **types)(x)
        up = Dense((self.num_heads, self._decays), (None, "heads", "head_dim"), name="decay_out", **types)
        return jax.nn.log_sigmoid(up(low)) / self.gate_temperature

    @nn.nowrap
    def costs(self, length: int) -> Costs:
        channels = self.num_heads * self._decays
        up = Costs(parameters=(self.gate_rank + 1) * channels, flops=2 * length * self.gate_rank * channels)
        return super().costs(length) + self.map_costs(length, self.gate_rank) + up
