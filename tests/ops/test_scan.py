"""Prefix scans and linear scans against loops in NumPy."""

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqjax.ops.complex_pairs import Pair
from seqjax.ops.scan import AFFINE, COMPLEX_AFFINE, SCANS, Monoid, linear_scan, prefix_scan

MATRICES = Monoid(
    lambda earlier, later: earlier @ later,
    lambda e: jnp.broadcast_to(jnp.eye(2, dtype=e.dtype), e.shape),
)
"""2 x 2 matrices under multiplication: order matters."""


class Case(NamedTuple):
    """A monoid, with its operation on NumPy trees written once more."""

    monoid: Monoid
    combine: Any
    draw: Any  # (rng, leading axes) -> elements, complex where the monoid's are pairs


def affine(earlier, later):
    return earlier[0] * later[0], later[0] * earlier[1] + later[1]


def complex_normal(rng, *shape):
    return rng.standard_normal(shape) + 1j * rng.standard_normal(shape)


CASES = {
    "affine": Case(AFFINE, affine, lambda rng, *s: (rng.uniform(-1, 1, (*s, 3)), rng.standard_normal((*s, 3)))),
    "complex": Case(COMPLEX_AFFINE, affine, lambda rng, *s: (0.7 * complex_normal(rng, *s, 3), complex_normal(rng, *s, 3))),
    "matrices": Case(MATRICES, operator.matmul, lambda rng, *s: 0.8 * rng.standard_normal((*s, 2, 2))),
}


def to_jax(tree):
    return jax.tree.map(lambda a: Pair(a.real, a.imag) if jnp.iscomplexobj(a) else a, tree)


def to_complex(tree):
    whole = lambda a: a.real + 1j * a.imag if isinstance(a, Pair) else a
    return jax.tree.map(whole, tree, is_leaf=lambda a: isinstance(a, Pair))


def by_hand(combine, elements, initial, starts, reverse):
    """One row and one token at a time: prefixes `[B, L, ...]`, and the last ones."""
    batch, length = jax.tree.leaves(elements)[0].shape[:2]
    prefixes = jax.tree.map(np.empty_like, elements)
    last = jax.tree.map(lambda a: np.empty_like(a[:, 0]), elements)
    for b in range(batch):
        total = None if initial is None else jax.tree.map(lambda a: a[b], initial)  # noqa: B023
        for t in reversed(range(length)) if reverse else range(length):
            edge = t + 1 if reverse else t  # the boundary that was crossed on the way to t
            if starts is not None and edge < length and starts[b, edge]:
                total = None
            element = jax.tree.map(lambda a: a[b, t], elements)  # noqa: B023
            total = element if total is None else combine(total, element)
            for whole, value in zip(jax.tree.leaves(prefixes), jax.tree.leaves(total)):
                whole[b, t] = value
        for whole, value in zip(jax.tree.leaves(last), jax.tree.leaves(total)):
            whole[b] = value
    return prefixes, last


def assert_close(got, wanted, tolerance=1e-12):
    got, wanted = jax.tree.leaves(to_complex(got)), jax.tree.leaves(to_complex(wanted))
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * max(1, np.abs(b).max()))


@functools.cache
def compiled(name, **options):
    return jax.jit(functools.partial(prefix_scan, CASES[name].monoid, **options))


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(list(CASES)),
    implementation=st.sampled_from(list(SCANS)),
    reverse=st.booleans(),
    starts=st.none() | st.lists(st.booleans(), min_size=14, max_size=14),
    continued=st.booleans(),
    seed=st.integers(0, 9),
)
def test_prefixes_equal_a_loop_over_tokens(name, implementation, reverse, starts, continued, seed):
    case, rng = CASES[name], np.random.default_rng(seed)
    elements = case.draw(rng, 2, 7)
    initial = case.draw(rng, 2) if continued else None
    starts = None if starts is None else np.array(starts).reshape(2, 7)
    with jax.enable_x64(True):
        scan = compiled(name, implementation=implementation, reverse=reverse, chunk_size=3)
        got = scan(to_jax(elements), initial=to_jax(initial), starts=starts)
        assert_close(got, by_hand(case.combine, elements, initial, starts, reverse))


@pytest.mark.parametrize(
    ("implementation", "chunk_size"), [("sequential", 64), ("associative", 64), ("chunked", 64), ("chunked", 9)]
)
@pytest.mark.parametrize("length", [1, 65])
@pytest.mark.parametrize("name", CASES)
def test_lengths_that_no_chunk_divides(name, length, implementation, chunk_size):
    case, rng = CASES[name], np.random.default_rng(length)
    elements, initial = case.draw(rng, 2, length), case.draw(rng, 2)
    starts = rng.random((2, length)) < 0.1
    with jax.enable_x64(True):
        scan = functools.partial(prefix_scan, case.monoid, implementation=implementation, chunk_size=chunk_size)
        got = jax.jit(scan)(to_jax(elements), initial=to_jax(initial), starts=starts)
        assert_close(got, by_hand(case.combine, elements, initial, starts, reverse=False))


