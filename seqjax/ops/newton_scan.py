"""Nonlinear recurrences solved for the whole sequence at once, by Newton's method over linear scans."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from seqjax.ops.affine_scan import Matrix, Vector, adjoint, affine_scan, apply, shifted, spread, transposed
from seqjax.ops.recurrence import reset

Tree = Any
Cell = Callable[[Tree, Tree, Tree], Tree]

IMPLEMENTATIONS = ("newton", "sequential")
MAX_ITERATIONS = 20


class Solution(NamedTuple):
    """What `newton_scan` returns.

    Attributes:
      states: after every step, `[B, L, ...]`.
      last: the state after the last step, `[B, ...]`.
      iterations: how many Newton steps were taken; 0 for the loop.
      converged: whether they sufficed; if not, the states are the loop's.
    """

    states: Tree
    last: Tree
    iterations: Int[Array, ""]
    converged: Bool[Array, ""]


def newton_scan(
    cell: Cell,
    constants: Tree,
    state: Tree,
    inputs: Tree,
    *,
    starts: Bool[Array, "B L"] | None = None,
    tolerance: float | None = None,
    max_iterations: int = MAX_ITERATIONS,
    implementation: str | None = None,
    scan: str | None = None,
) -> Solution:
    """States of `h_t = cell(constants, h_(t-1), x_t)`, for a cell that works feature by feature (Danieli et al. 2025, ParaRNN).

    Newton's method on all steps at once: with `J_t` the cell's derivative at the present guess of `h_(t-1)`, the correction
    `d_t = J_t d_(t-1) + cell(h_(t-1), x_t) - h_t` is a linear recurrence, one parallel scan. The first guess is
    `cell(0, x_t)`. After i corrections the first i states are exact, and near the solution each squares the error.

    Args:
      cell: a pure function defined at module level (it is compared by identity). It must work for arrays with any number of
        leading axes, and feature i of the new state may depend on feature i of the old one alone.
      constants: what every step reads: float arrays that broadcast against the features.
      state: h before the first step: an array `[B, *N]`, or a tree of K such arrays, whose Jacobian is then K x K blocks.
      inputs: x: float arrays `[B, L, ...]`.
      starts: where a segment starts: h is zero before that step.
      tolerance: converged when a correction changes no state by more; the one after it would be of the order of its square.
        None is a quarter of the square root of the precision: 9e-5 in float32, 4e-9 in float64.
      max_iterations: after as many corrections, or where one is not finite, a loop computes the states instead.
      implementation: "newton" or "sequential", the loop; None is the loop on CPU, where it is faster, and "newton" elsewhere.
      scan: implementation of the linear scans, as in `affine_scan`.
    Returns:
      A `Solution`, in at least float32. Differentiable in all float arguments, in reverse mode: the gradient is the exact one
      of the recurrence at the states found, by one linear scan backwards, and keeps nothing of the iterations.
    Raises:
      ValueError: the implementation is unknown, or `max_iterations` is not positive.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation={implementation!r} is unknown; allowed: None, {', '.join(IMPLEMENTATIONS)}.")
    if max_iterations < 1:
        raise ValueError(f"max_iterations={max_iterations} is not positive.")
    dtype = jnp.result_type(jnp.float32, *jax.tree.leaves((constants, state, inputs)))
    constants, state, inputs = jax.tree.map(lambda a: a.astype(dtype), (constants, state, inputs))
    if tolerance is None:
        tolerance = float(jnp.finfo(dtype).eps) ** 0.5 / 4
    how = _How(tolerance, max_iterations, implementation, scan)
    states, iterations, converged = _solve(cell, how, constants, state, inputs, starts)
    return Solution(states, jax.tree.map(lambda a: a[:, -1], states), iterations, converged)


class _How(NamedTuple):
    """Options that are known at compile time."""

    tolerance: float
    max_iterations: int
    implementation: str | None
    scan: str | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _solve(cell: Cell, how: _How, constants: Tree, state: Tree, inputs: Tree, starts: Array | None) -> tuple:
    newton, loop = functools.partial(_newton, cell, how), functools.partial(_loop, cell)
    args = (constants, state, inputs, starts)
    if how.implementation == "sequential" or _length(inputs) == 1:
        return loop(*args)
    if how.implementation == "newton":
        return newton(*args)
    return jax.lax.platform_dependent(*args, cpu=loop, default=newton)


