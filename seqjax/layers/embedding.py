"""From tokens or values to vectors, and back to logits over the same table."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class TokenEmbedding(nn.Module):
    """A table of `vocab_size` vectors, which enter multiplied by `multiplier`; `attend` reuses it as the output projection
    (Press and Wolf 2017)."""

    vocab_size: int
    embed_dim: int
    init_scale: float = 0.02
    multiplier: float = 1.0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        init = nn.with_logical_partitioning(nn.initializers.normal(self.init_scale), ("vocab", "embed"))
        self.table = self.param("table", init, (self.vocab_size, self.embed_dim), self.param_dtype)

    def __call__(self, tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        vectors = self.table.astype(self.dtype)[tokens]
        return vectors if self.multiplier == 1 else vectors * jnp.asarray(self.multiplier, self.dtype)

    def attend(self, x: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
        """Logits: inner products with every vector of the table."""
        return x.astype(self.dtype) @ self.table.astype(self.dtype).T


class PositionTable(nn.Module):
    """A learned vector per position, up to `max_length` of them."""

    max_length: int
    embed_dim: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, positions: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("length", "embed"))
        table = self.param("table", init, (self.max_length, self.embed_dim), self.param_dtype)
        return table.astype(self.dtype)[positions]
