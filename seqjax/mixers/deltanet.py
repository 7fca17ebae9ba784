"""Linear attention by the delta rule, with and without a decay."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from seqjax.config import ConfigError
from seqjax.mixers.base import Costs
from seqjax.mixers.linear_attention import MatrixStateMixer
from seqjax.mixers.mamba import step_bias
from seqjax.mixers.state_space import check_step_range
from seqjax.registry import register_mixer


@register_mixer("deltanet")
class DeltaNet(MatrixStateMixer):
    """DeltaNet (Schlag et al. 2021; Yang et al. 2024): `S_t = S_(t-1) (I - beta_t k_t k_t^T) + beta_t v_t k_t^T`.

    Queries, keys and values go through a short convolution and a SiLU, queries and keys are then scaled to length 1;
    `beta = sigmoid(x W_b)`. Then `W_o norm(y)`.

    Attributes:
      negative_eigenvalues: beta reaches 2, so that a token may reflect the state: what parity and permutations need
        (Grazzi et al. 2024).
    """

    conv_width: int = 4
    feature_map: str = "silu"
    qk_norm: str = "l2"
    negative_eigenvalues: bool = False

    value_map = "silu"
    delta_rule = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.qk_norm == "none":
            raise ConfigError("model.qk_norm='none' lets states of the delta rule grow without bound; allowed: l2, sum.")

    def write_strength(self, x: Array) -> Array:
        return (1 + self.negative_eigenvalues) * jax.nn.sigmoid(self.per_head("beta", x))

    @nn.nowrap
    def costs(self, length: int) -> Costs:
        return super().costs(length) + self.map_costs(length, self.num_heads)


@register_mixer("gated_deltanet")
class GatedDeltaNet(DeltaNet):
    """Gated DeltaNet (Yang et al. 2025): the state of DeltaNet decays by alpha before it is read and written.

    `log alpha = -exp(a_log) softplus(x W_a + dt_bias)` per head, as in Mamba-2. Then `W_o (silu(x W_g) * norm(y))`.

    Attributes:
      dt_min, dt_max: range of the initial steps, one per head, log-uniform.
    """

    expand_k: float = 0.75
    expand_v: float = 1.5
    output_gate: str | None = "silu"
    dt_min: float = 0.001
    dt_max: float = 0.1

    optimizer_groups = (("/(a_log|dt_bias)$", "state_space"),)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_step_range(self.dt_min, self.dt_max)

    def log_decay(self, x: Array) -> Array:
        steps = jax.nn.softplus(self.per_head("decay", x) + self._parameter("dt_bias", step_bias(self.dt_min, self.dt_max)))
        return -jnp.exp(self._parameter("a_log", _log_rates)) * steps

    def _parameter(self, name: str, init: nn.initializers.Initializer) -> Array:
        boxed = nn.with_logical_partitioning(init, ("heads",))
        return self.param(name, boxed, (self.num_heads,), self.param_dtype).astype(self.wide)

    @nn.nowrap
    def costs(self, length: int) -> Costs:
        return super().costs(length) + self.map_costs(length, self.num_heads) + Costs(parameters=2 * self.num_heads)


def _log_rates(key: Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> Array:
    """Rates uniform from 0 to 16, as the authors draw them; not quite 0, which has no logarithm."""
    return jnp.log(jax.random.uniform(key, shape, dtype, 1e-4, 16.0))
