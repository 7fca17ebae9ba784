"""Adaptive computation time against arrays made from its equations, the closed forms of constant probabilities, and loops."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqjax.ops.halting import Halting, halt

DATA = np.load(pathlib.Path(__file__).parent / "data" / "ut_act.npz")


def spend(probabilities, epsilon=0.01, steps=12):
    """Weights of all steps and what is spent at the end, with the same probability or one per step."""
    before, weights = Halting.fresh(np.shape(probabilities)[-2:]), []
    for i in range(steps):
        p = probabilities if np.ndim(probabilities) == 2 else probabilities[i]
        weight, before = halt(jnp.asarray(p), before, epsilon, i == steps - 1)
        weights.append(weight)
    return jnp.stack(weights), before


@pytest.mark.parametrize(
    ("p", "steps", "remainder"),
    [(0.9, 2, 0.1), (0.7311, 2, 0.2689), (0.5, 2, 0.5), (0.34, 3, 0.32), (0.3, 4, 0.1), (0.25, 4, 0.25), (0.995, 1, 1.0)],
)
def test_constant_probabilities_have_closed_forms(p, steps, remainder):
    weights, spent = spend(np.full((1, 1), p, np.float32))
    assert spent.steps[0, 0] == steps
    np.testing.assert_allclose(spent.remainder, remainder, atol=1e-6)
    np.testing.assert_allclose(weights[:, 0, 0], [p] * (steps - 1) + [remainder] + [0] * (12 - steps), atol=1e-6)
    np.testing.assert_allclose(spent.ponder_time, steps + remainder, atol=1e-6)


def step_map(s, number):
    """Of the stored arrays: causal attention to the states themselves, and a tanh."""
    logits = s @ DATA["A"] @ s.transpose(0, 2, 1)
    logits = np.where(np.tril(np.ones(logits.shape[1:], bool)), logits, -np.inf)
    attention = np.exp(logits - logits.max(-1, keepdims=True))
    attention /= attention.sum(-1, keepdims=True)
    return np.tanh(s + attention @ s @ DATA["W"] + 0.1 * number)


@pytest.mark.parametrize("copy", [False, True])
def test_stored_arrays(copy):
    with jax.enable_x64(True):
        s, y = DATA["s0"], 0
        spent, weights = Halting.fresh(s.shape[:2], jnp.float64), []
        for number in range(int(DATA["nmax"])):
            p = 1 / (1 + np.exp(-(s @ DATA["w"] + DATA["b"])))
            running = np.asarray(spent.running)
            weight, spent = halt(jnp.asarray(p), spent, float(DATA["eps"]), number == int(DATA["nmax"]) - 1)
            after = step_map(s, number)
            y = y + np.asarray(weight)[..., None] * after
            s = np.where(running[..., None], after, s) if copy else after
            weights.append(np.asarray(weight))
    np.testing.assert_allclose(y, DATA["y_accumulated_copy" if copy else "y_accumulated"], rtol=0, atol=1e-12)
    np.testing.assert_array_equal(spent.steps, DATA["n_copy" if copy else "n"])
    if not copy:
        np.testing.assert_allclose(spent.remainder, DATA["R"], rtol=0, atol=1e-12)
        used = len(DATA["u"])
        np.testing.assert_allclose(weights[:used], DATA["u"], rtol=0, atol=1e-12)
        assert not np.any(weights[used:])


def test_weights_sum_to_one_though_steps_run_out():
    rng = np.random.default_rng(0)
    probabilities = rng.uniform(0.01, 0.3, (5, 3, 7)).astype(np.float32)
    weights, spent = spend(probabilities, steps=5)
    np.testing.assert_allclose(weights.sum(0), 1, atol=1e-6)
    out_of_steps = probabilities.sum(0) < 0.98
    assert out_of_steps.any()
    np.testing.assert_allclose(spent.remainder[out_of_steps], 1 - probabilities[:4].sum(0)[out_of_steps], atol=1e-6)
    assert (spent.steps[out_of_steps] == 5).all() and (spent.total == 1).all()


def test_only_the_remainder_has_a_gradient():
    probabilities = jnp.asarray([0.3, 0.4, 0.5, 0.6])[:, None, None]  # halts at the third step
    gradient = jax.grad(lambda p: spend(p, steps=4)[1].ponder_time.sum())(probabilities)
    np.testing.assert_array_equal(gradient[:, 0, 0], [-1, -1, 0, 0])
