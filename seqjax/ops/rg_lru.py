"""The real-gated linear recurrent unit of Griffin."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from seqjax.ops.affine_scan import affine_scan

SHARPNESS = 8.0
"""c: by how much the gate can shorten the memory."""
STEEPEST = 1000.0
"""Bound on the derivative of the square root."""


def rg_lru(
    x: Float[Array, "B L D"],
    recurrence_gate: Float[Array, "B L D"],
    input_gate: Float[Array, "B L D"],
    decay: Float[Array, "D"],
    initial: Float[Array, "B D"],
    *,
    opens: Bool[Array, "#B L"],
    starts: Bool[Array, "B L"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B L D"], Float[Array, "B D"]]:
    """`h_t = a_t h_(t-1) + sqrt(1 - a_t^2) i_t x_t` with `log a_t = -8 softplus(decay) r_t` (De et al. 2024, eqs. 3 and 4).

    Args:
      recurrence_gate, input_gate: r and i, from 0 to 1.
      decay: Lambda.
      initial: h before the first token.
      opens: first tokens of their segments, which enter unscaled.
      starts: where a segment starts; None where the whole call continues one.
      implementation: as `affine_scan`.
    Returns:
      All states and the last, in at least float32. The derivative of the square root is at most 1000, as in the authors'
      code: where nothing is forgotten it has none.
    """
    log_a = -SHARPNESS * jax.nn.softplus(decay) * recurrence_gate
    multiplier = jnp.where(opens[..., None], 1, _sqrt(-jnp.expm1(2 * log_a)))
    return affine_scan(jnp.exp(log_a), multiplier * input_gate * x, initial, starts=starts, implementation=implementation)


@jax.custom_jvp
def _sqrt(x: Array) -> Array:
    return jnp.sqrt(x)


@_sqrt.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    root = jnp.sqrt(primals[0])
    return root, tangents[0] / jnp.maximum(2 * root, 1 / STEEPEST)
