"""Newton's method over the sequence against loops in NumPy float64, and reference arrays of ParaRNN."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from seqjax.ops import newton_scan
from seqjax.ops.cells import gru_cell, lstm_cell, para_gru_cell, para_lstm_cell
from seqjax.ops.recurrence import recurrence

GOLDEN = np.load(pathlib.Path(__file__).parent / "data" / "pararnn.npz")
FEATURES = 5
STARTS = np.array([[False] * 6 + [True] + [False] * 6, [True] + [False] * 12])

arrays = functools.partial(jax.tree.map, jnp.asarray)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gru_by_hand(a, h, x):
    z, r = sigmoid(a[0] * h + x[:, 0]), sigmoid(a[1] * h + x[:, 1])
    return (1 - z) * h + z * np.tanh(a[2] * (h * r) + x[:, 2])


def lstm_by_hand(weights, state, x):
    (a, p), (c, h) = weights, state
    f = sigmoid(a[0] * h + p[0] * c + x[:, 0])
    c = f * c + (1 - f) * np.tanh(a[2] * h + x[:, 2])
    return c, sigmoid(a[1] * h + p[1] * c + x[:, 1]) * np.tanh(c)


def linear_cell(weights, h, x):
    return weights * h + x


CELLS = {"gru": (para_gru_cell, gru_by_hand), "lstm": (para_lstm_cell, lstm_by_hand)}


def draw(name, length=13, scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape)
    weights = scale * normal(3, FEATURES) / 2
    state = np.tanh(normal(2, FEATURES))
    if name == "lstm":
        weights, state = (weights, normal(2, FEATURES) / 2), (np.tanh(normal(2, FEATURES)), state)
    return weights, state, normal(2, length, 3, FEATURES)


def by_hand(step, weights, state, inputs, starts=None):
    states = []
    for t in range(inputs.shape[1]):
        if starts is not None:
            state = jax.tree.map(lambda a, t=t: np.where(starts[:, t, None], 0, a), state)
        state = step(weights, state, inputs[:, t])
        states.append(state)
    return jax.tree.map(lambda *a: np.stack(a, axis=1), *states)


@pytest.mark.parametrize("implementation", ["newton", "sequential"])
@pytest.mark.parametrize("starts", [None, STARTS])
@pytest.mark.parametrize("name", CELLS)
def test_states_equal_a_loop(name, starts, implementation):
    cell, step = CELLS[name]
    operands = draw(name)
    with jax.enable_x64(True):
        run = functools.partial(newton_scan, cell, implementation=implementation)
        found = jax.jit(run)(*arrays(operands), starts=arrays(starts))
    wanted = by_hand(step, *operands, starts)
    assert found.converged and (found.iterations == 0) == (implementation == "sequential")
    for got, last, want in zip(*map(jax.tree.leaves, (found.states, found.last, wanted))):
        np.testing.assert_allclose(got, want, atol=1e-13)
        np.testing.assert_allclose(last, want[:, -1], atol=1e-13)


@pytest.mark.parametrize("implementation", ["newton", "sequential"])
@pytest.mark.parametrize("name", CELLS)
def test_gradients_equal_finite_differences(name, implementation):
    def outcome(*operands):
        found = newton_scan(CELLS[name][0], *arrays(operands), starts=jnp.asarray(STARTS), implementation=implementation)
        return found.states, found.last

    with jax.enable_x64(True):
        check_grads(outcome, arrays(draw(name)), order=1, modes=["rev"], rtol=1e-6)


@pytest.mark.parametrize("iterations", [1, 2, 3, 4])
@pytest.mark.parametrize("name", CELLS)
def test_errors_fall_as_published(name, iterations):
    """After i corrections: the reference's iterates, to a tenth of their error, and no more corrections than it needs."""
    x = GOLDEN["x"].reshape(2, 64, 2, 3)
    mapped = np.einsum("blhi,higo->blgho", x, GOLDEN[f"{name}_B"]).reshape(2, 64, 3, 8) + GOLDEN[f"{name}_b"]
    weights = GOLDEN["gru_A"] if name == "gru" else (GOLDEN["lstm_A"], GOLDEN["lstm_C"])
    truth = GOLDEN["gru_h"] if name == "gru" else GOLDEN["lstm_state"]
    zeros = np.zeros((2, 8)) if name == "gru" else (np.zeros((2, 8)), np.zeros((2, 8)))
    error = GOLDEN[f"{name}_newton_err"][iterations - 1]  # the correction of the next step is of this size
    with jax.enable_x64(True):
        found = newton_scan(CELLS[name][0], *arrays((weights, zeros, mapped)), implementation="newton", tolerance=1.5 * error)
        np.testing.assert_allclose(np.concatenate(jax.tree.leaves(found.states), axis=-1), truth, atol=error)
    assert found.converged and found.iterations == iterations


