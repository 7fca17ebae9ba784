"""The inverse of unit triangular matrices, by products of blocks.

A library's triangular solve would do, but on a CPU jaxlib runs it through LAPACK, whose batched calls wait for threads that
they themselves occupy: two at a time can stop a program on two cores for ever. On a TPU it is a loop over rows.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

SMALL = 8
"""Blocks up to this size are inverted by masks, for cutting them costs more than what it saves."""

matmul = functools.partial(jnp.matmul, precision="highest")


@jax.custom_vjp
def unit_lower_inverse(a: Float[Array, "... N N"]) -> Float[Array, "... N N"]:
    """`(I + strictly lower part of a)^(-1)`: halves first, then `[[P, 0], [B, R]]^(-1) = [[P', 0], [-R' B P', R']]`.

    As accurate as a solve row by row, which sums of powers of the matrix are not.
    """
    size = a.shape[-1]
    whole = 1 << (size - 1).bit_length()
    padded = jnp.pad(a, [(0, 0)] * (a.ndim - 2) + [(0, whole - size)] * 2)
    return _inverse(padded)[..., :size, :size]


def _inverse(a: Array) -> Array:
    size = a.shape[-1]
    if size <= SMALL:
        return _small_inverse(a)
    half = size // 2
    first, last = _inverse(jnp.stack([a[..., :half, :half], a[..., half:, half:]]))
    below = -matmul(matmul(last, a[..., half:, :half]), first)
    above = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
    return jnp.concatenate([above, jnp.concatenate([below, last], axis=-1)], axis=-2)


def _small_inverse(a: Array) -> Array:
    """The same, all blocks of a size at once: `X - X B X` for block-diagonal X, with B what lies beside its blocks."""
    size = a.shape[-1]
    at, inverse, width = np.arange(size), jnp.broadcast_to(jnp.eye(size, dtype=a.dtype), a.shape), 1
    while width < size:
        pair, odd = at // (2 * width), at // width % 2 == 1
        beside = (pair[:, None] == pair) & odd[:, None] & ~odd
        inverse = inverse - matmul(matmul(inverse, jnp.where(beside, a, 0)), inverse)
        width *= 2
    return inverse


def _backward(inverse: Array, d_inverse: Array) -> tuple[Array]:
    turned = jnp.swapaxes(inverse, -1, -2)
    return (-jnp.tril(matmul(matmul(turned, d_inverse), turned), -1),)


unit_lower_inverse.defvjp(lambda a: (unit_lower_inverse(a),) * 2, _backward)


def unit_lower_inverse_flops(size: int) -> int:
    """Floating-point operations of `unit_lower_inverse` for one matrix."""
    size = 1 << (size - 1).bit_length()
    if size <= SMALL:
        return (size - 1).bit_length() * (4 * size**3 + size**2)
    half = size // 2
    return 2 * unit_lower_inverse_flops(half) + 4 * half**3 + half**2
