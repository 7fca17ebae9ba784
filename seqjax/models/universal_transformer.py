"""Universal Transformer: one block, applied again and again in depth, for as long as each position needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from seqjax.config import ConfigError, Option, choose, options_of
from seqjax.layers.dense import Dense
from seqjax.layers.embedding import PositionTable
from seqjax.layers.norms import NORMS, make_norm, norm_parameters
from seqjax.layers.positions import sinusoids
from seqjax.mixers.base import Costs, Mixer, State
from seqjax.models.base import Model
from seqjax.models.sequence_model import Block, Frame, Residual, SequenceModel, make_sublayer, stack_options
from seqjax.ops.halting import Halting, halt
from seqjax.ops.prefix_mask import PrefixOrder
from seqjax.ops.segments import Segments, SegmentState, segments
from seqjax.registry import register_architecture

HALTING = ("none", "act")
"""What `model.halting` may say: a fixed number of steps, or adaptive computation time."""
HALTED = ("transform", "copy")
STEP_EMBEDDINGS = ("sinusoidal", "learned", "none")


class Progress(NamedTuple):
    """What passes from step to step.

    Attributes:
      x: the positions' vectors.
      outcome: sum of the steps' outcomes by their weights, in at least float32; None with a fixed number of steps.
      halting: what each position has spent; None likewise.
    """

    x: Float[Array, "B L D"]
    outcome: Float[Array, "B L D"] | None = None
    halting: Halting | None = None


class Step(nn.Module):
    """One step in depth. Its parameters are those of every step.

    Attributes:
      block: sub-layers; frame, norms, dropout: as in `Residual`.
      num_steps: how many steps there are.
      step_embedding, halting_epsilon, halted: see `UniversalTransformer`.
    """

    block: Block
    frame: Frame
    norms: tuple[str, str, float]
    dropout: float
    num_steps: int
    step_embedding: str
    halting_epsilon: float
    halted: str

    @nn.compact
    def __call__(
        self,
        before: Progress,
        step: tuple[Int[Array, ""], State],
        places: Array | None,
        segment_ids: Array | None,
        train: bool,
        order: PrefixOrder | None,
    ) -> tuple[Progress, tuple[State, Array | None]]:
        """The next progress; the block's next state, and how much the step counts for each position."""
        number, state = step
        x = before.x if places is None else before.x + places
        if self.step_embedding != "none":
            x = x + self._step_vector(number)
        weight, halting = None, None
        if before.halting is not None:
            logit = self._dense()(x)[..., 0].astype(before.halting.total.dtype)
            last = number == self.num_steps - 1
            weight, halting = halt(jax.nn.sigmoid(logit), before.halting, self.halting_epsilon, last)
        block = Residual(self.block, self.frame, *self.norms, self.dropout, name="block")
        y, state = block(x, state, None, segment_ids, train, order)
        if before.halting is None:
            return Progress(y), (state, None)
        outcome = before.outcome + weight[..., None] * y.astype(before.outcome.dtype)
        if self.halted == "copy":
            y = jnp.where(before.halting.running[..., None], y, before.x)
        return Progress(y, outcome, halting), (state, weight)

    def _step_vector(self, number: Int[Array, ""]) -> Float[Array, "1 1 D"]:
        if self.step_embedding == "sinusoidal":
            return sinusoids(number[None, None], self.frame.embed_dim, self.frame.dtype)
        types = {"dtype": self.frame.dtype, "param_dtype": self.frame.param_dtype}
        return PositionTable(self.num_steps, self.frame.embed_dim, name="steps", **types)(number[None, None])

    def _dense(self) -> Dense:
        types = {"dtype": self.frame.dtype, "param_dtype": self.frame.param_dtype}
        return Dense(1, ("embed", None), bias_init=nn.initializers.ones, name="halting", **types)


class UniversalTransformerState(NamedTuple):
    """What the model carries.

    Attributes:
      steps: states of the block at every step, stacked along a leading axis.
      segment: the current one.
      origin: its position from which positions count now; None where they count from its start alone.
    """

    steps: State
    segment: SegmentState
    origin: Int[Array, "B"] | None = None


