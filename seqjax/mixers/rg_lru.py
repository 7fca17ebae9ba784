"""The recurrent block of Griffin."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from seqjax.layers.dense import scaled_init
from seqjax.mixers.base import Costs, check_heads
from seqjax.mixers.diagonal_rnn import DiagonalRecurrence, DiagonalRecurrenceState
from seqjax.ops.rg_lru import rg_lru
from seqjax.registry import register_mixer

LEAST, MOST = 0.9, 0.999
"""Decays that a fresh layer has with its gates wide open, before the factor 8."""


@register_mixer("rg_lru")
class RGLRU(DiagonalRecurrence):
    """`W_o (gelu(W_y x) * RG-LRU(conv(W_x x)))` (De et al. 2024, "Griffin", section 2.3); the recurrence is `ops.rg_lru`.

    Its gates are maps in blocks of the convolved branch, through a sigmoid.

    Attributes:
      inner_dim: inner width; None is `expand * embed_dim`.
      num_heads: blocks of the gates' maps, a divisor of the inner width.
      use_bias: of the maps in and out.
    """

    inner_dim: int | None = None
    num_heads: int = 4
    use_bias: bool = True

    optimizer_groups = (("/decay$", "state_space"),)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self.num_heads, self.inner, f"the inner width {self.inner}")

    @property
    def inner(self) -> int:
        return self.inner_dim or super().inner

    @nn.compact
    def __call__(self, x, state=None, *, segment_ids=None, train=False):
        before = self.located(x, state, segment_ids)
        gate = jax.nn.gelu(self.dense("gate", self.inner, ("embed", "mlp"), use_bias=self.use_bias)(x))
        u, tail = self.convolve(self.dense("in", self.inner, ("embed", "mlp"), use_bias=self.use_bias)(x), before)
        u = u.astype(self.wide)
        recurrence_gate, input_gate = self._gate("recurrence_gate", u), self._gate("input_gate", u)
        init = nn.with_logical_partitioning(_initial_decay, ("mlp",))
        decay = self.param("decay", init, (self.inner,), self.param_dtype).astype(self.wide)
        hidden, last = rg_lru(u, recurrence_gate, input_gate, decay, before.cell, opens=before.opens, starts=before.starts)
        init = scaled_init(self.residual_init)
        out = self.dense("out", self.embed_dim, ("mlp", "embed"), use_bias=self.use_bias, kernel_init=init)
        if state is not None:
            state = DiagonalRecurrenceState(convolution=tail, cell=last, segment=before.segment)
        return out(hidden.astype(self.dtype) * gate), state

    def _gate(self, name: str, u: Float[Array, "B L E"]) -> Float[Array, "B L E"]:
        """A map of each block of features to itself, and a sigmoid."""
        shape = (self.num_heads, self.inner // self.num_heads)
        normal = lambda key, shape, dtype: jax.random.normal(key, shape, dtype) / math.sqrt(shape[1])
        made = lambda part, init, axes, shape: self.param(
            f"{name}_{part}", nn.with_logical_partitioning(init, axes), shape, self.param_dtype
        ).astype(self.wide)
        kernel = made("kernel", normal, ("heads", None, None), (*shape, shape[1]))
        bias = made("bias", nn.initializers.zeros, ("heads", None), shape)
        mapped = jnp.einsum("blhi,hio->blho", u.reshape(*u.shape[:2], *shape), kernel) + bias
        return jax.nn.sigmoid(mapped).reshape(u.shape)

    @nn.nowrap
    def costs(self, length: int) -> Costs:
        kernels = 3 * self.embed_dim * self.inner + 2 * self.inner**2 // self.num_heads
        own = Costs(
            parameters=kernels + self.use_bias * (2 * self.inner + self.embed_dim) + 3 * self.inner,
            flops=2 * length * kernels + 10 * length * self.inner,
        )
        return own + self.frame_costs(length)


def _initial_decay(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Lambda with `exp(-softplus(Lambda))` uniform by area in the ring from `LEAST` to `MOST` (section 2.4)."""
    squared = jax.random.uniform(key, shape, dtype, LEAST**2, MOST**2)
    return jnp.log(jnp.expm1(-0.5 * jnp.log(squared)))
