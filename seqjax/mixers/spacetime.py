"""SpaceTime: state spaces with companion matrices."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from seqjax.mixers.state_space import StateSpaceMixer
from seqjax.ops.state_space import CompanionSystem
from seqjax.registry import register_mixer


@register_mixer("spacetime")
class SpaceTime(StateSpaceMixer):
    """Companion state spaces (Zhang et al. 2023): `A` has ones below the diagonal and a free last column a.

    A system of order N holds every autoregression and every moving average of order below N. The head "closed_loop" makes
    forecasts of the same systems.

    Attributes:
      normalize: divide a by the sum of its absolute values, as the authors do, so that no mode grows.
    """

    state_dim: int = 16
    normalize: bool = True
    output: str = "linear"

    even_state = False
    optimizer_groups = (("/(last_column|b)$", "state_space"),)

    def system(self) -> CompanionSystem:
        shape, axes = (self.state_dim, self.embed_dim), ("state", "embed")
        normal = nn.initializers.normal(1.0)
        a = self.vector("last_column", normal, shape, axes).astype(self.wide)
        b = self.vector("b", normal, shape, axes).astype(self.wide)
        c = self.vector("c", normal, (self.outputs_per_feature, *shape), (None, *axes)).astype(self.wide)
        return CompanionSystem(unit_sum(a) if self.normalize else a, b, c)

    def system_parameters(self) -> int:
        return (2 + self.outputs_per_feature) * self.state_dim * self.embed_dim

    def step_flops(self) -> int:
        return (4 + 2 * self.channels) * self.state_dim * self.embed_dim

    def kernel_flops(self, length: int) -> int:
        per_feature = 30 * (length + self.state_dim) * max(1, (2 * length).bit_length())
        return self.embed_dim * per_feature * (1 + self.outputs_per_feature) // 2

    def empty_state(self, batch_size: int) -> Array:
        return jnp.zeros((batch_size, self.state_dim, self.embed_dim), self.wide)


def unit_sum(a: Float[Array, "N D"]) -> Float[Array, "N D"]:
    """Columns divided by the sum of their absolute values."""
    return a / jnp.sum(jnp.abs(a), axis=0)
