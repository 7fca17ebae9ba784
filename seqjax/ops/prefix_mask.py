"""The mask of a prefix language model: a source whose tokens see one another, then a target whose tokens see what came before
(Liu et al. 2018; Raffel et al. 2020, section 3.2.1)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class PrefixOrder(NamedTuple):
    """Which tokens of a call are in the source of their segment, whose tokens are all in this call."""

    source: Bool[Array, "#B L"]

    def masks(self, num_keys: int, index: int | Int[Array, ""]) -> dict[str, Any]:
        """Arguments of `flash_attention`: of queries which are the keys from `index` on."""
        return {"causal": False, "bias": prefix_bias(self.source, num_keys, index)}


def prefix_bias(source: Bool[Array, "#B L"], num_keys: int, index: int | Int[Array, ""] = 0) -> Float[Array, "#B 1 L S"]:
    """What attention adds to its logits: 0 where a token sees one before it, itself, or one of its source, else -inf.

    Segments are not told apart here, nor two sources in one row.

    Args:
      source: of the queries, which are the keys from `index` on; earlier keys all see.
    """
    sources = jax.lax.dynamic_update_slice_in_dim(jnp.zeros((source.shape[0], num_keys), bool), source, index, axis=1)
    before = jnp.arange(num_keys) <= index + jnp.arange(source.shape[1])[:, None]
    return jnp.where(before | (source[..., None] & sources[:, None]), 0.0, -jnp.inf)[:, None]