@pytest.mark.parametrize("implementation", SCANS)
@pytest.mark.parametrize("name", CASES)
def test_gradients_of_prefixes_equal_those_of_a_plain_loop(name, implementation):
    """Also through the chunks that the backward pass runs again."""
    case, rng = CASES[name], np.random.default_rng(0)
    elements, initial, weights = case.draw(rng, 2, 7), case.draw(rng, 2), case.draw(rng, 2, 7)
    starts = np.array([[False, False, True, False, False, False, True], [True] + [False] * 6])

    def plain(elements, initial):
        elements, total = to_complex((elements, initial))
        prefixes = []
        for t in range(7):
            element = jax.tree.map(lambda a: a[:, t], elements)  # noqa: B023
            fresh = lambda new, e: jnp.where(starts[:, t].reshape(-1, *(1,) * (e.ndim - 1)), e, new)  # noqa: B023
            total = jax.tree.map(fresh, case.combine(total, element), element)
            prefixes.append(total)
        return to_jax(jax.tree.map(lambda *a: jnp.stack(a, 1), *prefixes))

    def scanned(elements, initial):
        options = {"starts": jnp.asarray(starts), "implementation": implementation, "chunk_size": 3}
        return prefix_scan(case.monoid, elements, initial=initial, **options)[0]

    with jax.enable_x64(True):
        loss = lambda run: lambda *args: sum(jax.tree.leaves(jax.tree.map(jnp.vdot, to_jax(weights), run(*args))))
        got, wanted = (jax.jit(jax.grad(loss(run), (0, 1)))(to_jax(elements), to_jax(initial)) for run in (scanned, plain))
        assert_close(got, wanted)


@functools.cache
def compiled_linear(**options):
    """States, the last of them, and the gradients of a sum of both with weights."""

    def run(decay, inputs, initial, starts, weights):
        def loss(decay, inputs, initial):
            found = linear_scan(decay, inputs, initial, starts=starts, **options)
            return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, weights, found))), found

        grads, found = jax.grad(loss, (0, 1, 2), has_aux=True)(decay, inputs, initial)
        return found, grads

    return jax.jit(run)


def linear_by_hand(decay, inputs, initial, starts, reverse, weights):
    """States and last ones; and gradients of `Re sum conj(weights) states` by the chain rule, one token at a time."""
    elements = (np.broadcast_to(decay, inputs.shape), inputs)
    (_, states), (_, last) = by_hand(affine, elements, (np.ones_like(initial), initial), starts, reverse)
    batch, length = inputs.shape[:2]
    d_decay, d_inputs, d_initial = np.zeros_like(decay), np.zeros_like(inputs), np.zeros_like(initial)
    order = list(reversed(range(length)) if reverse else range(length))
    for b in range(batch):
        d_state = weights[1][b].copy()
        for i, t in reversed(list(enumerate(order))):
            d_state = d_state + weights[0][b, t]
            d_inputs[b, t] = d_state
            edge = t + 1 if reverse else t
            if starts is not None and edge < length and starts[b, edge]:
                d_state = np.zeros_like(d_state)
                continue
            d_decay += np.conj(states[b, order[i - 1]] if i else initial[b]) * d_state
            d_state = np.conj(decay) * d_state
        d_initial[b] = d_state
    return (states, last), (d_decay, d_inputs, d_initial)


@settings(max_examples=40, deadline=None)
@given(
    is_complex=st.booleans(),
    implementation=st.sampled_from([None, *SCANS]),
    reverse=st.booleans(),
    starts=st.none() | st.lists(st.booleans(), min_size=14, max_size=14),
    seed=st.integers(0, 9),
)
def test_linear_scan_and_its_gradients_equal_a_loop(is_complex, implementation, reverse, starts, seed):
    rng = np.random.default_rng(seed)
    draw = (lambda *shape: complex_normal(rng, *shape)) if is_complex else (lambda *shape: rng.standard_normal(shape))
    decay, inputs, initial = 0.7 * draw(4, 3), draw(2, 7, 4, 3), draw(2, 4, 3)
    weights = (draw(2, 7, 4, 3), draw(2, 4, 3))
    starts = None if starts is None else np.array(starts).reshape(2, 7)
    with jax.enable_x64(True):
        run = compiled_linear(reverse=reverse, implementation=implementation)
        got = run(*to_jax((decay, inputs, initial)), starts, to_jax(weights))
        assert_close(got, linear_by_hand(decay, inputs, initial, starts, reverse, weights))


@pytest.mark.parametrize("implementation", SCANS)
def test_a_linear_scan_starts_from_zero_and_takes_any_length(implementation):
    rng = np.random.default_rng(0)
    for length in (1, 65):
        decay, inputs = rng.uniform(-1, 1, 3), rng.standard_normal((2, length, 3))
        with jax.enable_x64(True):
            got = linear_scan(jnp.asarray(decay), jnp.asarray(inputs), implementation=implementation)
        zeros = np.zeros((2, 3))
        wanted, _ = linear_by_hand(decay, inputs, zeros, None, False, (np.zeros_like(inputs), zeros))
        assert_close(got, wanted)


def test_half_precision_inputs_are_carried_in_single_precision():
    rng = np.random.default_rng(0)
    decay, inputs = np.float32([0.999, 0.5, -0.9]), jnp.asarray(rng.standard_normal((2, 300, 3)), jnp.bfloat16)
    states, last = linear_scan(jnp.asarray(decay), inputs)
    assert states.dtype == last.dtype == jnp.float32
    exact = np.asarray(inputs, np.float64)
    zeros = np.zeros((2, 3))
    wanted, _ = linear_by_hand(np.float64(decay), exact, zeros, None, False, (np.zeros_like(exact), zeros))
    assert_close((states, last), wanted, 1e-5)
    assert jax.grad(lambda x: linear_scan(jnp.asarray(decay), x)[0].sum())(inputs).dtype == jnp.bfloat16


def test_an_unknown_implementation_is_refused():
    x = jnp.zeros((1, 2, 3))
    for scan in (
        lambda: prefix_scan(AFFINE, (x, x), implementation="parallel"),
        lambda: linear_scan(x[0, 0], x, implementation="parallel"),
    ):
        with pytest.raises(
            ValueError, match=r"implementation='parallel' of a scan is unknown.*sequential, associative, chunked"
        ):
            scan()