def test_gradients_equal_the_reference():
    x = GOLDEN["x"]

    def loss(x, weights, maps, bias):
        mapped = jnp.einsum("blhi,higo->blgho", x.reshape(2, 64, 2, 3), maps).reshape(2, 64, 3, 8) + bias
        found = newton_scan(para_gru_cell, weights, jnp.zeros((2, 8)), mapped, implementation="newton")
        return jnp.sum(found.states * GOLDEN["cot"])

    with jax.enable_x64(True):
        got = jax.grad(loss, argnums=(0, 1, 2, 3))(x, *(GOLDEN[f"gru_{key}"] for key in "ABb"))
    for gradient, key in zip(got, ("x", "A", "B", "b")):
        np.testing.assert_allclose(gradient, GOLDEN[f"gru_grad_{key}"], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", CELLS)
def test_float32_over_4096_tokens(name):
    cell, step = CELLS[name]
    operands = draw(name, length=4096)
    narrow = jax.tree.map(lambda a: a.astype(np.float32), operands)
    cotangent = np.random.default_rng(1).standard_normal((2, 4096, FEATURES))
    loss = lambda how, *a: jnp.sum(jax.tree.leaves(newton_scan(cell, *a, implementation=how).states)[-1] * cotangent)
    found = jax.jit(lambda *a: newton_scan(cell, *a, implementation="newton"))(*arrays(narrow))
    assert found.converged and found.iterations <= 8
    for got, want in zip(jax.tree.leaves(found.states), jax.tree.leaves(by_hand(step, *operands))):
        np.testing.assert_allclose(got, want, atol=1e-5)
    got = jax.jit(jax.grad(functools.partial(loss, "newton"), argnums=(0, 1, 2)))(*narrow)
    with jax.enable_x64(True):
        wanted = jax.jit(jax.grad(functools.partial(loss, "sequential"), argnums=(0, 1, 2)))(*operands)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted)):
        assert np.abs(np.asarray(a) - np.asarray(b)).max() <= 1e-4 * np.abs(b).max()


def test_a_linear_recurrence_takes_one_correction():
    rng = np.random.default_rng(0)
    weights, state, x = (
        rng.uniform(-0.9, 0.9, FEATURES),
        rng.standard_normal((2, FEATURES)),
        rng.standard_normal((2, 40, FEATURES)),
    )
    with jax.enable_x64(True):
        found = newton_scan(linear_cell, *arrays((weights, state, x)), implementation="newton", tolerance=1e-12)
    np.testing.assert_allclose(found.states, by_hand(linear_cell, weights, state, x), atol=1e-13)
    assert found.iterations == 2  # the second one finds nothing to correct


@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_where_newton_does_not_converge_a_loop_gives_the_states(scale):
    operands = draw("gru", length=64, scale=scale)
    with jax.enable_x64(True):
        found = newton_scan(para_gru_cell, *arrays(operands), implementation="newton", max_iterations=2, tolerance=1e-14)
    assert not found.converged and found.iterations <= 2
    np.testing.assert_allclose(found.states, by_hand(gru_by_hand, *operands), atol=1e-13)


def test_values_that_are_not_numbers_end_the_iterations():
    weights, state, x = draw("gru", length=32)
    x[0, 3] = np.nan
    found = newton_scan(para_gru_cell, *arrays((weights, state, x)), implementation="newton")
    assert not found.converged and found.iterations == 1
    np.testing.assert_allclose(found.states[1], by_hand(gru_by_hand, weights, state, x)[1], atol=1e-6)
    assert np.isnan(found.states[0, 3:]).all() and not np.isnan(found.states[0, :3]).any()


def test_the_backward_pass_keeps_nothing_of_the_iterations():
    operands = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, np.float32), draw("gru", length=4096))

    def memory(max_iterations):
        loss = lambda *a: newton_scan(para_gru_cell, *a, implementation="newton", max_iterations=max_iterations).states.sum()
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*operands).compile().memory_analysis().temp_size_in_bytes

    assert memory(20) == memory(2)


@pytest.mark.parametrize("option", [{"implementation": "fast"}, {"max_iterations": 0}])
def test_bad_options(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        newton_scan(para_gru_cell, *arrays(draw("gru")), **option)


def test_dense_cells_equal_their_equations():
    """GRU with the reset gate after the matrix, and LSTM, one row and token at a time."""
    rng = np.random.default_rng(0)
    width, x = 4, rng.standard_normal((2, 9, 4, 4))
    weights, bias, h, c = (rng.standard_normal(s) / 2 for s in ((width, 4, width), (width,), (2, width), (2, width)))
    with jax.enable_x64(True):
        gru, _ = recurrence(gru_cell, *arrays(((weights[:, :3], bias), h, x[:, :, :3])))
        lstm, (last_c, _) = recurrence(lstm_cell, *arrays((weights, (c, h), x)))
    for b in range(2):
        hidden, cell, memory = h[b], h[b], c[b]
        for t in range(9):
            r, z = (sigmoid(x[b, t, g] + hidden @ weights[:, g]) for g in (0, 1))
            n = np.tanh(x[b, t, 2] + r * (hidden @ weights[:, 2] + bias))
            hidden = (1 - z) * n + z * hidden
            np.testing.assert_allclose(gru[b, t], hidden, atol=1e-13)
            i, f, o = (sigmoid(x[b, t, g] + cell @ weights[:, g]) for g in (0, 1, 3))
            memory = f * memory + i * np.tanh(x[b, t, 2] + cell @ weights[:, 2])
            cell = o * np.tanh(memory)
            np.testing.assert_allclose(lstm[b, t], cell, atol=1e-13)
        np.testing.assert_allclose(last_c[b], memory, atol=1e-13)
