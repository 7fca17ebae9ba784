"""SaShiMi: a U-shaped stack of state-space layers at several sampling rates, for raw audio and other long signals."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from seqjax.config import ConfigError, Option, options_of
from seqjax.layers.dense import Dense, scaled_init
from seqjax.layers.norms import make_norm, norm_parameters
from seqjax.mixers.base import Costs, State
from seqjax.models.base import Model, choose_rows, take
from seqjax.models.sequence_model import Block, Frame, Residual, SequenceModel, make_sublayer, stack_options
from seqjax.ops.segments import SegmentState, segments
from seqjax.registry import register_architecture

Places = tuple[Int[Array, "B L"], Int[Array, "B L"]]
"""Per token: which run of its row it is in, and its position there."""


class Layer(nn.Module):
    """The sub-layers of one layer, each a `Residual`; where `skips` are given, each has one of them added behind it."""

    sublayers: Block
    frame: Frame
    dropout: float

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], state: tuple | None, skips: tuple | None, runs: Array | None, train: bool
    ) -> tuple[Float[Array, "B L D"], tuple[tuple | None, tuple]]:
        """Outputs; the next states, and what each sub-layer was given."""
        states, given = [], []
        for i, sublayer in enumerate(self.sublayers):
            given.append(x)
            residual = Residual((sublayer,), self.frame, "layer", "pre", 1e-5, self.dropout, name=sublayer.name)
            x, after = residual(x, None if state is None else state[i : i + 1], None, runs, train)
            states += after or ()
            x = x if skips is None else x + skips[i]
        return x, (None if state is None else tuple(states), tuple(given))


class TierState(NamedTuple):
    """What one sampling rate and the coarser ones carry; the last four are None where there is nothing such.

    Attributes:
      layers: states of the layers, stacked along a leading axis.
      down_layers: the same of the layers before the pooling.
      group: inputs of the pooling since the current group of p tokens began, without the last.
      held: what the coarser rates said last, for each of the p tokens of the current group.
      coarse: of the coarser rates.
    """

    layers: State
    down_layers: State = None
    group: Float[Array, "B P D"] | None = None
    held: Float[Array, "B P D"] | None = None
    coarse: TierState | None = None


class Tier(nn.Module):
    """One sampling rate, and within it the coarser ones.

    `y = x + up(coarse(down(x)))`, then `y + layers(y)`; at the coarsest rate `y = x`. `down` makes one token of each
    whole group of p tokens; `up` gives what the coarser rates say of a group to the tokens of the *next* group. In the
    U-net form layers precede the pooling as well, and each sub-layer on the way up has the one across added to it.

    Attributes:
      pooling: p of this rate and of the coarser ones; empty at the coarsest.
      expand: how much wider each coarser rate is.
      sublayers, num_layers, frame, dropout: of the layers.
      unet: the U-net form.
    """

    pooling: tuple[int, ...]
    expand: int
    sublayers: Block
    num_layers: int
    frame: Frame
    dropout: float
    unet: bool

    def setup(self) -> None:
        self.layers = self._stack()
        if not self.pooling:
            return
        if self.unet:
            self.down_layers = self._stack()
        width, types = self.frame.embed_dim, {"dtype": self.frame.dtype, "param_dtype": self.frame.param_dtype}
        self.down = Dense(self.expand * width, ("mlp", "embed"), **types)
        self.coarse = self._coarser()
        up_init = scaled_init(self.frame.residual_init)
        self.up = Dense(self.pooling[0] * width, ("embed", "mlp"), kernel_init=up_init, **types)

    def _stack(self) -> nn.Module:
        if self.num_layers == 1:  # a loop of one takes longer to compile than no loop
            return Layer(self.sublayers, self.frame, self.dropout)
        scanned = nn.scan(
            Layer,
            variable_axes={"params": 0, "losses": 0, "derived": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, 0, nn.broadcast, nn.broadcast),
            length=self.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return scanned(self.sublayers, self.frame, self.dropout)

    def _run(self, stack: nn.Module, x: Array, state: State, skips: tuple | None, *rest: Any) -> tuple[Array, tuple]:
        """All layers; states, skips and what sub-layers were given lead with the layer."""
        if self.num_layers > 1:
            return stack(x, state, skips, *rest)
        state, skips = jax.tree.map(lambda a: a[0], (state, skips))
        x, out = stack(x, state, skips, *rest)
        return x, jax.tree.map(lambda a: a[None], out)

    @nn.nowrap
    def _coarser(self, **where: Any) -> Tier:
        frame = self.frame._replace(embed_dim=self.expand * self.frame.embed_dim)
        options = (self.expand, self.sublayers, self.num_layers, frame, self.dropout, self.unet)
        return Tier(self.pooling[1:], *options, **where)

    def __call__(
        self, x: Float[Array, "B L D"], state: TierState | None, places: Places | None, train: bool
    ) -> tuple[Float[Array, "B L D"], TierState | None]:
        """A whole sequence, or with a state one token of it. Without `places` a row is one run from its start."""
        runs = None if places is None else places[0]
        skips, after = None, {}
        old = TierState(None) if state is None else state
        if self.pooling:
            if self.unet:
                x, (down_state, given) = self._run(self.down_layers, x, old.down_layers, None, runs, train)
                skips = jax.tree.map(lambda a: jnp.flip(a, 0), given[::-1])
                after["down_layers"] = down_state
            if state is None:
                x = x + self._over_groups(x, places, train)
            else:
                up, pooled = self._over_one_token(x, state, places, train)
                x, after = x + up, after | pooled
        y, (layers, _) = self._run(self.layers, x, old.layers, skips, runs, train)
        y = y if skips is not None else x + y
        return y, None if state is None else TierState(layers, **after)

    def _over_groups(self, x: Float[Array, "B L D"], places: Places | None, train: bool) -> Float[Array, "B L D"]:
        """What the coarser rates say to each token of a sequence."""
        factor, length = self.pooling[0], x.shape[1]
        if places is None:
            count = groups_of(length, factor)
            whole = jnp.pad(x[:, : count * factor], [(0, 0), (0, max(0, factor - length)), (0, 0)])
            pooled, between = whole.reshape(x.shape[0], count, factor, -1), None
        else:
            groups = find_groups(*places, factor)
            pooled, between = take(x, groups.tokens), (groups.runs, groups.positions)
        y, _ = self.coarse(self.down(fold(pooled)), None, between, train)
        y = unfold(self.up(y), factor)
        if places is None:
            later = jnp.pad(y.reshape(x.shape[0], -1, x.shape[2]), [(0, 0), (factor, 0), (0, 0)])
            return later[:, :length]
        flat = y.reshape(x.shape[0], -1, x.shape[2])
        return jnp.where((groups.sources >= 0)[..., None], take(flat, groups.sources), 0)

    def _over_one_token(
        self, x: Float[Array, "B 1 D"], state: TierState, places: Places, train: bool
    ) -> tuple[Float[Array, "B 1 D"], dict[str, Any]]:
        """What the coarser rates say to one token, and their state behind it. They run where it ends a group of a row."""
        factor, (runs, positions) = self.pooling[0], places
        phase = positions % factor
        up = jnp.where((positions >= factor)[..., None], take(state.held, phase), 0)
        group = jnp.where((jnp.arange(factor - 1) == phase)[..., None], x, state.group)
        ended = phase[:, 0] == factor - 1

        def advance(tier: Tier, old: tuple) -> tuple:
            whole = jnp.concatenate([group, x], axis=1)[:, None]
            y, coarse = tier.coarse(tier.down(fold(whole)), old[1], (runs, positions // factor), train)
            return choose_rows(ended, unfold(tier.up(y), factor)[:, 0], old[0]), _chosen_state(ended, coarse, old[1])

        # Rematerialised, the branch keeps nothing for the backward pass that the other one would have to make up.
        advance = nn.remat(advance, prevent_cse=False)
        held, coarse = nn.cond(jnp.any(ended), advance, lambda tier, old: old, self, (state.held, state.coarse))
        return up, {"group": group, "held": held, "coarse": coarse}

    @nn.nowrap
    def init_state(self, batch_size: int, max_length: int) -> TierState:
        def fresh() -> State:
            one = tuple(s.make(self.frame, parent=None).init_state(batch_size, max_length) for s in self.sublayers)
            return jax.tree.map(lambda a: jnp.broadcast_to(a, (self.num_layers, *a.shape)), one)

        if not self.pooling:
            return TierState(fresh())
        factor = self.pooling[0]
        zeros = lambda size: jnp.zeros((batch_size, size, self.frame.embed_dim), self.frame.dtype)
        coarse = self._coarser(parent=None).init_state(batch_size, groups_of(max_length, factor))
        return TierState(fresh(), fresh() if self.unet else None, zeros(factor - 1), zeros(factor), coarse)

    @nn.nowrap
    def costs(self, length: int) -> Costs:
        width = self.frame.embed_dim
        norm = Costs(parameters=norm_parameters("layer", width))
        layers = sum((norm + s.make(self.frame, parent=None).costs(length) for s in self.sublayers), Costs())
        layers = self.num_layers * layers
        if not self.pooling:
            return layers
        factor, wider = self.pooling[0], self.expand * width
        groups, folded = groups_of(length, factor), factor * width
        held = (2 * factor - 1) * width * jnp.dtype(self.frame.dtype).itemsize
        pools = Costs(2 * folded * wider + folded + wider, 4 * groups * folded * wider, held)
        return (2 if self.unet else 1) * layers + pools + self._coarser(parent=None).costs(groups)


class SashimiState(NamedTuple):
    """State of all sampling rates, and the current segment."""

    tiers: TierState
    segment: SegmentState


class Sashimi(Model):
    """SaShiMi (Goel et al. 2022, "It's Raw! Audio Generation with State-Space Models").

    Groups of samples are pooled, step after step, to slower and wider sequences; layers at the slowest rate run first, and
    what they find joins the samples of the next group on the way back, where layers at each rate run in turn. Groups are
    counted from the start of each segment. A coarser rate costs a decoding step nothing until a group of its is whole, but
    chunks are taken token by token.

    Attributes (beside those of `Model`):
      layer: sub-layers of one layer, each between a norm and a skip connection.
      pooling: how many tokens each rate makes one of, finest first.
      expand: how much wider each slower rate is.
      layers_per_tier: layers at each rate (twice as many, but for the slowest, with `unet`).
      unet: layers before each pooling as well, with a skip connection to each sub-layer across.
      residual_init: scale of the initial weights of each last map to a residual stream, relative to `1 / sqrt(inputs)`.
    """

    layer: Block = ()
    pooling: tuple = (4, 4)
    expand: int = 2
    layers_per_tier: int = 8
    unet: bool = False
    residual_init: float = 0.0
    position: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.causal:
            raise ConfigError("model.causal=False: sashimi shifts its slower rates into the past; allowed: True.")
        whole = isinstance(self.pooling, tuple) and all(isinstance(p, int) and p >= 2 for p in self.pooling)
        if not whole or not self.pooling:
            raise ConfigError(
                f"model.pooling={self.pooling!r} pools nothing; allowed: integers of 2 and above, such as (4, 4)."
            )
        for key in ("expand", "layers_per_tier"):
            if getattr(self, key) < 1:
                raise ConfigError(f"model.{key}={getattr(self, key)} is not positive; allowed: 1 and above.")

    @nn.nowrap
    def make_tiers(self, **where: Any) -> Tier:
        """The body; `where` may name it and its parent."""
        frame = Frame(self.embed_dim, self.causal, self.residual_init, self.dtype, self.param_dtype)
        options = (self.expand, self.layer, self.layers_per_tier, frame, self.dropout, self.unet)
        return Tier(self.pooling, *options, **where)

    @nn.compact
    def __call__(
        self,
        inputs: Array,
        state: SashimiState | None = None,
        *,
        segment_ids: Int[Array, "B L"] | None = None,
        train: bool = False,
    ) -> tuple[Array, SashimiState | None]:
        """Outputs of the head for `inputs`, and the next state if one was given.

        Args:
          inputs: `[B, L]` tokens or `[B, L, C]` values (`[B, 2, L]` or `[B, 2, L, C]` pairs for the matching head).
          state: from `init_state`, or a previous call.
          segment_ids: a new segment starts wherever the id changes; nothing crosses. Heads that pool take 0 for padding.
          train: dropout is on; needs the rng `dropout` where its rate is positive.
        """
        inputs, segment_ids = self.sequences(inputs, segment_ids, state)
        before = SegmentState.fresh(1 if segment_ids is None else inputs.shape[0]) if state is None else state.segment
        found, segment = segments(segment_ids, before, inputs.shape[1])
        x, table = self.embed(inputs, found.positions, train)
        tiers, places = self.make_tiers(name="tiers"), (found.runs, found.positions)
        if state is None or self.is_initializing():
            x, _ = tiers(x, None, None if segment_ids is None else places, train)
        else:
            x, after = _token_by_token(tiers, x, state.tiers, places, train)
            state = SashimiState(after, segment)
        x = make_norm("layer", name="norm", dtype=self.dtype, param_dtype=self.param_dtype)(x)
        return self.make_head(name="head")(x, segment_ids, table.attend if self.tied else None), state

    @nn.nowrap
    def init_state(self, batch_size: int, max_length: int) -> SashimiState:
        """The state before the first token, with room for `max_length` tokens.

        Raises:
          ConfigError: the head reads whole sequences, or the position table is shorter.
        """
        self.check_state(max_length)
        tiers = self.make_tiers(parent=None).init_state(batch_size, max_length)
        return SashimiState(tiers, SegmentState.fresh(batch_size))

    @nn.nowrap
    def costs(self, length: int) -> Costs:
        """Parameters, FLOPs and state of one sequence of `length` tokens, from the parts' own accounts."""
        total = self.frame_costs(length) + self.make_tiers(parent=None).costs(length)
        total += Costs(parameters=norm_parameters("layer", self.embed_dim))
        carried = self.make_head(parent=None).per_token
        return dataclasses.replace(total, state_bytes=total.state_bytes + 12 if carried else 0)

    @nn.nowrap
    def mixers(self) -> tuple[type[Mixer], ...]:
        return tuple(s.mixer for s in self.layer)


