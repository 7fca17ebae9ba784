"""Perceiver AR: latents at some positions attend to a long input once, and a causal stack runs over the latents alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seqjax.config import ConfigError, Option, options_of
from seqjax.layers.dense import Dense
from seqjax.layers.norms import make_norm, norm_parameters
from seqjax.mixers.attention import Attention, AttentionState
from seqjax.mixers.base import Costs, State
from seqjax.models.base import Window, choose_rows
from seqjax.models.heads import HEADS
from seqjax.models.sequence_model import (
    Block,
    Frame,
    Residual,
    SequenceModel,
    make_stack,
    make_sublayer,
    stack_options,
)
from seqjax.ops.attention import attended_pairs
from seqjax.ops.segments import Segments, SegmentState, segments
from seqjax.ops.windows import count_windows, over_packed_windows, over_windows, window_begins
from seqjax.registry import register_architecture


class CrossAttention(Attention):
    """Causal attention of latents, at some positions of a sequence, to the inputs at all of them."""

    @nn.compact
    def __call__(self, latents, inputs, state=None, *, found, after=None, start=0, ids=None):
        """Mixed inputs for each latent `[B, T, D]`, and the next state if one was given.

        Args:
          latents: `[B, T, D]`, at the positions from `start`; all L of them with a state.
          inputs: `[B, L, D]`.
          found, after: where the segments are, and the segment state after them.
          ids: of latents and of inputs; None where all are one segment.
        """
        of_latents = jax.lax.dynamic_slice_in_dim(found.positions, start, latents.shape[1], axis=1)
        q, k, v = self._project(latents, inputs, of_latents, found.positions)
        if state is None:
            mixed = self._attend(q, k, v, segment_ids=ids, q_offset=start)
        else:
            mixed, state = self._continue(q, k, v, found, state, after)
        return self._out(mixed), state

    @nn.nowrap
    def costs(self, length: int, latents: int | None = None) -> Costs:
        """Parameters, FLOPs and state for `length` inputs, read by as many of the last latents; None: by all."""
        unread = 0 if latents is None else length - latents
        wide = self.num_heads * self.key_dim
        saved = 4 * wide * (unread * self.embed_dim + attended_pairs(unread, causal=True, window=None))
        return super().costs(length) + Costs(flops=-saved)


class Reader(nn.Module):
    """What latents take from the inputs: `z = W x`, `z + attention(norm(z), norm(x))`, then `z + mlp(norm(z))`.

    A latent depends on the inputs up to its position, and not on the other latents.

    Attributes:
      sublayers: the cross-attention and the feed-forward.
      frame, norm, norm_epsilon, dropout: as in the stack.
      input_dropout: rate at which an input is hidden from all latents in training; a latent always has its own.
    """

    sublayers: Block
    frame: Frame
    norm: str
    norm_epsilon: float
    dropout: float
    input_dropout: float

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B L D"],
        found: Segments,
        state: AttentionState | None = None,
        after: SegmentState | None = None,
        *,
        window: tuple[int | Array, int] | None = None,
        packed: bool = True,
        train: bool = False,
    ) -> tuple[Float[Array, "B T D"], AttentionState | None]:
        """Latents at all positions, or in a `window` of (start, length), and the next state if one was given.

        Args:
          packed: whether rows hold more than one segment.
        """
        start, length = (0, x.shape[1]) if window is None else window
        types = {"dtype": self.frame.dtype, "param_dtype": self.frame.param_dtype}
        cross, feed_forward = self.sublayers
        norm = partial(make_norm, self.norm, epsilon=self.norm_epsilon, **types)
        z = Dense(self.frame.embed_dim, (None, "embed"), name="latents", **types)(_cut(x, start, length))
        ids = None
        if packed or (train and self.input_dropout):
            seen = found.runs
            if train and self.input_dropout:
                kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.input_dropout, x.shape[:2])
                seen = jnp.where(kept, seen, -1)
            ids = (_cut(found.runs, start, length), seen)
        mixed, state = cross.make(self.frame, name="attention")(
            norm(name="norm_latents")(z, train),
            norm(name="norm_inputs")(x, train),
            state,
            found=found,
            after=after,
            start=start,
            ids=ids,
        )
        z = z + nn.Dropout(self.dropout, deterministic=not train)(mixed)
        residual = Residual((feed_forward,), self.frame, self.norm, "pre", self.norm_epsilon, self.dropout, name="mlp")
        return residual(z, None, None, None, train)[0], state

    @nn.nowrap
    def costs(self, length: int, latents: int) -> Costs:
        """Parameters, FLOPs and state for `length` inputs, read by so many of the last latents."""
        width = self.frame.embed_dim
        own = Costs(width * width + width + 3 * norm_parameters(self.norm, width), 2 * latents * width * width)
        cross, feed_forward = (s.make(self.frame, parent=None) for s in self.sublayers)
        return own + cross.costs(length, latents) + feed_forward.costs(latents)


class LatentStack(SequenceModel):
    """The residual stack of a `SequenceModel`, from vectors to vectors, with a state of each row's own."""

    @nn.compact
    def __call__(self, x, state=None, segment_ids=None, train=False):
        return self._stack(x, (None, None) if state is None else state, segment_ids, train)

    def each_row(self, x: Float[Array, "B L D"], state: State, train: bool) -> tuple[Float[Array, "B L D"], State]:
        """Outputs and next state. Rows stand at different places in their windows, and mixers count for all rows alike."""
        one = lambda stack, x, state: stack(x[None], state, None, train)
        shared = dict.fromkeys(("params", "batch_stats", "derived"))
        y, state = nn.vmap(one, variable_axes=shared, split_rngs={"params": False, "dropout": True})(self, x, state)
        return y[:, 0], state

    @nn.nowrap
    def init_state(self, batch_size: int, max_length: int) -> State:
        row = super().init_state(1, max_length)
        return jax.tree.map(lambda a: jnp.broadcast_to(a, (batch_size, *a.shape)), (row.repeats, row.remainder))