class UniversalTransformer(Model):
    """Universal Transformer (Dehghani et al. 2019): `num_steps` times the same block.

    Before each step the positions' vectors and the step's are added again (eqs. 6 and 7; sines come before
    cosines, and both count from 0, as in the authors' code).
    With adaptive computation time every position halts by itself: it predicts at each step, after the vectors are added,
    how probable it is that the step is its last; see `seqjax.ops.halting`. Its output is the sum of the steps' outcomes by
    their weights. The ponder cost, `ponder_weight` times the mean ponder time of tokens outside segment 0, is sown in
    `losses`; the weights `[num_steps, B, L]` in `intermediates`.

    Carried state: the block's, at each step. It holds the steps after a position has halted too, for later positions
    attend to it there; so all steps run, however early a position halts.

    Attributes (beside those of `Model`):
      block: sub-layers of the shared block.
      position_restart: a token from which positions count anew, as a decoder's do beside an encoder's; None for none. Then
        what stands at equal places of two strings has equal positions, however long they are.
      bidirectional_source: the source of a segment, what stands before its first restart behind its first token, is seen in
        both directions, as an encoder sees it; all of it must be in one call. The loss is not to count its tokens, which see
        what they are to predict: a segment without a restart is all source. `costs` counts causal pairs.
      num_steps: steps in depth T; with adaptive computation time the most.
      step_embedding: "sinusoidal", "learned" or "none".
      halting: "none", a fixed number of steps, or "act", adaptive computation time.
      halting_epsilon: a position halts when its probabilities sum to more than 1 less this.
      halted: what becomes of a halted position where others attend to it: "transform", as in the authors' code it takes
        the later steps too, or "copy", as in the paper's text it stays as it was.
      ponder_weight: of the ponder cost, in nats per step.
      norm: "layer", "rms" or "none"; norm_position: "pre", as the authors' code, or "post", as the paper; norm_epsilon:
        added to the variance.
      residual_init: scale of the initial weights of each sub-layer's last map, relative to `1 / sqrt(inputs)`.
      unroll: steps unrolled per scan iteration; 0 unrolls all: slower to compile, faster on CPU.
    """

    block: Block = ()
    position_restart: int | None = None
    bidirectional_source: bool = False
    num_steps: int = 6
    step_embedding: str = "sinusoidal"
    halting: str = "none"
    halting_epsilon: float = 0.01
    halted: str = "transform"
    ponder_weight: float = 0.01
    norm: str = "layer"
    norm_position: str = "pre"
    norm_epsilon: float = 1e-5
    residual_init: float = 0.0
    unroll: int = 1
    position: str = "sinusoidal"

    def __post_init__(self) -> None:
        super().__post_init__()
        choose({name: 0 for name in NORMS if name != "batch"}, self.norm, "model.norm")
        named = {"norm_position": ("pre", "post"), "step_embedding": STEP_EMBEDDINGS, "halting": HALTING, "halted": HALTED}
        for key, names in named.items():
            choose(dict.fromkeys(names), getattr(self, key), f"model.{key}")
        if self.position_restart is not None:
            self._check_restart()
        if self.bidirectional_source:
            self._check_source()
        if self.num_steps < 1:
            raise ConfigError(f"model.num_steps={self.num_steps} is not positive; allowed: 1 and above.")
        if not 0.0 < self.halting_epsilon < 1.0:
            raise ConfigError(f"model.halting_epsilon={self.halting_epsilon} is out of range; allowed: between 0.0 and 1.0.")
        if self.ponder_weight < 0:
            raise ConfigError(f"model.ponder_weight={self.ponder_weight} is negative; allowed: 0.0 and above.")

    def _check_restart(self) -> None:
        if self.position not in ("sinusoidal", "learned"):
            raise ConfigError(
                f"model.position_restart={self.position_restart} with model.position={self.position!r} has no effect; allowed: "
                "None, or a token with position='sinusoidal' or 'learned'."
            )
        if self.vocab_size is None or not 0 <= self.position_restart < self.vocab_size:
            raise ConfigError(
                f"model.position_restart={self.position_restart} is not a token of model.vocab_size={self.vocab_size}; "
                "allowed: None, or 0 up to, not including, the vocabulary's size."
            )

    def _check_source(self) -> None:
        if self.position_restart is None or not self.causal:
            raise ConfigError(
                f"model.bidirectional_source=True with model.position_restart={self.position_restart} and model.causal="
                f"{self.causal} has no source apart from a target; allowed: causal=True, and a token that ends the source."
            )
        if self.sublayers_in_order:
            raise ConfigError(
                f"model.bidirectional_source=True does not fit {', '.join(self.sublayers_in_order)} in model.pattern; "
                "allowed: attention with window=None, and feed-forwards."
            )

    @property
    def frame(self) -> Frame:
        return Frame(self.embed_dim, self.causal, self.residual_init, self.dtype, self.param_dtype)

    @property
    def adaptive(self) -> bool:
        return self.halting == "act"

    @property
    def sublayers_in_order(self) -> tuple[str, ...]:
        """Names of those that keep less than every token, or take them in turn: neither whole attention nor a feed-forward."""
        mixers = ((sublayer.name, sublayer.make(self.frame, parent=None)) for sublayer in self.block)
        return tuple(name for name, m in mixers if not m.takes_sets or getattr(m, "window", None) is not None)

    @property
    def _normalizes_last(self) -> bool:
        """A norm before the head: where no block ends with one, and over the mean of several outcomes."""
        return self.norm_position == "pre" or self.adaptive

    @nn.compact
    def __call__(
        self,
        inputs: Array,
        state: UniversalTransformerState | None = None,
        *,
        segment_ids: Int[Array, "B L"] | None = None,
        train: bool = False,
    ) -> tuple[Array, UniversalTransformerState | None]:
        """Outputs of the head for `inputs`, and the next state if one was given.

        Args:
          inputs: `[B, L]` tokens or `[B, L, C]` values (`[B, 2, L]` or `[B, 2, L, C]` pairs for the matching head).
          state: from `init_state`, or a previous call.
          segment_ids: a new segment starts wherever the id changes; nothing crosses. 0 is padding to pooling heads and to
            the ponder cost.
          train: dropout, position offsets and the ponder cost are on; needs the rng `dropout` for the first two.
        """
        inputs, segment_ids = self.sequences(inputs, segment_ids, state)
        before = SegmentState.fresh(1 if segment_ids is None else inputs.shape[0]) if state is None else state.segment
        found, segment = segments(segment_ids, before, inputs.shape[1])
        x, table = self.embed(inputs, None, train)
        positions, origin, order = found.positions, None, None
        if self.position_restart is not None:
            origins = last_origins(inputs == self.position_restart, found, None if state is None else state.origin)
            positions, origin = positions - origins, origins[:, -1]
            order = PrefixOrder(origins == 0) if self.bidirectional_source else None
        places = self.position_vectors(self.shifted(positions, inputs.shape[0], train))
        x, states = self._run(x, None if state is None else state.steps, places, segment_ids, train, order)
        outputs = self._read_out(x, table, segment_ids, train)
        return outputs, None if state is None else UniversalTransformerState(states, segment, origin)

    def _read_out(
        self, x: Float[Array, "B L D"], table: TokenEmbedding | None, segment_ids: Array | None, train: bool
    ) -> Array:
        """The head's outputs for the last step's outcomes."""
        if self._normalizes_last:
            types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
            x = make_norm(self.norm, name="norm", epsilon=self.norm_epsilon, **types)(x, train)
        return self.make_head(name="head")(x, segment_ids, table.attend if self.tied else None)

    def _run(
        self,
        x: Float[Array, "B L D"],
        states: State,
        places: Array | None,
        segment_ids: Array | None,
        train: bool,
        order: PrefixOrder | None,
    ) -> tuple[Float[Array, "B L D"], State]:
        """All steps."""
        begun = Progress(x)
        if self.adaptive:
            wide = jnp.promote_types(x.dtype, jnp.float32)
            begun = Progress(x, jnp.zeros(x.shape, wide), Halting.fresh(x.shape[:2], wide))
        steps = self._steps(Step, self.num_steps)
        done, (states, weights) = steps(begun, (jnp.arange(self.num_steps), states), places, segment_ids, train, order)
        if not self.adaptive:
            return done.x, states
        self.sow("intermediates", "halting", weights)
        if train:
            self.sow("losses", "ponder", self.ponder_weight * _mean_of_tokens(done.halting.ponder_time, segment_ids))
        return done.outcome.astype(x.dtype), states

    def _steps(self, step: type[nn.Module], count: int) -> nn.Module:
        """`count` steps in a row, of the class `Step` or one lifted from it."""
        scanned = nn.scan(
            step,
            variable_broadcast=("params", "derived"),
            variable_axes={"losses": 0},
            split_rngs={"params": False, "dropout": True},
            in_axes=(0, *(nn.broadcast,) * 4),
            length=count,
            unroll=self.unroll or count,
        )
        norms = (self.norm, self.norm_position, self.norm_epsilon)
        depth = (self.num_steps, self.step_embedding, self.halting_epsilon, self.halted)
        return scanned(self.block, self.frame, norms, self.dropout, *depth, name="step")

    @nn.nowrap
    def init_state(self, batch_size: int, max_length: int) -> UniversalTransformerState:
        """The state before the first token, with room for `max_length` tokens.

        Raises:
          ConfigError: the model is bidirectional, reads whole sequences, or its position table is shorter.
        """
        self.check_state(max_length)
        one = tuple(s.make(self.frame, parent=None).init_state(batch_size, max_length) for s in self.block)
        steps = jax.tree.map(lambda a: jnp.broadcast_to(a, (self.num_steps, *a.shape)), one)
        origin = None if self.position_restart is None else jnp.zeros((batch_size,), jnp.int32)
        return UniversalTransformerState(steps, SegmentState.fresh(batch_size), origin)

    @nn.nowrap
    def costs(self, length: int) -> Costs:
        """Parameters, FLOPs and state of one sequence of `length` tokens, all steps taken."""
        width, norm = self.embed_dim, Costs(parameters=norm_parameters(self.norm, self.embed_dim))
        block = sum((norm + s.make(self.frame, parent=None).costs(length) for s in self.block), Costs())
        if self.adaptive:
            block += Costs(width + 1, (2 + 2) * width * length)  # the probability, and the sum of outcomes
        steps = dataclasses.replace(self.num_steps * block, parameters=block.parameters)
        if self.step_embedding == "learned":
            steps += Costs(parameters=self.num_steps * width)
        total = self.frame_costs(length) + steps + (norm if self._normalizes_last else Costs())
        carried = self.causal and self.make_head(parent=None).per_token
        places = 12 if self.position_restart is None else 16
        return dataclasses.replace(total, state_bytes=total.state_bytes + places if carried else 0)

    @nn.nowrap
    def mixers(self) -> tuple[type[Mixer], ...]:
        return tuple(s.mixer for s in self.block)


