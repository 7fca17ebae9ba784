"""From continuous time to steps: `x' = A x + B u` to `x_k = A_bar x_{k-1} + B_bar u_k`, with step sizes `dt`.

Everything is computed in at least float32 and is differentiable in every array.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from seqjax.ops.complex_pairs import Pair, exponential, product, reciprocal, scale

# alpha of the generalised bilinear transform.
ALPHAS = {"bilinear": 0.5, "euler": 0.0, "backward_euler": 1.0}
DENSE_METHODS = ("bilinear", "zoh", "euler", "backward_euler")
DIAGONAL_METHODS = ("zoh", "bilinear", "euler", "exponential_euler")

# Below this |z|, (exp(z) - 1) / z is a power series: its quotient is accurate further down, but the quotient's derivative
# loses digits as 1 / |z|. With ten terms the remainder is below float64's rounding, for the derivative too.
SERIES_BELOW = 0.1
SERIES_TERMS = 10


def discretize_dense(
    A: Float[ArrayLike, "*#batch N N"],
    B: Float[ArrayLike, "*#batch N"],
    dt: Float[ArrayLike, "*#batch"],
    method: str = "bilinear",
    *,
    alpha: float | None = None,
) -> tuple[Float[Array, "*batch N N"], Float[Array, "*batch N"]]:
    """`A_bar [..., N, N]` and `B_bar [..., N]` of a dense system; leading axes broadcast.

    Args:
      A, B, dt: `[..., N, N]`, `[..., N]`, `[...]`.
      method: "bilinear", "euler", "backward_euler": the generalised bilinear transform
        `A_bar = (I - alpha dt A)^{-1} (I + (1 - alpha) dt A)`, `B_bar = (I - alpha dt A)^{-1} dt B` (LSSL, Gu et al.
        2021) with alpha 1/2, 0 and 1; or "zoh": exact for an input held during the step, also where A is singular
        (not a number where the 1-norm of `dt A` exceeds about 2e5).
      alpha: in [0, 1], another alpha for "bilinear".
    Raises:
      ValueError: unknown method, alpha outside [0, 1], or alpha with another method than "bilinear".
    """
    _check_method(method, DENSE_METHODS)
    if alpha is not None and (method != "bilinear" or not 0 <= alpha <= 1):
        raise ValueError(f"alpha={alpha} with method={method!r} is not possible; allowed: 0 to 1, with method='bilinear'.")
    A, B, dt = _at_least_float32(A, B, dt)
    A, B = dt[..., None, None] * A, dt[..., None] * B
    batch = jnp.broadcast_shapes(A.shape[:-2], B.shape[:-1])
    A, B = jnp.broadcast_to(A, (*batch, *A.shape[-2:])), jnp.broadcast_to(B, (*batch, B.shape[-1]))
    if method == "zoh":
        return _zero_order_hold(A, B)
    return _generalised_bilinear(A, B, ALPHAS[method] if alpha is None else alpha)


def _generalised_bilinear(A: Array, B: Array, alpha: float) -> tuple[Array, Array]:
    """The transform at unit step, as `A_bar = I + (I - alpha A)^{-1} A`: one solve for A and B together."""
    identity = jnp.eye(A.shape[-1], dtype=A.dtype)
    if alpha == 0:
        return identity + A, B
    both = jnp.concatenate([A, B[..., None]], axis=-1)
    with jax.default_matmul_precision("highest"):
        both = _for_each(jnp.linalg.solve, identity - alpha * A, both)
    return identity + both[..., :-1], both[..., -1]


def _zero_order_hold(A: Array, B: Array) -> tuple[Array, Array]:
    """`exp [[A, B], [0, 0]] = [[A_bar, B_bar], [0, 1]]` at unit step: no inverse of A."""
    both = jnp.concatenate([A, B[..., None]], axis=-1)
    square = jnp.concatenate([both, jnp.zeros_like(both[..., :1, :])], axis=-2)
    with jax.default_matmul_precision("highest"):
        both = _for_each(jax.scipy.linalg.expm, square)[..., :-1, :]
    return both[..., :-1], both[..., -1]


def _for_each(function: Callable[..., Array], *matrices: Array) -> Array:
    """A function of matrices over their leading axes; on a CPU one after the other.

    jaxlib's batched LAPACK calls wait there for threads that they themselves occupy: two at a time can stop a program on two
    cores for ever.
    """
    batch = matrices[0].shape[:-2]
    flat = tuple(a.reshape(-1, *a.shape[-2:]) for a in matrices)
    in_turn = lambda *flat: jax.lax.map(lambda each: function(*each), flat)
    found = jax.lax.platform_dependent(*flat, cpu=in_turn, default=jax.vmap(function))
    return found.reshape(*batch, *found.shape[1:])


def discretize_diagonal(
    a_real: Float[ArrayLike, "*#modes"],
    a_imag: Float[ArrayLike, "*#modes"],
    dt: Float[ArrayLike, "*#modes"],
    method: str = "zoh",
) -> tuple[Pair, Pair]:
    """`decay` and `gain` of independent modes `x' = a x + b u`: `x_k = decay x_{k-1} + gain b u_k`. Real arithmetic only.

    Args:
      a_real, a_imag, dt: broadcast against one another, element by element.
      method:
        "zoh": `exp(dt a)` and `(exp(dt a) - 1) / a`, which is dt at a = 0; exact for an input held during the step.
        "bilinear": `(1 + dt a / 2) / (1 - dt a / 2)` and `dt / (1 - dt a / 2)`.
        "exponential_euler": `exp(dt a)` and dt, as the Mamba code does (Gu & Dao 2023).
        "euler": `1 + dt a` and dt; unstable unless dt is small against the fastest mode.
    Returns:
      Two pairs (real, imag) of arrays of the common shape.
    Raises:
      ValueError: unknown method.
    """
    _check_method(method, DIAGONAL_METHODS)
    a_real, a_imag, dt = jnp.broadcast_arrays(*_at_least_float32(a_real, a_imag, dt))
    z = Pair(dt * a_real, dt * a_imag)
    step = Pair(dt, jnp.zeros_like(dt))
    if method == "zoh":
        return exponential(z), scale(_held_input(z), dt)
    if method == "bilinear":
        inverse = reciprocal(Pair(1 - z.real / 2, -z.imag / 2))
        return product(Pair(1 + z.real / 2, z.imag / 2), inverse), scale(inverse, dt)
    if method == "exponential_euler":
        return exponential(z), step
    return Pair(1 + z.real, z.imag), step


def _held_input(z: Pair) -> Pair:
    """`(exp(z) - 1) / z`, accurate with its derivative at and around z = 0."""
    near = z.real**2 + z.imag**2 < SERIES_BELOW**2
    # The quotient's argument is moved away from zero where it is not used, so that its derivative stays finite there.
    away = Pair(jnp.where(near, 1, z.real), jnp.where(near, 0, z.imag))
    quotient = product(_exponential_minus_one(away), reciprocal(away))
    close = Pair(jnp.where(near, z.real, 0), jnp.where(near, z.imag, 0))
    series = _exponential_series(close)
    return Pair(jnp.where(near, series.real, quotient.real), jnp.where(near, series.imag, quotient.imag))


def _exponential_minus_one(z: Pair) -> Pair:
    """`exp(z) - 1` without cancellation for small z."""
    x, y = z
    return Pair(jnp.expm1(x) * jnp.cos(y) - 2 * jnp.sin(y / 2) ** 2, jnp.exp(x) * jnp.sin(y))


def _exponential_series(z: Pair) -> Pair:
    """`1 + z/2 (1 + z/3 (1 + ...))`."""
    total = Pair(jnp.ones_like(z.real), jnp.zeros_like(z.imag))
    for n in range(SERIES_TERMS, 1, -1):
        total = product(scale(z, 1 / n), total)
        total = Pair(1 + total.real, total.imag)
    return total


def _at_least_float32(*arrays: ArrayLike) -> tuple[Array, ...]:
    arrays = tuple(jnp.asarray(a) for a in arrays)
    dtype = jnp.result_type(*arrays, jnp.float32)
    return tuple(a.astype(dtype) for a in arrays)


def _check_method(given: str, allowed: tuple[str, ...]) -> None:
    if given not in allowed:
        raise ValueError(f"method={given!r} is unknown; allowed: {', '.join(allowed)}.")
