"""Combiner: full attention at sub-quadratic cost, through summaries of earlier spans."""

from __future__ import annotations

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from seqjax.config import ConfigError, choose
from seqjax.layers.dense import Dense, scaled_init
from seqjax.mixers.base import Costs, Mixer, check_heads
from seqjax.ops.combiner import FACTORIZATIONS, CombinerCache, combiner_attention, span_sizes
from seqjax.ops.segments import SegmentState, segments
from seqjax.registry import register_mixer


@chex.dataclass(frozen=True)
class CombinerState:
    """The tokens seen so far with their spans, and the segment that the next token may continue."""

    cache: CombinerCache
    segment: SegmentState


@register_mixer("combiner")
class Combiner(Mixer):
    """Combiner attention (Ren et al. 2021): every earlier token is seen, most of them through spans.

    Carried state: queries, keys, values and spans. A chunk that overruns them gets NaN, never a silently wrong answer.

    Attributes:
      num_heads: H, a divisor of `embed_dim`.
      factorization: "axial", "fixed" or "logsparse"; see `combiner_attention`.
      span_length: of the blocks of "fixed" and the rows of "axial"; the square root of the length costs least.
      position: of the model, which adds "sinusoidal" or "learned" to the embedding: a span's key is the greatest of several,
        which a rotation would not survive.
    """

    num_heads: int = 4
    factorization: str = "axial"
    span_length: int = 32
    position: str = "sinusoidal"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self.num_heads, self.embed_dim, f"model.embed_dim={self.embed_dim}")
        choose(dict.fromkeys(FACTORIZATIONS), self.factorization, "model.factorization")
        if self.span_length < 1:
            raise ConfigError(f"model.span_length={self.span_length} is not positive; allowed: 1 and above.")
        if self.position in ("rope", "alibi"):
            raise ConfigError(
                f"model.position={self.position!r} acts on pairs of tokens, and a Combiner's spans have no position; "
                "allowed: sinusoidal, learned, none."
            )

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def _form(self) -> dict:
        return {"factorization": self.factorization, "span_length": self.span_length}

    @nn.compact
    def __call__(self, x, state=None, *, segment_ids=None, train=False):
        before = SegmentState.fresh(1 if segment_ids is None else x.shape[0]) if state is None else state.segment
        found, after = segments(segment_ids, before, x.shape[1])
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        shape, axes = (self.num_heads, self.head_dim), ("embed", "heads", "head_dim")
        q, k, v = (Dense(shape, axes, use_bias=False, name=name, **types)(x) for name in ("query", "key", "value"))
        q, k, v = (nn.with_logical_constraint(a, ("batch", "length_act", "heads_act", None)) for a in (q, k, v))
        mixed, cache = combiner_attention(q, k, v, found.positions, None if state is None else state.cache, **self._form)
        init = scaled_init(self.residual_init)
        out = Dense(self.embed_dim, ("heads", "head_dim", "embed"), 2, use_bias=False, kernel_init=init, name="out", **types)
        return out(mixed), None if state is None else CombinerState(cache=cache, segment=after)

    @nn.nowrap
    def init_state(self, batch_size: int, max_length: int) -> CombinerState:
        cache = CombinerCache.fresh(batch_size, max_length, self.num_heads, self.head_dim, self.dtype, **self._form)
        return CombinerState(cache=cache, segment=SegmentState.fresh(batch_size))

    @nn.nowrap
    def costs(self, length: int) -> Costs:
        kernels = 4 * self.embed_dim**2
        state = jax.eval_shape(lambda: self.init_state(1, length))
        return Costs(
            parameters=kernels,
            flops=2 * length * kernels + 4 * self._pairs(length) * self.embed_dim,
            state_bytes=sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(state)),
        )

    @nn.nowrap
    def _pairs(self, length: int) -> int:
        """Pairs of a query and a token or span, with those that make the summaries."""
        size = self.span_length
        if self.factorization == "logsparse":
            sizes = span_sizes(length, **self._form)
            return sum(1 + at.bit_count() for at in range(length)) + sum(length // n * n for n in sizes)
        seen = sum(at % size + 1 + at // size for at in range(length))
        return seen + length // size * size * (size if self.factorization == "axial" else 1)