@chex.dataclass(frozen=True)
class PerceiverARState:
    """What is carried from token to token.

    Attributes:
      inputs: keys and values of all inputs, for the cross-attention; and the current segment.
      recent: the last `num_latents - 1` latents, from which a new window starts.
      latents: the stack's state within each row's current window.
    """

    inputs: AttentionState
    recent: Float[Array, "B S D"]
    latents: State


class PerceiverAR(SequenceModel):
    """Perceiver AR (Hawthorne et al. 2022, "General-purpose, long-context autoregressive modeling with Perceiver AR").

    Latents, one at each position of a window of M = `num_latents`, attend to all inputs up to their positions; the stack of
    the pattern runs over the window alone. In training there is one window, at a random place, and the outputs are a
    `Window`. Otherwise there is an output at every position, from windows that start a stride apart, counted from the start
    of each segment (`seqjax.ops.windows`): a position sees M - stride to M - 1 latents before it, or all there are. So the
    paper's decoding does, which keeps the stack's cache until it is full and then starts a new one with the last latents.
    What a latent takes from the inputs does not depend on its window and is computed once.

    Heads that read a whole sequence read the last window. Chunks that follow a state go through the stack token by token,
    except the middle of a chunk of more than 2 M tokens, which goes window by window.

    Attributes (beside those of `SequenceModel`):
      num_latents: M, the most positions in a window.
      stride: by how many positions the next window starts later; None for M / 2.
      min_context: in training a window ends at a random position, after at least so many inputs; None: always at the end.
      input_dropout: rate at which an input is hidden from the latents in training.
      read: the cross-attention, and the feed-forward behind it.
    """

    num_latents: int = 1024
    stride: int | None = None
    min_context: int | None = 0
    input_dropout: float = 0.0
    read: Block = ()

    inverts = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.causal:
            raise ConfigError("model.causal=False: perceiver_ar reads from left to right; allowed: True.")
        if self.num_latents < 1:
            raise ConfigError(f"model.num_latents={self.num_latents} is not positive; allowed: 1 and above.")
        if self.stride is not None and not 1 <= self.stride <= self.num_latents:
            raise ConfigError(
                f"model.stride={self.stride} does not fit model.num_latents={self.num_latents}; "
                f"allowed: None, 1 to {self.num_latents}."
            )
        if self.min_context is not None and self.min_context < 0:
            raise ConfigError(f"model.min_context={self.min_context} is negative; allowed: None, 0 and above.")
        if not 0.0 <= self.input_dropout < 1.0:
            raise ConfigError(f"model.input_dropout={self.input_dropout} is not a rate; allowed: from 0.0 to below 1.0.")

    @property
    def grid(self) -> tuple[int, int]:
        """Size and stride of the windows."""
        return self.num_latents, self.stride or max(1, self.num_latents // 2)

    @nn.nowrap
    def make_reader(self, **where: Any) -> Reader:
        norms = {"norm": self.norm, "norm_epsilon": self.norm_epsilon}
        dropout = {"dropout": self.dropout, "input_dropout": self.input_dropout}
        return Reader(self.read, self.frame, **norms, **dropout, **where)

    @nn.nowrap
    def make_latents(self, **where: Any) -> LatentStack:
        return LatentStack(**{key: getattr(self, key) for key in options_of(SequenceModel)}, **where)

    @nn.compact
    def __call__(
        self,
        inputs: Array,
        state: PerceiverARState | None = None,
        *,
        segment_ids: Int[Array, "B L"] | None = None,
        train: bool = False,
    ) -> tuple[Array | Window, PerceiverARState | None]:
        """Outputs of the head for `inputs`, and the next state if one was given.

        Args:
          inputs: `[B, L]` tokens or `[B, L, C]` values (`[B, 2, L]` or `[B, 2, L, C]` pairs for the matching head).
          state: from `init_state`, or a previous call.
          segment_ids: a new segment starts wherever the id changes; nothing crosses. Heads that pool take 0 for padding.
          train: dropout is on, and without a state a sequence of more than `num_latents` has outputs in a `Window` alone;
            needs the rng `dropout`.
        """
        inputs, segment_ids = self.sequences(inputs, segment_ids, state)
        packed = segment_ids is not None
        before = SegmentState.fresh(inputs.shape[0] if packed else 1) if state is None else state.inputs.segment
        found, after = segments(segment_ids, before, inputs.shape[1])
        x, table = self.embed(inputs, found.positions, train)
        reader, latents = self.make_reader(name="reader"), self.make_latents(name="latents")
        window = None
        if state is None or self.is_initializing():
            window = self._only_window(inputs.shape[1], train)
            z, _ = reader(x, found, window=window, packed=packed, train=train)
            y = self._in_windows(latents, z, found, window, packed, train)
        else:
            z, cache = reader(x, found, state.inputs, after, train=train)
            y, recent, within = self._continue(latents, z, found, state, train)
            state = PerceiverARState(inputs=cache, recent=recent, latents=within)
        y = self._last_norm(y, train)
        segment_ids = segment_ids if window is None or not packed else _cut(segment_ids, *window)
        outputs = self.make_head(name="head")(y, segment_ids, table.attend if self.tied else None)
        return outputs if window is None or not HEADS[self.head].per_token else Window(outputs, window[0]), state

    def _only_window(self, length: int, train: bool) -> tuple[int | Array, int] | None:
        """Start and length of the one window that has latents; None where all positions have."""
        last = length - self.num_latents
        per_token = HEADS[self.head].per_token
        if last <= 0 or (per_token and not train):
            return None
        if not per_token or self.min_context is None:
            return last, self.num_latents
        first = min(max(self.min_context - self.num_latents, 0), last)
        return jax.random.randint(self.make_rng("dropout"), (), first, last + 1), self.num_latents

    def _in_windows(
        self, latents: LatentStack, z: Array, found: Segments, window: tuple | None, packed: bool, train: bool
    ) -> Float[Array, "B T D"]:
        """The stack over latents that follow no state."""
        mix = lambda z, ids: latents(z, None, ids, train)[0]
        if window is not None:
            return mix(z, _cut(found.runs, *window) if packed else None)
        if packed:
            return over_packed_windows(mix, z, found.positions, *self.grid)
        return over_windows(mix, z, *self.grid)

    def _continue(
        self, latents: LatentStack, z: Float[Array, "B L D"], found: Segments, state: PerceiverARState, train: bool
    ) -> tuple[Float[Array, "B L D"], Array, State]:
        """The stack over latents that follow a state; the recent latents and the stack's state after them."""
        size, _ = self.grid
        batch, length = z.shape[:2]
        fresh = latents.init_state(batch, min(size, state.inputs.keys.shape[1]))
        step = partial(self._token_by_token, latents, fresh, size <= state.inputs.keys.shape[1], train)
        if length <= 2 * size:
            return step(z, found.positions, state.recent, state.latents)
        first, _, _ = step(z[:, :size], found.positions[:, :size], state.recent, state.latents)
        # Behind the first window's length, all windows begin within the chunk, though with latents from before it.
        known = jnp.concatenate([state.recent, z], axis=1)
        earlier = state.inputs.segment.position[:, None] + jnp.arange(1 - size, 0)
        mix = lambda z, ids: latents(z, None, ids, train)[0]
        rest = over_packed_windows(mix, known, jnp.concatenate([earlier, found.positions], axis=1), *self.grid)
        # Each row's last window begins within the last `size` tokens, so what they start from is of no matter.
        _, recent, within = step(z[:, -size:], found.positions[:, -size:], known[:, length - size : length - 1], fresh)
        return jnp.concatenate([first, rest[:, 2 * size - 1 :]], axis=1), recent, within

    def _token_by_token(
        self,
        latents: LatentStack,
        fresh: State,
        restarts: bool,
        train: bool,
        z: Float[Array, "B L D"],
        positions: Int[Array, "B L"],
        recent: Float[Array, "B S D"],
        within: State,
    ) -> tuple[Float[Array, "B L D"], Array, State]:
        """Outputs, recent latents and the stack's state. A stack with room for less than a window never `restarts`."""
        size, stride = self.grid
        repeated = (size - stride) * restarts

        def restart(latents: LatentStack, position: Array, recent: Array, within: State) -> State:
            new = fresh
            if repeated:
                _, later = latents.each_row(recent[:, -repeated:], fresh, train)
                new = choose_rows(position >= size, later, fresh)
            return choose_rows(window_begins(position, size, stride), new, within)

        def step(latents: LatentStack, carry: tuple, token: tuple) -> tuple[tuple, Array]:
            (recent, within), (z, position) = carry, token
            begins = jnp.any(window_begins(position, size, stride))
            # Rematerialised, the branch keeps nothing for the backward pass that the other one would have to make up.
            begun = nn.remat(restart, prevent_cse=False)
            within = nn.cond(begins, begun, lambda latents, *state: state[-1], latents, position, recent, within)
            y, within = latents.each_row(z[:, None], within, train)
            return (jnp.concatenate([recent, z[:, None]], axis=1)[:, 1:], within), y[:, 0]

        if z.shape[1] == 1:  # decoding: no loop
            (recent, within), y = step(latents, (recent, within), (z[:, 0], positions[:, 0]))
            return y[:, None], recent, within
        scanned = nn.scan(
            nn.remat(step, prevent_cse=False),  # the backward pass keeps states alone
            variable_broadcast=("params", "batch_stats", "derived"),
            split_rngs={"params": False, "dropout": True},
            in_axes=1,
            out_axes=1,
        )
        (recent, within), y = scanned(latents, (recent, within), (z, positions))
        return y, recent, within

    @nn.nowrap
    def init_state(self, batch_size: int, max_length: int) -> PerceiverARState:
        """The state before the first token, with room for `max_length` tokens.

        Raises:
          ConfigError: the head reads whole sequences, or the position table is shorter.
        """
        self.check_state(max_length)
        within = min(self.num_latents, max_length)
        return PerceiverARState(
            inputs=self.read[0].make(self.frame, parent=None).init_state(batch_size, max_length),
            recent=jnp.zeros((batch_size, self.num_latents - 1, self.embed_dim), self.dtype),
            latents=self.make_latents(parent=None).init_state(batch_size, within),
        )

    @nn.nowrap
    def costs(self, length: int) -> Costs:
        """Parameters, FLOPs and state of one sequence of `length` tokens, with outputs at all positions where there are any."""
        size, stride = self.grid
        carried = self.make_head(parent=None).per_token
        within = min(size, length)
        latents = self.make_latents(parent=None)
        stack = latents.costs(within) + -1 * latents.frame_costs(within)  # with its last norm, without embedding and head
        recent = (size - 1) * self.embed_dim * jnp.dtype(self.dtype).itemsize
        stack = dataclasses.replace(
            stack,
            flops=stack.flops * (count_windows(length, size, stride) if carried else 1),
            state_bytes=stack.state_bytes - 12 + recent,  # the segment is kept with the inputs
        )
        reader = self.make_reader(parent=None).costs(length, length if carried else within)
        total = self.frame_costs(length) + reader + stack
        return total if carried else dataclasses.replace(total, state_bytes=0)


def _cut(a: Array, start: int | Array, length: int) -> Array:
    """`length` positions from `start` on."""
    return a if length == a.shape[1] else jax.lax.dynamic_slice_in_dim(a, start, length, axis=1)


PATTERN = ("attention", "mlp")
DEFAULTS = {"activation": "relu_squared"}


def _options(given: Mapping[str, Any]) -> dict[str, Option]:
    """Every key that a config may set: the model's, and those of its mixers and of the cross-attention."""
    of_stack = stack_options(given.get("pattern", PATTERN), DEFAULTS, {})
    of_read = stack_options(PATTERN, DEFAULTS, {})
    own = {
        **of_read,
        **of_stack,
        **options_of(PerceiverAR, exclude=options_of(SequenceModel)),
        "pattern": Option(tuple, PATTERN),
    }
    absent = ("read", "embed_norm", "series_norm", "channel_independent")
    return {key: option for key, option in own.items() if key not in absent}


EXAMPLE = {"vocab_size": 64, "embed_dim": 32, "num_layers": 1, "num_heads": 4, "num_latents": 6, "max_length": 64}


@register_architecture("perceiver_ar", example=EXAMPLE, options=_options)
def _make(pattern: tuple, **options: Any) -> PerceiverAR:
    """A `PerceiverAR` whose flat options reach every mixer that has them; a `window` is the stack's alone."""
    cross = make_sublayer({"name": "attention", "window": None}, options)
    read = (dataclasses.replace(cross, mixer=CrossAttention), make_sublayer("mlp", options))
    return make_stack(PerceiverAR, pattern, read=read, **options)
