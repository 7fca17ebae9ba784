"""Causal Fourier mixing: tokens mixed by fixed waves, without a parameter."""

from __future__ import annotations

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from seqjax.config import ConfigError
from seqjax.mixers.base import Costs, Mixer
from seqjax.ops.segments import Segments, SegmentState, segments
from seqjax.registry import register_mixer


@chex.dataclass(frozen=True)
class FourierState:
    """Tokens seen so far, transformed over their features: cosine and sine parts, in the computation's dtype.

    Attributes:
      parts: of each slot; empty ones are 0.
      runs, positions: which segment of its row each slot belongs to, -1 for an empty slot, and its position there.
      index: tokens seen so far, the same for all rows.
      segment: the segment that the next token may continue.
    """

    parts: Float[Array, "B S 2 D"]
    runs: Int[Array, "B S"]
    positions: Int[Array, "B S"]
    index: Int[Array, ""]
    segment: SegmentState


@register_mixer("fourier")
class Fourier(Mixer):
    """Mixing by Fourier transforms over features and tokens (FNet: Lee-Thorp et al. 2021), cut to what came before.

    `y_n = Re(sum_(m <= n) exp(-2 pi i n m / T) (F x_m)) / sqrt((n + 1) D)`, F the transform over D features and T =
    `max_length`: rows of one large transform, masked, so that appending tokens changes no earlier output. FNetAR (Lou et
    al. 2021) is this idea; its exact operator is not published in full, and the scale, which keeps variances, is ours.

    Carried state: all transformed tokens. A chunk that overruns them gets NaN, never a silently wrong answer.

    Attributes:
      max_length: T, the longest segment.
    """

    max_length: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.max_length <= 2**15:
            raise ConfigError(f"model.max_length={self.max_length} is out of range for fourier; allowed: 1 to {2**15}.")

    def __call__(self, x, state=None, *, segment_ids=None, train=False):
        if x.shape[1] > self.max_length:
            raise ConfigError(f"a sequence of {x.shape[1]} tokens is longer than model.max_length={self.max_length}.")
        before = SegmentState.fresh(1 if segment_ids is None else x.shape[0]) if state is None else state.segment
        found, after = segments(segment_ids, before, x.shape[1])
        angles = 2 * np.pi * (np.outer(np.arange(self.embed_dim), np.arange(self.embed_dim)) % self.embed_dim) / self.embed_dim
        waves = jnp.asarray(np.stack([np.cos(angles), -np.sin(angles)], axis=1), self.dtype)
        parts = jnp.einsum("bld,dpe->blpe", x.astype(self.dtype), waves)
        if state is None:
            return self._mix(found, parts, found.runs, found.positions), None
        length, capacity = x.shape[1], state.parts.shape[1]
        new = (parts, found.runs, found.positions)
        old = (state.parts, state.runs, state.positions)
        cache = tuple(jax.lax.dynamic_update_slice_in_dim(a, b.astype(a.dtype), state.index, axis=1) for a, b in zip(old, new))
        y = jnp.where(state.index + length > capacity, jnp.nan, self._mix(found, *cache))
        index = state.index + length
        return y, FourierState(parts=cache[0], runs=cache[1], positions=cache[2], index=index, segment=after)

    def _mix(
        self, found: Segments, parts: Float[Array, "B S 2 D"], runs: Int[Array, "#B S"], positions: Int[Array, "#B S"]
    ) -> Float[Array, "B L D"]:
        """Sums over the slots of the same segment up to each token."""
        wide = jnp.promote_types(self.dtype, jnp.float32)
        n, m = found.positions[:, :, None], positions[:, None]
        table = 2 * np.pi * np.arange(self.max_length) / self.max_length
        turns = (n * m) % self.max_length
        scale = jax.lax.rsqrt((n + 1).astype(wide) * self.embed_dim)
        seen = (found.runs[:, :, None] == runs[:, None]) & (m <= n)
        waves = jnp.stack([jnp.asarray(wave(table), wide)[turns] for wave in (np.cos, np.sin)])
        waves = jnp.where(seen, waves * scale, 0).astype(self.dtype)
        y = jnp.einsum("pbls,bspd->bld", jnp.broadcast_to(waves, (2, parts.shape[0], *waves.shape[2:])), parts)
        beyond = found.positions >= self.max_length
        return jnp.where(beyond[..., None], jnp.nan, y)

    @nn.nowrap
    def init_state(self, batch_size: int, max_length: int) -> FourierState:
        return FourierState(
            parts=jnp.zeros((batch_size, max_length, 2, self.embed_dim), self.dtype),
            runs=jnp.full((batch_size, max_length), -1, jnp.int32),
            positions=jnp.zeros((batch_size, max_length), jnp.int32),
            index=jnp.zeros((), jnp.int32),
            segment=SegmentState.fresh(batch_size),
        )

    @nn.nowrap
    def costs(self, length: int) -> Costs:
        width = self.embed_dim
        slot = 2 * width * jnp.dtype(self.dtype).itemsize + 8
        return Costs(flops=4 * length * width**2 + 4 * length**2 * width, state_bytes=length * slot + 16)
