"""Axial Transformer: tensors in raster order, attended to along one axis at a time, with nothing left out of their joint
distribution."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seqjax.config import ConfigError, Option, choose, options_of
from seqjax.layers.dense import Dense, scaled_init
from seqjax.layers.norms import NORMS, make_norm, norm_parameters
from seqjax.mixers.base import Costs, check_heads
from seqjax.models.base import Model, choose_rows
from seqjax.ops.attention import attended_pairs, flash_attention
from seqjax.ops.segments import SegmentState, segments
from seqjax.registry import mixer, register_architecture


class Cache(NamedTuple):
    """Keys and values along the masked axis of a block."""

    keys: Float[Array, "B *S N H K"]
    values: Float[Array, "B *S N H K"]


class AxialState(NamedTuple):
    """What a row carries within its tensor. For each axis but the last:

    Attributes:
      slices: vectors of the tokens since the axis last moved on, in raster order.
      contexts: what the finished slices tell the present one.
      outer: caches of the blocks along the axis.
      inner: caches of the blocks along the last axis.
      segment: the segment that the next token may continue.
    """

    slices: tuple[Float[Array, "B S D"], ...]
    contexts: tuple[Float[Array, "B S D"], ...]
    outer: tuple[tuple[Cache, ...], ...]
    inner: tuple[Cache, ...]
    segment: SegmentState


class AxialBlock(nn.Module):
    """Attention and a feed-forward behind norms and between skip connections, along whichever axis is put last but one."""

    embed_dim: int
    num_heads: int
    causal: bool
    mlp_ratio: float
    activation: str
    norm: str
    dropout: float
    residual_init: float
    dtype: str
    param_dtype: str

    @nn.compact
    def __call__(
        self, x: Float[Array, "N T D"], cache: Cache | None = None, at: Int[Array, "N"] | None = None, train: bool = False
    ) -> tuple[Float[Array, "N T D"], Cache | None]:
        """The next vectors, and with a cache, which then holds T = 1 more from slot `at` on, the next one."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        heads, axes = (self.num_heads, self.embed_dim // self.num_heads), ("embed", "heads", "head_dim")
        attended = make_norm(self.norm, name="norm_attention", **types)(x, train)
        q, k, v = (Dense(heads, axes, use_bias=False, name=name, **types)(attended) for name in ("query", "key", "value"))
        if cache is None:
            mixed = flash_attention(q, k, v, causal=self.causal)
        else:
            rows = jnp.arange(len(x))
            cache = Cache(*(old.at[rows, at].set(new[:, 0]) for old, new in zip(cache, (k, v))))
            mixed = flash_attention(q, *cache, causal=True, q_offset=at)
        init = scaled_init(self.residual_init)
        out = Dense(self.embed_dim, ("heads", "head_dim", "embed"), 2, use_bias=False, kernel_init=init, name="out", **types)
        x = x + nn.Dropout(self.dropout, deterministic=not train)(out(mixed))
        fed = make_norm(self.norm, name="norm_mlp", **types)(x, train)
        y, _ = self._feed_forward(name="mlp")(fed, train=train)
        return x + nn.Dropout(self.dropout, deterministic=not train)(y), cache

    @nn.nowrap
    def _feed_forward(self, **where: Any) -> nn.Module:
        options = ("embed_dim", "mlp_ratio", "activation", "residual_init", "dtype", "param_dtype")
        return mixer("mlp")(**{key: getattr(self, key) for key in options}, **where)

    def along(self, x: Float[Array, "B *shape D"], axis: int, train: bool = False) -> Float[Array, "B *shape D"]:
        """The block along one axis of x, the others being rows."""
        moved = jnp.moveaxis(x, axis, -2)
        y, _ = self(moved.reshape(-1, *moved.shape[-2:]), train=train)
        return jnp.moveaxis(y.reshape(moved.shape), -2, axis)

    @nn.nowrap
    def costs(self, rows: int, length: int) -> Costs:
        """Of so many rows of `length` tokens."""
        within = self._feed_forward(parent=None).costs(rows * length)
        kernels = 4 * self.embed_dim**2
        pairs = rows * attended_pairs(length, causal=self.causal, window=None)
        parameters = kernels + 2 * norm_parameters(self.norm, self.embed_dim) + within.parameters
        return Costs(parameters, 2 * rows * length * kernels + 4 * pairs * self.embed_dim + within.flops)


