"""Companion matrices, `A = S + a e^T` with S ones below the diagonal and e the last unit vector: powers, and the closed loop.

A product with A is a shift and a multiple of a, so that N powers cost `O(N^2)` per feature and no matrix is built. All
arrays hold D systems side by side.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def unit_sum(a: Float[Array, "N D"]) -> Float[Array, "N D"]:
    """Columns divided by the sum of their absolute values. As a companion's last column, no power of A then grows."""
    return a / jnp.sum(jnp.abs(a), axis=0)


def companion_columns(last_column: Float[Array, "N D"], vector: Float[Array, "N D"], length: int) -> Float[Array, "L N D"]:
    """`A^l v` for l = 0, ..., length - 1."""

    def step(v: Array, _: None) -> tuple[Array, Array]:
        return jnp.pad(v[:-1], [(1, 0), (0, 0)]) + last_column * v[-1], v

    return jax.lax.scan(step, vector, None, length=length)[1]


def companion_rows(
    last_column: Float[Array, "N D"],
    vector: Float[Array, "N D"],
    length: int,
    low_rank: tuple[Float[Array, "N D"], Float[Array, "N D"]] | None = None,
) -> Float[Array, "L N D"]:
    """`v (A + b k^T)^l` for l = 0, ..., length - 1, with `low_rank = (b, k)`, or 0 for None."""

    def step(v: Array, _: None) -> tuple[Array, Array]:
        after = jnp.concatenate([v[1:], jnp.sum(v * last_column, axis=0, keepdims=True)])
        if low_rank is not None:
            after = after + jnp.sum(v * low_rank[0], axis=0) * low_rank[1]
        return after, v

    return jax.lax.scan(step, vector, None, length=length)[1]


def companion_read(
    last_column: Float[Array, "N D"], inputs: Float[Array, "N D"], u: Float[Array, "B L D"]
) -> Float[Array, "B N D"]:
    """The state after a window: `x_L = sum_i A^(L-1-i) b u_i`, b `inputs`."""
    columns = companion_columns(last_column, inputs, u.shape[1])
    return jnp.einsum("bld,lnd->bnd", jnp.flip(u, 1), columns, precision=jax.lax.Precision.HIGHEST)


def closed_loop(
    last_column: Float[Array, "N D"],
    inputs: Float[Array, "N D"],
    feedback: Float[Array, "N D"],
    outputs: Float[Array, "N D"],
    state: Float[Array, "B N D"],
    horizon: int,
) -> Float[Array, "B T D"]:
    """`y_h = c (A + b k^T)^h x`, h = 0, ..., horizon - 1: the system fed with its own `k x` (Zhang et al. 2023, section 3.2).

    Args:
      inputs, feedback, outputs: b, k, c; `feedback` as outputs gives the inputs that the loop feeds itself.
      state: x, such as `companion_read` gives.
    """
    rows = companion_rows(last_column, outputs, horizon, (inputs, feedback))
    return jnp.einsum("bnd,tnd->btd", state, rows, precision=jax.lax.Precision.HIGHEST)
