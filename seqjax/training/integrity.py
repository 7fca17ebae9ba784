"""Exact checksums of a state's arrays, computed on the devices that hold them.

A checksum is a sum of integers modulo 2**32, so it does not depend on order, hence not on how arrays are sharded.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from seqjax.training.groups import parameter_path


def summarize(state: Any) -> dict[str, dict[str, Any]]:
    """`{path: {"shape", "dtype", "checksum", "finite"}}` of every array, JSON-ready. Waits for the arrays."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    examined = jax.device_get([_examine(leaf) for _, leaf in leaves])
    return {
        parameter_path(path): {**layout(leaf), "checksum": int(total), "finite": bool(finite)}
        for (path, leaf), (total, finite) in zip(leaves, examined)
    }


def layout(leaf: Any) -> dict[str, Any]:
    """Shape and dtype of an array, concrete or abstract, JSON-ready."""
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def layouts(tree: Any) -> dict[str, dict[str, Any]]:
    """`{path: layout}` of every array of a tree."""
    return {parameter_path(path): layout(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@jax.jit
def _examine(array: Array) -> tuple[Array, Array]:
    # One small program per shape: arrays repeat their shapes (moments, layers), a program over all of them does not.
    return checksum(array), jnp.all(jnp.isfinite(array))


def checksum(array: Array) -> UInt32[Array, ""]:
    """Sum over the array's 32-bit words of word times an odd multiplier that depends on the position.

    An odd multiplier is invertible modulo 2**32, so a change in any one word always shows; multipliers are mixed bits of
    the position, so exchanged values show too, all but once in 2**31.
    """
    words = _words(array)
    position = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(words.ndim):
        index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        position += index * np.uint32(math.prod(words.shape[axis + 1 :]) % 2**32)
    return jnp.sum(words * (_mix(position) | np.uint32(1)), dtype=jnp.uint32)


def _words(array: Array) -> Array:
    """The array's bits as uint32, one word per value, two for 64-bit values."""
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    width = array.dtype.itemsize
    if width >= 4:
        return jax.lax.bitcast_convert_type(array, jnp.uint32)
    return jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * width}")).astype(jnp.uint32)


def _mix(x: Array) -> Array:
    """The finaliser of MurmurHash3: every input bit reaches every output bit."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
