"""LMU: a memory that holds a sliding window as Legendre polynomials."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array, Bool, Float

from seqjax.config import ConfigError, choose
from seqjax.layers.dense import Dense, scaled_init
from seqjax.mixers.base import Costs, Mixer
from seqjax.mixers.feed_forward import ACTIVATIONS
from seqjax.mixers.state_space import SCAN_UP_TO, StateSpaceState, apply_system, check_implementation, transform_flops
from seqjax.ops.hippo import hippo
from seqjax.ops.recurrence import recurrence
from seqjax.ops.segments import SegmentState
from seqjax.ops.state_space import Times
from seqjax.registry import register_mixer


class LegendreMemory(NamedTuple):
    """A fixed system of one feature whose N states are its outputs: `m_t = A m_(t-1) + B u_t`, as constants.

    State n is the coefficient of the shifted Legendre polynomial `P_n(2 s / theta - 1)` of the input s tokens ago.
    """

    matrix: np.ndarray  # A: [N, N], float64
    inputs: np.ndarray  # B: [N]
    dtype: Any

    @classmethod
    def of(cls, state_dim: int, theta: float, dtype: Any) -> LegendreMemory:
        return cls(*_legendre_delay(state_dim, theta), dtype)

    def times(self) -> Times:
        # One feature: a step for the whole batch is one matrix product, faster on CPU at any length.
        return Times(setup=0, lag=0, step=0, outputs=len(self.inputs))

    def kernel(self, length: int) -> Float[Array, "N 1 L"]:
        """`A^l B` by doubling, on the host: no step of a training run makes it again."""
        columns, power = self.inputs[:, None], self.matrix
        while columns.shape[1] < length:  # power is A^(number of columns)
            columns, power = np.concatenate([columns, power @ columns], axis=1), power @ power
        return jnp.asarray(columns[:, None, :length], self.dtype)

    def init_state(self, batch_size: int) -> Float[Array, "B N"]:
        return jnp.zeros((batch_size, len(self.inputs)), self.dtype)

    def scan(
        self, u: Float[Array, "B L 1"], state: Float[Array, "B N"], starts: Bool[Array, "B L"] | None = None
    ) -> tuple[Float[Array, "B L N 1"], Float[Array, "B N"]]:
        constants = (jnp.asarray(self.matrix, self.dtype), jnp.asarray(self.inputs, self.dtype))
        return recurrence(_memory_step, constants, state, u, starts=starts)


def _memory_step(constants: tuple, memory: Array, u: Array) -> tuple[Array, Array]:
    matrix, inputs = constants
    memory = jnp.matmul(memory, matrix.T, precision=jax.lax.Precision.HIGHEST) + inputs * u
    return memory, memory[..., None]


@functools.lru_cache(maxsize=16)
def _legendre_delay(state_dim: int, theta: float) -> tuple[np.ndarray, np.ndarray]:
    """A and B of one token, its input held: the exponential of `[[A, B], [0, 0]] / theta`."""
    a, b = hippo("lmu", state_dim)
    held = scipy.linalg.expm(np.pad(np.column_stack([a, b]) / theta, [(0, 1), (0, 0)]))
    return held[:-1, :-1], held[:-1, -1]


@register_mixer("lmu")
class LMU(Mixer):
    """Legendre memory unit (Voelker et al. 2019) in the parallel form (Chilkuri and Eliasmith 2021).

    `u_t = f(w x_t + b)`, one number; `m_t = A m_(t-1) + B u_t`, fixed (zero-order hold of the Legendre delay of `theta`
    tokens); `h_t = f(W [m_t; x_t] + b)`, then a linear map back to the residual stream, without which a block that starts as
    the identity would stay there: relu has no slope at zero. The 2019 cell's feedback of h and m into u is left out, as in
    the parallel form. With an MLP after it this is the block of LMUFormer (Liu et al. 2024) but for batch normalisation
    after each map; its convolutional patch embedding sees five tokens ahead and is left out.

    Attributes:
      state_dim: number of Legendre polynomials.
      theta: length of the window, in tokens.
      activation: f, a key of `ACTIVATIONS`.
      implementation: of the parallel face, "convolution" or "scan"; None takes the faster by shape and platform.
    """

    state_dim: int = 64
    theta: float = 128.0
    activation: str = "relu"
    implementation: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.state_dim < 1:
            raise ConfigError(f"model.state_dim={self.state_dim} is not positive; allowed: 1 and above.")
        if not 0 < self.theta < math.inf:
            raise ConfigError(f"model.theta={self.theta} is no window; allowed: above 0, in tokens.")
        choose(ACTIVATIONS, self.activation, "model.activation")
        check_implementation(self.implementation)

    @property
    def wide(self) -> Any:
        return jnp.promote_types(self.param_dtype, jnp.float32)

    @nn.compact
    def __call__(self, x, state=None, *, segment_ids=None, train=False):
        activation = ACTIVATIONS[self.activation]
        u = activation(self._dense("encoder", 1, ("embed", None))(x)).astype(self.wide)
        system = LegendreMemory.of(self.state_dim, self.theta, self.wide)
        memory, state = apply_system(system, u, state, segment_ids, implementation=self.implementation)
        both = jnp.concatenate([memory[..., 0].astype(self.dtype), x.astype(self.dtype)], axis=-1)
        hidden = activation(self._dense("hidden", self.embed_dim, (None, "mlp"))(both))
        return self._dense("out", self.embed_dim, ("mlp", "embed"), self.residual_init)(hidden), state

    def _dense(self, name: str, features: int, axes: tuple, scale: float = 1.0) -> Dense:
        return Dense(features, axes, kernel_init=scaled_init(scale), dtype=self.dtype, param_dtype=self.param_dtype, name=name)

    @nn.nowrap
    def init_state(self, batch_size: int, max_length: int) -> StateSpaceState:
        memory = jnp.zeros((batch_size, self.state_dim), self.wide)
        return StateSpaceState(system=memory, segment=SegmentState.fresh(batch_size))

    @nn.nowrap
    def costs(self, length: int) -> Costs:
        width, order = self.embed_dim, self.state_dim
        kernels = width + (order + width) * width + width * width
        how = self.implementation or ("scan" if length <= SCAN_UP_TO else "convolution")
        mixing = 2 * length * order * (order + 1) if how == "scan" else transform_flops(length, 1, order, order)
        return Costs(
            parameters=kernels + 1 + 2 * width,
            flops=2 * length * kernels + mixing,
            state_bytes=order * jnp.dtype(self.wide).itemsize + 12,
        )
