"""LightNet: linear attention whose decay is the growth of a running sum."""

from __future__ import annotations

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from seqjax.config import ConfigError
from seqjax.layers.dense import Dense, scaled_init
from seqjax.layers.norms import GatedRMSNorm
from seqjax.mixers.base import Costs, Mixer, check_heads
from seqjax.ops.linear_attention import linear_attention, linear_attention_flops
from seqjax.ops.log_space import running_log_sum
from seqjax.ops.segments import SegmentState, segments
from seqjax.registry import register_mixer


@chex.dataclass(frozen=True)
class LightNetState:
    """The heads' matrices and the logarithms of their running sums, in at least float32; the current segment."""

    heads: Float[Array, "B H K W"]
    log_sum: Float[Array, "B H K"]
    segment: SegmentState


@register_mixer("lightnet")
class LightNet(Mixer):
    """The additive recurrence of LightNet (Qin et al. 2024) in its causal form: per channel of the keys, a softmax over time.

    With `z_t = log sum_(s <= t) exp(k_s)`: `S_t = exp(z_(t-1) - z_t) S_(t-1) + exp(k_t - z_t) v_t^T`,
    `y_t = S_t^T silu(q_t)`, which weighs each value by `softmax_(s <= t)(k_s)`. Then a norm over all heads, a gate from a map
    of low rank, and a map out, as in flash-linear-attention.

    Attributes:
      num_heads: H, a divisor of `embed_dim`.
      gate_rank: of the gate's map.
      initial_unit: the sums start at 1 in place of 0, as in the authors' later code: weights then sum to less than 1.
      norm_epsilon: of the norm.
      chunk_size, implementation: of `linear_attention`.
    """

    num_heads: int = 4
    gate_rank: int = 16
    initial_unit: bool = False
    norm_epsilon: float = 1e-5
    chunk_size: int | None = None
    implementation: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self.num_heads, self.embed_dim, f"model.embed_dim={self.embed_dim}")
        for key in ("gate_rank", "chunk_size"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise ConfigError(f"model.{key}={getattr(self, key)} is not positive; allowed: 1 and above.")

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @nn.compact
    def __call__(self, x, state=None, *, segment_ids=None, train=False):
        before = SegmentState.fresh(1 if segment_ids is None else x.shape[0]) if state is None else state.segment
        found, after = segments(segment_ids, before, x.shape[1])
        starts = None if segment_ids is None else found.starts
        heads, log_sum = self._empty(x.shape[0]) if state is None else (state.heads, state.log_sum)
        q, k, v = (self._dense(name, (self.num_heads, self.head_dim))(x) for name in ("query", "key", "value"))
        keys, log_decay, log_sum = self._weights(k.astype(log_sum.dtype), log_sum, starts)
        y, heads = linear_attention(
            jax.nn.silu(q),
            keys.astype(self.dtype),
            v,
            log_decay,
            heads,
            starts=starts,
            chunk_size=self.chunk_size,
            implementation=self.implementation,
        )
        gate = self._dense("gate_out", self.embed_dim, ("mlp", "embed"))(self._dense("gate_in", self.gate_rank)(x))
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = GatedRMSNorm(norm_before_gate=True, epsilon=self.norm_epsilon, name="norm", **types)
        y = norm(y.reshape(x.shape), gate)
        out = self._dense("out", self.embed_dim, ("heads", "embed"), kernel_init=scaled_init(self.residual_init))(y)
        return out, None if state is None else LightNetState(heads=heads, log_sum=log_sum, segment=after)

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
        wide = jnp.promote_types(self.dtype, jnp.float32)
        shape = (batch_size, self.num_heads, self.head_dim)
        return jnp.zeros((*shape, self.head_dim), wide), jnp.full(shape, 0.0 if self.initial_unit else -jnp.inf, wide)

    @nn.nowrap
    def init_state(self, batch_size: int, max_length: int) -> LightNetState:
        heads, log_sum = self._empty(batch_size)
        return LightNetState(heads=heads, log_sum=log_sum, segment=SegmentState.fresh(batch_size))

    @nn.nowrap
    def costs(self, length: int) -> Costs:
        width, heads, size = self.embed_dim, self.num_heads, self.head_dim
        kernels = 4 * width**2 + 2 * width * self.gate_rank
        mixing = linear_attention_flops(length, heads, heads, size, size, self.chunk_size, channel_decay=True)
        wide = jnp.promote_types(self.dtype, jnp.float32).itemsize
        return Costs(
            parameters=kernels + width,
            flops=2 * length * kernels + mixing + 12 * length * width,
            state_bytes=width * (size + 1) * wide + 12,
        )
