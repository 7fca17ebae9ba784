"""DSS: diagonal state spaces with kernels of all modes."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from seqjax.config import ConfigError, choose
from seqjax.mixers.state_space import ContinuousMixer, complex_normal, constant
from seqjax.ops.complex_pairs import Pair, product, scale
from seqjax.ops.discretization import discretize_diagonal
from seqjax.ops.hippo import diagonal_plus_low_rank
from seqjax.ops.state_space import DiagonalSystem
from seqjax.registry import register_mixer


@register_mixer("dss")
class DSS(ContinuousMixer):
    """Diagonal state spaces (Gupta, Gu and Berant 2022): `K_l = Re sum_n w_n x_n exp(l dt A_n)`, without conjugates.

    Attributes:
      state_dim: N, the number of complex modes (all are kept, so half a HiPPO matrix of 2 N starts them).
      kernel: "exp": `x_n = (exp(dt A_n) - 1) / A_n`, `A = -exp(a_log) + i a_imag` (proposition 1b); "softmax": `x_n`
        divides the mode by its sum over `kernel_length` lags and by `A_n`, whose real part is free (proposition 1a).
      kernel_length: lags that "softmax" sums over, and the longest sequence it takes.
    """

    kernel: str = "exp"
    kernel_length: int | None = None

    even_state = False
    optimizer_groups = (("/(log_dt|a_log|a_real|a_imag)$", "state_space"),)

    def __post_init__(self) -> None:
        super().__post_init__()
        choose(dict.fromkeys(("exp", "softmax")), self.kernel, "model.kernel")
        if (self.kernel == "softmax") != (self.kernel_length is not None) or (self.kernel_length or 1) < 1:
            raise ConfigError(
                f"model.kernel_length={self.kernel_length} with model.kernel={self.kernel!r}; allowed: 1 and above with "
                "kernel='softmax', which sums over so many lags, and None with 'exp'."
            )

    @nn.compact
    def __call__(self, x, state=None, *, segment_ids=None, train=False):
        self._check_length(x.shape[1])
        return super().__call__(x, state, segment_ids=segment_ids, train=train)

    def system(self) -> DiagonalSystem:
        start = diagonal_plus_low_rank("legs", 2 * self.state_dim).eigenvalues
        shape, axes = (self.state_dim, 1), ("state", None)
        a_imag = self.vector("a_imag", constant(start.imag), shape, axes).astype(self.wide)
        if self.kernel == "exp":
            real = -jnp.exp(self.vector("a_log", constant(np.log(-start.real)), shape, axes).astype(self.wide))
        else:
            real = self.vector("a_real", constant(start.real), shape, axes).astype(self.wide)
        dt = self.time_steps(self.embed_dim)
        a = Pair(*(jnp.broadcast_to(part, (self.state_dim, self.embed_dim)) for part in (real, a_imag)))
        channels = (self.outputs_per_feature, self.state_dim, self.embed_dim)
        w = self.pair("w", complex_normal, channels, (None, "state", "embed"))
        step = scale(a, dt)
        if self.kernel == "exp":
            return DiagonalSystem(step, product(discretize_diagonal(*a, jnp.broadcast_to(dt, a.real.shape), "zoh")[1], w))
        return DiagonalSystem(step, product(self._softmax_gain(a, step), w))

    def _softmax_gain(self, a: Pair, step: Pair) -> Pair:
        """`1 / (A sum_(l < L) exp(l dt A))`: `(exp(dt A) - 1) / (A (exp(L dt A) - 1))`, for growing modes (positive real
        parts) times `exp((L - 1) dt A) / exp((L - 1) dt A)`, so that nothing overflows."""
        last = self.kernel_length - 1
        # The geometric sum by lags, stable for both signs: the largest term is factored out and left in the decay.
        growth = jnp.maximum(step.real, 0) * last
        lags = jnp.arange(self.kernel_length, dtype=step.real.dtype)[:, None, None]
        sizes, angles = jnp.exp(lags * step.real - growth), lags * step.imag
        total = Pair((sizes * jnp.cos(angles)).sum(0), (sizes * jnp.sin(angles)).sum(0))
        return scale(_guarded_reciprocal(product(a, total)), jnp.exp(-growth))

    @nn.nowrap
    def _check_length(self, length: int) -> None:
        if self.kernel_length is not None and length > self.kernel_length:
            raise ConfigError(
                f"a sequence of {length} tokens is longer than model.kernel_length={self.kernel_length}, over which "
                "model.kernel='softmax' normalises; raise it, or use kernel='exp'."
            )

    def system_parameters(self) -> int:
        return 2 * self.state_dim + (2 * self.state_dim * self.outputs_per_feature + 1) * self.embed_dim

    def setup_flops(self) -> int:
        per_mode = 140 if self.kernel == "exp" else 8 * self.kernel_length
        return per_mode * self.state_dim * self.embed_dim

    def step_flops(self) -> int:
        return (7 + 4 * self.channels) * self.state_dim * self.embed_dim

    def kernel_flops(self, length: int) -> int:
        return 4 * length * self.state_dim * self.embed_dim * self.outputs_per_feature

    def empty_state(self, batch_size: int) -> Pair:
        return Pair(*(jnp.zeros((batch_size, self.state_dim, self.embed_dim), self.wide) for _ in range(2)))

    def init_state(self, batch_size: int, max_length: int):
        self._check_length(max_length)
        return super().init_state(batch_size, max_length)


def _guarded_reciprocal(a: Pair, epsilon: float = 1e-7) -> Pair:
    """`conj(a) / (|a|^2 + epsilon)`, the authors' reciprocal: a mode whose lags cancel does not blow up."""
    size = a.real * a.real + a.imag * a.imag + epsilon
    return Pair(a.real / size, -a.imag / size)
