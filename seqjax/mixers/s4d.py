"""S4D: diagonal state-space systems."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from seqjax.config import ConfigError, choose
from seqjax.mixers.state_space import ContinuousMixer, complex_normal, constant, constant_pair
from seqjax.ops.complex_pairs import Pair, product, scale
from seqjax.ops.discretization import discretize_diagonal
from seqjax.ops.hippo import diagonal_init, diagonal_plus_low_rank
from seqjax.ops.state_space import DiagonalSystem
from seqjax.registry import register_mixer

SMALLEST_DECAY = 1e-15


def log_decay(a: Pair, dt: Array, method: str) -> tuple[Pair, Pair]:
    """Logarithm of the discrete decay, and the gain, of modes `a [N, D]` with steps `dt [D]`."""
    decay, gain = discretize_diagonal(a.real, a.imag, jnp.broadcast_to(dt, a.real.shape), method)
    if method == "zoh":
        return scale(a, dt), gain
    size = decay.real**2 + decay.imag**2
    gone = size < SMALLEST_DECAY**2  # a step of dt a = -2 forgets everything, and nothing has no logarithm
    real, imag = jnp.where(gone, SMALLEST_DECAY, decay.real), jnp.where(gone, 0, decay.imag)
    return Pair(0.5 * jnp.log(real**2 + imag**2), jnp.arctan2(imag, real)), gain


@register_mixer("s4d")
class S4D(ContinuousMixer):
    """Diagonal state spaces (Gu et al. 2022, "On the Parameterization and Initialization of Diagonal State Space Models").

    `K_l = 2 Re sum_n C_n B_n gain_n exp(l dt A_n)`, `A = -exp(a_log) - i a_imag`.

    Attributes:
      a_init: of A: "legs", "lin", "inv" (section 4), or "real" (`-(n + 1)`).
      discretization: "zoh" or "bilinear".
      num_systems: S copies of A, B; feature h uses copy `h mod S`. None gives each feature its own.
    """

    a_init: str = "legs"
    discretization: str = "zoh"
    num_systems: int | None = None

    optimizer_groups = (("/(log_dt|a_log|a_imag|b_real|b_imag)$", "state_space"),)

    def __post_init__(self) -> None:
        super().__post_init__()
        choose(dict.fromkeys(("legs", "lin", "inv", "real")), self.a_init, "model.a_init")
        choose(dict.fromkeys(("zoh", "bilinear")), self.discretization, "model.discretization")
        check_num_systems(self.num_systems, self.embed_dim)

    @property
    def systems(self) -> int:
        return self.num_systems or self.embed_dim

    @property
    def modes(self) -> int:
        return self.state_dim if self.a_init == "real" else self.state_dim // 2

    def system(self) -> DiagonalSystem:
        start = diagonal_init(self.a_init, self.state_dim)
        shape, axes = (self.modes, self.systems), ("state", "embed")
        a_log = self.vector("a_log", constant(np.log(-start.real)), shape, axes)
        real = -jnp.exp(a_log.astype(self.wide))
        dt = self.time_steps(self.embed_dim)
        channels = (self.outputs_per_feature, self.modes, self.embed_dim)
        if self.a_init == "real":
            a = Pair(real, jnp.zeros_like(real))
            c = self.vector("c_real", jax.nn.initializers.normal(1.0), channels, (None, *axes)).astype(self.wide)
            weights = Pair(c, jnp.zeros_like(c))
        else:
            a_imag = self.vector("a_imag", constant(-start.imag), shape, axes)
            a = Pair(real, -a_imag.astype(self.wide))
            b = self.pair("b", constant_pair(self._initial_inputs()), shape, axes)
            c = self.pair("c", complex_normal, channels, (None, *axes))
            weights = scale(product(tiled(b, self.embed_dim), c), 2.0)
        log_a, gain = log_decay(tiled(a, self.embed_dim), dt, self.discretization)
        return DiagonalSystem(log_a, product(gain, weights))

    def _initial_inputs(self) -> np.ndarray:
        """B at the start: ones, or for LegS that of its normal form, imaginary parts clipped to 2 as in the authors' code."""
        if self.a_init != "legs":
            return np.ones(self.modes, complex)
        b = diagonal_plus_low_rank("legs", self.state_dim).B
        return b.real + 1j * b.imag.clip(-2, 2)

    def system_parameters(self) -> int:
        per_system = 1 if self.a_init == "real" else 4
        per_output = 1 if self.a_init == "real" else 2
        outputs = self.outputs_per_feature * self.modes * self.embed_dim
        return per_system * self.modes * self.systems + per_output * outputs + self.embed_dim

    def setup_flops(self) -> int:
        return 140 * self.modes * self.embed_dim  # the series of the held input

    def step_flops(self) -> int:
        return (7 + 4 * self.channels) * self.modes * self.embed_dim

    def kernel_flops(self, length: int) -> int:
        return 4 * length * self.modes * self.embed_dim * self.outputs_per_feature

    def empty_state(self, batch_size: int) -> Pair:
        return Pair(*(jnp.zeros((batch_size, self.modes, self.embed_dim), self.wide) for _ in range(2)))


def tiled(a: Pair, width: int) -> Pair:
    """`[..., S]` repeated to `[..., width]`: feature h gets column `h mod S`."""
    repeat = lambda x: jnp.tile(x, (*(1,) * (x.ndim - 1), width // x.shape[-1]))
    return Pair(repeat(a.real), repeat(a.imag))


def check_num_systems(num_systems: int | None, width: int, option: str = "num_systems") -> None:
    """Raise a ConfigError unless the copies divide the features evenly."""
    if num_systems is not None and (num_systems < 1 or width % num_systems):
        fits = [s for s in range(1, width + 1) if width % s == 0]
        near = min(fits, key=lambda s: abs(s - num_systems))
        raise ConfigError(
            f"model.{option}={num_systems} does not divide model.embed_dim={width}; did you mean {near}? "
            f"Allowed: None, {', '.join(map(str, fits))}."
        )
