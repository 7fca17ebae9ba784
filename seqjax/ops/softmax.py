"""The monoid of softmax-weighted sums: what running, blocked and split softmax attention have in common."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from seqjax.ops.scan import Monoid


class SoftmaxSums(NamedTuple):
    """`sum_i exp(s_i - m) v_i` and `sum_i exp(s_i - m)` over a set of scores s and values v, with `m = max_i s_i`.

    The empty set has the maximum -inf and sums 0. Gradients take the maximum for a constant: it is the unit that both sums
    are measured in, and nothing that depends on the sums themselves depends on the choice of unit.
    """

    maximum: Float[Array, "*N"]
    numerator: Float[Array, "*N W"]
    denominator: Float[Array, "*N"]

    @classmethod
    def empty(cls, shape: tuple[int, ...], width: int, dtype: Any) -> SoftmaxSums:
        """Sums over nothing, `[*shape]` and `[*shape, width]`."""
        return cls(jnp.full(shape, -jnp.inf, dtype), jnp.zeros((*shape, width), dtype), jnp.zeros(shape, dtype))

    @property
    def mean(self) -> Float[Array, "*N W"]:
        """The softmax average of the values; zeros for the empty set."""
        return self.numerator * inverse(self.denominator)[..., None]

    @property
    def log_sum(self) -> Float[Array, "*N"]:
        """`log sum_i exp(s_i)`; -inf for the empty set."""
        empty = self.denominator == 0
        return jnp.where(empty, -jnp.inf, self.maximum + jnp.log(jnp.where(empty, 1, self.denominator)))


def merge_sums(earlier: SoftmaxSums, later: SoftmaxSums) -> SoftmaxSums:
    """The sums over both sets (Feng et al. 2024, section 3.2)."""
    maximum = jax.lax.stop_gradient(jnp.maximum(earlier.maximum, later.maximum))
    a, b = decay_between(earlier.maximum, maximum), decay_between(later.maximum, maximum)
    return SoftmaxSums(
        maximum,
        earlier.numerator * a[..., None] + later.numerator * b[..., None],
        earlier.denominator * a + later.denominator * b,
    )


def decay_between(old: Float[Array, "..."], new: Float[Array, "..."]) -> Float[Array, "..."]:
    """`exp(old - new)` for `old <= new`: what sums with the maximum `old` become where the maximum is `new`; 0 for -inf."""
    return jnp.exp(old - jnp.where(new == -jnp.inf, 0, new))  # -inf less -inf is no number


def inverse(denominator: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """`1 / denominator`; 0 for the empty set."""
    return jnp.where(denominator == 0, 0, 1 / jnp.where(denominator == 0, 1, denominator))


SOFTMAX = Monoid(merge_sums, lambda e: SoftmaxSums(jnp.full_like(e[0], -jnp.inf), jnp.zeros_like(e[1]), jnp.zeros_like(e[2])))
"""Elements are `SoftmaxSums`; one token is `(s, v, 1)`."""
