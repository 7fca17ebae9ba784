"""Complex numbers as pairs of real arrays: the arithmetic of complex modes without complex dtypes.

Complex dtypes compile slowly on CPU and do not exist inside accelerator kernels, so recurrences keep both parts apart.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float


class Pair(NamedTuple):
    """Real and imaginary parts, arrays of one shape."""

    real: Float[Array, "..."]
    imag: Float[Array, "..."]


def product(a: Pair, b: Pair) -> Pair:
    """`a b`."""
    return Pair(a.real * b.real - a.imag * b.imag, a.real * b.imag + a.imag * b.real)


def real_product(a: Pair, b: Pair) -> Float[Array, "..."]:
    """The real part of `a b`."""
    return a.real * b.real - a.imag * b.imag


def add(a: Pair, b: Pair) -> Pair:
    return Pair(a.real + b.real, a.imag + b.imag)


def subtract(a: Pair, b: Pair) -> Pair:
    return Pair(a.real - b.real, a.imag - b.imag)


def scale(a: Pair, factor: Array | float) -> Pair:
    """`factor * a` for a real factor."""
    return Pair(a.real * factor, a.imag * factor)


def conjugate(a: Pair) -> Pair:
    return Pair(a.real, -a.imag)


def reciprocal(a: Pair) -> Pair:
    """`1 / a`."""
    size = a.real * a.real + a.imag * a.imag
    return Pair(a.real / size, -a.imag / size)


def exponential(a: Pair) -> Pair:
    """`exp(a)`."""
    size = jnp.exp(a.real)
    return Pair(size * jnp.cos(a.imag), size * jnp.sin(a.imag))


def from_complex(a: Complex[Array, "..."]) -> Pair:
    return Pair(jnp.real(a), jnp.imag(a))


def to_complex(a: Pair) -> Complex[Array, "..."]:
    return jax.lax.complex(a.real, a.imag)
