"""Feature maps of linear attention, which stand for the exponential of a softmax, and norms of queries and keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class FeatureMap:
    """A function of the last axis.

    Attributes:
      function: `[..., K]` to `[..., width(K)]`.
      positive: products of two images are never negative, so that a sum of keys can normalise.
      width: of the image.
    """

    function: Callable[[Array], Array]
    positive: bool = False
    width: Callable[[int], int] = lambda k: k

    def __call__(self, x: Float[Array, "... K"]) -> Float[Array, "... _"]:
        return self.function(x)


def _dpfp(x: Array) -> Array:
    both = jax.nn.relu(jnp.concatenate([x, -x], axis=-1))
    return both * jnp.roll(both, 1, axis=-1)


def _taylor(x: Array) -> Array:
    x = x * x.shape[-1] ** -0.25  # products come out over the root of K, as in a softmax
    squares = (x[..., :, None] * x[..., None, :]).reshape(*x.shape[:-1], -1)
    return jnp.concatenate([jnp.ones_like(x[..., :1]), x, squares * 0.5**0.5], axis=-1)


FEATURE_MAPS = {
    "identity": FeatureMap(lambda x: x),
    "silu": FeatureMap(jax.nn.silu),
    "relu": FeatureMap(jax.nn.relu, True),
    "softmax": FeatureMap(jax.nn.softmax, True),
    "elu_plus_one": FeatureMap(lambda x: jax.nn.elu(x) + 1, True),  # Katharopoulos et al. 2020, eq. 7
    "dpfp": FeatureMap(_dpfp, True, lambda k: 2 * k),  # Schlag et al. 2021, eq. 37, nu = 1
    "taylor": FeatureMap(_taylor, True, lambda k: 1 + k + k * k),  # exp to the second order: Arora et al. 2024, section 4
}


def _l2(x: Array) -> Array:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (wide * jax.lax.rsqrt(jnp.sum(wide * wide, axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)


KEY_NORMS: dict[str, Callable[[Array], Array]] = {
    "none": lambda x: x,
    "l2": _l2,  # length 1, epsilon inside the root
    "sum": lambda x: x / (jnp.sum(x, axis=-1, keepdims=True) + 1e-6),  # Schlag et al. 2021, eq. 28
}