class Wavefront(UniversalTransformer):
    """The same parameters where positions of a sequence stand at different depths, one new token among them.

    Steps are divided into `num_steps / R` stages of R; each stage holds one position of each row, or none.
    """

    @classmethod
    def of(cls, model: UniversalTransformer) -> Wavefront:
        """Of the same options."""
        names = (field.name for field in dataclasses.fields(model) if field.name not in ("parent", "name"))
        return cls(**{name: getattr(model, name) for name in names})

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "B"], latents: Float[Array, "M B D"], positions: Int[Array, "M B"], states: State
    ) -> tuple[Float[Array, "M B V"], Float[Array, "M B D"], Float[Array, "M B D"], State]:
        """Each stage's R steps, all stages at once.

        Args:
          tokens: those that enter the first stage.
          latents: what enters the others; the first stage's are not read.
          positions: from which the vectors of positions are made.
          states: of the block, leaves `[R, M * B, 1, ...]`: at step r, those of stage m's step `m * R + r` in each row.
        Returns:
          Logits; the vectors that entered each stage and those that left it; the next states.
        """
        stages, batch_size, _ = latents.shape
        x, table = self.embed(tokens[:, None], None, False)
        before = latents.at[0].set(x[:, 0])
        flat = lambda a: a.reshape(-1, 1, *a.shape[2:])  # rows of one token
        places = self.position_vectors(flat(positions))
        inner = self.num_steps // stages
        numbers = jnp.arange(inner)[:, None] + inner * jnp.repeat(jnp.arange(stages), batch_size)
        each = nn.vmap(
            Step,
            in_axes=(0, 0, 0, None, None, None),
            variable_axes={"params": None, "derived": None},
            split_rngs={"params": False, "dropout": False},
        )
        rows = lambda a: None if a is None else a[:, None]
        begun, depth = Progress(rows(flat(before))), (numbers, states)
        done, (states, _) = self._steps(each, inner)(begun, depth, rows(places), None, False, None)
        logits = self._read_out(done.x[:, 0], table, None, False)
        return logits.reshape(stages, batch_size, -1), before, done.x.reshape(before.shape), states