def _loop(cell: Cell, constants: Tree, state: Tree, inputs: Tree, starts: Array | None) -> tuple:
    """The states step by step."""

    def step(state: Tree, element: tuple) -> tuple[Tree, Tree]:
        state = cell(constants, reset(state, element[1]), element[0])
        return state, state

    elements = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), (inputs, starts))
    if _length(inputs) == 1:  # decoding: no loop
        states = jax.tree.map(lambda a: a[None], step(state, jax.tree.map(lambda a: a[0], elements))[1])
    else:
        states = jax.lax.scan(step, state, elements)[1]
    return jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), states), jnp.int32(0), jnp.bool_(True)


def _newton(cell: Cell, how: _How, constants: Tree, state: Tree, inputs: Tree, starts: Array | None) -> tuple:
    """The states of all steps at once, or the loop's where that fails."""
    zeros = jax.tree.map(lambda a: jnp.zeros((a.shape[0], _length(inputs), *a.shape[1:]), a.dtype), state)
    guess = cell(constants, _before(zeros, state, starts), inputs)

    def unfinished(carry: tuple) -> Array:
        iterations, _, change = carry
        return (iterations < how.max_iterations) & (change > how.tolerance)  # not a number ends it too

    def correct(carry: tuple) -> tuple:
        iterations, states, _ = carry
        values, jacobian = _linearised(cell, constants, _before(states, state, starts), inputs, starts)
        residuals = tuple(v - h for v, h in zip(values, jax.tree.leaves(states)))
        corrections, _ = affine_scan(jacobian, residuals, implementation=how.scan)
        change = functools.reduce(jnp.maximum, (jnp.max(jnp.abs(d)) for d in corrections))
        corrected = jax.tree.map(jnp.add, states, jax.tree.unflatten(jax.tree.structure(states), corrections))
        return iterations + 1, corrected, change

    start = (jnp.int32(0), guess, jnp.asarray(jnp.inf, jax.tree.leaves(guess)[0].dtype))
    iterations, states, change = jax.lax.while_loop(unfinished, correct, start)
    converged = change <= how.tolerance
    loop = lambda: _loop(cell, constants, state, inputs, starts)[0]
    return jax.lax.cond(converged, lambda: states, loop), iterations, converged


def _length(inputs: Tree) -> int:
    return jax.tree.leaves(inputs)[0].shape[1]


def _before(states: Tree, state: Tree, starts: Array | None) -> Tree:
    """What each step continues from: the state one token earlier, or zeros where a segment starts."""
    before = jax.tree.map(shifted, states, state)
    return before if starts is None else jax.tree.map(lambda a: jnp.where(spread(starts, a), 0, a), before)


def _linearised(cell: Cell, constants: Tree, before: Tree, inputs: Tree, starts: Array | None) -> tuple[Vector, Matrix]:
    """The cell's values at every step, and its Jacobian by the state before: one derivative per component, for features do not
    mix."""
    parts, structure = jax.tree.flatten(before)
    columns = []
    for k, part in enumerate(parts):

        def moved(part: Array, k: int = k) -> Vector:
            state = jax.tree.unflatten(structure, [*parts[:k], part, *parts[k + 1 :]])
            return tuple(jax.tree.leaves(cell(constants, state, inputs)))

        values, column = jax.jvp(moved, (part,), (jnp.ones_like(part),))
        columns.append(column)
    jacobian = transposed(tuple(columns))
    if starts is not None:
        jacobian = jax.tree.map(lambda a: jnp.where(spread(starts, a), 0, a), jacobian)
    return values, jacobian


def _solve_forward(cell: Cell, how: _How, constants: Tree, state: Tree, inputs: Tree, starts: Array | None) -> tuple:
    solution = _solve(cell, how, constants, state, inputs, starts)
    return solution, (constants, state, inputs, starts, solution[0])


def _solve_backward(cell: Cell, how: _How, saved: tuple, cotangents: tuple) -> tuple:
    """By the implicit function theorem: cotangents of all steps' values by one linear scan, then each step's own gradients."""
    constants, state, inputs, starts, states = saved
    before = _before(states, state, starts)
    _, jacobian = _linearised(cell, constants, before, inputs, starts)
    d_values = adjoint(jacobian, tuple(jax.tree.leaves(cotangents[0])), implementation=how.scan)
    _, pull = jax.vjp(lambda c, x: cell(c, before, x), constants, inputs)
    d_constants, d_inputs = pull(jax.tree.unflatten(jax.tree.structure(states), d_values))
    first = jax.tree.map(lambda a: a[:, 0], (transposed(jacobian), d_values))
    d_state = jax.tree.unflatten(jax.tree.structure(state), apply(*first))
    return d_constants, d_state, d_inputs, None


_solve.defvjp(_solve_forward, _solve_backward)
