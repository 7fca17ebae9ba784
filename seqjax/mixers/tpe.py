"""Toeplitz positional encoding: an exponential filter along each axis of a tensor."""

from __future__ import annotations

import math
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from seqjax.layers.dense import Dense, scaled_init
from seqjax.layers.norms import RMSNorm
from seqjax.layers.positions import check_shape, raster_coordinates
from seqjax.mixers.base import Costs, Mixer, check_heads
from seqjax.ops.scan import linear_scan
from seqjax.ops.segments import Segments, SegmentState, segments
from seqjax.registry import register_mixer


@chex.dataclass(frozen=True)
class TPEState:
    """For each axis the filter's last values, as many as tokens lie between neighbours along it, oldest first, in at least
    float32; the current segment."""

    filtered: tuple[Float[Array, "B S D"], ...]
    segment: SegmentState


@register_mixer("tpe")
class TPE(Mixer):
    """MD-TPE of LightNet (Qin et al. 2024), which tells a token what lies near it: for the first sub-layer of a stack.

    Along each axis and for each head a recurrence whose query q, key k and decay `lambda = sigmoid(d)` do not depend on the
    token, `y = (q . k) sum_(i >= 0) lambda^i x_(-i)`, x_(-i) being the token i steps before along the axis. Then a norm per
    head, and a map out, summed over axes, as in the authors' later code, which has no skip connection around it. The norm
    leaves of q and k little more than the sign of their product.

    The filter looks back along its axis whether `causal` or not, so that it keeps raster order.

    Attributes:
      num_heads: H, a divisor of `embed_dim`.
      shape: of the tensors that a segment holds in raster order, the last axis fastest; every product(shape) tokens begin
        another. None is one axis without an end.
      norm_epsilon: of the norm.
    """

    num_heads: int = 4
    shape: tuple[int, ...] | None = None
    norm_epsilon: float = 1e-5

    bidirectional = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self.num_heads, self.embed_dim, f"model.embed_dim={self.embed_dim}")
        check_shape(self.shape)

    @property
    def strides(self) -> tuple[int, ...]:
        """Tokens from one to the next along each axis."""
        shape = self.shape or (1,)
        return tuple(math.prod(shape[a + 1 :]) for a in range(len(shape)))

    @property
    def wide(self) -> Any:
        return jnp.promote_types(self.dtype, jnp.float32)

    @nn.compact
    def __call__(self, x, state=None, *, segment_ids=None, train=False):
        before = SegmentState.fresh(1 if segment_ids is None else x.shape[0]) if state is None else state.segment
        found, after = segments(segment_ids, before, x.shape[1])
        earlier = self._empty(x.shape[0]) if state is None else state.filtered
        heads = (len(self.strides), self.num_heads, self.embed_dim // self.num_heads)
        normal, ones = nn.initializers.normal(1.0), nn.initializers.ones
        query, key, scale = (self._parameter(n, i, heads) for n, i in (("query", normal), ("key", normal), ("scale", ones)))
        decay = jnp.repeat(jax.nn.sigmoid(self._parameter("decay", normal, heads[:2])), heads[2], axis=1)
        wide = x.astype(self.wide)
        runs = [strided_filter(wide, *each) for each in zip(decay, earlier, self._firsts(found, segment_ids, x.shape))]
        y = jnp.stack([y for y, _ in runs], axis=2).reshape(*x.shape[:2], *heads)
        gain = jnp.sum(query * key, axis=-1, keepdims=True)
        norm = RMSNorm(self.norm_epsilon, self.wide, use_scale=False, name="norm")
        y = (norm(gain * y) * scale).astype(self.dtype)
        init, axes = scaled_init(self.residual_init), (None, "heads", "head_dim", "embed")
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        y = Dense(self.embed_dim, axes, 3, use_bias=False, kernel_init=init, name="out", **types)(y)
        return y, None if state is None else TPEState(filtered=tuple(last for _, last in runs), segment=after)

    def _parameter(self, name: str, init: Any, shape: tuple[int, ...]) -> Array:
        """`[A, H, ...]`, in the precision of the filter."""
        init = nn.with_logical_partitioning(init, (None, "heads", "head_dim")[: len(shape)])
        return self.param(name, init, shape, self.param_dtype).astype(self.wide)

    def _firsts(self, found: Segments, segment_ids: Array | None, shape: tuple) -> list[Bool[Array, "B L"] | None]:
        """For each axis, the tokens that have none before them along it."""
        if self.shape is None:
            return [None if segment_ids is None else found.starts]
        coordinates = raster_coordinates(found.positions, self.shape)
        return list(jnp.broadcast_to(jnp.moveaxis(coordinates == 0, -1, 0), (len(self.shape), *shape[:2])))

    @nn.nowrap
    def _empty(self, batch_size: int) -> tuple[Array, ...]:
        return tuple(jnp.zeros((batch_size, stride, self.embed_dim), self.wide) for stride in self.strides)

    @nn.nowrap
    def init_state(self, batch_size: int, max_length: int) -> TPEState:
        return TPEState(filtered=self._empty(batch_size), segment=SegmentState.fresh(batch_size))

    @nn.nowrap
    def costs(self, length: int) -> Costs:
        width, axes = self.embed_dim, len(self.strides)
        return Costs(
            parameters=axes * (width**2 + 3 * width + self.num_heads),
            flops=2 * length * axes * width**2 + 7 * length * axes * width,
            state_bytes=sum(self.strides) * width * jnp.dtype(self.wide).itemsize + 12 if self.causal else 0,
        )


def strided_filter(
    x: Float[Array, "B L D"],
    decay: Float[Array, "D"],
    earlier: Float[Array, "B S D"],
    firsts: Bool[Array, "B L"] | None = None,
) -> tuple[Float[Array, "B L D"], Float[Array, "B S D"]]:
    """`y_t = decay y_(t - S) + x_t`: S recurrences, whose tokens take turns.

    Args:
      earlier: y of the S tokens before the first, oldest first; y of the last S comes back.
      firsts: tokens at which their recurrence starts again, `y_t = x_t`.
    """
    (batch, length, _), stride = x.shape, earlier.shape[1]

    def apart(a: Array) -> Array:
        a = jnp.pad(a, [(0, 0), (0, -length % stride)] + [(0, 0)] * (a.ndim - 2))
        return a.reshape(batch, -1, stride, *a.shape[2:]).swapaxes(1, 2).reshape(batch * stride, -1, *a.shape[2:])

    starts = None if firsts is None else apart(firsts)
    y, _ = linear_scan(decay, apart(x), earlier.reshape(batch * stride, -1), starts=starts)
    y = y.reshape(batch, stride, -1, x.shape[-1]).swapaxes(1, 2).reshape(batch, -1, x.shape[-1])[:, :length]
    return y, jnp.concatenate([earlier, y], axis=1)[:, -stride:]