def last_origins(restarts: Bool[Array, "B L"], found: Segments, before: Int[Array, "B"] | None) -> Int[Array, "B L"]:
    """Per token, the position in its segment of the last restart up to it, itself included; 0 where there was none.

    Args:
      before: of the token before the chunk; None for 0.
    """
    steps = jnp.arange(restarts.shape[1])
    last = jax.lax.cummax(jnp.where(restarts | found.starts, steps, -1), axis=1)
    origins = jnp.where(restarts, found.positions, 0)
    carried = jnp.zeros((restarts.shape[0],), jnp.int32) if before is None else before
    return jnp.where(last >= 0, jnp.take_along_axis(origins, jnp.maximum(last, 0), axis=1), carried[:, None])


def _mean_of_tokens(values: Float[Array, "B L"], segment_ids: Int[Array, "B L"] | None) -> Float[Array, ""]:
    """The mean over tokens outside segment 0; 0 where there is none."""
    if segment_ids is None:
        return values.mean()
    real = segment_ids != 0
    return jnp.where(real, values, 0).sum() / jnp.maximum(real.sum(), 1)


PATTERN = ("attention", "mlp")


def _options(given: Mapping[str, Any]) -> dict[str, Option]:
    """Every key that a config may set: the model's, and those of its mixers."""
    of_mixers = stack_options(_flat(given.get("pattern", PATTERN)), {}, {})
    routed = {key: option for key, option in of_mixers.items() if key not in options_of(SequenceModel)}
    return {**routed, **options_of(UniversalTransformer, exclude=("block",)), "pattern": Option(tuple, PATTERN)}


def _flat(pattern: Any) -> tuple:
    """The pattern of the shared block, or a ConfigError for one of several blocks."""
    if not isinstance(pattern, tuple | list) or not pattern or any(isinstance(entry, tuple | list) for entry in pattern):
        raise ConfigError(
            f"model.pattern={pattern!r} is not one block; allowed: mixers such as ('attention', 'mlp'), all in one tuple."
        )
    return tuple(pattern)


EXAMPLE = {"vocab_size": 64, "embed_dim": 32, "num_steps": 3, "num_heads": 4, "max_length": 64}


@register_architecture("universal_transformer", example=EXAMPLE, options=_options, causal=(True, False))
def _make(pattern: tuple, **options: Any) -> UniversalTransformer:
    """A `UniversalTransformer` whose flat options reach every mixer that has them."""
    block = tuple(make_sublayer(entry, options) for entry in _flat(pattern))
    of_model = {key: value for key, value in options.items() if key in options_of(UniversalTransformer)}
    model = UniversalTransformer(block=block, **of_model)
    for sublayer in block:
        sublayer.make(model.frame, parent=None)  # a mixer's own checks, before anything is compiled
    return model
