"""Softmax attention as a mixer: multi-head, grouped or multi-query, global or sliding window."""

from __future__ import annotations

from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from seqjax.config import ConfigError, allowed_values
from seqjax.layers.dense import Dense, scaled_init
from seqjax.layers.positions import POSITIONS, alibi_slopes, rotary_frequencies, rotate
from seqjax.mixers.base import Costs, Mixer
from seqjax.ops.attention import attended_pairs, flash_attention
from seqjax.ops.prefix_mask import PrefixOrder
from seqjax.ops.segments import Segments, SegmentState, segments
from seqjax.ops.set_prompt import SetOrder, reordered
from seqjax.registry import register_mixer


@chex.dataclass(frozen=True)
class AttentionState:
    """Keys and values seen so far: all of them, or with a window the last `S = window` in a ring buffer.

    Attributes:
      keys, values: in the computation's dtype, keys already rotated.
      runs: which segment of its row each slot belongs to; -1 for an empty slot.
      index: tokens seen so far, the same for all rows.
      segment: the segment that the next token may continue.
    """

    keys: Float[Array, "B S G K"]
    values: Float[Array, "B S G K"]
    runs: Int[Array, "B S"]
    index: Int[Array, ""]
    segment: SegmentState


class Memory(NamedTuple):
    """What a call attended to, for later attention that shares it.

    Attributes:
      keys, values: of the cache where there is one; keys already rotated.
      positions: of the call's queries.
      masks: arguments of `flash_attention` that say which pairs attend.
      overrun: whether the cache is too small; None without one.
    """

    keys: Float[Array, "B S G K"]
    values: Float[Array, "B S G K"]
    positions: Int[Array, "#B L"]
    masks: dict[str, Any]
    overrun: Bool[Array, ""] | None = None


