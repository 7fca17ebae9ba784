"""What mixers with a matrix state per head share: queries, keys and values in, norm, gate and map out."""

from __future__ import annotations

from typing import Any, ClassVar

import chex
import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from seqjax.config import ConfigError, choose
from seqjax.layers.convolution import ShortConvolution
from seqjax.layers.dense import Dense, scaled_init
from seqjax.layers.feature_maps import FEATURE_MAPS, KEY_NORMS
from seqjax.layers.norms import NORMS, make_norm, norm_parameters
from seqjax.mixers.base import Costs, Mixer
from seqjax.mixers.feed_forward import ACTIVATIONS
from seqjax.ops.convolution import Tail
from seqjax.ops.linear_attention import linear_attention, linear_attention_flops
from seqjax.ops.segments import Segments, SegmentState, segments
from seqjax.registry import register_mixer


@chex.dataclass(frozen=True)
class MatrixState:
    """The heads' states in at least float32, the last inputs of the convolution (None without), and the current segment."""

    heads: Float[Array, "B H K S"]
    convolution: Tail | None
    segment: SegmentState


class MatrixStateMixer(Mixer):
    """`y = W_o (norm(S q / sqrt(K)) * gate)`, S a matrix state per head of `ops.linear_attention`.

    A subclass says how the state decays, and whether it is written by the delta rule.

    Attributes:
      num_heads: H.
      expand_k, expand_v: width of all heads' keys and values, in units of `embed_dim`.
      conv_width: taps of a depthwise convolution over queries, keys and values; 0 is none.
      feature_map: of queries and keys, a key of `FEATURE_MAPS`; qk_norm: after it, a key of `KEY_NORMS`.
      head_norm: of each head's outputs, "rms", "rms_unscaled", "layer" or "none"; norm_epsilon: of it.
      output_gate: activation of a gate on the outputs, a key of `ACTIVATIONS`; None is no gate.
      qkv_bias, out_bias: biases of the maps.
      chunk_size, implementation: of `ops.linear_attention`.
    """

    num_heads: int = 4
    expand_k: float = 1.0
    expand_v: float = 1.0
    conv_width: int = 0
    feature_map: str = "identity"
    qk_norm: str = "none"
    head_norm: str = "rms"
    norm_epsilon: float = 1e-5
    output_gate: str | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    chunk_size: int | None = None
    implementation: str | None = None

    kernel_init: ClassVar[Any] = staticmethod(nn.initializers.lecun_normal())
    value_map: ClassVar[str] = "identity"
    """Activation of the values."""
    channel_decay: ClassVar[bool] = False
    delta_rule: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, least in (("num_heads", 1), ("chunk_size", 1), ("conv_width", 0)):
            value = getattr(self, key)
            if value is not None and value < least:
                raise ConfigError(f"model.{key}={value} is too small; allowed: {least} and above.")
        for key in ("expand_k", "expand_v"):
            width = int(getattr(self, key) * self.embed_dim)
            if width < 1 or width % self.num_heads:
                raise ConfigError(
                    f"model.{key}={getattr(self, key)} makes {width} features, which model.num_heads={self.num_heads} does "
                    "not divide; allowed: a multiple of it."
                )
        choose(FEATURE_MAPS, self.feature_map, "model.feature_map")
        choose(KEY_NORMS, self.qk_norm, "model.qk_norm")
        choose({key: norm for key, norm in NORMS.items() if key != "batch"}, self.head_norm, "model.head_norm")
        if self.output_gate is not None:
            choose(ACTIVATIONS, self.output_gate, "model.output_gate")
        if self.implementation is not None:
            choose({"xla": 0, "reference": 0}, self.implementation, "model.implementation")

    @property
    def key_dim(self) -> int:
        """Of a head, before the feature map."""
        return int(self.expand_k * self.embed_dim) // self.num_heads

    @property
    def value_dim(self) -> int:
        return int(self.expand_v * self.embed_dim) // self.num_heads

    @property
    def state_shape(self) -> tuple[int, int, int]:
        return self.num_heads, FEATURE_MAPS[self.feature_map].width(self.key_dim), self.value_dim + self.normalized

    @property
    def normalized(self) -> bool:
        """Whether a running sum of keys divides the outputs."""
        return False

    @property
    def wide(self) -> Any:
        return jnp.promote_types(self.param_dtype, jnp.float32)

    def log_decay(self, x: Array) -> Array | None:
        """`[#B, #L, H]` or `[B, L, H, K]`, at most 0."""
        return None

    def write_strength(self, x: Array) -> Array | None:
        """beta of the delta rule, `[B, L, H]`."""
        return None

    def place(self, a: Array, found: Segments) -> Array:
        """Give queries or keys a position."""
        return a

    @nn.compact
    def __call__(self, x, state=None, *, segment_ids=None, train=False):
        before = SegmentState.fresh(1 if segment_ids is None else x.shape[0]) if state is None else state.segment
        found, after = segments(segment_ids, before, x.shape[1])
        runs = None if segment_ids is None and state is None else jnp.broadcast_to(found.runs, x.shape[:2])
        q, k, v, tail = self._project(x, runs, None if state is None else state.convolution)
        phi, norm = FEATURE_MAPS[self.feature_map], KEY_NORMS[self.qk_norm]
        q, k = (self.place(norm(phi(a)), found) for a in (q, k))
        scale = 1.0 if self.normalized else k.shape[-1] ** -0.5
        y, heads = linear_attention(
            (q * scale).astype(self.dtype),
            k.astype(self.dtype),
            ACTIVATIONS[self.value_map](v).astype(self.dtype),
            self.log_decay(x),
            None if state is None else state.heads,
            beta=self.write_strength(x),
            normalize=self.normalized,
            starts=None if segment_ids is None else found.starts,
            chunk_size=self.chunk_size,
            implementation=self.implementation,
        )
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        y = make_norm(self.head_norm, name="norm", epsilon=self.norm_epsilon, **types)(y)
        if self.output_gate is not None:
            y = y * ACTIVATIONS[self.output_gate](self.dense("gate", self.value_dim, self.kernel_init)(x))
        if state is not None:
            state = MatrixState(heads=heads, convolution=tail, segment=after)
        return self._map_out()(y), state

    def _project(self, x: Array, runs: Array | None, tail: Tail | None) -> tuple[Array, Array, Array, Tail | None]:
        """Queries and keys `[B, L, H, K]` and values `[B, L, H, W]`, through the convolution."""
        widths = {"query": self.key_dim, "key": self.key_dim, "value": self.value_dim}
        parts = [self.dense(name, width, self.kernel_init, self.qkv_bias)(x) for name, width in widths.items()]
        # The norms make much of small differences: what lies between two matrix products is rounded once.
        parts = [a.astype(jnp.promote_types(self.dtype, jnp.float32)) for a in parts]
        if self.conv_width:
            # Depthwise: one convolution over all is three, one over each.
            convolution = ShortConvolution(self.conv_width, use_bias=False, param_dtype=self.param_dtype, name="conv")
            joined = jnp.concatenate([a.reshape(*x.shape[:2], -1) for a in parts], axis=-1)
            joined, tail = convolution(joined, runs=runs, tail=tail)
            keys = self.num_heads * self.key_dim
            parts = [a.reshape(b.shape) for a, b in zip(jnp.split(joined, (keys, 2 * keys), axis=-1), parts)]
        return *(nn.with_logical_constraint(a, ("batch", "length_act", "heads_act", None)) for a in parts), tail

    def dense(self, name: str, width: int, init: Any, use_bias: bool = False) -> Dense:
        """A map of the inputs to `[B, L, H, width]`."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        axes = ("embed", "heads", "head_dim")
        return Dense((self.num_heads, width), axes, use_bias=use_bias, kernel_init=init, name=name, **types)

    def _map_out(self) -> Dense:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        init = scaled_init(self.residual_init)
        axes = ("heads", "head_dim", "embed")
        return Dense(self.embed_dim, axes, 2, use_bias=self.out_bias, kernel_init=init, name="out", **types)

    def per_head(self, name: str, x: Array) -> Array:
        """One number for each head, `[B, L, H]`, in the parameters' precision."""
        types = {"dtype": self.wide, "param_dtype": self.param_dtype}
        return Dense(self.num_heads, ("embed", "heads"), use_bias=False, kernel_init=self.kernel_init, name=name, **types)(x)

    @nn.nowrap
    def init_state(self, batch_size: int, max_length: int) -> MatrixState:
        return MatrixState(
            heads=jnp.zeros((batch_size, *self.state_shape), jnp.promote_types(self.dtype, jnp.float32)),
            convolution=Tail.fresh(batch_size, self.conv_width - 1, self._convolved, self.dtype) if self.conv_width else None,
            segment=SegmentState.fresh(batch_size),
        )

    @property
    def _convolved(self) -> int:
        return self.num_heads * (2 * self.key_dim + self.value_dim) * (self.conv_width > 0)

    @nn.nowrap
    def costs(self, length: int) -> Costs:
        keys, values, width = self.num_heads * self.key_dim, self.num_heads * self.value_dim, self.embed_dim
        kernels = width * (2 * keys + values * (2 + (self.output_gate is not None)))
        biases = self.qkv_bias * (2 * keys + values) + self.out_bias * width
        heads, key_dim, value_dim = self.state_shape
        forms = {"channel_decay": self.channel_decay, "delta_rule": self.delta_rule}
        state = heads * key_dim * value_dim * jnp.promote_types(self.dtype, jnp.float32).itemsize
        tail = max(self.conv_width - 1, 0) * (self._convolved * jnp.dtype(self.dtype).itemsize + 4)
        return Costs(
            parameters=kernels + biases + self.conv_width * self._convolved + norm_parameters(self.head_norm, self.value_dim),
            flops=2 * length * (kernels + self.conv_width * self._convolved)
            + linear_attention_flops(length, heads, heads, key_dim, value_dim, self.chunk_size, **forms),
            state_bytes=state + tail + 12,
        )

    @nn.nowrap
    def map_costs(self, length: int, features: int) -> Costs:
        """Of one more map of the inputs, without a bias."""
        return Costs(parameters=self.embed_dim * features, flops=2 * length * self.embed_dim * features)


@register_mixer("linear_transformer")
class LinearTransformer(MatrixStateMixer):
    """Linear attention (Katharopoulos et al. 2020, eqs. 9 to 12): a feature map for the softmax, nothing is forgotten.

    `y_t = sum_(s <= t) phi(q_t) . phi(k_s) v_s / (sum_(s <= t) phi(q_t) . phi(k_s) + 1e-6)`, then `W_o y`. Queries are
    not scaled. Inputs need positions: only their order would tell tokens apart.

    Attributes:
      normalize: divide by the sum; without, `head_norm` bounds the outputs.
    """

    feature_map: str = "elu_plus_one"
    head_norm: str = "none"
    qkv_bias: bool = True
    out_bias: bool = True
    normalize: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.normalize and not FEATURE_MAPS[self.feature_map].positive:
            fits = ", ".join(sorted(name for name, phi in FEATURE_MAPS.items() if phi.positive))
            raise ConfigError(
                f"model.normalize=True with model.feature_map={self.feature_map!r} divides by sums of either sign; allowed: "
                f"model.normalize=False, or one of {fits}."
            )

    @property
    def normalized(self) -> bool:
        return self.normalize
