"""S5: one multi-input, multi-output state space per layer, computed by a parallel scan."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from seqjax.config import ConfigError, allowed_values, choose
from seqjax.layers.dense import Dense, scaled_init
from seqjax.mixers.base import Costs, Mixer
from seqjax.mixers.state_space import StateSpaceState, check_step_range
from seqjax.ops.complex_pairs import Pair, product
from seqjax.ops.discretization import discretize_diagonal
from seqjax.ops.hippo import block_diagonal_legs
from seqjax.ops.scan import SCANS, linear_scan
from seqjax.ops.segments import SegmentState, segments
from seqjax.registry import register_mixer

GATES = ("half_glu1", "half_glu2", "full_glu", "gelu")
"""What `gate` may say: the S5 code's activations."""


@register_mixer("s5")
class S5(Mixer):
    """Simplified state space (Smith, Warrington and Linderman 2023): `x_k = Lambda x_(k-1) + B u_k`, `y = 2 Re(C x) + D u`.

    B `[P, D]` and C `[D, P]` are complex matrices over all features; P = state_dim / 2 modes stand for conjugate pairs.

    Attributes:
      state_dim: number of states, conjugates included.
      blocks: J diagonal blocks, each a HiPPO-N (normal part of LegS) matrix of size state_dim / J, that Lambda starts as.
      discretization: "zoh" or "bilinear".
      dt_min, dt_max: range of the initial step sizes, one per mode, log-uniform.
      resample: factor on all step sizes, for inputs at another sampling rate.
      clip_eigenvalues: keep real parts below -1e-4, so that no mode grows.
      gate: of the output: "half_glu1" `z * sigmoid(W z)` with z = gelu(y), "half_glu2" `y * sigmoid(W z)`, "full_glu"
        `W1 z * sigmoid(W2 z)`, or "gelu" (tanh form).
      implementation: of the scan over time, see `ops.scan`; None takes a loop on CPU and a parallel scan elsewhere.
    """

    state_dim: int = 64
    blocks: int = 1
    discretization: str = "zoh"
    dt_min: float = 0.001
    dt_max: float = 0.1
    resample: float = 1.0
    clip_eigenvalues: bool = False
    gate: str = "full_glu"
    implementation: str | None = None

    bidirectional = True
    derives = True
    optimizer_groups = (("/(lambda_real|lambda_imag|b_real|b_imag|log_dt)$", "state_space"),)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blocks < 1 or self.state_dim < 2 or self.state_dim % (2 * self.blocks):
            raise ConfigError(
                f"model.state_dim={self.state_dim} does not divide into model.blocks={self.blocks} blocks of conjugate pairs; "
                f"allowed: multiples of {2 * max(1, self.blocks)}."
            )
        check_step_range(self.dt_min, self.dt_max)
        if not self.resample > 0:
            raise ConfigError(f"model.resample={self.resample} is not positive; allowed: above 0, 1 keeps the rate.")
        choose(dict.fromkeys(("zoh", "bilinear")), self.discretization, "model.discretization")
        choose(dict.fromkeys(GATES), self.gate, "model.gate")
        if self.implementation is not None and self.implementation not in SCANS:
            raise ConfigError(
                f"model.implementation={self.implementation!r} is unknown; {allowed_values(self.implementation, SCANS)}"
            )

    @property
    def modes(self) -> int:
        return self.state_dim // 2

    @property
    def wide(self) -> Any:
        return jnp.promote_types(self.param_dtype, jnp.float32)

    @nn.compact
    def __call__(self, x, state=None, *, segment_ids=None, train=False):
        if state is not None and not self.causal:
            self.refuse_state()
        before = SegmentState.fresh(1 if segment_ids is None else x.shape[0]) if state is None else state.segment
        found, after = segments(segment_ids, before, x.shape[1])
        starts = None if segment_ids is None else found.starts
        u = x.astype(self.wide)
        decay, inputs, outputs = self.derived("system", self._system)
        driven = Pair(u @ inputs.real.T, u @ inputs.imag.T)
        options = {"starts": starts, "implementation": self.implementation}
        states, last = linear_scan(decay, driven, None if state is None else state.system, **options)
        if not self.causal:  # a second scan over the same inputs, from the end; position t is in both
            later, _ = linear_scan(decay, driven, reverse=True, **options)
            states = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=-1), states, later)
        skip = self._parameter("skip", nn.initializers.normal(1.0), (self.embed_dim,), ("embed",))
        y = 2 * (states.real @ outputs.real - states.imag @ outputs.imag) + skip * u
        return self._gated(y.astype(self.dtype)), None if state is None else StateSpaceState(system=last, segment=after)

    def _system(self) -> tuple[Pair, Pair, Pair]:
        """Discrete decay `[P]`, input weights `[P, D]`, output weights `[P, D]` (twice P if bidirectional)."""
        start, vectors, inverse = block_diagonal_legs(self.state_dim, self.blocks)
        fixed = lambda values: lambda key, shape, dtype: jnp.asarray(values, dtype)
        a_real = self._parameter("lambda_real", fixed(start.real), (self.modes,), ("state",))
        a_imag = self._parameter("lambda_imag", fixed(start.imag), (self.modes,), ("state",))
        if self.clip_eigenvalues:
            a_real = jnp.minimum(a_real, -1e-4)
        low, high = math.log(self.dt_min), math.log(self.dt_max)
        uniform = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, low, high)
        dt = self.resample * jnp.exp(self._parameter("log_dt", uniform, (self.modes,), ("state",)))
        decay, gain = discretize_diagonal(a_real, a_imag, dt, self.discretization)

        def rotated_inputs(key: Array, shape: tuple, dtype: Any) -> Pair:
            real = nn.initializers.lecun_normal()(key, (self.state_dim, self.embed_dim), dtype)  # fan-in of state_dim
            return Pair(jnp.asarray(inverse.real, dtype) @ real, jnp.asarray(inverse.imag, dtype) @ real)

        def rotated_outputs(key: Array, shape: tuple, dtype: Any) -> Pair:
            keys = jax.random.split(key, 2)
            std = 1 / math.sqrt(self.state_dim)
            real, imag = (
                std * jax.random.normal(k, (shape[0] // self.modes, self.embed_dim, self.state_dim), dtype) for k in keys
            )
            turned = product_matrix(Pair(real, imag), Pair(jnp.asarray(vectors.real, dtype), jnp.asarray(vectors.imag, dtype)))
            return Pair(*(jnp.moveaxis(part, 2, 1).reshape(shape) for part in turned))

        b = self._pair("b", rotated_inputs, (self.modes, self.embed_dim), ("state", "embed"))
        sides = 1 if self.causal else 2
        c = self._pair("c", rotated_outputs, (sides * self.modes, self.embed_dim), ("state", "embed"))
        b = product(Pair(gain.real[:, None], gain.imag[:, None]), b)
        return decay, b, c

    def _gated(self, y: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        z = jax.nn.gelu(y)
        if self.gate == "gelu":
            return z
        dense = lambda name, **options: Dense(
            self.embed_dim, ("mlp", "embed"), dtype=self.dtype, param_dtype=self.param_dtype, name=name, **options
        )
        if self.gate == "full_glu":
            return dense("out", kernel_init=scaled_init(self.residual_init))(z) * jax.nn.sigmoid(dense("gate")(z))
        return (z if self.gate == "half_glu1" else y) * jax.nn.sigmoid(dense("gate")(z))

    def _parameter(self, name: str, init: Any, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> Array:
        value = self.param(name, nn.with_logical_partitioning(init, axes), shape, self.param_dtype)
        return value.astype(self.wide)

    def _pair(self, name: str, init: Any, shape: tuple[int, ...], axes: tuple[str, ...]) -> Pair:
        # Both parts come of one draw: they are turned together into the modes' basis.
        key = self.make_rng("params") if self.is_initializing() else None
        drawn = init(key, shape, self.param_dtype) if key is not None else (None, None)
        parts = [
            self._parameter(f"{name}_{part}", lambda *_, value=value: value, shape, axes)
            for part, value in zip(("real", "imag"), drawn)
        ]
        return Pair(*parts)

    @nn.nowrap
    def init_state(self, batch_size: int, max_length: int) -> StateSpaceState:
        if not self.causal:
            self.refuse_state()
        system = Pair(*(jnp.zeros((batch_size, self.modes), self.wide) for _ in range(2)))
        return StateSpaceState(system=system, segment=SegmentState.fresh(batch_size))

    @nn.nowrap
    def costs(self, length: int) -> Costs:
        sides, width, modes = (1 if self.causal else 2), self.embed_dim, self.modes
        maps = {"gelu": 0, "half_glu1": 1, "half_glu2": 1, "full_glu": 2}[self.gate]
        return Costs(
            parameters=3 * modes + 2 * modes * width * (1 + sides) + width + maps * (width * width + width),
            flops=length * (4 * modes * width * (1 + sides) + 8 * sides * modes + 2 * maps * width * width),
            state_bytes=2 * modes * jnp.dtype(self.wide).itemsize + 12 if self.causal else 0,
        )


def product_matrix(a: Pair, b: Pair) -> Pair:
    """The matrix product of complex matrices."""
    return Pair(a.real @ b.real - a.imag @ b.imag, a.real @ b.imag + a.imag @ b.real)
