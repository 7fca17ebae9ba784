"""What every model shares: inputs become vectors, a body mixes them, a head reads them out."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from seqjax.config import ConfigError, allowed_values, choose
from seqjax.layers.dense import Dense
from seqjax.layers.embedding import PositionTable, TokenEmbedding
from seqjax.layers.positions import POSITIONS, sinusoids
from seqjax.mixers.base import Costs, Mixer, State
from seqjax.models.heads import HEADS, Head, check_pool


class Window(NamedTuple):
    """What a model may return in training in place of its outputs: those at some positions of each sequence alone.

    Attributes:
      outputs: `[B, T, ...]`, at positions `start .. start + T - 1`.
      start: the same for all rows.
    """

    outputs: Float[Array, "B T ..."]
    start: int | Int[Array, ""]


class Model(nn.Module):
    """Embedding, body and head. A subclass gives the body.

    Attributes:
      vocab_size: number of tokens, for `[B, L]` integer inputs.
      input_dim: number of channels C, for `[B, L, C]` float inputs; exactly one of the two is given.
      embed_dim: width D.
      head: a key of `HEADS`; "language_model" reads out `vocab_size`, classifier and matching `num_classes`, regression and
        forecast `output_dim` (and `horizon` steps), "point_process" the next event's time and which of `output_dim` marks.
      pool: "mean" or "last", for heads that read a whole sequence.
      head_state_dim: order of the systems of the head "closed_loop".
      mixture_components: log-normal distributions that the head "point_process" makes the next event's time of.
      tie_embeddings: the language-model head reuses the embedding table.
      embed_init: standard deviation of a token's initial vector; 0.02 is GPT-2's.
      embed_scale: what tokens' vectors are multiplied by where they enter.
      logit_softcap: the language-model head's logits x become `logit_softcap * tanh(x / logit_softcap)`; None leaves them.
      position: "learned" and "sinusoidal" act here, "rope" and "alibi" inside attention, "none" nowhere.
      position_offset: in training, sinusoidal positions of a row start anywhere from 0 to this, so that those of longer
        sequences are seen (Dehghani et al. 2019, section 3.4).
      max_length: positions in the learned table, and the longest sequence it takes.
      causal: False asks for the bidirectional form.
      dropout: rate on the embedding and on each sub-layer's output.
      dtype: of the computation, "float32", "bfloat16" or "float64"; param_dtype: of the parameters.
    """

    embed_dim: int
    vocab_size: int | None = None
    input_dim: int | None = None
    head: str = "language_model"
    num_classes: int | None = None
    output_dim: int | None = None
    horizon: int = 1
    pool: str = "mean"
    head_state_dim: int = 64
    mixture_components: int = 16
    tie_embeddings: bool = True
    embed_init: float = 0.02
    embed_scale: float = 1.0
    logit_softcap: float | None = None
    position: str = "rope"
    position_offset: int = 0
    max_length: int = 1024
    causal: bool = True
    dropout: float = 0.0
    dtype: str = "float32"
    param_dtype: str = "float32"

    inverts: ClassVar[bool] = False
    """Whether the body can take channels for tokens, as `Head.variates` asks."""
    segment_alignment: ClassVar[int] = 1
    """Packed documents must start at multiples of this in their row."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.vocab_size is None) == (self.input_dim is None):
            raise ConfigError(
                f"model.vocab_size={self.vocab_size} and model.input_dim={self.input_dim}: give exactly one, "
                "vocab_size for tokens or input_dim for continuous inputs."
            )
        if self.embed_dim < 1:
            raise ConfigError(f"model.embed_dim={self.embed_dim} is not positive; allowed: 1 and above.")
        head = choose(HEADS, self.head, "model.head")
        if getattr(self, head.size_option) is None:
            raise ConfigError(f"model.head={self.head!r} needs model.{head.size_option}, which was not given.")
        if head.variates and (not self.inverts or self.input_dim is None or self.causal):
            raise ConfigError(
                f"model.head={self.head!r} makes tokens of channels, which have no order in time; allowed: residual stacks "
                "with input_dim and causal=False."
            )
        check_pool(self.pool)
        if self.embed_scale != 1 and self.vocab_size is None:
            raise ConfigError(f"model.embed_scale={self.embed_scale} acts on tokens, and there is no vocab_size; allowed: 1.0.")
        if self.logit_softcap is not None and (self.logit_softcap <= 0 or self.head != "language_model"):
            raise ConfigError(
                f"model.logit_softcap={self.logit_softcap} with model.head={self.head!r} is not served; allowed: None, or "
                "above 0 with the head 'language_model'."
            )
        for key in ("head_state_dim", "mixture_components"):
            if getattr(self, key) < 1:
                raise ConfigError(f"model.{key}={getattr(self, key)} is not positive; allowed: 1 and above.")
        for key in ("dtype", "param_dtype"):
            choose(DTYPES, getattr(self, key), f"model.{key}")
        if self.position not in POSITIONS:
            raise ConfigError(f"model.position={self.position!r} is unknown; {allowed_values(self.position, POSITIONS)}")
        if self.position_offset < 0 or (self.position_offset and self.position != "sinusoidal"):
            raise ConfigError(
                f"model.position_offset={self.position_offset} with model.position={self.position!r} has no effect; "
                "allowed: 0, or 1 and above with model.position='sinusoidal'."
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"model.dropout={self.dropout} is not a rate; allowed: from 0.0 up to, not including, 1.0.")

    @property
    def tied(self) -> bool:
        return self.tie_embeddings and self.head == "language_model" and self.vocab_size is not None

    @nn.nowrap
    def make_head(self, **options: Any) -> Head:
        """The head module; `options` may name it and its parent, or set a width other than the model's."""
        kind = HEADS[self.head]
        own = {"horizon": self.horizon, "pool": self.pool, "state_dim": self.head_state_dim}
        own |= {"softcap": self.logit_softcap, "num_components": self.mixture_components}
        own |= {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return kind(**{"output_dim": getattr(self, kind.size_option), **own, **options})

    def shifted(self, positions: Int[Array, "#B L"], batch_size: int, train: bool) -> Int[Array, "#B L"]:
        """Positions; in training with the rows' random offsets, for which it needs the rng `dropout`."""
        if not train or not self.position_offset:
            return positions
        return positions + jax.random.randint(self.make_rng("dropout"), (batch_size, 1), 0, self.position_offset + 1)

    def position_vectors(self, positions: Int[Array, "#B L"]) -> Float[Array, "#B L D"] | None:
        """What positions add to the embedding; None where they act elsewhere."""
        if self.position == "learned":
            options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
            return PositionTable(self.max_length, self.embed_dim, name="positions", **options)(positions)
        return sinusoids(positions, self.embed_dim, self.dtype) if self.position == "sinusoidal" else None

    def embed(
        self, inputs: Array, positions: Int[Array, "#B L"] | None, train: bool
    ) -> tuple[Float[Array, "B L D"], TokenEmbedding | None]:
        """Vectors of the inputs with their positions added, and the token table where there is one; None adds none."""
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if self.vocab_size is not None:
            table = TokenEmbedding(
                self.vocab_size, self.embed_dim, self.embed_init, self.embed_scale, name="embedding", **options
            )
            x = table(inputs)
        else:
            table = None
            x = Dense(self.embed_dim, (None, "embed"), name="embedding", **options)(inputs)
        if positions is not None:
            places = self.position_vectors(self.shifted(positions, x.shape[0], train))
            x = x if places is None else x + places
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.with_logical_constraint(x, ("batch", "length_act", "embed_act")), table

    @nn.nowrap
    def sequences(self, inputs: Array, segment_ids: Array | None, state: State | None) -> tuple[Array, Array | None]:
        """Checked inputs and segment ids, one row per sequence: the two of a pair for the matching head follow one another."""
        self._check_inputs(inputs, state)
        if self.head == "matching":
            inputs = inputs.reshape(-1, *inputs.shape[2:])
            segment_ids = None if segment_ids is None else segment_ids.reshape(inputs.shape[:2])
        return inputs, segment_ids

    @nn.nowrap
    def _check_inputs(self, inputs: Array, state: State | None) -> None:
        """Raise a ConfigError for inputs of the wrong rank, kind or length, or a state that the head cannot carry."""
        pair = self.head == "matching"
        kind = "tokens, integers" if self.vocab_size is not None else f"floats with {self.input_dim} channels"
        rank = 2 + pair + (self.vocab_size is None)
        integers = jnp.issubdtype(inputs.dtype, jnp.integer)
        channels = self.vocab_size is not None or inputs.shape[-1:] == (self.input_dim,)
        if inputs.ndim != rank or integers != (self.vocab_size is not None) or not channels:
            shape = f"[B, {'2, ' if pair else ''}L{'' if self.vocab_size is not None else ', C'}]"
            raise ConfigError(f"inputs of shape {inputs.shape}, {inputs.dtype}: this model takes {shape} {kind}.")
        length = inputs.shape[1 + pair]
        if self.position == "learned" and length > self.max_length:
            raise ConfigError(
                f"a sequence of {length} tokens is longer than the position table, model.max_length={self.max_length}; "
                "raise it, or use model.position='rope', 'alibi', 'sinusoidal' or 'none'."
            )
        if state is not None and not HEADS[self.head].per_token:
            raise ConfigError(f"model.head={self.head!r} reads the whole sequence at once, so the model carries no state.")

    @nn.nowrap
    def check_state(self, max_length: int) -> None:
        """Raise a ConfigError if this model carries no state, or none for `max_length` tokens."""
        if not self.causal:
            raise ConfigError("model.causal=False sees the whole sequence at once, so it carries no state; allowed: True.")
        if not HEADS[self.head].per_token:
            raise ConfigError(f"model.head={self.head!r} reads the whole sequence at once, so the model carries no state.")
        if self.position == "learned" and max_length > self.max_length:
            raise ConfigError(
                f"a state for {max_length} tokens is longer than the position table, model.max_length={self.max_length}."
            )

    @nn.nowrap
    def frame_costs(self, length: int) -> Costs:
        """Costs of embedding and head."""
        values = length if HEADS[self.head].variates else self.input_dim
        inputs = self.vocab_size if self.vocab_size is not None else values + 1
        parameters = inputs * self.embed_dim + (self.position == "learned") * self.max_length * self.embed_dim
        flops = 0 if self.vocab_size is not None else 2 * length * self.input_dim * self.embed_dim
        head = self.make_head(parent=None)
        parameters += head.parameters(self.embed_dim, self.tied)
        return Costs(parameters=parameters, flops=flops + head.flops(self.embed_dim, length))

    @nn.nowrap
    def mixers(self) -> tuple[type[Mixer], ...]:
        """The kinds of mixer in the body."""
        return ()

    @nn.nowrap
    def optimizer_groups(self) -> tuple[tuple[str, str], ...]:
        """(regular expression on a parameter's path, optimizer group) for parameters that train apart from the rest."""
        return tuple(dict.fromkeys(group for mixer in self.mixers() for group in mixer.optimizer_groups))

    @nn.nowrap
    def prepare(self, variables: Any, length: int | None = None) -> Any:
        """Variables with constants derived from them (a discretised system, say) in the collection "derived".

        `generate` calls it once, so that no token makes them again. They are wrong for other parameters.

        Args:
          length: of the longest whole sequence to come: what depends on it, such as a convolution's kernel, is kept as well.
        """
        if not any(mixer.derives for mixer in self.mixers()):
            return variables
        shape = (1, 2) if self.head == "matching" else (1,)
        shape = (*shape, length or 1)
        inputs = jnp.zeros(shape, jnp.int32) if self.input_dim is None else jnp.zeros((*shape, self.input_dim))
        _, made = self.apply(variables, inputs, mutable=["derived"])
        return {**variables, **made}


def take(x: Float[Array, "B L D"], indices: Int[Array, "B *M"]) -> Float[Array, "B *M D"]:
    """Each row's vectors at its indices; negative ones give any vector."""
    flat = jnp.maximum(indices.reshape(x.shape[0], -1, 1), 0)
    return jnp.take_along_axis(x, flat, axis=1).reshape(*indices.shape, x.shape[-1])


def choose_rows(rows: Bool[Array, "B"], new: State, old: State, axis: int = 0) -> State:
    """`new` for the true rows, `old` for the others; the batch is axis `axis` of each leaf."""
    return jax.tree.map(lambda a, b: jnp.where(rows.reshape(-1, *(1,) * (a.ndim - 1 - axis)), a, b), new, old)


DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float64": jnp.float64}
