"""Mamba: a gated state space whose step sizes, inputs and outputs depend on the token."""

from __future__ import annotations

import math
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from seqjax.config import ConfigError, choose
from seqjax.layers.convolution import ShortConvolution
from seqjax.layers.dense import Dense, scaled_init
from seqjax.mixers.base import Costs, Mixer
from seqjax.mixers.state_space import check_step_range, constant
from seqjax.ops.complex_pairs import Pair
from seqjax.ops.convolution import Tail
from seqjax.ops.segments import SegmentState, reversed_starts, segments
from seqjax.ops.selective_scan import IMPLEMENTATIONS, selective_scan
from seqjax.parallel.rules import current_spec
from seqjax.registry import register_mixer

SELECTIVE = ("dt", "B", "C")
"""What may depend on the token."""
AS_AUTHORS = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""Uniform within `1 / sqrt(inputs)`."""


@chex.dataclass(frozen=True)
class MambaState:
    """The convolution's last inputs, the scan's state in at least float32, and the segment that the next token may continue."""

    convolution: Tail
    system: Array | Pair
    segment: SegmentState


@register_mixer("mamba")
class Mamba(Mixer):
    """Selective state space (Gu and Dao 2023): `out(scan(silu(conv(W_x x))) * silu(W_z x))`.

    `h_t = exp(delta_t A) h_(t-1) + delta_t B_t u_t`, `y_t = C_t h_t + D u_t` per feature u of the expanded width, where
    `delta = softplus(W_up W_down u + b)` and B, C are linear in u. Bidirectional (`causal=False`), the same maps feed a
    convolution and a scan of each direction with parameters of their own, and their outputs are added, as in Vision Mamba
    (Zhu et al. 2024); or each direction has maps of its own as well, as in S-Mamba (Wang et al. 2024).

    Attributes:
      state_dim: N, states per feature; of complex modes, conjugates count.
      expand: width E of the scan, in units of `embed_dim`.
      conv_width: taps of the causal depthwise convolution.
      dt_rank: inner width of the map to step sizes; None is `embed_dim / 16`, rounded up.
      dt_min, dt_max: range of the initial step sizes, log-uniform.
      selective: which of "dt", "B" and "C" depend on the token; the others are parameters of each feature. None of them
        leaves a time-invariant system: from S4 to S6 in steps (section 4.6 of the paper).
      complex_modes: conjugate pairs of complex modes, S4D-Lin at first, in place of real ones.
      gate: multiply by `silu(W_z x)`.
      shared_maps: whether both directions of a bidirectional one have the same maps in and out.
      conv_bias, use_bias: biases of the convolution, and of the maps in and out.
      chunk_size: tokens between states kept for the backward pass; None chooses.
      implementation: of the scan, see `ops.selective_scan`; None takes the platform's kernel.
    """

    state_dim: int = 16
    expand: int = 2
    conv_width: int = 4
    dt_rank: int | None = None
    dt_min: float = 0.001
    dt_max: float = 0.1
    selective: tuple = SELECTIVE
    complex_modes: bool = False
    gate: bool = True
    shared_maps: bool = True
    conv_bias: bool = True
    use_bias: bool = False
    chunk_size: int | None = None
    implementation: str | None = None

    bidirectional = True
    optimizer_groups = (("/(a_log|a_imag|skip|dt_bias|b_real|b_imag|c_real|c_imag)(_reverse)?$", "state_space"),)

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("state_dim", "expand", "conv_width", "dt_rank", "chunk_size"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"model.{key}={value} is not positive; allowed: 1 and above.")
        if self.complex_modes and self.state_dim % 2:
            raise ConfigError(
                f"model.state_dim={self.state_dim} with model.complex_modes=True: modes come in conjugate pairs; "
                f"did you mean {self.state_dim + 1}? Allowed: even numbers."
            )
        check_step_range(self.dt_min, self.dt_max)
        for name in self.selective:
            choose(dict.fromkeys(SELECTIVE), name, "model.selective")
        if self.implementation is not None:
            choose(IMPLEMENTATIONS, self.implementation, "model.implementation")

    @property
    def inner(self) -> int:
        """E."""
        return self.expand * self.embed_dim

    @property
    def rank(self) -> int:
        return self.dt_rank or math.ceil(self.embed_dim / 16)

    @property
    def modes(self) -> int:
        return self.state_dim // 2 if self.complex_modes else self.state_dim

    @property
    def wide(self) -> Any:
        """The dtype of the scan's parameters and states."""
        return jnp.promote_types(self.param_dtype, jnp.float32)

    @nn.compact
    def __call__(self, x, state=None, *, segment_ids=None, train=False):
        if state is not None and not self.causal:
            self.refuse_state()
        before = SegmentState.fresh(1 if segment_ids is None else x.shape[0]) if state is None else state.segment
        found, segment = segments(segment_ids, before, x.shape[1])
        starts = None if segment_ids is None else found.starts
        runs = None if segment_ids is None and state is None else jnp.broadcast_to(found.runs, x.shape[:2])
        tail, system = (None, None) if state is None else (state.convolution, state.system)
        u, z = self._maps_in("", x)
        y, tail, system = self._direction("", u, z, runs, starts, tail, system)
        if not self.causal:
            flip = lambda a: None if a is None else jnp.flip(a, 1)
            back, gate = (u, z) if self.shared_maps else self._maps_in("_reverse", x)
            later, *_ = self._direction("_reverse", flip(back), flip(gate), flip(runs), reversed_starts(starts), None, None)
            if not self.shared_maps:
                return self._map_out("", y) + self._map_out("_reverse", flip(later)), None
            y = y + flip(later)
        if state is not None:
            state = MambaState(convolution=tail, system=system, segment=segment)
        return self._map_out("", y), state

    def _maps_in(self, suffix: str, x: Array) -> tuple[Array, Array | None]:
        """What is scanned, and the gate."""
        dense = lambda name: self._dense(name + suffix, self.inner, ("embed", "mlp"), self.use_bias)(x)
        return dense("in"), dense("gate") if self.gate else None

    def _map_out(self, suffix: str, y: Array) -> Array:
        init = scaled_init(self.residual_init)
        return self._dense("out" + suffix, self.embed_dim, ("mlp", "embed"), self.use_bias, init)(y)

    def _direction(
        self, suffix: str, u: Array, z: Array | None, runs: Array | None, starts: Array | None, tail: Tail | None, system: Any
    ) -> tuple[Float[Array, "B L E"], Tail | None, Array | Pair]:
        """Convolution and scan with the parameters that end in `suffix`, and what a next chunk continues from."""
        taps = {"width": self.conv_width, "use_bias": self.conv_bias, "param_dtype": self.param_dtype}
        u, tail = ShortConvolution(**taps, name="conv" + suffix)(u, runs=runs, tail=tail)
        u = jax.nn.silu(u)
        dt = jnp.zeros_like(u)
        if "dt" in self.selective:
            low = self._dense("dt_down" + suffix, self.rank, ("mlp", None))(u)
            dt = self._dense("dt_up" + suffix, self.inner, (None, "mlp"), init=_uniform(self.rank**-0.5))(low)
        y, system = selective_scan(
            u,
            dt,
            self._decay_rates(suffix),
            self._weights("b", suffix, u),
            self._weights("c", suffix, u),
            D=self._parameter("skip" + suffix, nn.initializers.ones, (self.inner,), ("mlp",)),
            z=z,
            dt_bias=self._parameter("dt_bias" + suffix, step_bias(self.dt_min, self.dt_max), (self.inner,), ("mlp",)),
            dt_softplus=True,
            h0=system,
            starts=starts,
            return_state=True,
            chunk_size=self.chunk_size,
            implementation=self.implementation,
            spec=current_spec(("batch", None, "mlp_act"), u.shape),
        )
        return y, tail, system

    def _decay_rates(self, suffix: str) -> Float[Array, "E N"] | Pair:
        """A: `-(n + 1)` for each feature at first, or complex `-1/2 + i pi n`."""
        shape, axes = (self.modes, self.inner), ("state", "mlp")
        starts = np.full(self.modes, 0.5) if self.complex_modes else np.arange(1.0, self.modes + 1)
        real = -jnp.exp(self._parameter("a_log" + suffix, constant(np.log(starts)), shape, axes)).T
        if not self.complex_modes:
            return real
        return Pair(real, self._parameter("a_imag" + suffix, constant(np.pi * np.arange(self.modes)), shape, axes).T)

    def _weights(self, name: str, suffix: str, u: Array) -> Array | Pair:
        """B or C: of every token `[B, L, N]`, or of every feature `[E, N]`; pairs with complex modes."""
        if name.upper() in self.selective:
            weights = self._dense(name + suffix, self.state_dim, ("mlp", None))(u)
            return Pair(*jnp.split(weights, 2, axis=-1)) if self.complex_modes else weights
        shape, axes = (self.modes, self.inner), ("state", "mlp")
        # As in S4D: inputs of one, random outputs.
        init = nn.initializers.ones if name == "b" else nn.initializers.normal(math.sqrt(0.5) if self.complex_modes else 1.0)
        real = self._parameter(f"{name}_real{suffix}", init, shape, axes).T
        if not self.complex_modes:
            return real
        init = nn.initializers.zeros if name == "b" else init
        return Pair(real, self._parameter(f"{name}_imag{suffix}", init, shape, axes).T)

    def _dense(self, name: str, features: int, axes: tuple, use_bias: bool = False, init: Any = AS_AUTHORS) -> Dense:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return Dense(features, axes, use_bias=use_bias, kernel_init=init, name=name, **types)

    def _parameter(self, name: str, init: Any, shape: tuple[int, ...], axes: tuple[str, ...]) -> Array:
        return self.param(name, nn.with_logical_partitioning(init, axes), shape, self.param_dtype).astype(self.wide)

    @nn.nowrap
    def init_state(self, batch_size: int, max_length: int) -> MambaState:
        if not self.causal:
            self.refuse_state()
        system = jnp.zeros((batch_size, self.modes, self.inner), self.wide)
        return MambaState(
            convolution=Tail.fresh(batch_size, self.conv_width - 1, self.inner, self.dtype),
            system=Pair(system, system) if self.complex_modes else system,
            segment=SegmentState.fresh(batch_size),
        )

    @nn.nowrap
    def costs(self, length: int) -> Costs:
        width, inner, modes, order = self.embed_dim, self.inner, self.modes, self.state_dim
        maps = width * inner * (2 + self.gate)
        weights = [name in self.selective for name in ("B", "C")]
        per_token = inner * order * sum(weights) + (2 * inner * self.rank if "dt" in self.selective else 0)
        fixed = inner * order * (2 - sum(weights))
        sides = 1 if self.causal else 2
        copies = 1 if self.shared_maps else sides
        parameters = copies * (maps + self.use_bias * (inner * (1 + self.gate) + width))
        parameters += sides * (per_token + fixed + inner * (order + 2 + self.conv_width + self.conv_bias))
        scan = inner * (modes * (22 if self.complex_modes else 7) + 8)
        held = inner * order * jnp.dtype(self.wide).itemsize
        tail = (self.conv_width - 1) * (inner * jnp.dtype(self.dtype).itemsize + 4)
        return Costs(
            parameters=parameters,
            flops=length * (2 * copies * maps + sides * (2 * per_token + 2 * self.conv_width * inner + scan)),
            state_bytes=held + tail + 12 if self.causal else 0,
        )


def step_bias(dt_min: float, dt_max: float) -> nn.initializers.Initializer:
    """What a softplus makes log-uniform steps of."""

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        dt = jnp.exp(jax.random.uniform(key, shape, dtype, math.log(dt_min), math.log(dt_max)))
        return dt + jnp.log(-jnp.expm1(-dt))

    return init


def _uniform(bound: float) -> nn.initializers.Initializer:
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)
