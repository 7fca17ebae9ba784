"""GSS: a gated state space at a fraction of the width."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from seqjax.config import ConfigError
from seqjax.layers.dense import Dense, scaled_init
from seqjax.layers.norms import LayerNorm
from seqjax.mixers.base import Costs, Mixer
from seqjax.mixers.state_space import SCAN_UP_TO, StateSpaceState, apply_system, check_implementation, transform_flops
from seqjax.ops.complex_pairs import Pair, product
from seqjax.ops.discretization import discretize_diagonal
from seqjax.ops.segments import SegmentState
from seqjax.ops.state_space import DiagonalSystem
from seqjax.registry import register_mixer


@register_mixer("gss")
class GSS(Mixer):
    """Gated state spaces (Mehta et al. 2022): `W_o (gelu(W_u x) * (W_c y)) + b`, y a simplified DSS of `gelu(W_v x)`.

    `y = K * v + skip v` with v normalised, steps of 1 and one spectrum `Lambda = -exp(lambda_real) + i exp(lambda_imag)` for
    all features: `K_l = Re sum_n C_n (exp(Lambda_n) - 1) / Lambda_n exp(l Lambda_n)`. The outer norm and the skip connection
    are the stack's. The paper's hybrid, an attention block over a window after every few of these, is a pattern.

    Attributes:
      state_dim: N, the number of complex modes, each with a frequency above zero and without a conjugate (paper: 512).
      inner_dim: width that the state space works at; None is a quarter of `embed_dim`.
      expand: width of the gate, in units of `embed_dim`.
      implementation: of the parallel face, "convolution" or "scan"; None takes the faster by shape and platform.
    """

    state_dim: int = 64
    inner_dim: int | None = None
    expand: int = 4
    implementation: str | None = None

    derives = True
    optimizer_groups = (("/(lambda_real|lambda_imag)$", "state_space"),)

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("state_dim", "expand", "inner_dim"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"model.{key}={value} is not positive; allowed: 1 and above.")
        check_implementation(self.implementation)

    @property
    def inner(self) -> int:
        return self.inner_dim or max(1, self.embed_dim // 4)

    @property
    def wide(self) -> Any:
        return jnp.promote_types(self.param_dtype, jnp.float32)

    @nn.compact
    def __call__(self, x, state=None, *, segment_ids=None, train=False):
        gate = jax.nn.gelu(self._dense("gate", self.expand * self.embed_dim, ("embed", "mlp"))(x))
        v = jax.nn.gelu(self._dense("down", self.inner, ("embed", None))(x))
        v = LayerNorm(dtype=self.wide, param_dtype=self.param_dtype, name="norm")(v)
        y, state = apply_system(self.derived("system", self._system), v, state, segment_ids, implementation=self.implementation)
        skip = self._parameter("skip", nn.initializers.normal(1.0), (self.inner,), (None,))
        y = (y[:, :, 0] + skip * v).astype(self.dtype)
        mixed = gate * self._dense("up", self.expand * self.embed_dim, (None, "mlp"))(y)
        out = self._dense("out", self.embed_dim, ("mlp", "embed"), True, self.residual_init)
        return out(mixed), state

    def _system(self) -> DiagonalSystem:
        normal = nn.initializers.normal(1.0)
        shape = (self.state_dim, 1)
        a_real = -jnp.exp(self._parameter("lambda_real", normal, shape, ("state", None)))
        a_imag = jnp.exp(self._parameter("lambda_imag", normal, shape, ("state", None)))
        _, gain = discretize_diagonal(a_real, a_imag, jnp.ones_like(a_real), "zoh")
        channels = (1, self.state_dim, self.inner)
        parts = (self._parameter(f"c_{part}", normal, channels, (None, "state", None)) for part in ("real", "imag"))
        spread = Pair(*(jnp.broadcast_to(a, channels[1:]) for a in (a_real, a_imag)))
        return DiagonalSystem(spread, product(gain, Pair(*parts)))

    def _dense(self, name: str, features: int, axes: tuple, use_bias: bool = False, scale: float = 1.0) -> Dense:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return Dense(features, axes, use_bias=use_bias, kernel_init=scaled_init(scale), name=name, **types)

    def _parameter(self, name: str, init: Any, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> Float[Array, "..."]:
        value = self.param(name, nn.with_logical_partitioning(init, axes), shape, self.param_dtype)
        return value.astype(self.wide)

    @nn.nowrap
    def init_state(self, batch_size: int, max_length: int) -> StateSpaceState:
        system = Pair(*(jnp.zeros((batch_size, self.state_dim, self.inner), self.wide) for _ in range(2)))
        return StateSpaceState(system=system, segment=SegmentState.fresh(batch_size))

    @nn.nowrap
    def costs(self, length: int) -> Costs:
        width, inner, modes, gate = self.embed_dim, self.inner, self.state_dim, self.expand * self.embed_dim
        kernels = width * (gate + inner) + inner * gate + gate * width
        how = self.implementation or ("scan" if length <= SCAN_UP_TO else "convolution")
        if how == "scan":
            mixing = 11 * length * modes * inner
        else:
            mixing = transform_flops(length, inner, 1, 1) + 4 * length * modes * inner
        return Costs(
            parameters=kernels + width + 3 * inner + 2 * modes + 2 * modes * inner,
            flops=2 * length * kernels + mixing,
            state_bytes=2 * modes * inner * jnp.dtype(self.wide).itemsize + 12,
        )
