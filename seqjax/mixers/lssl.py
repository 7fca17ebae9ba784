"""LSSL: linear state-space layers with a dense state matrix."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from seqjax.config import ConfigError, choose
from seqjax.mixers.state_space import ContinuousMixer
from seqjax.ops.discretization import discretize_dense
from seqjax.ops.hippo import Quasiseparable, hippo, quasiseparable, tridiagonal_family
from seqjax.ops.state_space import DenseSystem
from seqjax.registry import register_mixer


@register_mixer("lssl")
class LSSL(ContinuousMixer):
    """Linear state-space layer (Gu et al. 2021): `x' = A x + B u`, generalised bilinear transform, `y = C x + D u`.

    The parallel face convolves with `C A^l B` from Krylov vectors by doubling; the carried one steps the dense recurrence.
    Each call solves a small dense system per feature: on CPU set OPENBLAS_NUM_THREADS=1, as the entry points do, for
    OpenBLAS's threads and XLA's can take a thousand times as long against one another.

    Attributes:
      measure: of the HiPPO matrix that A starts as: "legs", "legt" or "lagt".
      learn: "none" fixes A, B and the time steps (the paper's LSSL-f), "dt" trains the steps, "all" also A, as
        `-P (D + T^(-1)) Q` with T tridiagonal (theorem 2's quasiseparable family), shared by all features.
      alpha: of the generalised bilinear transform: 0.5 bilinear, 1 backward Euler, 0 Euler.
    """

    measure: str = "legs"
    learn: str = "all"
    alpha: float = 0.5
    output: str = "linear"

    even_state = False
    optimizer_groups = (("/(log_dt|sub|diagonal|super|left|right|scale|b)$", "state_space"),)

    def __post_init__(self) -> None:
        super().__post_init__()
        choose(dict.fromkeys(("legs", "legt", "lagt")), self.measure, "model.measure")
        choose(dict.fromkeys(("none", "dt", "all")), self.learn, "model.learn")
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"model.alpha={self.alpha} is out of range; allowed: 0 (Euler) to 1 (backward Euler).")
        if self.learn == "none" or self.alpha < 0.5:
            self._check_stable()

    def _check_stable(self) -> None:
        """An A that stays as it starts, or a transform that does not keep every stable A stable, is checked at once."""
        a, _ = hippo(self.measure, self.state_dim)
        eigenvalues = np.linalg.eigvals(a)
        step = self.dt_max * self.resample * eigenvalues
        largest = np.abs((1 + (1 - self.alpha) * step) / (1 - self.alpha * step)).max()
        if largest > 1 + 1e-9:
            raise ConfigError(
                f"model.alpha={self.alpha} with model.dt_max={self.dt_max} makes A unstable: a step multiplies a state by up "
                f"to {largest:.3g}; allowed: alpha of 0.5 and above, or dt_max below {2 / np.abs(eigenvalues).max():.2g}."
            )

    def system(self) -> DenseSystem:
        a, b = self._continuous()
        dt = self._fixed_steps() if self.learn == "none" else self.time_steps(self.embed_dim)
        matrix, inputs = discretize_dense(a, b, dt, "bilinear", alpha=self.alpha)
        shape = (self.outputs_per_feature, self.embed_dim, self.state_dim)
        outputs = self.vector("c", jax.nn.initializers.normal(1.0), shape, (None, "embed", "state"))
        return DenseSystem(matrix, inputs, outputs.astype(self.wide))

    def _continuous(self) -> tuple[Array, Array]:
        """A `[N, N]` and B `[N]`."""
        start = tridiagonal_family(self.measure, self.state_dim)
        if self.learn != "all":
            return tuple(jnp.asarray(part, self.wide) for part in hippo(self.measure, self.state_dim))
        names = {"sub": "sub", "diagonal": "diagonal", "super": "super", "P": "left", "Q": "right", "D": "scale", "b": "b"}

        def parameter(field: str) -> Array:
            value = getattr(start, field)
            init = lambda key, shape, dtype: jnp.asarray(value, dtype)
            return self.vector(names[field], init, value.shape, ("state",)).astype(self.wide)

        return quasiseparable(Quasiseparable(**{field: parameter(field) for field in Quasiseparable._fields}))

    def _fixed_steps(self) -> Array:
        """The median steps of as many features: log-uniform quantiles, no parameter."""
        quantiles = (np.arange(self.embed_dim) + 0.5) / self.embed_dim
        low, high = math.log(self.dt_min), math.log(self.dt_max)
        return jnp.asarray(self.resample * np.exp(low + quantiles * (high - low)), self.wide)

    def system_parameters(self) -> int:
        trained = {"none": 0, "dt": self.embed_dim, "all": self.embed_dim + 7 * self.state_dim - 2}
        return trained[self.learn] + self.outputs_per_feature * self.embed_dim * self.state_dim

    def setup_flops(self) -> int:
        return 2 * self.embed_dim * self.state_dim**2 * (self.state_dim + 4)  # a solve per feature

    def step_flops(self) -> int:
        return self.embed_dim * self.state_dim * (2 * self.state_dim + 2 + 2 * self.channels)

    def kernel_flops(self, length: int) -> int:
        fine = max(1, 1 << (math.isqrt(max(length - 1, 1)).bit_length()))
        squarings = math.ceil(math.log2(fine)) + math.ceil(math.log2(max(1, -(-length // fine))))
        n, m = self.state_dim, self.outputs_per_feature
        vectors = fine + m * -(-length // fine)
        return 2 * self.embed_dim * n * (squarings * n * n + vectors * n + m * length)

    def empty_state(self, batch_size: int) -> Array:
        return jnp.zeros((batch_size, self.embed_dim, self.state_dim), self.wide)
