"""LightNet: linear attention whose decay is the growth of a running sum."""

from __future__ import annotations

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from seqjax.config import ConfigError
from seqjax.layers.dense import Dense, scaled_init
from seqjax.layers.norms import GatedRMSNorm
from seqjax.layers.positions import check_shape, lrpe, lrpe_frequencies, raster_coordinates
from seqjax.mixers.base import Costs, Mixer, check_heads
from seqjax.ops.linear_attention import bidirectional_linear_attention, linear_attention, linear_attention_flops
from seqjax.ops.log_space import running_log_sum, segment_log_sum
from seqjax.ops.segments import Segments, SegmentState, segments
from seqjax.registry import register_mixer


@chex.dataclass(frozen=True)
class LightNetState:
    """The heads' matrices and the logarithms of their running sums, in at least float32; the current segment."""

    heads: Float[Array, "B H C W"]
    log_sum: Float[Array, "B H K"]
    segment: SegmentState


@register_mixer("lightnet")
class LightNet(Mixer):
    """The additive recurrence of LightNet (Qin et al. 2024): per channel of the keys, a softmax over time.

    With `z_t = log sum_(s <= t) exp(k_s)`: `S_t = exp(z_(t-1) - z_t) S_(t-1) + exp(k_t - z_t) v_t^T`,
    `y_t = S_t^T silu(q_t)`, which weighs each value by `softmax_(s <= t)(k_s)`. With `causal=False` the softmax is over the
    whole segment, `y_t = V^T softmax(K) silu(q_t)`: one pass, without a recurrence. Then a norm over all heads, a gate from a
    map of low rank, and a map out, as in flash-linear-attention.

    Attributes:
      num_heads: H, a divisor of `embed_dim`.
      gate_rank: of the gate's map.
      initial_unit: the sums start at 1 in place of 0, as in the authors' later code: weights then sum to less than 1.
      shape: of the tensors that a segment holds in raster order, for positions by MD-LRPE (`layers.positions.lrpe`) on
        `silu(q)` and on the keys' weights: `(7, 7)` for 49 patches of an image. Every product(shape) tokens begin another
        tensor. One axis, longer than any segment, serves text. None gives no positions.
      lrpe_theta: base of the angles.
      norm_epsilon: of the norm.
      chunk_size, implementation: of `linear_attention`.
    """

    num_heads: int = 4
    gate_rank: int = 16
    initial_unit: bool = False
    shape: tuple[int, ...] | None = None
    lrpe_theta: float = 10000.0
    norm_epsilon: float = 1e-5
    chunk_size: int | None = None
    implementation: str | None = None

    bidirectional = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self.num_heads, self.embed_dim, f"model.embed_dim={self.embed_dim}")
        check_shape(self.shape)
        for key in ("gate_rank", "chunk_size"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise ConfigError(f"model.{key}={getattr(self, key)} is not positive; allowed: 1 and above.")

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def key_dim(self) -> int:
        """Of a head, after the encoding of positions."""
        return self.head_dim if self.shape is None else 2 * self.head_dim

    @property
    def wide(self) -> Any:
        return jnp.promote_types(self.dtype, jnp.float32)

    @nn.compact
    def __call__(self, x, state=None, *, segment_ids=None, train=False):
        if state is not None and not self.causal:
            self.refuse_state()
        before = SegmentState.fresh(1 if segment_ids is None else x.shape[0]) if state is None else state.segment
        found, after = segments(segment_ids, before, x.shape[1])
        starts = None if segment_ids is None else found.starts
        q, k, v = (self._dense(name, (self.num_heads, self.head_dim))(x) for name in ("query", "key", "value"))
        q, k = jax.nn.silu(q), k.astype(self.wide)
        chunks = {"starts": starts, "chunk_size": self.chunk_size, "implementation": self.implementation}
        if self.causal:
            heads, log_sum = self._empty(x.shape[0]) if state is None else (state.heads, state.log_sum)
            keys, log_decay, log_sum = self._weights(k, log_sum, starts)
            log_decay = log_decay if self.shape is None else jnp.tile(log_decay, 2)
            y, heads = linear_attention(self._place(q, found), self._place(keys, found), v, log_decay, heads, **chunks)
        else:
            totals = segment_log_sum(k, starts=starts)
            keys = jnp.exp(k - (jnp.logaddexp(totals, 0.0) if self.initial_unit else totals))
            y = bidirectional_linear_attention(self._place(q, found), self._place(keys, found), v, **chunks)
        if state is not None:
            state = LightNetState(heads=heads, log_sum=log_sum, segment=after)
        return self._map_out(y.reshape(x.shape), x), state

    def _map_out(self, y: Float[Array, "B L D"], x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """Norm, gate and map of the heads' outputs."""
        gate = self._dense("gate_out", self.embed_dim, ("mlp", "embed"))(self._dense("gate_in", self.gate_rank)(x))
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        y = GatedRMSNorm(norm_before_gate=True, epsilon=self.norm_epsilon, name="norm", **types)(y, gate)
        return self._dense("out", self.embed_dim, ("heads", "embed"), kernel_init=scaled_init(self.residual_init))(y)

    def _place(self, a: Float[Array, "B L H K"], found: Segments) -> Float[Array, "B L H C"]:
        """Give queries or keys a position."""
        if self.shape is not None:
            frequencies = lrpe_frequencies(self.num_heads, self.head_dim, len(self.shape), self.lrpe_theta)
            a = lrpe(a, raster_coordinates(found.positions, self.shape), frequencies)
        return a.astype(self.dtype)

    def _weights(self, k: Array, log_sum: Float[Array, "B H K"], starts: Array | None) -> tuple[Array, Array, Array]:
        """Keys and decays of the recurrence, and the last logarithm of the sums."""
        first = 0.0 if self.initial_unit else -jnp.inf
        if starts is not None and self.initial_unit:
            # A new segment starts from a unit: one more summand of its first token.
            k_and_unit = jnp.logaddexp(k, 0.0)
            z = running_log_sum(jnp.where(starts[..., None, None], k_and_unit, k), log_sum, starts=starts)
        else:
            z = running_log_sum(k, log_sum, starts=starts)
        earlier = jnp.concatenate([log_sum[:, None], z[:, :-1]], axis=1)
        if starts is not None:
            earlier = jnp.where(starts[..., None, None], first, earlier)
        log_decay = jnp.where(earlier == -jnp.inf, 0, earlier - z)  # of an empty state any decay will do
        return jnp.exp(k - z), log_decay, z[:, -1]

    def _dense(self, name: str, features: int | tuple, axes: tuple | None = None, **options) -> Dense:
        types = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype}
        axes = axes or (("embed", "heads", "head_dim") if isinstance(features, tuple) else ("embed", "mlp"))
        return Dense(features, axes, name=name, **types, **options)

    @nn.nowrap
    def _empty(self, batch_size: int) -> tuple[Array, Array]:
        matrices = (batch_size, self.num_heads, self.key_dim, self.head_dim)
        sums = (batch_size, self.num_heads, self.head_dim)
        return jnp.zeros(matrices, self.wide), jnp.full(sums, 0.0 if self.initial_unit else -jnp.inf, self.wide)

    @nn.nowrap
    def init_state(self, batch_size: int, max_length: int) -> LightNetState:
        if not self.causal:
            self.refuse_state()
        heads, log_sum = self._empty(batch_size)
        return LightNetState(heads=heads, log_sum=log_sum, segment=SegmentState.fresh(batch_size))

    @nn.nowrap
    def costs(self, length: int) -> Costs:
        width, heads, size = self.embed_dim, self.num_heads, self.head_dim
        kernels = 4 * width**2 + 2 * width * self.gate_rank
        mixing = 4 * length * width * self.key_dim
        if self.causal:
            mixing = linear_attention_flops(length, heads, heads, self.key_dim, size, self.chunk_size, channel_decay=True)
        return Costs(
            parameters=kernels + width,
            flops=2 * length * kernels + mixing + 12 * length * width,
            state_bytes=width * (self.key_dim + 1) * jnp.dtype(self.wide).itemsize + 12 if self.causal else 0,
        )
