"""The two blocks of xLSTM: a matrix memory that trains in parallel, and a scalar memory whose features mix at every step."""

from __future__ import annotations

import math
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from seqjax.config import ConfigError
from seqjax.layers.convolution import ShortConvolution
from seqjax.layers.dense import Dense, scaled_init
from seqjax.layers.norms import make_norm
from seqjax.mixers.base import Costs, Mixer, check_heads
from seqjax.ops.cells import slstm_cell
from seqjax.ops.convolution import Tail
from seqjax.ops.linear_attention import linear_attention_flops
from seqjax.ops.mlstm import MatrixMemory, mlstm
from seqjax.ops.recurrence import recurrence
from seqjax.ops.segments import SegmentState, segments
from seqjax.registry import register_mixer


@chex.dataclass(frozen=True)
class XLSTMState:
    """The last inputs of the convolution; the memory, in at least float32; the current segment."""

    convolution: Tail
    memory: Any
    segment: SegmentState


class XLSTM(Mixer):
    """What both blocks share.

    Attributes:
      num_heads: H.
      conv_width: taps of the convolution, 2 and above.
      norm_epsilon: of the norm of each head's outputs.
    """

    num_heads: int = 4
    conv_width: int = 4
    norm_epsilon: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.conv_width < 2:
            raise ConfigError(f"model.conv_width={self.conv_width} is too small; allowed: 2 and above.")
        check_heads(self.num_heads, self.width, f"the width {self.width}")

    @property
    def width(self) -> int:
        """Of the memory."""
        return self.embed_dim

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def wide(self) -> Any:
        return jnp.promote_types(self.dtype, jnp.float32)

    @property
    def small_init(self) -> Any:
        return nn.initializers.normal(math.sqrt(2 / (5 * self.embed_dim)))

    def convolve(self, u: Array, runs: Array, tail: Tail | None) -> tuple[Array, Tail | None]:
        mixed, tail = ShortConvolution(self.conv_width, param_dtype=self.param_dtype, name="conv")(u, runs=runs, tail=tail)
        return jax.nn.silu(mixed), tail

    def norm_heads(self, y: Float[Array, "B L H D"]) -> Float[Array, "B L E"]:
        """Each head to mean 0 and variance 1, then a scale per feature."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        y = make_norm("layer_unscaled", name="head_norm", epsilon=self.norm_epsilon, **types)(y)
        return y.reshape(*y.shape[:2], -1) * self.parameter("norm", nn.initializers.ones, (self.width,), ("mlp",))

    def parameter(self, name: str, init: Any, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> Array:
        return self.param(name, nn.with_logical_partitioning(init, axes), shape, self.param_dtype).astype(self.dtype)

    def dense(self, name: str, features: int, axes: tuple[str, str], **options: Any) -> Dense:
        types = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype}
        return Dense(features, axes, name=name, **types, **options)

    @nn.nowrap
    def fresh_memory(self, batch_size: int) -> Any:
        raise NotImplementedError

    @nn.nowrap
    def init_state(self, batch_size: int, max_length: int) -> XLSTMState:
        return XLSTMState(
            convolution=Tail.fresh(batch_size, self.conv_width - 1, self.width, self.dtype),
            memory=self.fresh_memory(batch_size),
            segment=SegmentState.fresh(batch_size),
        )

    @nn.nowrap
    def frame_costs(self, length: int) -> Costs:
        """Of the convolution and the scale of the norm; the state but for the memory."""
        tail = self.width * jnp.dtype(self.dtype).itemsize + 4
        return Costs(
            parameters=(self.conv_width + 2) * self.width,  # taps, their bias, and the scale
            flops=2 * length * self.conv_width * self.width,
            state_bytes=(self.conv_width - 1) * tail + 12,
        )


@register_mixer("mlstm")
class MLSTM(XLSTM):
    """The block of the matrix memory (Beck et al. 2024, figure 11), with the defaults of the authors' code.

    Two maps to the inner width; one branch goes through a convolution to queries and keys, and as it is to values, by maps in
    blocks; `ops.mlstm`; the heads' norm, a skip around the memory, the other branch as a gate, and a map out.

    Attributes:
      expand: inner width, in units of `embed_dim`.
      qkv_block: width of the blocks of the maps to queries, keys and values.
      chunk_size, implementation: of `ops.mlstm`.
    """

    expand: int = 2
    qkv_block: int = 4
    chunk_size: int | None = None
    implementation: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.qkv_block < 1 or self.width % self.qkv_block:
            raise ConfigError(f"model.qkv_block={self.qkv_block} does not divide the inner width {self.width}.")
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ConfigError(f"model.chunk_size={self.chunk_size} is not positive; allowed: None, or 1 and above.")

    @property
    def width(self) -> int:
        return self.expand * self.embed_dim

    @nn.compact
    def __call__(self, x, state=None, *, segment_ids=None, train=False):
        before = SegmentState.fresh(1 if segment_ids is None else x.shape[0]) if state is None else state.segment
        found, after = segments(segment_ids, before, x.shape[1])
        runs = None if segment_ids is None and state is None else jnp.broadcast_to(found.runs, x.shape[:2])
        inner, gate = jnp.split(self.dense("in", 2 * self.width, ("embed", "mlp"), kernel_init=self.small_init)(x), 2, -1)
        mixed, tail = self.convolve(inner, runs, None if state is None else state.convolution)
        q, k, v = self._blocks("query", mixed), self._blocks("key", mixed), self._blocks("value", inner)
        input_gate, forget_gate = jnp.split(self._gates(jnp.concatenate([q, k, v], axis=-1)), 2, axis=-1)
        heads = [a.reshape(*a.shape[:2], self.num_heads, self.head_dim) for a in (q, k, v)]
        y, memory = mlstm(
            *heads,
            input_gate,
            forget_gate,
            self.fresh_memory(x.shape[0]) if state is None else state.memory,
            starts=None if segment_ids is None else found.starts,
            chunk_size=self.chunk_size,
            implementation=self.implementation,
        )
        y = self.norm_heads(y) + self.parameter("skip", nn.initializers.ones, (self.width,), ("mlp",)) * mixed
        out = self.dense("out", self.embed_dim, ("mlp", "embed"), kernel_init=scaled_init(self.residual_init))
        if state is not None:
            state = XLSTMState(convolution=tail, memory=memory, segment=after)
        return out((y * jax.nn.silu(gate)).astype(self.dtype)), state

    def _blocks(self, name: str, u: Float[Array, "B L E"]) -> Float[Array, "B L E"]:
        """A map of each block of features to itself."""
        shape = (self.width // self.qkv_block, self.qkv_block, self.qkv_block)
        kernel = self.parameter(name, self.small_init, shape, ("mlp", None, None))
        parts = u.astype(self.dtype).reshape(*u.shape[:2], *shape[:2])
        return jnp.einsum("blni,nio->blno", parts, kernel).reshape(u.shape)

    def _gates(self, u: Float[Array, "B L 3E"]) -> Float[Array, "B L 2H"]:
        """Input and forget gates of each head; at first the same for all tokens, and heads forget at different rates."""

        def biases(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
            of_input = 0.1 * jax.random.normal(key, (self.num_heads,), dtype)
            return jnp.concatenate([of_input, jnp.linspace(3, 6, self.num_heads, dtype=dtype)])

        types = {"dtype": self.wide, "param_dtype": self.param_dtype}
        zeros = nn.initializers.zeros
        return Dense(2 * self.num_heads, ("mlp", "heads"), kernel_init=zeros, bias_init=biases, name="gates", **types)(u)

    @nn.nowrap
    def fresh_memory(self, batch_size: int) -> MatrixMemory:
        return MatrixMemory.empty(batch_size, self.num_heads, self.head_dim, self.head_dim, self.wide)

    @nn.nowrap
    def costs(self, length: int) -> Costs:
        width, heads = self.width, self.num_heads
        kernels = 3 * self.embed_dim * width + 3 * width * self.qkv_block + 6 * width * heads
        size = heads * (self.head_dim * (self.head_dim + 1) + 1)
        memory = linear_attention_flops(length, heads, heads, self.head_dim, self.head_dim + 1, self.chunk_size)
        own = Costs(
            parameters=kernels + 2 * heads + width,
            flops=2 * length * kernels + memory,
            state_bytes=size * jnp.dtype(self.wide).itemsize,
        )
        return own + self.frame_costs(length)


@register_mixer("slstm")
class SLSTM(XLSTM):
    """The block of the scalar memory (Beck et al. 2024, figure 10), without the feed-forward that follows it there.

    Input and forget gates see the convolved inputs, memory and output gate the inputs as they are, by maps in blocks of a
    head; `ops.cells.slstm_cell`; the heads' norm, and a map out, which the authors' code leaves to the feed-forward.
    Tokens follow one another.
    """

    @nn.compact
    def __call__(self, x, state=None, *, segment_ids=None, train=False):
        before = SegmentState.fresh(1 if segment_ids is None else x.shape[0]) if state is None else state.segment
        found, after = segments(segment_ids, before, x.shape[1])
        runs = None if segment_ids is None and state is None else jnp.broadcast_to(found.runs, x.shape[:2])
        mixed, tail = self.convolve(x.astype(self.dtype), runs, None if state is None else state.convolution)
        hidden, memory = recurrence(
            slstm_cell,
            self._recurrent_weights(),
            self.fresh_memory(x.shape[0]) if state is None else state.memory,
            self._gate_inputs(mixed, x),
            starts=None if segment_ids is None else found.starts,
        )
        out = self.dense("out", self.embed_dim, ("mlp", "embed"), kernel_init=scaled_init(self.residual_init))
        if state is not None:
            state = XLSTMState(convolution=tail, memory=memory, segment=after)
        return out(self.norm_heads(hidden.astype(self.dtype))), state

    def _recurrent_weights(self) -> Array:
        shape = (self.num_heads, self.head_dim, 4, self.head_dim)
        return self.parameter("recurrent", nn.initializers.zeros, shape, ("heads", None, None, None)).astype(self.wide)

    def _gate_inputs(self, mixed: Array, x: Array) -> Float[Array, "B L 4 H D"]:
        shape = (2, self.num_heads, self.head_dim, self.head_dim)
        axes = (None, "heads", None, None)
        parts = []
        for name, u in (("convolved", mixed), ("plain", x)):
            heads = u.astype(self.dtype).reshape(*u.shape[:2], *shape[1:3])
            parts.append(jnp.einsum("blhi,ghio->blgho", heads, self.parameter(name, self.small_init, shape, axes)))

        def biases(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
            # The forget gate starts open for the first features of a head and shut for the last.
            ramp = jnp.arange(shape[2], dtype=dtype) / max(shape[2] - 1, 1)
            return jnp.zeros(shape, dtype).at[1].set(5 - 12 * ramp**0.95)

        bias = self.parameter("bias", biases, (4, *shape[1:3]), (None, "heads", None))
        return jnp.concatenate(parts, axis=2).astype(self.wide) + bias.astype(self.wide)

    @nn.nowrap
    def fresh_memory(self, batch_size: int) -> tuple[Array, ...]:
        return tuple(jnp.zeros((batch_size, self.num_heads, self.head_dim), self.wide) for _ in range(4))

    @nn.nowrap
    def costs(self, length: int) -> Costs:
        kernels = 8 * self.width * self.head_dim + self.embed_dim * self.width
        own = Costs(
            parameters=kernels + 4 * self.width,
            flops=length * (2 * kernels + 20 * self.width),
            state_bytes=4 * self.width * jnp.dtype(self.wide).itemsize,
        )
        return own + self.frame_costs(length)
