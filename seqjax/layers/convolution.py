"""The short depthwise convolution that many mixers put before their recurrence."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seqjax.ops.convolution import Tail, short_convolution


class ShortConvolution(nn.Module):
    """`ops.short_convolution` with a kernel `[W, D]` and a bias, both drawn within `1 / sqrt(W)`, as in PyTorch.

    Attributes:
      width: W taps.
      ahead: how many of them look ahead of their output; 0 is causal.
    """

    width: int = 4
    ahead: int = 0
    use_bias: bool = True
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, u: Float[Array, "B L D"], *, runs: Int[Array, "B L"] | None = None, tail: Tail | None = None
    ) -> tuple[Float[Array, "B L D"], Tail | None]:
        bound = 1 / math.sqrt(self.width)
        uniform = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
        made = lambda name, *axes: self.param(
            name, nn.with_logical_partitioning(uniform, axes), (self.width, u.shape[-1])[-len(axes) :], self.param_dtype
        )
        kernel, bias = made("kernel", None, "mlp"), made("bias", "mlp") if self.use_bias else None
        return short_convolution(u, kernel, bias, ahead=self.ahead, runs=runs, tail=tail)