class AxialBody(nn.Module):
    """The blocks: for each axis but the last an outer decoder, and the inner decoder along the last."""

    shape: tuple[int, ...]
    outer_layers: int
    inner_layers: int
    embed_init: float
    block: Mapping[str, Any]

    def setup(self) -> None:
        axes, last = len(self.shape), len(self.shape) - 1
        width, kind = self.block["embed_dim"], self.block["param_dtype"]
        init = nn.with_logical_partitioning(nn.initializers.normal(self.embed_init), (None, "embed"))
        self.tables = [self.param(f"positions_{a}", init, (size, width), kind) for a, size in enumerate(self.shape)]
        make = lambda causal: AxialBlock(causal=causal, **self.block)
        layers = range(self.outer_layers)
        self.outer = [[[make(b == axes) for b in range(a + 1, axes + 1)] for _ in layers] for a in range(last)]
        self.inner = [make(True) for _ in range(self.inner_layers)]

    def places(self) -> Float[Array, "*shape D"]:
        """A vector for each place of the tensor: the sum of one per coordinate."""
        axes = len(self.shape)
        spread = (
            table.reshape(*(-1 if b == a else 1 for b in range(axes)), table.shape[-1]) for a, table in enumerate(self.tables)
        )
        return sum(spread).astype(self.block["dtype"])

    def __call__(self, x: Float[Array, "B L D"], train: bool = False) -> Float[Array, "B L D"]:
        """All tokens at once."""
        batch_size, length, width = x.shape
        size = math.prod(self.shape)
        x = jnp.pad(x, [(0, 0), (0, -length % size), (0, 0)]).reshape(-1, *self.shape, width) + self.places()
        for a, layers in enumerate(self.outer):
            context = x
            for blocks in layers:
                context = self._across(blocks, context, a + 2, train)
                context = blocks[-1].along(context, a + 1, train)
            later = [(0, 0)] * x.ndim
            later[a + 1] = (1, 0)
            x = x + jax.lax.slice_in_dim(jnp.pad(context, later), 0, self.shape[a], axis=a + 1)
        for block in self.inner:
            x = block.along(x, len(self.shape), train)
        return x.reshape(batch_size, -1, width)[:, :length]

    def _across(self, blocks: list, x: Float[Array, "B *shape D"], first: int, train: bool) -> Float[Array, "B *shape D"]:
        """The blocks without a mask, along the axes of x from `first` on."""
        for b, block in enumerate(blocks[:-1]):
            x = block.along(x, first + b, train)
        return x

    def step(
        self, state: AxialState, token: tuple[Float[Array, "B D"], Int[Array, "B"]], train: bool
    ) -> tuple[AxialState, Float[Array, "B D"]]:
        """One token of each row, at its place in its tensor."""
        x, place = token
        rows, slices, contexts, outer = jnp.arange(len(x)), [], [], []
        x = x + self.places().reshape(-1, x.shape[-1])[place]
        for a in range(len(self.outer)):
            size = math.prod(self.shape[a + 1 :])
            at, within = place // size % self.shape[a], place % size
            slices.append(state.slices[a].at[rows, within].set(x))
            told = jnp.where((at > 0)[:, None], state.contexts[a][rows, within], 0)
            before, ends = (state.contexts[a], state.outer[a]), within == size - 1
            after = nn.cond(
                jnp.any(ends),
                lambda body, before, x, a=a, at=at, ends=ends: body.advance(a, before, x, at, ends, train),
                lambda body, before, *_: before,
                self,
                before,
                slices[a],
            )
            contexts.append(after[0])
            outer.append(after[1])
            x = x + told
        inner, at, x = [], place % self.shape[-1], x[:, None]
        for block, cache in zip(self.inner, state.inner):
            x, cache = block(x, cache, at, train)
            inner.append(cache)
        return AxialState(tuple(slices), tuple(contexts), tuple(outer), tuple(inner), state.segment), x[:, 0]

    def advance(self, a: int, before: tuple, x: Float[Array, "B S D"], at: Int[Array, "B"], ends: Array, train: bool) -> tuple:
        """Context and caches of axis a where a slice ends, the one at `at`; elsewhere those before."""
        batch_size, size, width = x.shape
        flat, caches = jnp.repeat(at, size), []
        for blocks, cache in zip(self.outer[a], before[1]):
            x = self._across(blocks, x.reshape(batch_size, *self.shape[a + 1 :], width), 1, train)
            cache = jax.tree.map(lambda old: old.reshape(-1, *old.shape[2:]), cache)
            x, cache = blocks[-1](x.reshape(-1, 1, width), cache, flat, train)
            caches.append(jax.tree.map(lambda new: new.reshape(batch_size, size, *new.shape[1:]), cache))
        return choose_rows(ends, (x.reshape(batch_size, size, width), tuple(caches)), before)