def _token_by_token(
    tiers: Tier, x: Float[Array, "B L D"], state: TierState, places: Places, train: bool
) -> tuple[Float[Array, "B L D"], TierState]:
    if x.shape[1] == 1:  # decoding: no loop
        return tiers(x, state, places, train)

    def step(tiers: Tier, state: TierState, token: tuple) -> tuple[TierState, Array]:
        x, *places = (a[:, None] for a in token)
        y, state = tiers(x, state, tuple(places), train)
        return state, y[:, 0]

    scanned = nn.scan(
        nn.remat(step, prevent_cse=False),  # the backward pass keeps states alone
        variable_broadcast=("params", "derived"),
        split_rngs={"params": False, "dropout": True},
        in_axes=1,
        out_axes=1,
    )
    state, y = scanned(tiers, state, (x, *places))
    return y, state


class Groups(NamedTuple):
    """The whole groups of each row in order, M of them at most; what is left of M is a run of its own at the end.

    Attributes:
      tokens: the p tokens of each group.
      runs: of its tokens; positions: counted in groups, within the run.
      sources: for every token, its place in the groups' outputs `[M p]` laid in a row: the same place in the group before
        its own. Negative in the first group of a run.
    """

    tokens: Int[Array, "B M P"]
    runs: Int[Array, "B M"]
    positions: Int[Array, "B M"]
    sources: Int[Array, "B L"]


