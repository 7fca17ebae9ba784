"""The residual stack of a repeating pattern of mixers. Transformer, S4, Mamba and hybrids are configs of this one file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seqjax import registry
from seqjax.config import ConfigError, Option, check_options, choose, options_of
from seqjax.layers.norms import NORMS, make_norm, norm_parameters
from seqjax.mixers.base import Costs, Mixer, State
from seqjax.models.base import Model
from seqjax.models.heads import HEADS, Head, last_segment
from seqjax.models.series import check_series, series_rows
from seqjax.ops.prefix_mask import PrefixOrder
from seqjax.ops.segments import SegmentState, segments
from seqjax.ops.set_prompt import SetOrder, reordered

REMAT_POLICIES = {
    "none": None,
    "full": "nothing_saveable",
    "dots": "dots_saveable",
    "dots_no_batch": "dots_with_no_batch_dims_saveable",
}
"""Names that `model.remat` may say, and the member of `jax.checkpoint_policies` each stands for."""


@dataclasses.dataclass(frozen=True)
class SubLayer:
    """A mixer's registered name, class and own options; the model adds the ones that all its mixers share."""

    name: str
    mixer: type[Mixer]
    options: tuple[tuple[str, Any], ...] = ()

    def make(self, frame: Frame, **where: Any) -> Mixer:
        return self.mixer(**dict(self.options), **frame._asdict(), **where)


class Frame(NamedTuple):
    """What a model decides for all its mixers."""

    embed_dim: int
    causal: bool
    residual_init: float
    dtype: Any
    param_dtype: Any


Block = tuple[SubLayer, ...]


class Residual(nn.Module):
    """Sub-layers in a row, each between a norm and a skip connection.

    pre-norm: `x + mixer(norm(x))` (Xiong et al. 2020); post-norm: `norm(x + mixer(x))` (Vaswani et al. 2017).
    Stochastic depth (Huang et al. 2016) drops a sub-layer's output, for a whole row, at `drop_rate`.
    Attention may read the keys and values of an earlier sub-layer (`Attention.shares`).
    """

    sublayers: Block
    frame: Frame
    norm: str
    norm_position: str
    norm_epsilon: float
    dropout: float

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B L D"],
        state: tuple | None,
        drop_rate: Array | None,
        segment_ids: Array | None,
        train: bool,
        order: SetOrder | PrefixOrder | None = None,
    ) -> tuple[Float[Array, "B L D"], tuple | None]:
        states, memory = [], None
        for i, sublayer in enumerate(self.sublayers):
            types = {"dtype": self.frame.dtype, "param_dtype": self.frame.param_dtype}
            norm = make_norm(self.norm, name=f"norm_{i}", epsilon=self.norm_epsilon, **types)
            mixer = sublayer.make(self.frame, name=f"{sublayer.name}_{i}")
            inputs = norm(x, train) if self.norm_position == "pre" else x
            before = None if state is None else state[i]
            options = {"segment_ids": segment_ids, "train": train}
            if order is not None and not mixer.takes_sets:
                raise ConfigError(f"model.pattern: {sublayer.name} takes tokens as they are stored, so no prompt with sets.")
            if mixer.passes_memory:
                y, after, memory = mixer(inputs, before, memory=memory, return_memory=True, order=order, **options)
            else:
                y, after = mixer(inputs, before, **options)
            states.append(after)
            y = nn.Dropout(self.dropout, deterministic=not train)(y)
            if train and drop_rate is not None:
                kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - drop_rate, (x.shape[0], 1, 1))
                y = jnp.where(kept, y / (1 - drop_rate), 0).astype(y.dtype)
            x = x + y if self.norm_position == "pre" else norm(x + y, train)
            x = nn.with_logical_constraint(x, ("batch", "length_act", "embed_act"))
        return x, None if state is None else tuple(states)


@chex.dataclass(frozen=True)
class SequenceModelState:
    """State of every sub-layer: `repeats` stacked along a leading axis, `remainder` not; and the current segment."""

    repeats: State
    remainder: State
    segment: SegmentState


