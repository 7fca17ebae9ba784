"""Routing attention: each token attends to the earlier tokens of its cluster."""

from __future__ import annotations

import math

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seqjax.config import ConfigError
from seqjax.layers.dense import Dense, scaled_init
from seqjax.layers.norms import make_norm
from seqjax.layers.positions import rotary_frequencies, rotate
from seqjax.mixers.base import Costs, Mixer, check_heads
from seqjax.ops.attention import attended_pairs, flash_attention
from seqjax.ops.segments import SegmentState, segments
from seqjax.registry import register_mixer

SMOOTHING = 1e-5
"""Added to the number of tokens of each cluster."""


@chex.dataclass(frozen=True)
class RoutingState:
    """Keys, values and clusters of the tokens seen so far.

    Attributes:
      keys, values: in the computation's dtype, keys already rotated.
      labels: cluster and segment of each slot in one number, for each head; -1 for an empty slot.
      index: tokens seen so far, the same for all rows.
      segment: the segment that the next token may continue.
    """

    keys: Float[Array, "B S H K"]
    values: Float[Array, "B S H K"]
    labels: Int[Array, "B S H"]
    index: Int[Array, ""]
    segment: SegmentState


@register_mixer("routing")
class Routing(Mixer):
    """The routing heads of the Routing Transformer (Roy et al. 2021): attention within clusters of online k-means.

    Queries, normalised, are the keys as well. A token belongs to the cluster whose centroid has the greatest product with
    it, in each head, and attends to itself and the earlier tokens there. The authors' clusters take the same number of
    tokens each, the nearest ones of the whole sequence: then later tokens decide where earlier ones belong, and no token by
    token decoding agrees with it. Theirs are one half of a layer's heads, local attention the other: a pattern has both.

    Centroids are moving averages of their tokens, in the collection `batch_stats`; in training they move, tokens of segment 0
    left out, and `losses` holds the mean squared distance to them.

    Carried state: keys, values and clusters. A chunk that overruns them gets NaN, never a silently wrong answer.

    Attributes:
      num_heads: H, a divisor of `embed_dim`.
      num_clusters: of each head.
      centroid_decay: of the moving averages.
      commitment: weight of the distance in the loss.
      position: "rope" turns queries after they were assigned; others act elsewhere.
      implementation: of `flash_attention`.
    """

    num_heads: int = 4
    num_clusters: int = 8
    centroid_decay: float = 0.999
    commitment: float = 1e-4
    position: str = "rope"
    implementation: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self.num_heads, self.embed_dim, f"model.embed_dim={self.embed_dim}")
        if self.num_clusters < 1:
            raise ConfigError(f"model.num_clusters={self.num_clusters} is not positive; allowed: 1 and above.")
        if not 0 <= self.centroid_decay <= 1:
            raise ConfigError(f"model.centroid_decay={self.centroid_decay} is out of range; allowed: from 0.0 to 1.0.")
        if self.position == "rope" and self.head_dim % 2:
            raise ConfigError(f"model.position='rope' turns pairs of features, and the head width {self.head_dim} is odd.")

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @nn.compact
    def __call__(self, x, state=None, *, segment_ids=None, train=False):
        length = x.shape[1]
        before = SegmentState.fresh(1 if segment_ids is None else x.shape[0]) if state is None else state.segment
        found, after = segments(segment_ids, before, length)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        shape, axes = (self.num_heads, self.head_dim), ("embed", "heads", "head_dim")
        project = lambda name: Dense(shape, axes, use_bias=False, name=name, **types)(x)
        q, v = make_norm("layer_unscaled", name="norm", **types)(project("query")), project("value")
        clusters = self._assign(q, segment_ids, train)
        labels = found.runs[..., None] * self.num_clusters + clusters
        if self.position == "rope":
            q = rotate(q, found.positions, rotary_frequencies(self.head_dim, 10000.0, None))
        k, values, key_labels, offset = q, v, labels, 0
        if state is not None:
            cache = [
                jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), state.index, axis=1)
                for old, new in zip((state.keys, state.values, state.labels), (k, v, labels))
            ]
            k, values, key_labels, offset = *cache, state.index
        mixed = self._attend(q, k, values, labels, key_labels, offset)
        if state is not None:
            index = state.index + length
            mixed = jnp.where(index > state.keys.shape[1], jnp.nan, mixed)
            state = RoutingState(keys=k, values=values, labels=key_labels, index=index, segment=after)
        init = scaled_init(self.residual_init)
        out = Dense(self.embed_dim, ("heads", "head_dim", "embed"), 2, use_bias=False, kernel_init=init, name="out", **types)
        return out(mixed), state

    def _assign(self, q: Float[Array, "B L H K"], segment_ids: Array | None, train: bool) -> Int[Array, "B L H"]:
        """The cluster of each token; in training, move the centroids."""
        wide = jnp.promote_types(self.param_dtype, jnp.float32)
        shape = (self.num_heads, self.num_clusters, self.head_dim)

        def fresh() -> Array:
            drawn = jax.random.normal(self.make_rng("params"), shape, wide)
            return drawn * math.sqrt(self.head_dim) / jnp.linalg.norm(drawn, axis=-1, keepdims=True)

        centroids = self.variable("batch_stats", "centroids", fresh)
        sizes = self.variable("batch_stats", "sizes", lambda: jnp.ones(shape[:2], wide))
        q = q.astype(wide)
        clusters = jnp.argmax(jnp.einsum("blhk,hck->blhc", q, centroids.value), axis=-1)
        if train and not self.is_initializing():
            real = jnp.ones(q.shape[:2], wide) if segment_ids is None else (segment_ids != 0).astype(wide)
            members = jax.nn.one_hot(clusters, self.num_clusters, dtype=wide) * real[..., None, None]
            nearest = jnp.einsum("blhc,hck->blhk", members, centroids.value)
            distance = jnp.mean(jnp.square(q - nearest), axis=-1) * real[..., None]
            self.sow("losses", "commitment", self.commitment * distance.sum() / jnp.maximum(real.sum() * self.num_heads, 1))
            q, members = jax.lax.stop_gradient((q, members))
            keep = self.centroid_decay
            sums = centroids.value * sizes.value[..., None]
            sums = keep * sums + (1 - keep) * jnp.einsum("blhc,blhk->hck", members, q)
            counts = keep * sizes.value + (1 - keep) * members.sum((0, 1))
            centroids.value, sizes.value = sums / (counts + SMOOTHING)[..., None], counts
        return clusters.astype(jnp.int32)

    def _attend(self, q: Array, k: Array, v: Array, labels: Array, key_labels: Array, offset: int | Array) -> Array:
        """Attention of each head as a row of its own, for clusters differ by head."""
        rows = lambda a: jnp.swapaxes(a, 1, 2).reshape(-1, a.shape[1], 1, a.shape[3])
        ids = tuple(
            jnp.swapaxes(jnp.broadcast_to(a, (q.shape[0], *a.shape[1:])), 1, 2).reshape(-1, a.shape[1])
            for a in (labels, key_labels)
        )
        mixed = flash_attention(rows(q), rows(k), rows(v), segment_ids=ids, q_offset=offset, implementation=self.implementation)
        return jnp.swapaxes(mixed.reshape(q.shape[0], self.num_heads, q.shape[1], self.head_dim), 1, 2)

    @nn.nowrap
    def init_state(self, batch_size: int, max_length: int) -> RoutingState:
        shape = (batch_size, max_length, self.num_heads, self.head_dim)
        return RoutingState(
            keys=jnp.zeros(shape, self.dtype),
            values=jnp.zeros(shape, self.dtype),
            labels=jnp.full(shape[:3], -1, jnp.int32),
            index=jnp.zeros((), jnp.int32),
            segment=SegmentState.fresh(batch_size),
        )

    @nn.nowrap
    def costs(self, length: int) -> Costs:
        """Of all causal pairs: how few of them share a cluster depends on the data."""
        kernels = 3 * self.embed_dim**2
        pairs = attended_pairs(length, causal=True, window=None)
        slot = 2 * self.embed_dim * jnp.dtype(self.dtype).itemsize + 4 * self.num_heads
        return Costs(
            parameters=kernels,
            flops=2 * length * kernels + 4 * pairs * self.embed_dim + 2 * length * self.num_clusters * self.embed_dim,
            state_bytes=length * slot + 16,
        )
