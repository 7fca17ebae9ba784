"""A recurrence in time with memory and gradients under control, for any step function.

Differentiating `lax.scan` keeps every intermediate of every step. Here only the state at the start of each chunk is kept;
the backward pass runs a chunk again, and then back through it step by step. Resets at segment boundaries are written here
once, for all recurrences.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from seqjax.ops.segments import reversed_starts

Tree = Any
ONE_CHUNK = 32
"""Sequences up to this length are one chunk."""

Step = Callable[[Tree, Tree, Tree], tuple[Tree, Tree]]


def recurrence(
    step: Step,
    constants: Tree,
    state: Tree,
    inputs: Tree,
    *,
    starts: Bool[Array, "B L"] | None = None,
    reverse: bool = False,
    chunk_size: int | None = None,
    elementwise: bool = False,
) -> tuple[Tree, Tree]:
    """Apply `state, y_t = step(constants, state, x_t)` along the sequence.

    Args:
      step: a pure function of arrays, defined at module level (it is compared by identity).
      constants: what every step reads: a tree of float arrays.
      state: float arrays `[B, ...]`, before the first step.
      inputs: float arrays `[B, L, ...]`; a step gets `[B, ...]`.
      starts: where a segment starts: the state is zero before that step.
      reverse: run from the last token to the first; the state then resets after the last token of a segment.
      chunk_size: steps between kept states; default near half the square root of the length. The root itself keeps least,
        a fifth less, and is slower: the states of a chunk lie in the cache when they are needed again.
      elementwise: the step also works for constants with a leading batch axis. Their gradients are then summed over the
        batch once, not at every step: two to three times faster backward on CPU.
    Returns:
      Outputs `[B, L, ...]` and the state after the last step. Differentiable in all float arguments, in reverse mode.
    """
    if reverse:
        inputs = jax.tree.map(lambda a: jnp.flip(a, 1), inputs)
        starts = reversed_starts(starts)
    inputs = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), inputs)
    starts = None if starts is None else jnp.swapaxes(starts, 0, 1)
    length = jax.tree.leaves(inputs)[0].shape[0]
    if length == 1:  # decoding: no loop
        start = None if starts is None else starts[0]
        state, y = step(constants, reset(state, start), jax.tree.map(lambda a: a[0], inputs))
        return jax.tree.map(lambda a: a[:, None], y), state
    size = min(chunk_size or chunk_size_for(length), length)
    whole = length - length % size
    outputs = []
    for part in (slice(0, whole), slice(whole, length)):
        if part.start < part.stop:
            taken = jax.tree.map(lambda a: a[part], (inputs, starts))  # noqa: B023
            y, state = _run(step, _How(min(size, part.stop - part.start), elementwise), constants, state, *taken)
            outputs.append(y)
    y = outputs[0] if len(outputs) == 1 else jax.tree.map(lambda *a: jnp.concatenate(a), *outputs)
    y = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), y)
    return (jax.tree.map(lambda a: jnp.flip(a, 1), y) if reverse else y), state


def chunk_size_for(length: int) -> int:
    """All of a short sequence; else the divisor of `length` nearest half the square root within a factor of 2, or that half,
    which leaves a remainder."""
    if length <= ONE_CHUNK:
        return length
    near = math.isqrt(length) // 2
    fits = [n for n in range(max(1, near // 2), 2 * near + 1) if length % n == 0]
    return min(fits, key=lambda n: abs(n - near)) if fits else near


def reset(state: Tree, start: Array | None) -> Tree:
    """The state a step sees: zeros for the rows whose segment starts."""
    if start is None:
        return state
    return jax.tree.map(lambda a: jnp.where(start.reshape(-1, *(1,) * (a.ndim - 1)), 0, a), state)


def chunked(tree: Tree, size: int) -> Tree:
    """`[L, ...]` to `[L / size, size, ...]`."""
    return jax.tree.map(lambda a: a.reshape(a.shape[0] // size, size, *a.shape[1:]), tree)


def joined(tree: Tree) -> Tree:
    return jax.tree.map(lambda a: a.reshape(a.shape[0] * a.shape[1], *a.shape[2:]), tree)


class _How(NamedTuple):
    """Options of `recurrence` that are known at compile time."""

    chunk_size: int
    elementwise: bool


def scan_chunks(chunk: Callable, carry: Tree, chunks: Tree, reverse: bool = False) -> tuple[Tree, Tree]:
    """`lax.scan`, without the loop where there is one chunk: half the time to compile."""
    if jax.tree.leaves(chunks)[0].shape[0] > 1:
        return jax.lax.scan(chunk, carry, chunks, reverse=reverse)
    carry, y = chunk(carry, jax.tree.map(lambda a: a[0], chunks))
    return carry, jax.tree.map(lambda a: a[None], y)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run(step: Step, how: _How, constants: Tree, state: Tree, inputs: Tree, starts: Array | None) -> tuple[Tree, Tree]:
    """The recurrence over time-major inputs `[L, B, ...]`, L a multiple of the chunk size."""

    def advance(state: Tree, x: tuple) -> tuple[Tree, Tree]:
        return step(constants, reset(state, x[1]), x[0])

    state, y = jax.lax.scan(advance, state, (inputs, starts))
    return y, state


def _run_forward(step: Step, how: _How, constants: Tree, state: Tree, inputs: Tree, starts: Array | None) -> tuple:
    def advance(state: Tree, x: tuple) -> tuple[Tree, Tree]:
        return step(constants, reset(state, x[1]), x[0])

    def chunk(state: Tree, xs: tuple) -> tuple[Tree, tuple]:
        after, y = jax.lax.scan(advance, state, xs)
        return after, (y, state)

    last, (y, kept) = scan_chunks(chunk, state, chunked((inputs, starts), how.chunk_size))
    return (joined(y), last), (constants, kept, inputs, starts)


def _run_backward(step: Step, how: _How, saved: tuple, cotangents: tuple) -> tuple:
    constants, kept, inputs, starts = saved
    d_outputs, d_last = cotangents
    batch_size = jax.tree.leaves(kept)[0].shape[1]
    per_row = (lambda a: jnp.broadcast_to(a, (batch_size, *a.shape))) if how.elementwise else (lambda a: a)
    spread = jax.tree.map(per_row, constants)

    def advance(state: Tree, x: tuple) -> tuple[Tree, Tree]:
        return step(constants, reset(state, x[1]), x[0])[0], state

    def back(carry: tuple, x: tuple) -> tuple[tuple, Tree]:
        d_state, d_constants = carry
        state, x_t, start, d_y = x
        _, pull = jax.vjp(lambda c, s, x: step(c, reset(s, start), x), spread, state, x_t)
        of_constants, d_state, d_x = pull((d_state, d_y))
        return (d_state, jax.tree.map(jnp.add, d_constants, of_constants)), d_x

    def chunk_back(carry: tuple, xs: tuple) -> tuple[tuple, Tree]:
        state, x, start, d_y = xs
        _, states = jax.lax.scan(advance, state, (x, start))
        return jax.lax.scan(back, carry, (states, x, start, d_y), reverse=True)

    zeros = jax.tree.map(jnp.zeros_like, spread)
    chunks = (kept, *chunked((inputs, starts, d_outputs), how.chunk_size))
    (d_state, d_constants), d_inputs = scan_chunks(chunk_back, (d_last, zeros), chunks, reverse=True)
    if how.elementwise:
        d_constants = jax.tree.map(lambda a: a.sum(0), d_constants)
    return d_constants, d_state, joined(d_inputs), None


_run.defvjp(_run_forward, _run_backward)


@jax.custom_vjp
def sum_modes(values: Float[Array, "B N *D"]) -> Float[Array, "B *D"]:
    """The sum over axis 1, written as additions: XLA for CPU turns them into vector code, and a reduction over that axis
    not (ten times slower inside a loop)."""
    return _added(values)


def _added(values: Array, group: int = 8) -> Array:
    modes = values.shape[1]
    if modes > group and modes % group == 0:  # fewer, wider additions compile faster
        return _added(_added(values.reshape(values.shape[0], modes // group, group, *values.shape[2:]), modes), modes)
    total = values[:, 0]
    for mode in range(1, modes):
        total = total + values[:, mode]
    return total


sum_modes.defvjp(
    lambda values: (_added(values), values.shape[1]),
    lambda modes, d: (jnp.broadcast_to(d[:, None], (d.shape[0], modes, *d.shape[1:])),),
)
