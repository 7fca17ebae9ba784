"""RWKV-4: a time mix that averages the past by channel, and a channel mix; both look one token back."""

from __future__ import annotations

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from seqjax.config import ConfigError
from seqjax.layers.dense import Dense, scaled_init
from seqjax.layers.token_shift import ShiftState, shift_tokens
from seqjax.mixers.base import Costs, Mixer
from seqjax.ops.softmax import SoftmaxSums
from seqjax.ops.wkv import wkv
from seqjax.registry import register_mixer


@chex.dataclass(frozen=True)
class TimeMixState:
    """The last token and its segment; each channel's sums over the segment, in at least float32."""

    shift: ShiftState
    sums: SoftmaxSums


class Mix(Mixer):
    """What both share: maps of `mu x_t + (1 - mu) x_(t-1)`, mu a parameter per feature.

    Attributes:
      depth: where the layer stands, from 0 for the first to 1 for the last: the authors' initial values depend on it.
    """

    depth: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.depth <= 1:
            raise ConfigError(f"model.depth={self.depth} is out of range; allowed: from 0.0, the first layer, to 1.0.")

    def mapped(
        self, name: str, x: Array, before: Array, width: int, power: float, lift: float = 0.0, init: Any = None
    ) -> Array:
        """A map of the mixture that starts with mu = `(i / D)^power + lift` at feature i."""
        ramp = lambda key, shape, dtype: (jnp.arange(shape[0], dtype=dtype) / shape[0]) ** power + lift
        ramp = nn.with_logical_partitioning(ramp, ("embed",))
        mu = self.param(f"{name}_mix", ramp, (self.embed_dim,), self.param_dtype).astype(self.dtype)
        return self.dense(name, width, ("embed", "mlp"), init or nn.initializers.zeros)(x * mu + before * (1 - mu))

    def dense(self, name: str, width: int, axes: tuple[str, str], init: Any) -> Dense:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return Dense(width, axes, use_bias=False, kernel_init=init, name=name, **types)

    @nn.nowrap
    def shift_bytes(self) -> int:
        return self.embed_dim * jnp.dtype(self.dtype).itemsize + 12


@register_mixer("rwkv_time_mix")
class TimeMix(Mix):
    """`W_o (sigmoid(r_t) * wkv_t)` with `wkv` of `ops.wkv` (Peng et al. 2023, eqs. 11 to 15).

    Initial values as in the authors' training code: keys and receptances start at 0.

    Attributes:
      inner_dim: width of keys, values and receptances; None is `embed_dim`.
    """

    inner_dim: int | None = None

    optimizer_groups = (("/(decay|bonus)$", "state_space"),)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inner_dim is not None and self.inner_dim < 1:
            raise ConfigError(f"model.inner_dim={self.inner_dim} is not positive; allowed: None, or 1 and above.")

    @property
    def width(self) -> int:
        return self.inner_dim or self.embed_dim

    @nn.compact
    def __call__(self, x, state=None, *, segment_ids=None, train=False):
        x = x.astype(self.dtype)
        before, starts, shift = shift_tokens(x, None if state is None else state.shift, segment_ids)
        ratio = 1 - self.depth
        k = self.mapped("key", x, before, self.width, ratio)
        v = self.mapped("value", x, before, self.width, ratio, 0.3 * self.depth, nn.initializers.orthogonal())
        r = self.mapped("receptance", x, before, self.width, 0.5 * ratio)
        wide = jnp.promote_types(self.dtype, jnp.float32)
        sums = self._empty(x.shape[0]) if state is None else state.sums
        decay, bonus = (a.astype(wide) for a in self._rates())
        mean, sums = wkv(k, v, jnp.exp(decay), bonus, sums, starts=starts)
        y = jax.nn.sigmoid(r) * mean.astype(self.dtype)
        y = self.dense("out", self.embed_dim, ("mlp", "embed"), scaled_init(self.residual_init))(y)
        return y, None if state is None else TimeMixState(shift=shift, sums=sums)

    def _rates(self) -> tuple[Array, Array]:
        """Logarithms of the decay, from slow to fast, and what a token's own score gains."""

        def decays(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
            return -5 + 8 * (jnp.arange(shape[0], dtype=dtype) / max(shape[0] - 1, 1)) ** (0.7 + 1.3 * self.depth)

        def bonuses(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
            return jnp.log(0.3) + 0.5 * ((jnp.arange(shape[0]) + 1) % 3 - 1).astype(dtype)

        made = lambda name, init: self.param(
            name, nn.with_logical_partitioning(init, ("mlp",)), (self.width,), self.param_dtype
        )
        return made("decay", decays), made("bonus", bonuses)

    @nn.nowrap
    def _empty(self, batch_size: int) -> SoftmaxSums:
        return SoftmaxSums.empty((batch_size, self.width), 1, jnp.promote_types(self.dtype, jnp.float32))

    @nn.nowrap
    def init_state(self, batch_size: int, max_length: int) -> TimeMixState:
        return TimeMixState(shift=ShiftState.fresh(batch_size, self.embed_dim, self.dtype), sums=self._empty(batch_size))

    @nn.nowrap
    def costs(self, length: int) -> Costs:
        kernels = 4 * self.embed_dim * self.width
        wide = jnp.promote_types(self.dtype, jnp.float32).itemsize
        return Costs(
            parameters=kernels + 3 * self.embed_dim + 2 * self.width,
            flops=length * (2 * kernels + 9 * self.embed_dim + 20 * self.width),
            state_bytes=self.shift_bytes() + 3 * self.width * wide,
        )


@register_mixer("rwkv_channel_mix")
class ChannelMix(Mix):
    """`sigmoid(W_r x'_t) * W_v relu(W_k x''_t)^2` (Peng et al. 2023, eqs. 17 and 18), x' and x'' mixed with the token before.

    Attributes:
      hidden_dim: width between the two maps; None for `mlp_ratio * embed_dim`.
    """

    hidden_dim: int | None = None
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width < 1:
            raise ConfigError(f"model.mlp_ratio={self.mlp_ratio} leaves no hidden width; allowed: above 0.")

    @property
    def width(self) -> int:
        return self.hidden_dim or int(self.mlp_ratio * self.embed_dim)

    @nn.compact
    def __call__(self, x, state=None, *, segment_ids=None, train=False):
        x = x.astype(self.dtype)
        before, _, after = shift_tokens(x, state, segment_ids)
        k = self.mapped("key", x, before, self.width, 1 - self.depth, init=nn.initializers.orthogonal(2.0))
        r = self.mapped("receptance", x, before, self.embed_dim, 1 - self.depth)
        y = self.dense("value", self.embed_dim, ("mlp", "embed"), scaled_init(self.residual_init))(jnp.square(jax.nn.relu(k)))
        return jax.nn.sigmoid(r) * y, None if state is None else after

    @nn.nowrap
    def init_state(self, batch_size: int, max_length: int) -> ShiftState:
        return ShiftState.fresh(batch_size, self.embed_dim, self.dtype)

    @nn.nowrap
    def costs(self, length: int) -> Costs:
        kernels = self.embed_dim * (2 * self.width + self.embed_dim)
        return Costs(
            parameters=kernels + 2 * self.embed_dim,
            flops=2 * length * (kernels + 4 * self.embed_dim),
            state_bytes=self.shift_bytes(),
        )
