"""SpaceTime: state spaces with companion matrices."""

from __future__ import annotations

import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from seqjax.mixers.s4d import check_num_systems
from seqjax.mixers.state_space import StateSpaceMixer
from seqjax.ops.companion import companion_columns, unit_sum
from seqjax.ops.state_space import CompanionSystem
from seqjax.registry import register_mixer

SHORTEST, LONGEST = 4, 63
"""Range of the windows of the preprocessing's moving averages."""


@register_mixer("spacetime")
class SpaceTime(StateSpaceMixer):
    """Companion state spaces (Zhang et al. 2023): `A` has ones below the diagonal and a free last column a.

    A system of order N holds every autoregression and every moving average of order below N. The head "closed_loop" makes
    forecasts of the same systems.

    Attributes:
      normalize: divide a by the sum of its absolute values, as the authors do, so that no mode grows. Signs that agree
        make an eigenvalue of exactly 1 (or alternate, -1); kernels are made inside the unit circle, so they stay exact.
      num_kernels: systems, each of which `embed_dim / num_kernels` neighbouring features share; None gives each its own.
      preprocess: filter the inputs first, as the authors' first layer, by `preprocessing(embed_dim)`, which does not train.
    """

    state_dim: int = 16
    normalize: bool = True
    num_kernels: int | None = None
    preprocess: bool = False
    output: str = "linear"

    even_state = False
    optimizer_groups = (("/(last_column|b)$", "state_space"),)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_num_systems(self.num_kernels, self.embed_dim, "num_kernels")

    @property
    def kernels(self) -> int:
        return self.num_kernels or self.embed_dim

    @property
    def order(self) -> int:
        """Of the system with its preprocessing."""
        return self.state_dim + self.preprocess * (LONGEST - 1)

    def system(self) -> CompanionSystem:
        shape, axes = (self.state_dim, self.kernels), ("state", "embed")
        normal = nn.initializers.normal(1.0)
        a = self.vector("last_column", normal, shape, axes).astype(self.wide)
        b = self.vector("b", normal, shape, axes).astype(self.wide)
        c = self.vector("c", normal, (self.outputs_per_feature, *shape), (None, *axes)).astype(self.wide)
        shared = self.embed_dim // self.kernels
        a, b, c = (jnp.repeat(v, shared, axis=-1) for v in (unit_sum(a) if self.normalize else a, b, c))
        system = CompanionSystem(a, b, c)
        return filtered(system, jnp.asarray(preprocessing(self.embed_dim), self.wide)) if self.preprocess else system

    def system_parameters(self) -> int:
        return (2 + self.outputs_per_feature) * self.state_dim * self.kernels

    def setup_flops(self) -> int:
        if not self.preprocess:
            return 0
        columns = self.order * self.state_dim * (2 + 2 * self.outputs_per_feature)
        return self.embed_dim * (columns + 2 * LONGEST * self.order * self.outputs_per_feature)

    def step_flops(self) -> int:
        return (4 + 2 * self.channels) * self.order * self.embed_dim

    def kernel_flops(self, length: int) -> int:
        outputs, nodes = self.outputs_per_feature, 2 * length + 1
        transform = lambda size: 2.5 * size * math.log2(size)
        transforms = (2 + 3 * outputs) * transform(4 * length) + (2 + 4 * outputs) * transform(2 * self.order)
        products = (3 + 4 * outputs) * nodes + (2 + 4 * outputs) * self.order
        return int(self.embed_dim * (transforms + products))

    def empty_state(self, batch_size: int) -> Array:
        return jnp.zeros((batch_size, self.order, self.embed_dim), self.wide)


def preprocessing(width: int) -> np.ndarray:
    """`[LONGEST, D]` taps of causal filters, newest input first: differences of order 0 to 3 and residuals of moving averages.

    Feature h has the difference of order `h mod 8` below 4, and a residual `u_t - mean(u_(t-m+1), ..., u_t)` above. The
    authors draw the windows m at random; here they grow geometrically over the residuals, from SHORTEST to LONGEST.
    """
    taps = np.zeros((LONGEST, width))
    kinds = np.arange(width) % 8
    for order in range(4):
        signed = [(-1) ** i * math.comb(order, i) for i in range(order + 1)]
        taps[: order + 1, kinds == order] = np.array(signed)[:, None]
    residuals = np.flatnonzero(kinds >= 4)
    for feature, window in zip(residuals, np.geomspace(SHORTEST, LONGEST, len(residuals)).round().astype(int)):
        taps[0, feature] = 1.0
        taps[:window, feature] -= 1 / window
    return taps


def filtered(system: CompanionSystem, taps: Float[Array, "T D"]) -> CompanionSystem:
    """The system of order `N + T - 1` that sees inputs through a filter: `system(sum_i taps_i u_(t-i))`.

    A shift register is a companion system as well, `a = 0`, and so is their chain: with `b = e_1` a system's outputs are
    the first lags of its kernel, and zeros before a multiply its characteristic polynomial by those of the register.
    """
    order = system.inputs.shape[0] + taps.shape[0] - 1
    columns = companion_columns(system.last_column, system.inputs, order)
    kernel = jnp.einsum("mnd,lnd->mld", system.outputs, columns, precision="highest")
    lags = np.arange(order)[:, None] - np.arange(taps.shape[0])
    past = jnp.where(lags[..., None] >= 0, kernel[:, np.maximum(lags, 0)], 0)  # [M, order, T, D]
    outputs = jnp.einsum("mltd,td->mld", past, taps, precision="highest")
    inputs = jnp.zeros((order, taps.shape[-1]), taps.dtype).at[0].set(1)
    last_column = jnp.pad(system.last_column, [(order - system.inputs.shape[0], 0), (0, 0)])
    return CompanionSystem(last_column, inputs, outputs)