class AxialTransformer(Model):
    """Axial Transformer (Ho et al. 2019, "Axial Attention in Multidimensional Transformers", section 3), in any number of axes.

    A sequence holds tensors of the given shape in raster order, the last axis fastest: `(28, 28)` for grey images,
    `(32, 32, 3)` for the channels of coloured pixels, `(8, 32, 32)` for video. Input t is the token before the one that
    output t predicts. For each axis but the last an outer decoder (blocks along all later axes without a mask, then along the
    axis with one), shifted by one along the axis, tells every token of the finished slices; the inner decoder runs along the
    last axis. So an output depends on every earlier input, and a token attends to the sum of the axes' lengths, not to their
    product.

    Segments are tensors of their own, and every product(shape) tokens of one begin another. With segment ids, or a state,
    tokens are taken one after the other, and an outer decoder runs once per finished slice (the paper's semi-parallel
    sampling); without, all at once.

    Attributes (beside those of `Model`):
      shape: of a tensor, at least two axes.
      num_heads: H, a divisor of `embed_dim`.
      outer_layers: of each outer decoder; a layer has a block per axis from its own on. inner_layers: of the inner decoder.
      mlp_ratio, activation: of the feed-forward layers.
      norm, residual_init: as in `SequenceModel`.
    """

    shape: tuple[int, ...] = (28, 28)
    num_heads: int = 4
    outer_layers: int = 2
    inner_layers: int = 4
    mlp_ratio: float = 4.0
    activation: str = "gelu"
    norm: str = "layer"
    residual_init: float = 0.0
    position: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.causal:
            raise ConfigError("model.causal=False: axial_transformer predicts tensors in raster order; allowed: True.")
        if len(self.shape) < 2 or min(self.shape) < 1:
            raise ConfigError(
                f"model.shape={self.shape} is no tensor of several axes; allowed: two sizes and more, such as (28, 28)."
            )
        check_heads(self.num_heads, self.embed_dim, f"model.embed_dim={self.embed_dim}")
        for key in ("outer_layers", "inner_layers"):
            if getattr(self, key) < 1:
                raise ConfigError(f"model.{key}={getattr(self, key)} is not positive; allowed: 1 and above.")
        choose(NORMS, self.norm, "model.norm")
        self._block(causal=True, parent=None)._feed_forward(parent=None)  # its own checks, before anything is compiled

    @nn.nowrap
    def _block(self, **options: Any) -> AxialBlock:
        return AxialBlock(**self._block_options(), **options)

    @nn.nowrap
    def _block_options(self) -> dict[str, Any]:
        named = [field.name for field in dataclasses.fields(AxialBlock) if field.name not in ("causal", "parent", "name")]
        return {key: getattr(self, key) for key in named}

    @nn.compact
    def __call__(
        self,
        inputs: Array,
        state: AxialState | None = None,
        *,
        segment_ids: Int[Array, "B L"] | None = None,
        train: bool = False,
    ) -> tuple[Array, AxialState | None]:
        """Outputs of the head for `inputs`, and the next state if one was given.

        Args:
          inputs: `[B, L]` tokens or `[B, L, C]` values (`[B, 2, L]` or `[B, 2, L, C]` pairs for the matching head).
          state: from `init_state`, or a previous call.
          segment_ids: a new tensor starts wherever the id changes; nothing crosses. Heads that pool take 0 for padding.
          train: dropout is on; needs the rng `dropout` where its rate is positive.
        """
        inputs, segment_ids = self.sequences(inputs, segment_ids, state)
        x, table = self.embed(inputs, None, train)
        body = AxialBody(
            shape=tuple(self.shape),
            outer_layers=self.outer_layers,
            inner_layers=self.inner_layers,
            embed_init=self.embed_init,
            block=self._block_options(),
            name="body",
        )
        if (state is None and segment_ids is None) or self.is_initializing():
            x = body(x, train)
        else:
            before = self._empty(x.shape[0]) if state is None else state
            found, segment = segments(segment_ids, before.segment, x.shape[1])
            places = jnp.broadcast_to(found.positions % math.prod(self.shape), x.shape[:2])
            after, x = _token_by_token(body, before._replace(segment=segment), (x, places), train)
            state = None if state is None else after
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = make_norm(self.norm, name="norm", **types)(x, train)
        return self.make_head(name="head")(x, segment_ids, table.attend if self.tied else None), state

    @nn.nowrap
    def init_state(self, batch_size: int, max_length: int) -> AxialState:
        """The state before the first token; its size is that of one tensor, whatever `max_length`.

        Raises:
          ConfigError: the head reads whole sequences.
        """
        self.check_state(max_length)
        return self._empty(batch_size)

    @nn.nowrap
    def _empty(self, batch_size: int) -> AxialState:
        sizes = [math.prod(self.shape[a + 1 :]) for a in range(len(self.shape) - 1)]
        zeros = lambda *shape: jnp.zeros((batch_size, *shape), self.dtype)
        heads = (self.num_heads, self.embed_dim // self.num_heads)
        cache = lambda *shape: Cache(zeros(*shape, *heads), zeros(*shape, *heads))
        vectors = tuple(zeros(size, self.embed_dim) for size in sizes)
        outer = tuple(tuple(cache(s, n) for _ in range(self.outer_layers)) for s, n in zip(sizes, self.shape))
        inner = tuple(cache(self.shape[-1]) for _ in range(self.inner_layers))
        return AxialState(vectors, vectors, outer, inner, SegmentState.fresh(batch_size))

    @nn.nowrap
    def costs(self, length: int) -> Costs:
        """Parameters, FLOPs and state of one sequence of `length` tokens, which take as much as whole tensors."""
        size, axes = math.prod(self.shape), len(self.shape)
        tensors = -(-length // size)
        total = self.clone(parent=None).frame_costs(length)
        total += Costs(sum(self.shape) * self.embed_dim + norm_parameters(self.norm, self.embed_dim), 0)
        masked, open_ = (self._block(causal=causal, parent=None) for causal in (True, False))
        blocks = [(masked, axes - 1)] * self.inner_layers
        for a in range(axes - 1):
            blocks += ([(open_, b) for b in range(a + 1, axes)] + [(masked, a)]) * self.outer_layers
        for block, axis in blocks:
            total += block.costs(tensors * size // self.shape[axis], self.shape[axis])
        held = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(jax.eval_shape(lambda: self._empty(1))))
        return dataclasses.replace(total, state_bytes=held if self.make_head(parent=None).per_token else 0)


def _token_by_token(
    body: AxialBody, before: AxialState, tokens: tuple[Float[Array, "B L D"], Int[Array, "B L"]], train: bool
) -> tuple[AxialState, Float[Array, "B L D"]]:
    step = lambda body, state, token: body.step(state, token, train)
    if tokens[0].shape[1] == 1:  # decoding: no loop
        after, y = step(body, before, tuple(a[:, 0] for a in tokens))
        return after, y[:, None]
    scanned = nn.scan(
        nn.remat(step, prevent_cse=False),  # the backward pass keeps states alone
        variable_broadcast=("params", "batch_stats"),
        split_rngs={"params": False, "dropout": True},
        in_axes=1,
        out_axes=1,
    )
    return scanned(body, before, tokens)


EXAMPLE = {"vocab_size": 64, "embed_dim": 16, "shape": (4, 4), "num_heads": 2, "outer_layers": 1, "inner_layers": 1}


def _options(given: Mapping[str, Any]) -> dict[str, Option]:
    """Every key that a config may set: places have vectors of their own."""
    return options_of(AxialTransformer, exclude=("position", "position_offset", "max_length"))


@register_architecture("axial_transformer", example=EXAMPLE, options=_options)
def _make(**options: Any) -> AxialTransformer:
    return AxialTransformer(**options)
