"""Mamba-2: a selective state space with one decay per head, computed with matrix products."""

from __future__ import annotations

import math
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from seqjax.config import ConfigError
from seqjax.layers.convolution import ShortConvolution
from seqjax.layers.dense import Dense, scaled_init
from seqjax.layers.norms import GatedRMSNorm
from seqjax.mixers.base import Costs, Mixer
from seqjax.mixers.mamba import step_bias
from seqjax.mixers.state_space import check_step_range
from seqjax.ops.convolution import Tail
from seqjax.ops.linear_attention import linear_attention, linear_attention_flops
from seqjax.ops.segments import SegmentState, segments
from seqjax.registry import register_mixer

DECAY_RATES = (1.0, 16.0)
"""Range of the initial decay rates of Mamba-2's heads."""
HEAD_DIM = 64
"""Of the authors' models; a power of 2."""


@chex.dataclass(frozen=True)
class Mamba2State:
    """The last inputs of the convolution, the heads' states in at least float32, and the current segment."""

    convolution: Tail
    heads: Float[Array, "B H N W"]
    segment: SegmentState


class HeadwiseStateSpace(Mixer):
    """What Mamba-2 and its relatives share: one map in, a short convolution, heads with a decay each, a gated norm, a map out.

    Attributes:
      state_dim: N, of the state of each feature.
      head_dim: features P in a head, which share a decay; None is 64, or the largest power of 2 below that divides the
        inner width.
      expand: inner width, in units of `embed_dim`.
      num_groups: groups of heads that share B and C.
      conv_width: taps of the depthwise convolution over x, B and C.
      dt_min, dt_max: range of the initial steps, one per head, log-uniform.
      chunk_size: of `ops.linear_attention`; None is its default.
      norm_epsilon: of the gated norm.
      use_bias: of the maps in and out; conv_bias: of the convolution.
    """

    state_dim: int = 128
    head_dim: int | None = None
    expand: int = 2
    num_groups: int = 1
    conv_width: int = 4
    dt_min: float = 0.001
    dt_max: float = 0.1
    chunk_size: int | None = None
    norm_epsilon: float = 1e-5
    use_bias: bool = False
    conv_bias: bool = True

    optimizer_groups = (("/(a_log|skip|dt_bias)$", "state_space"),)

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("state_dim", "head_dim", "expand", "num_groups", "conv_width", "chunk_size"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"model.{key}={value} is not positive; allowed: 1 and above.")
        if self.inner % self.head_width:
            raise ConfigError(
                f"model.head_dim={self.head_width} does not divide the inner width {self.inner}, model.expand times "
                f"model.embed_dim; allowed: {', '.join(map(str, _divisors(self.inner)))}."
            )
        if self.heads % self.num_groups:
            raise ConfigError(
                f"model.num_groups={self.num_groups} does not divide the {self.heads} heads; "
                f"allowed: {', '.join(map(str, _divisors(self.heads)))}."
            )
        check_step_range(self.dt_min, self.dt_max)

    @property
    def inner(self) -> int:
        return self.expand * self.embed_dim

    @property
    def head_width(self) -> int:
        return self.head_dim or math.gcd(HEAD_DIM, self.inner)

    @property
    def heads(self) -> int:
        return self.inner // self.head_width

    @property
    def wide(self) -> Any:
        return jnp.promote_types(self.param_dtype, jnp.float32)

    def map_in(self, x: Array, *widths: int) -> list[Array]:
        """One product for all that is made of the inputs, split into its parts."""
        # Uniform within 1 / sqrt(inputs): a third of LeCun's variance, as the authors' layers start.
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        both = self.dense("in", sum(widths), ("embed", "mlp"), self.use_bias, init)(x)
        return split(both, *widths)

    def map_out(self, y: Array) -> Array:
        return self.dense("out", self.embed_dim, ("mlp", "embed"), self.use_bias, scaled_init(self.residual_init))(y)

    def convolve(self, u: Array, ahead: int = 0, **options: Any) -> tuple[Array, Tail | None]:
        """The short convolution and a SiLU."""
        convolution = ShortConvolution(self.conv_width, ahead, self.conv_bias, self.param_dtype, name="conv")
        u, tail = convolution(u, **options)
        return jax.nn.silu(u), tail

    def decay_rates(self, init: Any) -> Array:
        """A per head, negative."""
        return -jnp.exp(self.parameter("a_log", init, (self.heads,), ("heads",)))

    def step_bias(self) -> Array:
        """What is added to the steps before their softplus."""
        return self.parameter("dt_bias", step_bias(self.dt_min, self.dt_max), (self.heads,), ("heads",))

    def skip_weights(self) -> Array:
        """D per head."""
        return self.parameter("skip", nn.initializers.ones, (self.heads,), ("heads",))

    def split_heads(self, values: Float[Array, "B L E"]) -> Float[Array, "B L H P"]:
        values = values.reshape(*values.shape[:2], self.heads, self.head_width)
        return nn.with_logical_constraint(values, ("batch", "length_act", "heads_act", None))

    def split_groups(self, keys: Float[Array, "B L _"]) -> Float[Array, "B L G N"]:
        return keys.reshape(*keys.shape[:2], self.num_groups, self.state_dim)

    def dense(self, name: str, features: int, axes: tuple, use_bias: bool, init: Any) -> Dense:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return Dense(features, axes, use_bias=use_bias, kernel_init=init, name=name, **types)

    def parameter(self, name: str, init: Any, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> Array:
        value = self.param(name, nn.with_logical_partitioning(init, axes), shape, self.param_dtype)
        return value.astype(self.wide)

    @nn.nowrap
    def costs_of(self, length: int, directions: int) -> Costs:
        """Parameters and FLOPs, with B, C and steps for each direction."""
        keys = 2 * directions * self.num_groups * self.state_dim
        convolved, steps = self.inner + keys, directions * self.heads
        into = self.inner + convolved + steps
        kernels = self.embed_dim * (into + self.inner)
        sizes = (self.heads, self.num_groups, self.state_dim, self.head_width, self.chunk_size)
        return Costs(
            parameters=kernels
            + self.use_bias * (into + self.embed_dim)
            + (self.conv_width + self.conv_bias) * convolved
            + 3 * self.heads
            + self.inner,
            flops=2 * length * (kernels + self.conv_width * convolved) + directions * linear_attention_flops(length, *sizes),
        )


@register_mixer("mamba2")
class Mamba2(HeadwiseStateSpace):
    """Mamba-2 (Dao and Gu 2024, section 7): `h_t = exp(dt A) h_(t-1) + dt B_t x_t^T`, `y_t = C_t h_t + D x_t` for each head.

    x, B, C and a gate z come of one map, the first three through a short convolution and a SiLU; the steps dt through a
    softplus. Then `W_o norm(y silu(z))`, normalised by groups of heads. The stack around it has RMS norms, and no MLP.

    Attributes:
      dt_limit: (least, largest) step; None is no limit.
    """

    dt_limit: tuple | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dt_limit is not None and not (len(self.dt_limit) == 2 and 0 <= self.dt_limit[0] < self.dt_limit[1]):
            raise ConfigError(f"model.dt_limit={self.dt_limit} is no range of steps; allowed: None, or (least, largest).")

    @nn.compact
    def __call__(self, x, state=None, *, segment_ids=None, train=False):
        before = SegmentState.fresh(1 if segment_ids is None else x.shape[0]) if state is None else state.segment
        found, after = segments(segment_ids, before, x.shape[1])
        keys = self.num_groups * self.state_dim
        z, convolved, dt = self.map_in(x, self.inner, self.inner + 2 * keys, self.heads)
        runs = None if segment_ids is None and state is None else jnp.broadcast_to(found.runs, x.shape[:2])
        convolved, tail = self.convolve(convolved, runs=runs, tail=None if state is None else state.convolution)
        values, b, c = split(convolved, self.inner, keys, keys)
        values, b, c = self.split_heads(values), self.split_groups(b), self.split_groups(c)
        dt = jax.nn.softplus(dt + self.step_bias())  # in the parameters' precision
        dt = dt if self.dt_limit is None else jnp.clip(dt, *self.dt_limit)
        rates = self.decay_rates(lambda key, shape, dtype: jnp.log(jax.random.uniform(key, shape, dtype, *DECAY_RATES)))
        y, heads = linear_attention(
            c,
            b,
            (dt[..., None] * values).astype(self.dtype),
            dt * rates,
            None if state is None else state.heads,
            starts=None if segment_ids is None else found.starts,
            chunk_size=self.chunk_size,
        )
        y = (y + self.skip_weights()[:, None] * values).astype(self.dtype).reshape(z.shape)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        y = GatedRMSNorm(self.num_groups, epsilon=self.norm_epsilon, name="norm", **types)(y, z)
        if state is not None:
            state = Mamba2State(convolution=tail, heads=heads, segment=after)
        return self.map_out(y), state

    @nn.nowrap
    def init_state(self, batch_size: int, max_length: int) -> Mamba2State:
        width = self.inner + 2 * self.num_groups * self.state_dim
        shape = (batch_size, self.heads, self.state_dim, self.head_width)
        return Mamba2State(
            convolution=Tail.fresh(batch_size, self.conv_width - 1, width, self.dtype),
            heads=jnp.zeros(shape, jnp.promote_types(self.dtype, jnp.float32)),
            segment=SegmentState.fresh(batch_size),
        )

    @nn.nowrap
    def costs(self, length: int) -> Costs:
        token = (self.inner + 2 * self.num_groups * self.state_dim) * jnp.dtype(self.dtype).itemsize + 4
        heads = self.inner * self.state_dim * jnp.promote_types(self.dtype, jnp.float32).itemsize
        return self.costs_of(length, 1) + Costs(state_bytes=(self.conv_width - 1) * token + heads + 12)


def split(a: Array, *widths: int) -> list[Array]:
    """Parts of these widths along the last axis."""
    edges = [sum(widths[: i + 1]) for i in range(len(widths) - 1)]
    return jnp.split(a, edges, axis=-1)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
