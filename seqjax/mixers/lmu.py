"""LMU: a memory that holds a sliding window as Legendre polynomials."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array, Float

from seqjax.config import ConfigError
from seqjax.layers.dense import Dense, scaled_init
from seqjax.mixers.base import Costs, Mixer
from seqjax.mixers.state_space import SCAN_UP_TO, StateSpaceState, check_implementation, run_system, transform_flops
from seqjax.ops.hippo import hippo
from seqjax.ops.segments import SegmentState, segments
from seqjax.ops.state_space import DenseSystem
from seqjax.registry import register_mixer


@register_mixer("lmu")
class LMU(Mixer):
    """Legendre memory unit (Voelker et al. 2019) in the parallel form (Chilkuri and Eliasmith 2021, eqs. 18 to 20).

    `u_t = relu(w x_t + b)`, one number; `m_t = A m_(t-1) + B u_t`, fixed (zero-order hold of the Legendre delay of `theta`
    tokens); `h_t = relu(W [m_t; x_t] + b)`, then a map back to the residual stream. With an MLP after it this is the block
    of LMUFormer (Liu et al. 2024), whose convolutional patch embedding looks ahead and is left out.

    Attributes:
      state_dim: number of Legendre polynomials.
      theta: length of the window, in tokens.
      implementation: of the parallel face, "convolution" or "scan"; None takes the faster by shape and platform.
    """

    state_dim: int = 64
    theta: float = 128.0
    implementation: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.state_dim < 1:
            raise ConfigError(f"model.state_dim={self.state_dim} is not positive; allowed: 1 and above.")
        if not self.theta > 0:
            raise ConfigError(f"model.theta={self.theta} is no window; allowed: above 0, in tokens.")
        check_implementation(self.implementation)

    @property
    def wide(self) -> Any:
        return jnp.promote_types(self.param_dtype, jnp.float32)

    @nn.compact
    def __call__(self, x, state=None, *, segment_ids=None, train=False):
        before = SegmentState.fresh(1 if segment_ids is None else x.shape[0]) if state is None else state.segment
        found, after = segments(segment_ids, before, x.shape[1])
        u = jax.nn.relu(self._dense("encoder", 1, ("embed", None))(x)).astype(self.wide)
        system, packed = self.system(), segment_ids is not None
        if state is None:
            memory = run_system(system, u, found if packed else None, causal=True, implementation=self.implementation)
        else:
            memory, inner = system.scan(u, state.system, found.starts if packed else None)
            state = StateSpaceState(system=inner, segment=after)
        both = jnp.concatenate([memory[..., 0].astype(self.dtype), x.astype(self.dtype)], axis=-1)
        hidden = jax.nn.relu(self._dense("hidden", self.embed_dim, (None, "mlp"))(both))
        return self._dense("out", self.embed_dim, ("mlp", "embed"), self.residual_init)(hidden), state

    @nn.nowrap
    def system(self) -> DenseSystem:
        """The memory: one feature, all N states as outputs; constants, made in float64."""
        a, b = hippo("lmu", self.state_dim)
        step = np.zeros((self.state_dim + 1, self.state_dim + 1))
        step[:-1, :-1], step[:-1, -1] = a / self.theta, b / self.theta
        held = scipy.linalg.expm(step)  # of [[A, B], [0, 0]]: the zero-order hold of one token
        constant = lambda value: jnp.asarray(value, self.wide)
        identity = np.eye(self.state_dim)[:, None]
        return DenseSystem(constant(held[None, :-1, :-1]), constant(held[None, :-1, -1]), constant(identity))

    def _dense(self, name: str, features: int, axes: tuple, scale: float = 1.0) -> Dense:
        return Dense(features, axes, kernel_init=scaled_init(scale), dtype=self.dtype, param_dtype=self.param_dtype, name=name)

    @nn.nowrap
    def init_state(self, batch_size: int, max_length: int) -> StateSpaceState:
        memory: Float[Array, "B 1 N"] = jnp.zeros((batch_size, 1, self.state_dim), self.wide)
        return StateSpaceState(system=memory, segment=SegmentState.fresh(batch_size))

    @nn.nowrap
    def costs(self, length: int) -> Costs:
        width, order = self.embed_dim, self.state_dim
        kernels = width + (order + width) * width + width * width
        how = self.implementation or ("scan" if length <= SCAN_UP_TO else "convolution")
        mixing = 4 * length * order**2 if how == "scan" else transform_flops(length, 1, order, order)
        return Costs(
            parameters=kernels + 1 + 2 * width,
            flops=2 * length * kernels + mixing,
            state_bytes=order * jnp.dtype(self.wide).itemsize + 12,
        )
