"""Prefix scans over a monoid: one frame for every recurrence whose steps compose.

A step of such a recurrence is an element of a monoid, and the state after t steps is the combination of the first t
elements: an affine map for linear recurrences, `h -> a h + x`. The frame adds what all of them need: a state to start
from, the last state, resets where a segment starts, the reverse direction, and three ways to compute.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from seqjax.ops.complex_pairs import Pair, add, conjugate, product
from seqjax.ops.segments import reversed_starts

Tree = Any

CHUNK_SIZE = 64


class Monoid(NamedTuple):
    """An associative operation and its neutral element.

    Attributes:
      combine: `(earlier, later) -> both`, on trees of arrays, elementwise over leading axes.
      identity: a tree of elements -> neutral elements of the same shapes and dtypes.
    """

    combine: Callable[[Tree, Tree], Tree]
    identity: Callable[[Tree], Tree]


def _combine_affine(earlier: tuple[Array, Array], later: tuple[Array, Array]) -> tuple[Array, Array]:
    return earlier[0] * later[0], later[0] * earlier[1] + later[1]


def _combine_complex_affine(earlier: tuple[Pair, Pair], later: tuple[Pair, Pair]) -> tuple[Pair, Pair]:
    return product(earlier[0], later[0]), add(product(later[0], earlier[1]), later[1])


AFFINE = Monoid(_combine_affine, lambda e: (jnp.ones_like(e[0]), jnp.zeros_like(e[1])))
"""Maps `h -> a h + x`, elements `(a, x)` of real arrays."""

COMPLEX_AFFINE = Monoid(
    _combine_complex_affine,
    lambda e: (Pair(jnp.ones_like(e[0].real), jnp.zeros_like(e[0].imag)), jax.tree.map(jnp.zeros_like, e[1])),
)
"""Maps `h -> a h + x` of complex numbers, elements `(a, x)` of pairs of real arrays."""


def prefix_scan(
    monoid: Monoid,
    elements: Tree,
    *,
    initial: Tree | None = None,
    starts: Bool[Array, "B L"] | None = None,
    reverse: bool = False,
    implementation: str = "sequential",
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Tree, Tree]:
    """All prefixes `initial e_0`, `initial e_0 e_1`, ... along axis 1.

    Args:
      elements: arrays `[B, L, ...]`.
      initial: an element `[B, ...]` that comes before the first; default the identity.
      starts: where a segment starts: what came before is forgotten.
      reverse: combine from the last token to the first.
      implementation: "sequential" (a loop: fastest on CPU), "associative" (logarithmic depth, materialises every level),
        or "chunked" (associative inside chunks, a loop over chunks; the backward pass runs a chunk again).
      chunk_size: of "chunked".
    Returns:
      Prefixes `[B, L, ...]`, and the last one `[B, ...]`.
    Raises:
      ValueError: the implementation is unknown.
    """
    if implementation not in SCANS:
        raise ValueError(f"implementation={implementation!r} of a scan is unknown; allowed: {', '.join(SCANS)}.")
    if reverse:
        elements = jax.tree.map(lambda a: jnp.flip(a, 1), elements)
        starts = reversed_starts(starts)
    if initial is None:
        initial = monoid.identity(jax.tree.map(lambda a: a[:, 0], elements))
    if starts is not None:
        monoid = _with_resets(monoid)
        elements, initial = (starts, elements), (jnp.zeros(starts.shape[:1], bool), initial)
    prefixes, last = SCANS[implementation](monoid, elements, initial, chunk_size)
    if starts is not None:
        prefixes, last = prefixes[1], last[1]
    return (jax.tree.map(lambda a: jnp.flip(a, 1), prefixes) if reverse else prefixes), last


def _with_resets(monoid: Monoid) -> Monoid:
    """The monoid of pairs (a segment starts in here, element), in which a start forgets what came before it."""

    def combine(earlier: tuple, later: tuple) -> tuple:
        starts, new = later
        both = monoid.combine(earlier[1], new)
        keep = lambda b, n: jnp.where(starts.reshape(*starts.shape, *(1,) * (n.ndim - starts.ndim)), n, b)
        return earlier[0] | starts, jax.tree.map(keep, both, new)

    return Monoid(combine, lambda e: (jnp.zeros_like(e[0]), monoid.identity(e[1])))


def _sequential(monoid: Monoid, elements: Tree, initial: Tree, chunk_size: int) -> tuple[Tree, Tree]:
    def step(state: Tree, element: Tree) -> tuple[Tree, Tree]:
        state = monoid.combine(state, element)
        return state, state

    last, prefixes = jax.lax.scan(step, initial, jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), elements))
    return jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), prefixes), last


def _associative(monoid: Monoid, elements: Tree, initial: Tree, chunk_size: int) -> tuple[Tree, Tree]:
    first = monoid.combine(initial, jax.tree.map(lambda a: a[:, 0], elements))
    elements = jax.tree.map(lambda a, f: a.at[:, 0].set(f), elements, first)
    prefixes = jax.lax.associative_scan(monoid.combine, elements, axis=1)
    return prefixes, jax.tree.map(lambda a: a[:, -1], prefixes)


def _chunked(monoid: Monoid, elements: Tree, initial: Tree, chunk_size: int) -> tuple[Tree, Tree]:
    batch, length = jax.tree.leaves(elements)[0].shape[:2]
    size = min(chunk_size, length)
    padding = -length % size
    neutral = monoid.identity(jax.tree.map(lambda a: jnp.zeros((batch, padding, *a.shape[2:]), a.dtype), elements))
    padded = jax.tree.map(lambda a, n: jnp.concatenate([a, n], axis=1), elements, neutral)
    split = lambda a: jnp.moveaxis(a.reshape(batch, -1, size, *a.shape[2:]), 1, 0)

    @jax.checkpoint
    def chunk(state: Tree, part: Tree) -> tuple[Tree, Tree]:
        prefixes, last = _associative(monoid, part, state, size)
        return last, prefixes

    last, prefixes = jax.lax.scan(chunk, initial, jax.tree.map(split, padded))
    join = lambda a: jnp.moveaxis(a, 0, 1).reshape(batch, length + padding, *a.shape[3:])[:, :length]
    return jax.tree.map(join, prefixes), last


SCANS = {"sequential": _sequential, "associative": _associative, "chunked": _chunked}


def linear_scan(
    decay: Float[Array, "*N"] | Pair,
    inputs: Float[Array, "B L *N"] | Pair,
    initial: Float[Array, "B *N"] | Pair | None = None,
    *,
    starts: Bool[Array, "B L"] | None = None,
    reverse: bool = False,
    implementation: str | None = None,
) -> tuple[Any, Any]:
    """States of the diagonal affine recurrence `h_t = a h_(t-1) + x_t` with constant `a`, real or complex.

    Args:
      decay: a, the same at every step.
      inputs: x; pairs where the decay is a pair.
      initial: h before the first step; zeros by default.
      starts: where a segment starts: h is zero before that step.
      implementation: as `prefix_scan`; None is a loop on CPU and "associative" elsewhere.
    Returns:
      All states, and the last; at least float32. The backward pass is the same recurrence in reverse and keeps only the
      states themselves.
    Raises:
      ValueError: the implementation is unknown.
    """
    dtype = jnp.result_type(jnp.float32, *jax.tree.leaves((decay, inputs, initial)))
    decay, inputs, initial = jax.tree.map(lambda a: a.astype(dtype), (decay, inputs, initial))
    if initial is None:
        initial = jax.tree.map(lambda a: jnp.zeros_like(a[:, 0]), inputs)
    if reverse:
        inputs = jax.tree.map(lambda a: jnp.flip(a, 1), inputs)
        starts = reversed_starts(starts)
    states = _linear_scan(implementation, decay, inputs, initial, starts)
    last = jax.tree.map(lambda a: a[:, -1], states)
    return (jax.tree.map(lambda a: jnp.flip(a, 1), states) if reverse else states), last


def _times(a: Any, b: Any) -> Any:
    return product(a, b) if isinstance(a, Pair) else a * b


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear_scan(implementation: str | None, decay: Any, inputs: Any, initial: Any, starts: Array | None) -> Any:
    if implementation is None:
        run = lambda how: functools.partial(_states, how)
        return jax.lax.platform_dependent(decay, inputs, initial, starts, cpu=run("sequential"), default=run("associative"))
    return _states(implementation, decay, inputs, initial, starts)


def _states(implementation: str, decay: Any, inputs: Any, initial: Any, starts: Array | None) -> Any:
    if implementation == "sequential":  # without the running product of decays, which the frame would carry along

        def step(state: Any, element: tuple) -> tuple[Any, Any]:
            x, start = element
            if start is not None:
                state = jax.tree.map(lambda a: jnp.where(start.reshape(-1, *(1,) * (a.ndim - 1)), 0, a), state)
            state = jax.tree.map(jnp.add, _times(decay, state), x)
            return state, state

        xs = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), (inputs, starts))
        return jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), jax.lax.scan(step, initial, xs)[1])
    monoid = COMPLEX_AFFINE if isinstance(decay, Pair) else AFFINE
    decays = jax.tree.map(lambda a, x: jnp.broadcast_to(a, x.shape), decay, inputs)
    start = jax.tree.map(lambda a: jnp.broadcast_to(a, a.shape), initial)
    ones = monoid.identity((start, start))[0]
    (_, states), _ = prefix_scan(
        monoid, (decays, inputs), initial=(ones, initial), starts=starts, implementation=implementation
    )
    return states


def _linear_scan_forward(implementation: str | None, decay: Any, inputs: Any, initial: Any, starts: Array | None) -> tuple:
    states = _linear_scan(implementation, decay, inputs, initial, starts)
    return states, (decay, states, initial, starts)


def _linear_scan_backward(implementation: str | None, saved: tuple, d_states: Any) -> tuple:
    decay, states, initial, starts = saved
    turned = conjugate(decay) if isinstance(decay, Pair) else decay
    d_inputs, _ = linear_scan(turned, d_states, starts=starts, reverse=True, implementation=implementation)
    before = jax.tree.map(lambda a, s: jnp.concatenate([a[:, None], s[:, :-1]], axis=1), initial, states)
    if starts is not None:
        before = jax.tree.map(lambda a: jnp.where(starts.reshape(*starts.shape, *(1,) * (a.ndim - 2)), 0, a), before)
    before = conjugate(before) if isinstance(before, Pair) else before
    d_decay = jax.tree.map(lambda a: a.sum((0, 1)), _times(before, d_inputs))
    kept = d_inputs if starts is None else jax.tree.map(lambda a: _masked_first(a, starts), d_inputs)
    d_initial = _times(turned, jax.tree.map(lambda a: a[:, 0], kept))
    return d_decay, d_inputs, d_initial, None


def _masked_first(values: Array, starts: Array) -> Array:
    """`values` with those of the first token zero where that token starts a segment."""
    first = jnp.where(starts[:, 0].reshape(-1, *(1,) * (values.ndim - 2)), 0, values[:, 0])
    return values.at[:, 0].set(first)


_linear_scan.defvjp(_linear_scan_forward, _linear_scan_backward)