class SequenceModel(Model):
    """Embed, then `num_layers` blocks that repeat `pattern`, then norm and head.

    The repeats are compiled once through `nn.scan`; blocks left over after the last whole repeat follow it.

    Attributes (beside those of `Model`):
      pattern: blocks of residual sub-layers.
      num_layers: number of blocks.
      embed_norm: a norm right behind the embedding, of the same kinds as `norm`.
      norm: "layer", "rms", "rms_unscaled", "batch" or "none"; norm_position: "pre" or "post"; norm_epsilon: added to the
        variance.
      residual_init: scale of the initial weights of each sub-layer's last map, relative to `1 / sqrt(inputs)`. 0 starts
        every block as the identity, and learns fastest (Zhang et al. 2019, Bachlechner et al. 2021).
      stochastic_depth: drop rate of the last block; earlier blocks' rates grow linearly up to it.
      remat: what the backward pass keeps, a key of `REMAT_POLICIES`.
      unroll: repeats unrolled per scan iteration; 0 unrolls all: slower to compile, up to a fifth faster on CPU.
      series_norm: what forecasts leave out of a window and add again, "none", "mean", "last" or "standard", and
        channel_independent: whether its channels are rows of their own; see `seqjax.models.series`.
    """

    pattern: tuple[Block, ...] = ()
    num_layers: int = 2
    embed_norm: str = "none"
    norm: str = "layer"
    norm_position: str = "pre"
    norm_epsilon: float = 1e-5
    residual_init: float = 0.0
    stochastic_depth: float = 0.0
    remat: str = "none"
    unroll: int = 1
    series_norm: str = "none"
    channel_independent: bool = False

    inverts = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_series(self.series_norm, self.channel_independent, self.head, self.input_dim, self.output_dim)
        choose(NORMS, self.norm, "model.norm")
        choose(NORMS, self.embed_norm, "model.embed_norm")
        choose({"pre": 0, "post": 0}, self.norm_position, "model.norm_position")
        choose(REMAT_POLICIES, self.remat, "model.remat")
        if self.num_layers < 1:
            raise ConfigError(f"model.num_layers={self.num_layers} is not positive; allowed: 1 and above.")
        if not 0.0 <= self.stochastic_depth < 1.0:
            raise ConfigError(f"model.stochastic_depth={self.stochastic_depth} is not a rate; allowed: from 0.0 to below 1.0.")

    @property
    def frame(self) -> Frame:
        return Frame(self.embed_dim, self.causal, self.residual_init, self.dtype, self.param_dtype)

    @property
    def _normalizes_last(self) -> bool:
        """A norm between stack and head: where each block does not end with one, and as iTransformer and S-Mamba have it."""
        return self.norm_position == "pre" or HEADS[self.head].variates

    @property
    def repeats(self) -> int:
        return self.num_layers // len(self.pattern)

    @property
    def unit(self) -> Block:
        """The sub-layers of one repeat."""
        return tuple(sublayer for block in self.pattern for sublayer in block)

    @property
    def remainder(self) -> Block:
        """The sub-layers after the last whole repeat."""
        left = self.pattern[: self.num_layers % len(self.pattern)]
        return tuple(sublayer for block in left for sublayer in block)

    @nn.compact
    def __call__(
        self,
        inputs: Array,
        state: SequenceModelState | None = None,
        *,
        segment_ids: Int[Array, "B L"] | None = None,
        train: bool = False,
        order: SetOrder | None = None,
    ) -> tuple[Array, SequenceModelState | None]:
        """Outputs of the head for `inputs`, and the next state if one was given.

        Args:
          inputs: `[B, L]` tokens or `[B, L, C]` values (`[B, 2, L]` or `[B, 2, L, C]` pairs for the matching head).
          state: from `init_state`, or a previous call.
          segment_ids: a new segment starts wherever the id changes; nothing crosses. Heads that pool take 0 for padding.
          train: dropout, stochastic depth and batch statistics are on; needs the rng `dropout` where a rate is positive.
          order: of prompts with sets of sub-sequences (`ops.set_prompt.set_order`), for patterns of attention and
            feed-forwards; the whole of a set in one call.
        """
        inputs, segment_ids = self.sequences(inputs, segment_ids, state)
        inputs, segment_ids, restore = series_rows(inputs, segment_ids, self.series_norm, self.channel_independent)
        if HEADS[self.head].variates:
            if segment_ids is not None:  # values outside the window count as 0, its mean where it is normalised
                inputs, segment_ids = jnp.where(last_segment(segment_ids)[..., None] > 0, inputs, 0), None
            inputs = inputs.swapaxes(1, 2)
        before = SegmentState.fresh(1 if segment_ids is None else inputs.shape[0]) if state is None else state.segment
        found, segment = segments(segment_ids, before, inputs.shape[1])
        if order is not None:
            found, segment = reordered(found, before, segment, order)
        x, table = self.embed(inputs, found.positions, train)
        if self.embed_norm != "none":
            types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
            x = make_norm(self.embed_norm, name="embed_norm", epsilon=self.norm_epsilon, **types)(x, train)
        states = (None, None) if state is None else (state.repeats, state.remainder)
        x, states = self._stack(x, states, segment_ids, train, order)
        x = self._last_norm(x, train)
        outputs = self.make_head(name="head")(x, segment_ids, table.attend if self.tied else None)
        if state is not None:
            state = SequenceModelState(repeats=states[0], remainder=states[1], segment=segment)
        return restore(outputs), state

    def _stack(
        self,
        x: Float[Array, "B L D"],
        states: tuple,
        segment_ids: Array | None,
        train: bool,
        order: SetOrder | None = None,
    ) -> tuple[Float[Array, "B L D"], tuple]:
        """All blocks: the scanned repeats, then the remainder."""
        layer = Residual
        if self.remat != "none":
            policy = getattr(jax.checkpoint_policies, REMAT_POLICIES[self.remat])
            layer = nn.remat(Residual, policy=policy, prevent_cse=False, static_argnums=(5,))
        norms = {"norm": self.norm, "norm_position": self.norm_position, "norm_epsilon": self.norm_epsilon}
        options = {"frame": self.frame, "dropout": self.dropout, **norms}
        rates = self._drop_rates()
        repeated, left = states
        if self.repeats:
            scanned = nn.scan(
                layer,
                variable_axes={"params": 0, "batch_stats": 0, "losses": 0, "derived": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(0, 0, nn.broadcast, nn.broadcast, nn.broadcast),
                out_axes=0,
                length=self.repeats,
                unroll=self.unroll or self.repeats,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            scan_rates = None if rates is None else rates[: self.repeats]
            x, repeated = scanned(self.unit, **options, name="repeats")(x, repeated, scan_rates, segment_ids, train, order)
        if self.remainder:
            last_rate = None if rates is None else rates[-1]
            x, left = layer(self.remainder, **options, name="remainder")(x, left, last_rate, segment_ids, train, order)
        return x, (repeated, left)

    def _last_norm(self, x: Float[Array, "B L D"], train: bool) -> Float[Array, "B L D"]:
        """The norm behind the blocks, where there is one."""
        if not self._normalizes_last:
            return x
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return make_norm(self.norm, name="norm", epsilon=self.norm_epsilon, **types)(x, train)

    def _drop_rates(self) -> Array | None:
        """One stochastic-depth rate per repeat, growing linearly to the last, and one for the remainder."""
        if self.stochastic_depth == 0.0:
            return None
        count = self.repeats + bool(self.remainder)
        return self.stochastic_depth * jnp.arange(1, count + 1) / count

    @nn.nowrap
    def init_state(self, batch_size: int, max_length: int) -> SequenceModelState:
        """The state before the first token, with room for `max_length` tokens.

        Raises:
          ConfigError: the model is bidirectional, reads whole sequences, or its position table is shorter.
        """
        self.check_state(max_length)
        repeats, remainder = self._stack_state(batch_size, max_length)
        return SequenceModelState(repeats=repeats, remainder=remainder, segment=SegmentState.fresh(batch_size))

    @nn.nowrap
    def _stack_state(self, batch_size: int, max_length: int) -> tuple[State, State]:
        """Of `_stack`, before the first token."""

        def fresh(sublayers: Block) -> tuple:
            return tuple(s.make(self.frame, parent=None).init_state(batch_size, max_length) for s in sublayers)

        repeated = jax.tree.map(lambda a: jnp.broadcast_to(a, (self.repeats, *a.shape)), fresh(self.unit))
        return repeated if self.repeats else None, fresh(self.remainder) if self.remainder else None

    @nn.nowrap
    def make_head(self, **options: Any) -> Head:
        """The head module, of one channel where channels are rows of their own; `options` as in `Model`."""
        return super().make_head(**({"output_dim": 1} if self.channel_independent else {}), **options)

    @nn.nowrap
    def costs(self, length: int) -> Costs:
        """Parameters, FLOPs and state of one sequence of `length` tokens, from the parts' own accounts."""
        if self.channel_independent:  # as many sequences as channels, one set of parameters
            channel = self.clone(parent=None, channel_independent=False, input_dim=1, output_dim=1).costs(length)
            return dataclasses.replace(channel, flops=self.input_dim * channel.flops)

        total = self.frame_costs(length) + Costs(parameters=norm_parameters(self.embed_norm, self.embed_dim))
        total += self._stack_costs(self.input_dim if HEADS[self.head].variates else length)
        carried = self.causal and self.make_head(parent=None).per_token
        return dataclasses.replace(total, state_bytes=total.state_bytes + 12 if carried else 0)

    @nn.nowrap
    def _stack_costs(self, length: int) -> Costs:
        """Of `_stack` and the last norm."""

        def of(sublayers: Block) -> Costs:
            norms = Costs(parameters=len(sublayers) * norm_parameters(self.norm, self.embed_dim))
            return sum((s.make(self.frame, parent=None).costs(length) for s in sublayers), norms)

        last = norm_parameters(self.norm, self.embed_dim) if self._normalizes_last else 0
        return self.repeats * of(self.unit) + of(self.remainder) + Costs(parameters=last)

    @nn.nowrap
    def mixers(self) -> tuple[type[Mixer], ...]:
        return tuple(s.mixer for s in self.unit)


def register_stack(name: str, *, pattern: tuple, defaults: Mapping[str, Any] | None = None, **registration: Any) -> None:
    """Register the residual stack of a pattern of mixers as architecture `name`.

    A flat pattern, `("attention", "mlp")`, is one block; a nested one, `(("mamba",), ("attention", "mlp"))`, several. An
    entry is a mixer's registered name, or `{"name": ..., option: value}` to set its options apart from other entries.

    Args:
      defaults: options whose default differs from `SequenceModel`'s or the mixer's.
      registration: `example` and abilities, see `registry.Architecture`.
    """
    _PATTERNS[name] = blocks_of(pattern)
    options = partial(stack_options, pattern, dict(defaults or {}))
    registry.register_architecture(name, options=options, **registration)(_make_stack)


def _make_stack(pattern: tuple, **options: Any) -> SequenceModel:
    return make_stack(SequenceModel, pattern, **options)


def make_stack(kind: type[SequenceModel], pattern: tuple, **options: Any) -> SequenceModel:
    """A model of this kind whose flat options reach every mixer that has them."""
    blocks = tuple(tuple(make_sublayer(entry, options) for entry in block) for block in blocks_of(pattern))
    of_model = {key: value for key, value in options.items() if key in options_of(kind)}
    model = kind(pattern=blocks, **of_model)
    source = None
    for sublayer in model.unit:
        mixer = sublayer.make(model.frame, parent=None)  # a mixer's own checks, before anything is compiled
        source = mixer.memory_source(source) if mixer.passes_memory else source
    return model


def make_sublayer(entry: str | Mapping, options: Mapping[str, Any]) -> SubLayer:
    """A pattern's entry; `options` reach it where it has them, and the entry's own win."""
    own = {} if isinstance(entry, str) else dict(entry)
    name = own.pop("name", entry)
    cls = registry.mixer(name)
    allowed = options_of(cls, exclude=Frame._fields)
    checked = check_options(own, allowed, f"model.pattern: {name}")
    own = {key: checked[key] for key in own}
    # None leaves a mixer its own default, unless None is a value that the mixer's option takes.
    routed = {k: v for k, v in options.items() if k in allowed and (v is not None or allowed[k].default is None)}
    return SubLayer(name, cls, tuple(sorted((routed | own).items())))


def blocks_of(pattern: Any) -> tuple[tuple, ...]:
    if not isinstance(pattern, tuple | list) or not pattern:
        raise ConfigError(f"model.pattern={pattern!r} is not a pattern; allowed: mixers such as ('attention', 'mlp').")
    nested = isinstance(pattern[0], tuple | list)
    return tuple(tuple(block) for block in pattern) if nested else (tuple(pattern),)


_PATTERNS: dict[str, tuple[tuple, ...]] = {}
"""Of the registered stacks."""


def stack_options(pattern: tuple, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Option]:
    """Every key that a stack's config may set: the model's, and those of the mixers in its pattern.

    Raises:
      ConfigError: the given pattern is that of another registered stack, as after an override of the name alone.
    """
    blocks = blocks_of(given.get("pattern", pattern))
    owner = next((name for name, other in _PATTERNS.items() if other == blocks), None)
    if owner is not None and blocks != blocks_of(pattern):
        raise ConfigError(
            f"model.pattern={given['pattern']!r} is that of model.name={owner!r}; an override of the name alone keeps it. "
            f"Allowed here: model.pattern={pattern!r}, or a pattern that no name stands for."
        )
    allowed = {**options_of(SequenceModel), "pattern": Option(tuple, pattern)}
    for entry in (e for block in blocks for e in block):
        cls = registry.mixer(entry if isinstance(entry, str) else entry.get("name"))
        for key, option in options_of(cls, exclude=options_of(SequenceModel)).items():
            known = allowed.get(key, option)
            # Mixers that disagree on a default each keep their own: None stands for that.
            agreed = known if known.default == option.default else Option(known.annotation | None, None)
            allowed[key] = agreed
    allowed |= {key: dataclasses.replace(allowed[key], default=value) for key, value in defaults.items() if key in allowed}
    return allowed
