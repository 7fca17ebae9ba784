"""What the time-invariant state-space mixers share: one system per feature, run as a convolution or as a recurrence."""

from __future__ import annotations

import functools
import math
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seqjax.config import ConfigError, choose
from seqjax.layers.dense import Dense, scaled_init
from seqjax.mixers.base import Costs, Mixer
from seqjax.mixers.feed_forward import ACTIVATIONS
from seqjax.ops.complex_pairs import Pair
from seqjax.ops.convolution import fft_size, long_convolution
from seqjax.ops.segments import Segments, SegmentState, reversed_starts, segments
from seqjax.ops.state_space import StateSpaceSystem, Times

IMPLEMENTATIONS = ("convolution", "scan")
OUTPUTS = {"glu": 2, "linear": 1, "none": 0}
"""What `output` may say, and how many maps of width D it takes."""
SCAN_UP_TO = 32
"""The longest sequence that an accelerator scans by default: below it, a convolution's set-up costs more than the steps."""
TRANSFORM_TIME = 0.6
"""Nanoseconds on a CPU of a Fourier transform, per feature, token and doubling of its size; see `ops.state_space.Times`."""


@chex.dataclass(frozen=True)
class StateSpaceState:
    """The system's state, in at least float32, and the segment that the next token may continue."""

    system: Any
    segment: SegmentState