@register_mixer("attention")
class Attention(Mixer):
    """Scaled dot-product attention (Vaswani et al. 2017) with grouped heads (Ainslie et al. 2023).

    Carried state: the key-value cache. A chunk that overruns the cache gets NaN, never a silently wrong answer.

    Attributes:
      num_heads: query heads H.
      num_kv_heads: key and value heads G, a divisor of H; None for H (multi-head), 1 is multi-query.
      head_dim: width K of a head; None for `embed_dim / num_heads`.
      window: see only the last `window` tokens (Beltagy et al. 2020); None sees all.
      position: "rope" and "alibi" act here; the others are added to the embedding by the model.
      rope_theta, rope_llama3: see `rotary_frequencies`.
      rope_fraction: how much of each head is turned, its first features; the rest knows no position.
      qkv_bias, out_bias: biases of the projections.
      shares: attend to the keys and values of the attention before it in its pattern unit and have none of its own
        (cross-layer attention, Brandon et al. 2024); several in a row share those of the first.
      implementation: of `flash_attention`.
    """

    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    window: int | None = None
    position: str = "rope"
    rope_theta: float = 10000.0
    rope_fraction: float = 1.0
    rope_llama3: tuple | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    shares: bool = False
    implementation: str | None = None

    bidirectional = True
    passes_memory = True
    takes_sets = True

    def __post_init__(self) -> None:
        super().__post_init__()
        heads = self.num_heads
        if heads < 1 or (self.head_dim is None and self.embed_dim % heads):
            fits = [h for h in range(1, self.embed_dim + 1) if self.embed_dim % h == 0 and h <= 64]
            near = min(fits, key=lambda h: abs(h - heads))
            raise ConfigError(
                f"model.num_heads={heads} does not divide model.embed_dim={self.embed_dim}; "
                f"did you mean {near}? Allowed: {', '.join(map(str, fits))}, or any number with model.head_dim given."
            )
        if self.num_kv_heads is not None and (self.num_kv_heads < 1 or heads % self.num_kv_heads):
            fits = [g for g in range(1, heads + 1) if heads % g == 0]
            raise ConfigError(
                f"model.num_kv_heads={self.num_kv_heads} does not divide model.num_heads={heads}; "
                f"allowed: None, {', '.join(map(str, fits))}."
            )
        if self.position not in POSITIONS:
            raise ConfigError(f"model.position={self.position!r} is unknown; {allowed_values(self.position, POSITIONS)}")
        if not 0 < self.rope_fraction <= 1:
            raise ConfigError(f"model.rope_fraction={self.rope_fraction} is out of range; allowed: above 0.0, up to 1.0.")
        if self.position == "rope" and self.turned % 2:
            raise ConfigError(f"model.position='rope' turns pairs of features, and the head width {self.turned} is odd.")
        if self.window is not None and self.window < 1:
            raise ConfigError(f"model.window={self.window} is not positive; allowed: None, or 1 and above.")

    @property
    def key_dim(self) -> int:
        return self.head_dim or self.embed_dim // self.num_heads

    @property
    def turned(self) -> int:
        """Features of a head that rotary positions act on."""
        return int(self.rope_fraction * self.key_dim)

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @nn.nowrap
    def memory_source(self, before: Attention | None) -> Attention:
        """Whose keys and values this one attends to: its own, or those that `before` it attends to."""
        if not self.shares:
            return self
        if before is None:
            raise ConfigError(
                "model.pattern: attention with shares=True has no attention before it in its pattern unit; allowed: "
                "shares=False there, such as (('attention', 'mlp'), ({'name': 'attention', 'shares': True}, 'mlp'))."
            )
        for key in ("kv_heads", "key_dim", "position", "rope_theta", "rope_llama3", "rope_fraction", "window"):
            mine, theirs = getattr(self, key), getattr(before, key)
            if mine != theirs:
                option = {"kv_heads": "num_kv_heads", "key_dim": "head_dim"}.get(key, key)
                raise ConfigError(
                    f"model.pattern: attention with shares=True has {option}={mine!r}, and the attention whose keys it reads "
                    f"has {theirs!r}; allowed: the same."
                )
        return before

    @nn.compact
    def __call__(
        self,
        x,
        state=None,
        *,
        segment_ids=None,
        train=False,
        order: SetOrder | PrefixOrder | None = None,
        memory: Memory | None = None,
        return_memory: bool = False,
    ):
        """As `Mixer`, and with more arguments.

        Args:
          order: of a prompt with sets of sub-sequences, or of a source that is seen in both directions; each must be in one
            call.
          memory: what to attend to, with `shares`.
          return_memory: also give what the call attended to.
        """
        if state is not None and not self.causal:
            self.refuse_state()
        if self.shares:
            if memory is None:
                self.memory_source(None)
            mixed = self._read(self._queries(x, memory.positions), memory)
        else:
            before = SegmentState.fresh(1 if segment_ids is None else x.shape[0]) if state is None else state.segment
            found, after = segments(segment_ids, before, x.shape[1])
            if isinstance(order, SetOrder):
                self._check_order()
                found, after = reordered(found, before, after, order)
            q, k, v = self._project(x, x, found.positions, found.positions)
            if state is None:
                runs = None if segment_ids is None else (found.runs, found.runs)
                memory, index = Memory(k, v, found.positions, {"segment_ids": runs}), 0
            else:
                index = state.index
                memory, state = self._remember(k, v, found, state, after)
            if order is not None:
                memory.masks.update(order.masks(memory.keys.shape[1], index))
            mixed = self._read(q, memory)
        y = self._out(mixed)
        return (y, state, memory) if return_memory else (y, state)

    def _check_order(self) -> None:
        if self.window is not None or self.position == "alibi":
            raise ConfigError(
                f"a prompt with sets has positions of its own, and model.window={self.window} with model.position="
                f"{self.position!r} counts tokens as they are stored; allowed: window=None and no 'alibi'."
            )

    def _project(self, queries: Array, x: Array, q_positions: Array, positions: Array) -> tuple[Array, Array, Array]:
        """Queries `[B, T, H, K]`, keys and values `[B, L, G, K]` of `x`, rotated where positions are rotary."""
        k = self._dense("key", (self.kv_heads, self.key_dim), ("embed", "kv_heads", "head_dim"), self.qkv_bias)(x)
        v = self._dense("value", (self.kv_heads, self.key_dim), ("embed", "kv_heads", "head_dim"), self.qkv_bias)(x)
        k, v = (nn.with_logical_constraint(a, ("batch", "length_act", "heads_act", None)) for a in (k, v))
        return self._queries(queries, q_positions), self._turn(k, positions), v

    def _queries(self, x: Array, positions: Array) -> Array:
        q = self._dense("query", (self.num_heads, self.key_dim), ("embed", "heads", "head_dim"), self.qkv_bias)(x)
        return self._turn(nn.with_logical_constraint(q, ("batch", "length_act", "heads_act", None)), positions)

    def _turn(self, a: Array, positions: Array) -> Array:
        if self.position != "rope":
            return a
        frequencies = rotary_frequencies(self.turned, self.rope_theta, self.rope_llama3)
        if self.turned == self.key_dim:
            return rotate(a, positions, frequencies)
        return jnp.concatenate([rotate(a[..., : self.turned], positions, frequencies), a[..., self.turned :]], axis=-1)

    def _out(self, mixed: Array) -> Array:
        axes = ("heads", "head_dim", "embed")
        return self._dense("out", self.embed_dim, axes, self.out_bias, self.residual_init)(mixed)

    def _attend(self, q: Array, k: Array, v: Array, **masks) -> Array:
        slopes = jnp.asarray(alibi_slopes(self.num_heads)) if self.position == "alibi" else None
        options = {"causal": self.causal, "window": self.window, **masks}
        return flash_attention(q, k, v, alibi_slopes=slopes, implementation=self.implementation, **options)

    def _read(self, q: Array, memory: Memory) -> Array:
        mixed = self._attend(q, memory.keys, memory.values, **memory.masks)
        return mixed if memory.overrun is None else jnp.where(memory.overrun, jnp.nan, mixed)

    def _continue(
        self, q: Array, k: Array, v: Array, found: Segments, state: AttentionState, after: SegmentState
    ) -> tuple[Array, AttentionState]:
        """Attend to the cache and the chunk, and put the chunk into the cache."""
        memory, state = self._remember(k, v, found, state, after)
        return self._read(q, memory), state

    def _remember(
        self, k: Array, v: Array, found: Segments, state: AttentionState, after: SegmentState
    ) -> tuple[Memory, AttentionState]:
        """Put the chunk into the cache; what the chunk attends to."""
        length, capacity = k.shape[1], state.keys.shape[1]
        old = (state.keys, state.values, state.runs)
        new = (k, v, found.runs)
        if self.window == capacity:
            memory, cache = self._remember_ring(found, old, new, state.index)
        else:
            cache = tuple(
                jax.lax.dynamic_update_slice_in_dim(a, b.astype(a.dtype), state.index, axis=1) for a, b in zip(old, new)
            )
            keys, values, runs = cache
            masks = {"segment_ids": (found.runs, runs), "q_offset": state.index}
            memory = Memory(keys, values, found.positions, masks, state.index + length > capacity)
        keys, values, runs = cache
        index = state.index + length
        return memory, AttentionState(keys=keys, values=values, runs=runs, index=index, segment=after)

    def _remember_ring(self, found: Segments, old: tuple, new: tuple, index: Array) -> tuple[Memory, tuple]:
        """Slot s holds the last token whose position is s modulo the capacity."""
        length, capacity = new[0].shape[1], old[0].shape[1]
        kept = min(length, capacity)
        arriving = index + jnp.arange(length - kept, length)
        cache = tuple(a.at[:, arriving % capacity].set(b[:, length - kept :].astype(a.dtype)) for a, b in zip(old, new))
        if length == 1:  # the slot that was overwritten had just left the window: attend to the ring as it now is
            (keys, values, runs), last = cache, index
        else:  # the chunk's first queries still need what its last keys overwrite
            keys, values, runs = (jnp.concatenate([a, b.astype(a.dtype)], axis=1) for a, b in zip(old, new))
            last = index - 1
        positions = last - (last - jnp.arange(capacity)) % capacity
        if length > 1:
            positions = jnp.concatenate([positions, index + jnp.arange(length)])
        masks = {"segment_ids": (found.runs, runs), "q_offset": index, "kv_positions": positions}
        return Memory(keys, values, found.positions, masks), cache

    def _dense(
        self, name: str, features: int | tuple[int, ...], axes: tuple[str, ...], use_bias: bool, scale: float = 1.0
    ) -> Dense:
        return Dense(
            features,
            axes,
            in_axes=len(axes) - (1 if isinstance(features, int) else len(features)),
            use_bias=use_bias,
            kernel_init=scaled_init(scale),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name=name,
        )

    @nn.nowrap
    def init_state(self, batch_size: int, max_length: int) -> AttentionState | tuple:
        if not self.causal:
            self.refuse_state()
        if self.shares:
            return ()
        capacity = max_length if self.window is None else min(self.window, max_length)
        shape = (batch_size, capacity, self.kv_heads, self.key_dim)
        return AttentionState(
            keys=jnp.zeros(shape, self.dtype),
            values=jnp.zeros(shape, self.dtype),
            runs=jnp.full(shape[:2], -1, jnp.int32),
            index=jnp.zeros((), jnp.int32),
            segment=SegmentState.fresh(batch_size),
        )

    @nn.nowrap
    def costs(self, length: int) -> Costs:
        wide, narrow = self.num_heads * self.key_dim, 0 if self.shares else self.kv_heads * self.key_dim
        kernels = self.embed_dim * (2 * wide + 2 * narrow)
        biases = self.qkv_bias * (wide + 2 * narrow) + self.out_bias * self.embed_dim
        pairs = attended_pairs(length, causal=self.causal, window=self.window)
        capacity = length if self.window is None else min(self.window, length)
        slot = 2 * narrow * jnp.dtype(self.dtype).itemsize + 4
        return Costs(
            parameters=kernels + biases,
            flops=2 * length * kernels + 4 * pairs * wide,
            state_bytes=capacity * slot + 16 if self.causal and not self.shares else 0,
        )
