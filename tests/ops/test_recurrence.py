"""Recurrences in time against loops in NumPy, and their gradients against autodiff of a plain scan."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from seqjax.ops.recurrence import recurrence, sum_modes

WIDTH, MODES = 3, 2


def gated_step(constants, state, x):
    """A nonlinear step on a tree of states; works for constants with a batch axis too."""
    a, w = constants
    h = jnp.tanh(w * state["h"] + x["u"])
    m = a * state["m"] + (h * x["v"])[:, None]
    return {"h": h, "m": m}, {"y": m.sum(1), "z": h * x["v"]}


def matrix_step(constants, state, x):
    """A step whose constant has no elementwise form."""
    h = jnp.tanh(state["h"] @ constants + x["u"])
    return {"h": h, "m": state["m"] + h[:, None]}, {"y": h * x["v"], "z": state["m"].sum(1)}


def gated_by_hand(constants, h, m, u, v):
    a, w = constants
    h = np.tanh(w * h + u)
    m = a * m + h * v
    return h, m, m.sum(0), h * v


def matrix_by_hand(constants, h, m, u, v):
    new = np.tanh(h @ constants + u)
    return new, m + new, new * v, m.sum(0)


STEPS = {"gated": (gated_step, gated_by_hand), "matrix": (matrix_step, matrix_by_hand)}


def draw(name, length, seed=0):
    rng = np.random.default_rng(seed)
    constants = {
        "gated": (rng.uniform(0.2, 0.9, (MODES, WIDTH)), rng.standard_normal(WIDTH)),
        "matrix": 0.5 * rng.standard_normal((WIDTH, WIDTH)),
    }[name]
    state = {"h": rng.standard_normal((2, WIDTH)), "m": rng.standard_normal((2, MODES, WIDTH))}
    inputs = {name: rng.standard_normal((2, length, WIDTH)) for name in "uv"}
    return constants, state, inputs


def by_hand(step, constants, state, inputs, starts, reverse):
    """One row and one token at a time."""
    batch, length = inputs["u"].shape[:2]
    y = {name: np.zeros((batch, length, WIDTH)) for name in "yz"}
    last = jax.tree.map(np.copy, state)
    for b in range(batch):
        h, m = state["h"][b], state["m"][b]
        for t in reversed(range(length)) if reverse else range(length):
            edge = t + 1 if reverse else t
            if starts is not None and edge < length and starts[b, edge]:
                h, m = np.zeros_like(h), np.zeros_like(m)
            h, m, y["y"][b, t], y["z"][b, t] = step(constants, h, m, inputs["u"][b, t], inputs["v"][b, t])
        last["h"][b], last["m"][b] = h, m
    return y, last


def plain(step, constants, state, inputs, starts, reverse):
    """`lax.scan`, for autodiff to differentiate."""
    length = inputs["u"].shape[1]
    crossed = jnp.zeros((2, length), bool) if starts is None else starts
    if reverse:
        crossed = jnp.concatenate([crossed[:, 1:], jnp.zeros((2, 1), bool)], axis=1)

    def advance(state, x):
        inputs, crossed = x
        keep = lambda a: a * ~crossed.reshape(-1, *(1,) * (a.ndim - 1))
        return step(constants, jax.tree.map(keep, state), inputs)

    xs = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), (inputs, crossed))
    state, y = jax.lax.scan(advance, state, xs, reverse=reverse)
    return jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), y), state


@functools.cache
def compiled(run, name, **options):
    """Outputs, the last state, and gradients of a sum of their squares with respect to constants, state and inputs."""

    def both(constants, state, inputs, starts):
        def loss(*args):
            found = run(STEPS[name][0], *args, starts=starts, **options)
            return sum(jnp.sum(a**2) for a in jax.tree.leaves(found)), found

        grads, found = jax.grad(loss, (0, 1, 2), has_aux=True)(constants, state, inputs)
        return found, grads

    return jax.jit(both)


def assert_close(got, wanted, tolerance=1e-11):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * max(1, np.abs(b).max()))


def check(name, length, starts, reverse, seed=0, **options):
    with jax.enable_x64(True):
        arguments = draw(name, length, seed)
        traced = None if starts is None else jnp.asarray(starts)
        found, grads = compiled(recurrence, name, reverse=reverse, **options)(*arguments, traced)
        assert_close(found, by_hand(STEPS[name][1], *arguments, starts, reverse))
        assert_close(grads, compiled(plain, name, reverse=reverse)(*arguments, traced)[1])


@pytest.mark.parametrize(("name", "elementwise"), [("gated", False), ("gated", True), ("matrix", False)])
@pytest.mark.parametrize(("length", "reverse"), [(1, False), (1, True), (7, False), (60, True), (61, False), (61, True)])
def test_outputs_state_and_gradients(length, name, elementwise, reverse):
    """61 is prime: its last chunk is shorter than the others."""
    starts = np.random.default_rng(length).random((2, length)) < 0.15
    check(name, length, starts, reverse, elementwise=elementwise)


@settings(max_examples=40, deadline=None)
@given(
    chunk_size=st.sampled_from([1, 3, 7, 100]),
    reverse=st.booleans(),
    starts=st.none() | st.lists(st.booleans(), min_size=14, max_size=14),
    seed=st.integers(0, 9),
)
def test_any_starts_and_any_chunks(chunk_size, reverse, starts, seed):
    starts = None if starts is None else np.array(starts).reshape(2, 7)
    check("gated", 7, starts, reverse, seed, chunk_size=chunk_size, elementwise=True)


def test_gradients_equal_finite_differences():
    starts = jnp.asarray([[False, False, True, False, False], [True, False, False, False, True]])
    with jax.enable_x64(True):
        run = functools.partial(recurrence, gated_step, starts=starts, chunk_size=2, elementwise=True)
        check_grads(run, draw("gated", 5), order=1, modes=["rev"])


def test_two_calls_equal_one():
    with jax.enable_x64(True):
        constants, state, inputs = draw("gated", 13)
        y, last = recurrence(gated_step, constants, state, inputs)
        parts = []
        for part in (slice(0, 1), slice(1, 9), slice(9, 13)):
            out, state = recurrence(gated_step, constants, state, jax.tree.map(lambda a: a[:, part], inputs))  # noqa: B023
            parts.append(out)
        assert_close((jax.tree.map(lambda *a: jnp.concatenate(a, 1), *parts), state), (y, last), 1e-13)


def decay_step(constants, h, u):
    a, c = constants
    h = a * h + jnp.tanh(u)[:, None]
    return h, sum_modes(c * h)


def test_the_backward_pass_keeps_the_states_of_chunks_only():
    modes, width, length = 16, 32, 4096
    struct = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    shapes = ((struct(modes, width), struct(modes, width)), struct(1, modes, width), struct(1, length, width))

    def scanned(constants, state, inputs):
        last, y = jax.lax.scan(functools.partial(decay_step, constants), state, jnp.swapaxes(inputs, 0, 1))
        return y, last

    def temporaries(run):
        loss = lambda *arguments: sum(jnp.sum(a**2) for a in jax.tree.leaves(run(*arguments)))
        return jax.jit(jax.grad(loss, (0, 1, 2))).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    ours = temporaries(functools.partial(recurrence, decay_step, elementwise=True))
    states, inputs = 4 * length * modes * width, 4 * length * width
    assert temporaries(scanned) > states
    assert ours < 0.5 * states
    assert ours < 6 * inputs + 6 * states / 64  # inputs, outputs and their cotangents, and a state for every 64 steps


@pytest.mark.parametrize("modes", [1, 3, 8, 16, 20, 64, 128])
def test_sum_modes_is_a_sum(modes):
    rng = np.random.default_rng(modes)
    values, weights = rng.standard_normal((2, modes, 3, 2)), rng.standard_normal((2, 3, 2))
    with jax.enable_x64(True):
        total, pull = jax.vjp(sum_modes, jnp.asarray(values))
        np.testing.assert_allclose(total, values.sum(1), atol=1e-13)
        np.testing.assert_array_equal(pull(jnp.asarray(weights))[0], np.repeat(weights[:, None], modes, axis=1))