class StateSpaceMixer(Mixer):
    """`out(f(system(x) + skip * x))`: a linear system per feature, an activation, a map back to the residual stream.

    A subclass gives `system()`, `system_parameters` and `step_flops`.

    Attributes:
      state_dim: N, states per feature; conjugate pairs count as two.
      channels: M, outputs of each feature's system, mixed by the output map.
      activation: f, a key of `ACTIVATIONS`.
      output: "glu" (`W1 y * sigmoid(W2 y)`, as S4), "linear" or "none".
      implementation: of the parallel face, "convolution" or "scan"; None takes the faster by shape and platform.
    """

    state_dim: int = 64
    channels: int = 1
    activation: str = "gelu_exact"
    output: str = "glu"
    implementation: str | None = None

    bidirectional = True
    derives = True
    even_state = True
    """Whether states come in conjugate pairs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.state_dim < 1 or (self.even_state and self.state_dim % 2):
            near = max(2, self.state_dim + self.state_dim % 2) if self.even_state else 1
            kind = "even numbers, for modes come in conjugate pairs" if self.even_state else "1 and above"
            raise ConfigError(f"model.state_dim={self.state_dim} does not fit; did you mean {near}? Allowed: {kind}.")
        if self.channels < 1:
            raise ConfigError(f"model.channels={self.channels} is not positive; allowed: 1 and above.")
        choose(ACTIVATIONS, self.activation, "model.activation")
        choose(OUTPUTS, self.output, "model.output")
        if self.output == "none" and self.channels > 1:
            raise ConfigError(f"model.output='none' leaves {self.channels} channels unmixed; allowed: glu, linear.")
        check_implementation(self.implementation)

    @property
    def outputs_per_feature(self) -> int:
        """M, or 2 M where the second half of the channels runs backwards."""
        return self.channels * (1 if self.causal else 2)

    @property
    def wide(self) -> Any:
        """The dtype of systems and states."""
        return jnp.promote_types(self.param_dtype, jnp.float32)

    def system(self) -> StateSpaceSystem:
        """Declare the parameters and build the discrete system of `outputs_per_feature` channels."""
        raise NotImplementedError

    @nn.nowrap
    def system_parameters(self) -> int:
        """How many parameters `system` declares."""
        raise NotImplementedError

    @nn.nowrap
    def setup_flops(self) -> int:
        """Floating-point operations of discretising the system."""
        return 0

    @nn.nowrap
    def step_flops(self) -> int:
        """Floating-point operations of one step of the recurrence."""
        raise NotImplementedError

    @nn.nowrap
    def kernel_flops(self, length: int) -> int:
        """Floating-point operations of making the convolution's kernel."""
        raise NotImplementedError

    @nn.nowrap
    def empty_state(self, batch_size: int) -> Any:
        """The system's state before the first token."""
        raise NotImplementedError

    @nn.compact
    def __call__(self, x, state=None, *, segment_ids=None, train=False):
        if state is not None and not self.causal:
            self.refuse_state()
        system, u = self.derived("system", self.system), x.astype(self.wide)
        how = {"causal": self.causal, "implementation": self.implementation}
        if state is None:
            how["kernel"] = self._kept_kernel(system, x.shape[1])
        y, state = apply_system(system, u, state, segment_ids, **how)
        skip = self.vector("skip", nn.initializers.normal(1.0), (self.channels, self.embed_dim), ("channels", "embed"))
        return self._out(y + skip.astype(self.wide) * u[:, :, None]), state

    def _kept_kernel(self, system: StateSpaceSystem, length: int) -> Float[Array, "M D S"] | None:
        """The kernel that `Model.prepare` keeps for whole sequences, of the length that it was given."""
        if self.preparing and length == 1:  # to decode
            return None
        if not self.preparing and not self.has_variable("derived", "kernel"):
            return None
        return self.derived("kernel", lambda: system.kernel(length))

    def _out(self, y: Float[Array, "B L M D"]) -> Float[Array, "B L D"]:
        y = ACTIVATIONS[self.activation](y.astype(self.dtype)).reshape(*y.shape[:2], self.channels * self.embed_dim)
        if self.output == "none":
            return y
        init = scaled_init(self.residual_init)
        make = functools.partial(Dense, dtype=self.dtype, param_dtype=self.param_dtype)
        maps = OUTPUTS[self.output]
        if maps == 1:
            return make(self.embed_dim, ("mlp", "embed"), kernel_init=init, name="out")(y)
        # The gate starts at random also where the map it multiplies starts at zero.
        gate = make(self.embed_dim, ("mlp", "embed"), name="gate")(y)
        return make(self.embed_dim, ("mlp", "embed"), kernel_init=init, name="out")(y) * jax.nn.sigmoid(gate)

    def vector(self, name: str, init: Any, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> Array:
        """A parameter with named axes."""
        return self.param(name, nn.with_logical_partitioning(init, axes), shape, self.param_dtype)

    def pair(self, name: str, init: Any, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> Pair:
        """A complex parameter, as `name_real` and `name_imag`; `init(key, shape, dtype)` gives both parts."""

        def part(index: int) -> Any:
            return lambda key, shape, dtype: init(key, shape, dtype)[index]

        parts = (self.vector(f"{name}_{p}", part(i), shape, axes) for i, p in enumerate(("real", "imag")))
        return Pair(*(a.astype(self.wide) for a in parts))

    @nn.nowrap
    def init_state(self, batch_size: int, max_length: int) -> StateSpaceState:
        if not self.causal:
            self.refuse_state()
        return StateSpaceState(system=self.empty_state(batch_size), segment=SegmentState.fresh(batch_size))

    @nn.nowrap
    def costs(self, length: int) -> Costs:
        width, features = self.embed_dim, self.channels * self.embed_dim
        maps = OUTPUTS[self.output]
        parameters = self.system_parameters() + features + maps * (features * width + width)
        how = self.implementation or ("scan" if length <= SCAN_UP_TO else "convolution")
        if how == "scan":
            mixing = length * self.step_flops() * (1 if self.causal else 2)
        else:
            mixing = transform_flops(length, width, self.outputs_per_feature, self.channels) + self.kernel_flops(length)
        flops = mixing + self.setup_flops() + length * (3 * features + 2 * maps * features * width)
        held = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(jax.eval_shape(lambda: self.empty_state(1))))
        return Costs(parameters, flops, held + 12 if self.causal else 0)


class ContinuousMixer(StateSpaceMixer):
    """A state-space mixer whose system is continuous in time, read at steps that are learned.

    Attributes:
      dt_min, dt_max: range of the initial step sizes, log-uniform.
      resample: factor on all step sizes: a system trained at one sampling rate runs at another (2 for inputs sampled half
        as often).
    """

    dt_min: float = 0.001
    dt_max: float = 0.1
    resample: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_step_range(self.dt_min, self.dt_max)
        if not self.resample > 0:
            raise ConfigError(f"model.resample={self.resample} is not positive; allowed: above 0, 1 keeps the rate.")

    def time_steps(self, count: int) -> Float[Array, "D"]:
        """Step sizes `exp(log_dt)`, log-uniform at first, one per feature."""

        def init(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
            low, high = math.log(self.dt_min), math.log(self.dt_max)
            return jax.random.uniform(key, shape, dtype, low, high)

        log_dt = self.vector("log_dt", init, (count,), ("embed",))
        return self.resample * jnp.exp(log_dt.astype(self.wide))


def check_step_range(dt_min: float, dt_max: float) -> None:
    """Raise a ConfigError unless initial step sizes can be drawn from between the two."""
    if not 0 < dt_min <= dt_max:
        raise ConfigError(
            f"model.dt_min={dt_min} and model.dt_max={dt_max} are no range of step sizes; allowed: 0 < dt_min <= dt_max."
        )


def check_implementation(implementation: str | None) -> None:
    """Raise a ConfigError unless `run_system` knows it."""
    if implementation is not None:
        choose(dict.fromkeys(IMPLEMENTATIONS), implementation, "model.implementation")


def apply_system(
    system: StateSpaceSystem,
    u: Float[Array, "B L D"],
    state: StateSpaceState | None,
    segment_ids: Int[Array, "B L"] | None,
    *,
    causal: bool = True,
    implementation: str | None = None,
    kernel: Float[Array, "M D S"] | None = None,
) -> tuple[Float[Array, "B L M D"], StateSpaceState | None]:
    """Both faces of a system: whole sequences by `run_system`, or a chunk that continues from a state, and the next one."""
    before = SegmentState.fresh(1 if segment_ids is None else u.shape[0]) if state is None else state.segment
    found, after = segments(segment_ids, before, u.shape[1])
    packed = segment_ids is not None
    if state is None:
        how = {"causal": causal, "implementation": implementation, "kernel": kernel}
        return run_system(system, u, found if packed else None, **how), None
    y, inner = system.scan(u, state.system, found.starts if packed else None)
    return y, StateSpaceState(system=inner, segment=after)


def run_system(
    system: StateSpaceSystem,
    u: Float[Array, "B L D"],
    found: Segments | None,
    *,
    causal: bool,
    implementation: str | None,
    kernel: Float[Array, "M D S"] | None = None,
) -> Float[Array, "B L M D"]:
    """The parallel face of a system: outputs for whole sequences, from an empty state.

    Args:
      found: the segments of packed documents; None for one per row.
      causal: False runs the second half of the outputs backwards: they see the state of the next position.
      implementation: "convolution", "scan", or None for the faster by shape and platform.
      kernel: the system's, if it was made before: S lags, at least as many as tokens.
    Raises:
      ConfigError: segments in a convolution that sees both sides, or more tokens than lags.
    """
    length, packed = u.shape[1], found is not None
    if kernel is not None and kernel.shape[-1] < length:
        raise ConfigError(
            f"a sequence of {length} tokens is longer than the kernel of {kernel.shape[-1]} lags that prepare kept; "
            f"allowed: up to {kernel.shape[-1]} tokens, or variables from prepare(..., length={length})."
        )
    convolve = functools.partial(_convolve, system, kernel, causal)
    ways = {"scan": functools.partial(_scan, system, causal), "convolution": convolve}
    elsewhere = "scan" if length <= SCAN_UP_TO or (packed and not causal) else "convolution"
    # On CPU the divide and conquer over segments costs more than the loop.
    on_cpu = "scan" if packed or _scans_faster_on_cpu(system.times(), kernel is None, *u.shape, causal) else "convolution"
    if implementation or on_cpu == elsewhere:
        return ways[implementation or elsewhere](u, found)
    return jax.lax.platform_dependent(u, found, cpu=ways[on_cpu], default=ways[elsewhere])


def _scans_faster_on_cpu(times: Times, makes_kernel: bool, batch_size: int, length: int, width: int, causal: bool) -> bool:
    transforms = (2 + times.outputs) * TRANSFORM_TIME * math.log2(2 * length)
    scan = batch_size * length * width * times.step * (1 if causal else 2)
    kernel = times.setup + length * width * times.lag if makes_kernel else 0
    return scan < kernel + batch_size * length * width * transforms


def _convolve(system: StateSpaceSystem, kernel: Array | None, causal: bool, u: Array, found: Segments | None) -> Array:
    if found is not None and not causal:
        raise ConfigError(
            "segment_ids with model.causal=False and model.implementation='convolution': a convolution that sees both "
            "sides takes no segments; allowed: implementation='scan' or None."
        )
    kernel = system.kernel(u.shape[1]) if kernel is None else kernel[..., : u.shape[1]]
    forward, backward = (kernel, None) if causal else jnp.split(kernel, 2)
    return long_convolution(u, forward, reverse_kernel=backward, runs=None if found is None else found.runs)[0]


def _scan(system: StateSpaceSystem, causal: bool, u: Array, found: Segments | None) -> Array:
    starts = None if found is None else found.starts
    if causal:
        return system.scan(u, system.init_state(u.shape[0]), starts)[0]
    half = jax.tree.leaves(system.outputs)[0].shape[0] // 2
    forward = system._replace(outputs=jax.tree.map(lambda a: a[:half], system.outputs))
    backward = system._replace(outputs=jax.tree.map(lambda a: a[half:], system.outputs))
    y, _ = forward.scan(u, forward.init_state(u.shape[0]), starts)
    starts = reversed_starts(starts)
    later, _ = backward.scan(jnp.flip(u, 1), backward.init_state(u.shape[0]), starts)
    # The state of position t + 1, seen from t: lag 0 of the backward kernel stands for the next input.
    later = jnp.pad(later[:, :-1], [(0, 0), (1, 0), (0, 0), (0, 0)])
    if starts is not None:
        later = jnp.where(starts[:, :, None, None], 0, later)
    return y + jnp.flip(later, 1)


def transform_flops(length: int, width: int, outputs: int, channels: int) -> int:
    """Floating-point operations of the convolution's Fourier transforms and products."""
    size = fft_size(2 * length - 1)
    return int(2.5 * size * math.log2(size) * width * (1 + outputs + channels)) + 6 * channels * width * (size // 2)


def complex_normal(key: Array, shape: tuple[int, ...], dtype: Any) -> Pair:
    """Standard complex normal numbers: variance 1/2 in each part."""
    real, imag = jax.random.normal(key, (2, *shape), dtype) * math.sqrt(0.5)
    return Pair(real, imag)


def constant(values: Any) -> Any:
    """An initialiser of numbers `[..., N]`, the same for all features: `[..., N, S]`."""
    return lambda key, shape, dtype: jnp.broadcast_to(jnp.asarray(values, dtype)[..., None], shape)


def constant_pair(values: Any) -> Any:
    """`constant` for complex numbers."""
    return lambda *like: Pair(constant(values.real)(*like), constant(values.imag)(*like))
