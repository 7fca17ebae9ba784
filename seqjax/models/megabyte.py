"""MEGABYTE: a global model over patches of tokens, and within each patch a local model that predicts token by token."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from seqjax.config import ConfigError, Option, options_of
from seqjax.layers.dense import Dense
from seqjax.layers.embedding import PositionTable, TokenEmbedding
from seqjax.layers.positions import sinusoids
from seqjax.mixers.base import Costs, Mixer, State
from seqjax.models.base import Model, choose_rows, take
from seqjax.models.sequence_model import Block, SequenceModel, blocks_of, make_sublayer, stack_options
from seqjax.ops.segments import Segments, SegmentState, segments
from seqjax.registry import register_architecture


class Level(SequenceModel):
    """The blocks of one level and the norm behind them, from vectors to vectors."""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B L D"],
        state: tuple | None = None,
        *,
        segment_ids: Int[Array, "B L"] | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "B L D"], tuple | None]:
        x, after = self._stack(x, (None, None) if state is None else state, segment_ids, train)
        return self._last_norm(x, train), None if state is None else after

    @nn.nowrap
    def init_state(self, batch_size: int, max_length: int) -> tuple:
        return self._stack_state(batch_size, max_length)

    @nn.nowrap
    def costs(self, length: int) -> Costs:
        return self._stack_costs(length)


class MegabyteState(NamedTuple):
    """What a row carries. Rows are in different places of their patches, so each has a state of the global level of its own.

    Attributes:
      coarse: of the global level, a leading axis of rows over states of one row.
      fine: of the local level.
      tail: embeddings for the global level of the last P - 1 tokens.
      told: what the global level said to each token of the current patch.
      segment: the segment that the next token may continue.
    """

    coarse: State
    fine: State
    tail: Float[Array, "B P1 G"]
    told: Float[Array, "B P G"]
    segment: SegmentState


class Patches(NamedTuple):
    """The patches of each row in order, M of them.

    Attributes:
      opens: whether the patch is the first of its segment.
      runs: of its tokens; None for one segment a row.
      tokens: index of its first token; None where patch m has tokens m P to (m + 1) P - 1.
      places: for every token, its place in the patches laid in a row; None as before.
    """

    opens: Bool[Array, "#B M"]
    runs: Int[Array, "B M"] | None
    tokens: Int[Array, "B M"] | None = None
    places: Int[Array, "B L"] | None = None

    def lay(self, x: Float[Array, "B L D"], size: int) -> Float[Array, "B M P D"]:
        """The tokens of each patch; what a patch does not fill holds anything."""
        if self.tokens is not None:
            return take(x, jnp.minimum(self.tokens[..., None] + jnp.arange(size), x.shape[1] - 1))
        room = self.opens.shape[1] * size
        whole = jnp.pad(x[:, :room], [(0, 0), (0, max(0, room - x.shape[1])), (0, 0)])
        return whole.reshape(x.shape[0], -1, size, x.shape[2])

    def unlay(self, y: Float[Array, "B M P D"], length: int) -> Float[Array, "B L D"]:
        """The inverse of `lay`."""
        flat = y.reshape(y.shape[0], -1, y.shape[-1])
        return flat[:, :length] if self.places is None else take(flat, self.places)


def find_patches(found: Segments, size: int, packed: bool, aligned: bool) -> Patches:
    """Patches of `size` tokens, counted from the start of each segment; a segment's last tokens may not fill theirs.

    Args:
      packed: False for one segment a row.
      aligned: segments start at multiples of `size` in their row. Else there may be as many patches as tokens.
    """
    positions = found.positions
    if aligned or not packed:
        return Patches(positions[:, ::size] == 0, found.runs[:, ::size] if packed else None)
    begins = positions % size == 0
    places = (jnp.cumsum(begins, axis=1, dtype=jnp.int32) - 1) * size + positions % size
    tokens = jnp.argsort(~begins, axis=1, stable=True)  # those that begin no patch stand behind: a run of their own
    used, at, runs = (jnp.take_along_axis(a, tokens, axis=1) for a in (begins, positions, found.runs))
    return Patches(at == 0, jnp.where(used, runs, found.runs[:, -1:] + 1), tokens, places)


class Megabyte(Model):
    """MEGABYTE (Yu et al. 2023, "Predicting Million-byte Sequences with Multiscale Transformers", section 2).

    With inputs `i_t`, each the token before the one that output t predicts, patch k holds outputs k P to (k + 1) P - 1. Its
    vector of the global level is made of the embeddings of the P inputs up to `i_(k P)`: the patch before it, in terms of
    what is predicted. In a segment's first patch P - 1 learned vectors stand for what is missing (and `i_0`, the beginning
    of the text, for the last of the paper's P). The local level is given input t, or a learned vector at the first place of
    a patch, plus a linear map of the global level's output for that place.

    Patches are counted from the start of each segment, in every row by itself, so what is packed or padded changes nothing.
    The carried state keeps partial patches. The global level takes a step where a patch of some row begins, and costs the
    other steps nothing. A chunk goes through the global level patch by patch, and through the local level at once.

    Attributes (beside those of `Model`; `embed_dim` is the width of the local level, `dropout` leaves embeddings alone):
      global_pattern, local_pattern: blocks of residual sub-layers; local attention has a window of at most `patch_size`.
      patch_size: P, tokens of a patch.
      global_dim: width of the global level, P times that of its embeddings; None for twice `embed_dim`.
      global_layers, local_layers: number of blocks.
      aligned: segments start at multiples of P in a row, as packing lays them. A row without a state where one starts
        elsewhere gives NaN; a state has room for the patches of an aligned row and one more, which padding before a prompt
        takes. False lets segments start anywhere; parallel calls with segment ids and global caches then take P times as much.
      norm, norm_position, norm_epsilon, residual_init, remat, unroll: of both levels, see `SequenceModel`.
      position: "learned" and "sinusoidal" positions are added to the embeddings of the global level; "rope" and "alibi"
        count patches in the global level and tokens of a patch in the local one.
    """

    global_pattern: tuple[Block, ...] = ()
    local_pattern: tuple[Block, ...] = ()
    patch_size: int = 8
    global_dim: int | None = None
    global_layers: int = 2
    local_layers: int = 2
    aligned: bool = True
    norm: str = "layer"
    norm_position: str = "pre"
    norm_epsilon: float = 1e-5
    residual_init: float = 0.0
    remat: str = "none"
    unroll: int = 1
    position: str = "learned"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.causal:
            raise ConfigError("model.causal=False: megabyte shifts its patches into the past; allowed: True.")
        if self.patch_size < 2:
            raise ConfigError(f"model.patch_size={self.patch_size} makes no patches; allowed: 2 and above.")
        if self.global_width < 1 or self.global_width % self.patch_size:
            whole = max(1, round(self.global_width / self.patch_size)) * self.patch_size
            raise ConfigError(
                f"model.global_dim={self.global_width} (by default twice embed_dim) is no multiple of "
                f"model.patch_size={self.patch_size}; did you mean {whole}?"
            )
        for key in ("global_layers", "local_layers"):
            if getattr(self, key) < 1:
                raise ConfigError(f"model.{key}={getattr(self, key)} is not positive; allowed: 1 and above.")

    @property
    def global_width(self) -> int:
        return 2 * self.embed_dim if self.global_dim is None else self.global_dim

    @property
    def slice_width(self) -> int:
        """Width of a token's part of a patch's vector."""
        return self.global_width // self.patch_size

    @property
    def segment_alignment(self) -> int:
        return self.patch_size if self.aligned else 1

    @nn.nowrap
    def make_global(self, **where: Any) -> Level:
        """The global level; `where` may name it and its parent."""
        return self._level(self.global_pattern, self.global_layers, self.global_width, **where)

    @nn.nowrap
    def make_local(self, **where: Any) -> Level:
        """The local level; `where` may name it and its parent."""
        return self._level(self.local_pattern, self.local_layers, self.embed_dim, **where)

    @nn.nowrap
    def _level(self, pattern: tuple[Block, ...], num_layers: int, width: int, **where: Any) -> Level:
        shared = (
            "norm",
            "norm_position",
            "norm_epsilon",
            "residual_init",
            "remat",
            "unroll",
            "dropout",
            "dtype",
            "param_dtype",
        )
        vectors = {"embed_dim": width, "input_dim": width, "output_dim": width, "head": "regression"}
        options = {key: getattr(self, key) for key in shared} | vectors
        return Level(pattern=pattern, num_layers=num_layers, **options, **where)

    @nn.compact
    def __call__(
        self,
        inputs: Array,
        state: MegabyteState | None = None,
        *,
        segment_ids: Int[Array, "B L"] | None = None,
        train: bool = False,
    ) -> tuple[Array, MegabyteState | None]:
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
        table = self._table("embedding", self.embed_dim)
        local, patched = table(inputs), self._embed_for_patches(inputs, found.positions)
        if state is None or self.is_initializing():
            x = self._parallel(local, patched, found, segment_ids is not None, train)
        else:
            x, state = self._carried(local, patched, found, state, segment, train)
        return self.make_head(name="head")(x, segment_ids, table.attend if self.tied else None), state

    def _table(self, name: str, width: int) -> nn.Module:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if self.vocab_size is not None:
            return TokenEmbedding(self.vocab_size, width, self.embed_init, self.embed_scale, name=name, **types)
        return Dense(width, (None, "embed"), name=name, **types)

    def _embed_for_patches(self, inputs: Array, positions: Int[Array, "#B L"]) -> Float[Array, "B L G"]:
        """Embeddings of the inputs with their positions, the slices of which patches are made."""
        x = self._table("global_embedding", self.slice_width)(inputs)
        if self.position == "learned":
            types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
            return x + PositionTable(self.max_length, self.slice_width, name="positions", **types)(positions)
        return x + sinusoids(positions, self.slice_width, self.dtype) if self.position == "sinusoidal" else x

    def _pad(self, name: str, *shape: int) -> Float[Array, "*P D"]:
        """Learned vectors that stand for what is not there."""
        names = (None, "embed")[-len(shape) :]
        init = nn.with_logical_partitioning(nn.initializers.normal(self.embed_init), names)
        return self.param(name, init, shape, self.param_dtype).astype(self.dtype)

    def _patch_vectors(self, patches: Float[Array, "B M P G"], opens: Bool[Array, "#B M"]) -> Float[Array, "B M PG"]:
        """Inputs of the global level from the P embeddings that end with the first token of each patch."""
        pad = self._pad("global_pad", self.patch_size - 1, self.slice_width)
        missing = opens[..., None, None] & (jnp.arange(self.patch_size) < self.patch_size - 1)[:, None]
        filled = jnp.where(missing, jnp.pad(pad, [(0, 1), (0, 0)]), patches)
        return filled.reshape(*filled.shape[:2], -1)

    def _local_inputs(
        self, x: Float[Array, "*B D"], told: Float[Array, "*B G"], begins: Bool[Array, "*#B"]
    ) -> Float[Array, "*B D"]:
        """Inputs of the local level, with what the global level told each token."""
        types = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype}
        x = jnp.where(begins[..., None], self._pad("local_pad", self.embed_dim), x)
        return x + Dense(self.embed_dim, ("mlp", "embed"), name="global_to_local", **types)(told)

    def _parallel(
        self, x: Float[Array, "B L D"], patched: Float[Array, "B L G"], found: Segments, packed: bool, train: bool
    ) -> Float[Array, "B L D"]:
        """All patches at once: patches are tokens of the global level, and rows of the local one."""
        size, (batch_size, length, _) = self.patch_size, x.shape
        patches = find_patches(found, size, packed, self.aligned)
        ending_at_first = patches.lay(jnp.pad(patched, [(0, 0), (size - 1, 0), (0, 0)]), size)
        vectors = self._patch_vectors(ending_at_first, patches.opens)
        told, _ = self.make_global(name="global")(vectors, segment_ids=patches.runs, train=train)
        told = told.reshape(batch_size, -1, size, self.slice_width)
        cells = self._local_inputs(patches.lay(x, size), told, jnp.arange(size) == 0)
        y, _ = self.make_local(name="local")(cells.reshape(-1, *cells.shape[2:]), train=train)
        y = patches.unlay(y.reshape(cells.shape), length)
        if packed and self.aligned:
            astray = found.starts & (jnp.arange(length) % size != 0)
            y = jnp.where(jnp.any(astray, axis=1)[:, None, None], jnp.nan, y)
        return y

    def _carried(
        self,
        x: Float[Array, "B L D"],
        patched: Float[Array, "B L G"],
        found: Segments,
        state: MegabyteState,
        segment: SegmentState,
        train: bool,
    ) -> tuple[Float[Array, "B L D"], MegabyteState]:
        """A chunk: patch after patch in the global level, then all of it in the local one."""
        size, length = self.patch_size, x.shape[1]
        history = jnp.concatenate([state.tail, patched], axis=1)
        ending_at_each = history[:, jnp.arange(length)[:, None] + jnp.arange(size)]
        vectors = self._patch_vectors(ending_at_each, found.positions == 0)
        phase = found.positions % size
        (coarse, told), heard = _over_patches(
            self.make_global(name="global"), (state.coarse, state.told), (vectors, found.runs, phase), train
        )
        cells = self._local_inputs(x, heard, phase == 0)
        # The patches that follow one another must differ by their ids.
        ids = 2 * found.runs + found.positions // size % 2
        y, fine = self.make_local(name="local")(cells, state.fine, segment_ids=ids, train=train)
        return y, MegabyteState(coarse, fine, history[:, length:], told, segment)

    @nn.nowrap
    def init_state(self, batch_size: int, max_length: int) -> MegabyteState:
        """The state before the first token, with room for `max_length` tokens.

        Raises:
          ConfigError: the head reads whole sequences, or the position table is shorter.
        """
        self.check_state(max_length)
        one_row = self.make_global(parent=None).init_state(1, self._most_patches(max_length))
        zeros = lambda size: jnp.zeros((batch_size, size, self.slice_width), self.dtype)
        return MegabyteState(
            jax.tree.map(lambda a: jnp.broadcast_to(a, (batch_size, *a.shape)), one_row),
            self.make_local(parent=None).init_state(batch_size, max_length),
            zeros(self.patch_size - 1),
            zeros(self.patch_size),
            SegmentState.fresh(batch_size),
        )

    @nn.nowrap
    def _most_patches(self, length: int) -> int:
        """Of so many tokens. Padding may stand before a prompt, and ends within a patch of its own."""
        return -(-length // self.patch_size) + 1 if self.aligned else length

    @nn.nowrap
    def costs(self, length: int) -> Costs:
        """Parameters, FLOPs and state of one sequence of `length` tokens, from the parts' own accounts."""
        size, width, item = self.patch_size, self.slice_width, jnp.dtype(self.dtype).itemsize
        patches, coarse, fine = -(-length // size), self.make_global(parent=None), self.make_local(parent=None)
        total = self.clone(parent=None, position="none").frame_costs(length)
        channels = 0 if self.vocab_size is not None else self.input_dim
        inputs = self.vocab_size or channels + 1
        embedded = (inputs + (self.position == "learned") * self.max_length + size - 1) * width
        total += Costs(embedded, 2 * length * channels * width)
        total += Costs(width * self.embed_dim + self.embed_dim, 2 * patches * size * width * self.embed_dim)
        within = fine.costs(size)
        total += dataclasses.replace(coarse.costs(patches), state_bytes=coarse.costs(self._most_patches(length)).state_bytes)
        total += dataclasses.replace(within, flops=patches * within.flops, state_bytes=fine.costs(length).state_bytes)
        own = (2 * size - 1) * width * item + 12
        carried = self.make_head(parent=None).per_token
        return dataclasses.replace(total, state_bytes=total.state_bytes + own if carried else 0)

    @nn.nowrap
    def mixers(self) -> tuple[type[Mixer], ...]:
        blocks = (*self.global_pattern, *self.local_pattern)
        return tuple(sublayer.mixer for block in blocks for sublayer in block)


def _over_patches(
    level: Level, before: tuple[State, Array], tokens: tuple[Array, Array, Array], train: bool
) -> tuple[tuple[State, Array], Float[Array, "B L G"]]:
    """The global level's state and what it tells the current patch, after a chunk; and what it told each token.

    Args:
      before: the same, before the chunk.
      tokens: of each, the vector of the patch that it would begin, `[B, L, PG]`; its run; and its place in its patch.
    """

    def step(level: Level, old: tuple, token: tuple) -> tuple[tuple, Array]:
        vector, run, phase = token
        begins = phase == 0
        new = nn.cond(jnp.any(begins), advance, lambda level, old, *_: old, level, old, vector, run, begins)
        return new, jnp.take_along_axis(new[1], phase[:, None, None], axis=1)[:, 0]

    def advance(level: Level, old: tuple, vector: Array, run: Array, begins: Array) -> tuple:
        y, coarse = row_by_row(level, old[0], vector, run)
        new = (coarse, y.reshape(old[1].shape))
        return new if len(begins) == 1 else choose_rows(begins, new, old)

    shared = {"variable_axes": {"params": None, "batch_stats": None, "derived": None}}
    row_by_row = nn.vmap(
        lambda level, state, vector, run: level(vector[None, None], state, segment_ids=run[None, None], train=train),
        split_rngs={"params": False, "dropout": True},
        **shared,
    )
    step = nn.remat(step, prevent_cse=False)  # the backward pass keeps states alone
    if tokens[0].shape[1] == 1:  # decoding: no loop
        after, heard = step(level, before, tuple(a[:, 0] for a in tokens))
        return after, heard[:, None]
    scanned = nn.scan(
        step,
        variable_broadcast=("params", "batch_stats", "derived"),
        split_rngs={"params": False, "dropout": True},
        in_axes=1,
        out_axes=1,
    )
    return scanned(level, before, tokens)


EXAMPLE = {"vocab_size": 64, "embed_dim": 16, "patch_size": 4, "global_layers": 1, "local_layers": 1, "max_length": 64}


def _options(given: Mapping[str, Any]) -> dict[str, Option]:
    """Every key that a config may set: the model's, and those of the mixers of both levels."""
    patterns = {key: given.get(key) or ("attention", "mlp") for key in ("global_pattern", "local_pattern")}
    both = tuple(block for pattern in patterns.values() for block in blocks_of(pattern))
    routed = {key: option for key, option in stack_options(both, {}, {}).items() if key not in options_of(SequenceModel)}
    own = options_of(Megabyte, exclude=patterns)
    return {**routed, **own, **{key: Option(tuple, pattern) for key, pattern in patterns.items()}}


@register_architecture("megabyte", example=EXAMPLE | {"aligned": False}, options=_options)
def _make(global_pattern: tuple, local_pattern: tuple, **options: Any) -> Megabyte:
    """A `Megabyte` whose flat options reach every mixer of both levels that has them."""
    size = options["patch_size"]
    # A ring of one patch serves the local level: tokens further back are in other patches.
    within = {**options, "window": min(options.get("window") or size, size)}
    levels = {
        key: tuple(tuple(make_sublayer(entry, to) for entry in block) for block in blocks_of(pattern))
        for key, pattern, to in (("global_pattern", global_pattern, options), ("local_pattern", local_pattern, within))
    }
    model = Megabyte(**levels, **{key: value for key, value in options.items() if key in options_of(Megabyte)})
    for level in (model.make_global(parent=None), model.make_local(parent=None)):
        for sublayer in level.unit:  # the mixers' own checks at each width, before anything is compiled
            sublayer.make(level.frame, parent=None)
    return model
