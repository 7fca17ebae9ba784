"""A recurrence whose steps are chunks of tokens: its backward pass keeps the states between chunks, and nothing else."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

Tree = Any
Forward = Callable[[Array, Tree], tuple[Array, Array]]
Backward = Callable[[Array, tuple], tuple[Array, Tree]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def scan_chunks(forward: Forward, backward: Backward, chunks: Tree, state: Array) -> tuple[Array, Array]:
    """Apply `state, y = forward(state, chunk)` to chunk after chunk.

    Args:
      forward: a pure function, defined at module level (it is compared by identity).
      backward: `(gradient of the state after, (chunk, state before, gradient of y))` to the gradients of the state before
        and of the chunk; `differentiated(forward)` where none is written by hand.
      chunks: arrays `[chunks, ...]`.
      state: before the first chunk.
    Returns:
      Outputs `[chunks, ...]` and the last state.
    """
    state, y = _over_chunks(forward, state, chunks)
    return y, state


def _scan_forward(forward: Forward, backward: Backward, chunks: Tree, state: Array) -> tuple:
    def keep(state: Array, chunk: Tree) -> tuple[Array, tuple]:
        after, y = forward(state, chunk)
        return after, (y, state)

    last, (y, kept) = _over_chunks(keep, state, chunks)
    return (y, last), (chunks, kept)


def _scan_backward(forward: Forward, backward: Backward, saved: tuple, cotangents: tuple) -> tuple:
    chunks, kept = saved
    d_outputs, d_last = cotangents
    d_state, d_chunks = _over_chunks(backward, d_last, (chunks, kept, d_outputs), reverse=True)
    return d_chunks, d_state


scan_chunks.defvjp(_scan_forward, _scan_backward)


@functools.cache
def differentiated(forward: Forward) -> Backward:
    """The backward pass of one chunk, by JAX: the chunk runs again, and what it keeps lives no longer than the chunk."""

    def backward(d_after: Array, saved: tuple) -> tuple[Array, Tree]:
        chunk, state, d_y = saved
        return jax.vjp(forward, state, chunk)[1]((d_after, d_y))

    return backward


def _over_chunks(function: Callable, carry: Array, chunks: Tree, reverse: bool = False) -> tuple:
    """`lax.scan`, without the loop where there is one chunk."""
    if jax.tree.leaves(chunks)[0].shape[0] > 1:
        return jax.lax.scan(function, carry, chunks, reverse=reverse)
    carry, y = function(carry, jax.tree.map(lambda a: a[0], chunks))
    return carry, jax.tree.map(lambda a: a[None], y)


def to_chunks(a: Array, count: int, size: int) -> Array:
    """`[B, L, H, ...]` to `[chunks, B, H, size, ...]`, filled up with zeros."""
    a = jnp.pad(a, [(0, 0), (0, count * size - a.shape[1]), *[(0, 0)] * (a.ndim - 2)])
    return a.reshape(a.shape[0], count, size, *a.shape[2:]).transpose(1, 0, 3, 2, *range(4, a.ndim + 1))


def from_chunks(y: Array, length: int) -> Array:
    """`[chunks, B, H, size, ...]` to `[B, L, H, ...]`."""
    count, batch, heads, size, *rest = y.shape
    return y.transpose(1, 0, 3, 2, *range(4, y.ndim)).reshape(batch, count * size, heads, *rest)[:, :length]


def matmul(spec: str, a: Array, b: Array) -> Array:
    """An einsum that accumulates in at least float32, and does not round float32 operands."""
    wide = jnp.promote_types(a.dtype, jnp.float32)
    return jnp.einsum(spec, a, b, preferred_element_type=wide, precision="highest")
