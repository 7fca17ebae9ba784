"""Aaren: attention with one query for all positions, which is a recurrence."""

from __future__ import annotations

import math

import chex
import flax.linen as nn
import jax.numpy as jnp

from seqjax.layers.dense import Dense, scaled_init
from seqjax.mixers.base import Costs, Mixer, check_heads
from seqjax.ops.prefix_attention import prefix_attention
from seqjax.ops.segments import SegmentState, segments
from seqjax.ops.softmax import SoftmaxSums
from seqjax.registry import register_mixer


@chex.dataclass(frozen=True)
class AarenState:
    """Each head's sums over the current segment, in at least float32, and the segment that the next token may continue."""

    sums: SoftmaxSums
    segment: SegmentState


@register_mixer("aaren")
class Aaren(Mixer):
    """Attention as a recurrence (Feng et al. 2024, "Attention as an RNN", section 3.3), in place of causal attention.

    The layer learns one query token. Every position attends with it to all positions before and to itself, so that the
    output is a running average whose weights depend on keys alone: one prefix scan, and a state of constant size. Nothing in
    a single layer depends on the order of tokens; positions belong into their embedding.

    Attributes:
      num_heads: H, a divisor of `embed_dim`.
      qkv_bias, out_bias: biases of the projections.
      implementation: of `prefix_attention`.
    """

    num_heads: int = 4
    qkv_bias: bool = False
    out_bias: bool = False
    implementation: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self.num_heads, self.embed_dim, f"model.embed_dim={self.embed_dim}")

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @nn.compact
    def __call__(self, x, state=None, *, segment_ids=None, train=False):
        before = SegmentState.fresh(1 if segment_ids is None else x.shape[0]) if state is None else state.segment
        found, after = segments(segment_ids, before, x.shape[1])
        wide = jnp.promote_types(self.dtype, jnp.float32)
        q, k, v = self._project("query", self._query()), self._project("key", x), self._project("value", x)
        scores = jnp.einsum("hk,blhk->blh", q, k, preferred_element_type=wide) / math.sqrt(self.head_dim)
        mixed, sums = prefix_attention(
            scores,
            v,
            None if state is None else state.sums,
            starts=None if segment_ids is None else found.starts,
            implementation=self.implementation,
        )
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        init, axes = scaled_init(self.residual_init), ("heads", "head_dim", "embed")
        out = Dense(self.embed_dim, axes, 2, self.out_bias, kernel_init=init, name="out", **types)
        return out(mixed), None if state is None else AarenState(sums=sums, segment=after)

    def _query(self):
        init = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("embed",))
        return self.param("token", init, (self.embed_dim,), self.param_dtype)

    def _project(self, name: str, x):
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        shape, axes = (self.num_heads, self.head_dim), ("embed", "heads", "head_dim")
        return Dense(shape, axes, use_bias=self.qkv_bias, name=name, **types)(x)

    @nn.nowrap
    def init_state(self, batch_size: int, max_length: int) -> AarenState:
        wide = jnp.promote_types(self.dtype, jnp.float32)
        sums = SoftmaxSums.empty((batch_size, self.num_heads), self.head_dim, wide)
        return AarenState(sums=sums, segment=SegmentState.fresh(batch_size))

    @nn.nowrap
    def costs(self, length: int) -> Costs:
        width = self.embed_dim
        wide = jnp.dtype(jnp.promote_types(self.dtype, jnp.float32)).itemsize
        return Costs(
            parameters=width + 4 * width**2 + (3 * self.qkv_bias + self.out_bias) * width,
            flops=2 * width**2 + length * (6 * width**2 + 7 * width),
            state_bytes=(width + 2 * self.num_heads) * wide + 12,
        )