def groups_of(length: int, factor: int) -> int:
    """The most groups of `factor` that so many tokens fill, and at least one, for no sequence is empty."""
    return max(1, length // factor)


def find_groups(runs: Int[Array, "B L"], positions: Int[Array, "B L"], factor: int) -> Groups:
    """Groups of `factor` tokens, counted from the start of each run; a run's last tokens may fill none."""
    length = runs.shape[1]
    phase = positions % factor
    ends = phase == factor - 1
    ended = jnp.cumsum(ends, axis=1, dtype=jnp.int32)
    last = jnp.argsort(~ends, axis=1, stable=True)[:, : groups_of(length, factor)]
    used = jnp.take_along_axis(ends, last, axis=1)
    tokens = jnp.maximum(last[..., None] - jnp.arange(factor - 1, -1, -1), 0)
    sources = jnp.where(positions >= factor, (ended - ends - 1) * factor + phase, -1)
    return Groups(
        tokens,
        jnp.where(used, jnp.take_along_axis(runs, last, axis=1), runs[:, -1:] + 1),
        jnp.where(used, jnp.take_along_axis(positions, last, axis=1) // factor, 0),
        sources,
    )


def fold(x: Float[Array, "B M P D"]) -> Float[Array, "B M DP"]:
    """The vectors of a group as one, channel by channel."""
    return jnp.swapaxes(x, 2, 3).reshape(*x.shape[:2], -1)


def unfold(x: Float[Array, "B M DP"], factor: int) -> Float[Array, "B M P D"]:
    """The inverse of `fold`."""
    return jnp.swapaxes(x.reshape(*x.shape[:2], -1, factor), 2, 3)


def _chosen_state(rows: Bool[Array, "B"], new: TierState, old: TierState) -> TierState:
    layers, down_layers = (choose_rows(rows, a, b, axis=1) for a, b in zip(new[:2], old[:2]))
    group, held = (choose_rows(rows, a, b) for a, b in zip(new[2:4], old[2:4]))
    coarse = None if new.coarse is None else _chosen_state(rows, new.coarse, old.coarse)
    return TierState(layers, down_layers, group, held, coarse)


def _pattern(options: Mapping[str, Any]) -> tuple:
    """One layer: the mixer and a feed-forward, exact GELU in both where nothing else is asked."""
    feed_forward = {"name": "mlp", "activation": options.get("activation") or "gelu_exact"}
    return (options.get("mixer") or "s4", feed_forward)


def _options(given: Mapping[str, Any]) -> dict[str, Option]:
    """Every key that a config may set: the model's, and those of its mixers."""
    of_mixers = stack_options(_pattern(given), {"mlp_ratio": 2.0}, {})
    routed = {key: option for key, option in of_mixers.items() if key not in options_of(SequenceModel)}
    return {**routed, **options_of(Sashimi, exclude=("layer",)), "mixer": Option(str, "s4")}


EXAMPLE = {"vocab_size": 64, "embed_dim": 8, "pooling": (2,), "layers_per_tier": 1, "state_dim": 4}


@register_architecture("sashimi", example=EXAMPLE, options=_options)
def _make(mixer: str, **options: Any) -> Sashimi:
    """A `Sashimi` whose flat options reach every mixer that has them."""
    layer = tuple(make_sublayer(entry, options) for entry in _pattern({"mixer": mixer, **options}))
    model = Sashimi(layer=layer, **{key: value for key, value in options.items() if key in options_of(Sashimi)})
    tier = model.make_tiers(parent=None)
    while True:  # the mixers' own checks at each width, before anything is compiled
        made = [s.make(tier.frame, parent=None) for s in layer]
        if not tier.pooling:
            break
        tier = tier._coarser(parent=None)
    held = jax.tree.leaves(jax.eval_shape(lambda: [m.init_state(3, 4) for m in made])) if made[0].carries_state else []
    if not held or any(a.shape[:1] != (3,) for a in held):
        raise ConfigError(
            f"model.mixer={mixer!r} has no state of each row's own, and at the slower rates a row advances when its own "
            "group is whole; allowed: recurrent mixers, such as s4, s4d."
        )
    return model
