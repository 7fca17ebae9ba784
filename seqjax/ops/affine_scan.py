"""Linear recurrences whose transitions change with the token: diagonal, or small blocks that are diagonal over features."""

from __future__ import annotations

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from seqjax.ops.scan import Monoid, prefix_scan

Vector = tuple[Array, ...]
"""K components, each an array of features."""
Matrix = tuple[Vector, ...]
"""K rows of K entries, each an array of features."""


def affine_scan(
    transitions: Array | Matrix,
    inputs: Array | Vector,
    initial: Array | Vector | None = None,
    *,
    starts: Bool[Array, "B L"] | None = None,
    reverse: bool = False,
    implementation: str | None = None,
) -> tuple[Any, Any]:
    """States of `h_t = A_t h_(t-1) + x_t`, one small system for each feature.

    Args:
      transitions: A, broadcast to `[B, L, *N]`; for states of K components, K rows of K such arrays.
      inputs: x, `[B, L, *N]`; or K such arrays.
      initial: h before the first step, `[B, *N]` or K such arrays; zeros by default.
      starts: where a segment starts: h is zero before that step.
      reverse: run from the last token to the first.
      implementation: as `prefix_scan`; None is a loop on CPU and "associative" elsewhere.
    Returns:
      All states, shaped as the inputs, and the last; at least float32. The backward pass is one more such recurrence, the
      other way round, and keeps only transitions and states.
    Raises:
      ValueError: the implementation is unknown.
    """
    dtype = jnp.result_type(jnp.float32, *jax.tree.leaves((transitions, inputs, initial)))
    single = not isinstance(inputs, tuple)
    if single:
        transitions, inputs = ((transitions,),), (inputs,)
        initial = None if initial is None else (initial,)
    if initial is None:
        initial = tuple(jnp.zeros_like(x[:, 0]) for x in inputs)
    transitions, inputs, initial = jax.tree.map(lambda a: a.astype(dtype), (transitions, inputs, initial))
    transitions = jax.tree.map(lambda a: jnp.broadcast_to(a, inputs[0].shape), transitions)
    if starts is not None:  # a transition of zero forgets what came before
        edges = jnp.pad(starts[:, 1:], [(0, 0), (0, 1)]) if reverse else starts
        transitions = jax.tree.map(lambda a: jnp.where(spread(edges, a), 0, a), transitions)
    states = _affine_scan(implementation, reverse, transitions, inputs, initial)
    last = tuple(h[:, 0 if reverse else -1] for h in states)
    return (states[0], last[0]) if single else (states, last)


def spread(marks: Bool[Array, "..."], values: Array) -> Array:
    """`marks` with as many axes as `values`."""
    return marks.reshape(*marks.shape, *(1,) * (values.ndim - marks.ndim))


def shifted(values: Array, first: Array, reverse: bool = False) -> Array:
    """What stands one token before each: `first` enters at the first token, or at the last one in reverse."""
    parts = (values[:, 1:], first[:, None]) if reverse else (first[:, None], values[:, :-1])
    return jnp.concatenate(parts, axis=1)


def transposed(matrix: Matrix) -> Matrix:
    return tuple(zip(*matrix))


def apply(matrix: Matrix, vector: Vector) -> Vector:
    """The product of blocks and components, feature by feature."""
    return tuple(functools.reduce(operator.add, map(operator.mul, row, vector)) for row in matrix)


def _combine(earlier: tuple[Matrix, Vector], later: tuple[Matrix, Vector]) -> tuple[Matrix, Vector]:
    product = transposed(tuple(apply(later[0], column) for column in transposed(earlier[0])))
    return product, tuple(map(operator.add, apply(later[0], earlier[1]), later[1]))


def _identity(element: tuple[Matrix, Vector]) -> tuple[Matrix, Vector]:
    matrix, vector = element
    ones = lambda i, j, a: jnp.ones_like(a) if i == j else jnp.zeros_like(a)
    eye = tuple(tuple(ones(i, j, a) for j, a in enumerate(row)) for i, row in enumerate(matrix))
    return eye, tuple(map(jnp.zeros_like, vector))


BLOCK_AFFINE = Monoid(_combine, _identity)
"""Maps `h -> A h + x` of K components, elements `(A, x)` of a `Matrix` and a `Vector`."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _affine_scan(implementation: str | None, reverse: bool, transitions: Matrix, inputs: Vector, initial: Vector) -> Vector:
    if implementation is None:
        run = lambda how: functools.partial(_states, how, reverse)
        return jax.lax.platform_dependent(transitions, inputs, initial, cpu=run("sequential"), default=run("associative"))
    return _states(implementation, reverse, transitions, inputs, initial)


def _states(implementation: str, reverse: bool, transitions: Matrix, inputs: Vector, initial: Vector) -> Vector:
    if implementation == "sequential":  # without the running product of transitions, which the frame would carry along

        def step(state: Vector, element: tuple[Matrix, Vector]) -> tuple[Vector, Vector]:
            state = tuple(map(operator.add, apply(element[0], state), element[1]))
            return state, state

        elements = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), (transitions, inputs))
        return jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), jax.lax.scan(step, initial, elements, reverse=reverse)[1])
    before = _identity((jax.tree.map(lambda a: a[:, 0], transitions), initial))[0], initial
    options = {"initial": before, "reverse": reverse, "implementation": implementation}
    return prefix_scan(BLOCK_AFFINE, (transitions, inputs), **options)[0][1]


def _forward(implementation: str | None, reverse: bool, transitions: Matrix, inputs: Vector, initial: Vector) -> tuple:
    states = _affine_scan(implementation, reverse, transitions, inputs, initial)
    return states, (transitions, states, initial)


def _backward(implementation: str | None, reverse: bool, saved: tuple, d_states: Vector) -> tuple:
    transitions, states, initial = saved
    d_inputs = adjoint(transitions, d_states, reverse=reverse, implementation=implementation)
    before = tuple(shifted(h, h0, reverse) for h, h0 in zip(states, initial))
    d_transitions = tuple(tuple(d * h for h in before) for d in d_inputs)
    entered = jax.tree.map(lambda a: a[:, -1 if reverse else 0], (transposed(transitions), d_inputs))
    return d_transitions, d_inputs, apply(*entered)


_affine_scan.defvjp(_forward, _backward)


def adjoint(transitions: Matrix, d_states: Vector, *, reverse: bool = False, implementation: str | None = None) -> Vector:
    """Gradients by the inputs of the recurrence, `g_t = d_t + A_(t+1)^T g_(t+1)`, from those by its states."""
    later = jax.tree.map(lambda a: shifted(a, jnp.zeros_like(a[:, 0]), not reverse), transposed(transitions))
    zeros = tuple(jnp.zeros_like(d[:, 0]) for d in d_states)
    return _affine_scan(implementation, not reverse, later, d_states, zeros)
