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
      num_heads: blocks of the gates' maps, a divisor of the inner width.
      use_bias: of the maps in and out.
    """

    num_heads: int = 4
    use_bias: bool = True

    optimizer_groups = (("/decay$", "state_space"),)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self.num_heads, self.inner, f"the inner width {self.inner}")

    @nn.compact
    def __call__(self, x, state=None, *, segment_ids=None, train=False):
        before = self.located(x, state, segment_ids)
        gate = jax.nn.gelu(self.dense("gate", self.inner, ("embed", "mlp"), use_bias=self.use_bias)(x))
        u, tail = self.convolve(self.dense("in", self.inner, ("embed", "mlp"), use_bias=self.use_bias)(x), before)
        u = u.astype(self.wide)
        recurrence_gate, input_gate = jax.nn.sigmoid(self._gates(u))
        init = nn.with_logical_partitioning(_initial_decay, ("mlp",))
        decay = self.param("decay", init, (self.inner,), self.param_dtype).astype(self.wide)
        hidden, last = rg_lru(u, recurrence_gate, input_gate, decay, before.cell, opens=before.opens, starts=before.starts)
        init = scaled_init(self.residual_init)
        out = self.dense("out", self.embed_dim, ("mlp", "embed"), use_bias=self.use_bias, kernel_init=init)
        if state is not None:
            state = DiagonalRecurrenceState(convolution=tail, cell=last, segment=before.segment)
        return out(hidden.astype(self.dtype) * gate), state

    def _gates(self, u: Float[Array, "B L E"]) -> Float[Array, "2 B L E"]:
        """Of the recurrence and of the inputs, before the sigmoid."""
        width = self.inner // self.num_heads
        normal = lambda key, shape, dtype: jax.random.normal(key, shape, dtype) / math.sqrt(width)
        axes = ("heads", None, None, None)
        blocks = self.param(
            "gates", nn.with_logical_partitioning(normal, axes), (self.num_heads, width, 2, width), self.param_dtype
        )
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, (None, "mlp"))
        bias = self.param("gates_bias", zeros, (2, self.inner), self.param_dtype)
        parts = u.reshape(*u.shape[:2], self.num_heads, width)
        mapped = jnp.einsum("blhi,higo->gblho", parts, blocks.astype(self.wide)).reshape(2, *u.shape)
        return mapped + bias.astype(self.wide)[:, None, None]

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
