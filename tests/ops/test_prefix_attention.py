"""Attention of one query to every prefix against a softmax per prefix in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from seqjax.ops import SOFTMAX, SoftmaxSums, prefix_attention

LENGTH, HEADS, WIDTH = 11, 2, 3
STARTS = np.array([[False] * 4 + [True] + [False] * 6, [True] + [False] * 9 + [True]])
IMPLEMENTATIONS = (None, "reference", "sequential", "associative", "chunked")


def draw(scale=1.0):
    rng = np.random.default_rng(0)
    scores, values = scale * rng.standard_normal((2, LENGTH, HEADS)), rng.standard_normal((2, LENGTH, HEADS, WIDTH))
    past = scale * rng.standard_normal((2, 5, HEADS)), rng.standard_normal((2, 5, HEADS, WIDTH))
    return scores, values, past


def sums_of(scores, values):
    """`SoftmaxSums` over axis 1."""
    top = scores.max(axis=1)
    weights = np.exp(scores - top[:, None])
    return SoftmaxSums(top, np.einsum("bsh,bshw->bhw", weights, values), weights.sum(axis=1))


def by_hand(scores, values, past=None, starts=None):
    y, sums = np.zeros_like(values), None
    for b in range(2):
        for t in range(LENGTH):
            first = 0 if starts is None else max([0, *np.flatnonzero(starts[b, : t + 1])])
            s, v = scores[b, first : t + 1], values[b, first : t + 1]
            if past is not None and (starts is None or not starts[b, : t + 1].any()):
                s, v = np.concatenate([past[0][b], s]), np.concatenate([past[1][b], v])
            weights = np.exp(s - s.max(axis=0))
            y[b, t] = np.einsum("sh,shw->hw", weights, v) / weights.sum(axis=0)[:, None]
        last = sums_of(s[None], v[None])
        sums = last if b == 0 else jax.tree.map(lambda *a: np.concatenate(a), sums, last)
    return y, sums


@pytest.mark.parametrize("scale", [1.0, 60.0])
@pytest.mark.parametrize(("continued", "starts"), [(False, None), (True, None), (True, STARTS)])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equals_a_softmax_per_prefix(implementation, continued, starts, scale):
    scores, values, past = draw(scale)
    with jax.enable_x64(True):
        state = jax.tree.map(jnp.asarray, sums_of(*past)) if continued else None
        where = None if starts is None else jnp.asarray(starts)
        y, sums = prefix_attention(jnp.asarray(scores), jnp.asarray(values), state, starts=where, implementation=implementation)
    wanted, wanted_sums = by_hand(scores, values, past if continued else None, starts)
    np.testing.assert_allclose(y, wanted, atol=1e-13)
    for got, want in zip(sums, wanted_sums):
        np.testing.assert_allclose(got, want, atol=1e-12)


@pytest.mark.parametrize("implementation", ["reference", "sequential", "associative"])
def test_gradients_equal_finite_differences(implementation):
    scores, values, past = draw()
    top, *sums = sums_of(*past)

    def outcome(scores, values, numerator, denominator):
        state = SoftmaxSums(*map(jnp.asarray, (top, numerator, denominator)))
        options = {"starts": jnp.asarray(STARTS), "implementation": implementation}
        y, last = prefix_attention(jnp.asarray(scores), jnp.asarray(values), state, **options)
        return y, last.mean

    with jax.enable_x64(True):
        check_grads(outcome, (scores, values, *sums), order=1, modes=["rev"], rtol=1e-6)


def test_scores_of_minus_infinity_leave_tokens_out():
    scores, values, _ = draw()
    scores[:, :3] = -np.inf
    loss = lambda s, v: jnp.sum(prefix_attention(s, v)[0] ** 2)
    with jax.enable_x64(True):
        y, _ = prefix_attention(jnp.asarray(scores), jnp.asarray(values))
        gradients = jax.grad(loss, argnums=(0, 1))(jnp.asarray(scores), jnp.asarray(values))
    assert not np.any(y[:, :3])
    np.testing.assert_allclose(y[:, 3], values[:, 3], atol=1e-13)
    assert all(np.isfinite(a).all() for a in gradients)


def test_the_monoid_is_associative_and_has_an_identity():
    rng = np.random.default_rng(0)
    a, b, c = (SoftmaxSums(60 * rng.standard_normal(4), rng.standard_normal((4, 3)), rng.random(4)) for _ in range(3))
    empty = SOFTMAX.identity(a)
    with jax.enable_x64(True):
        join = lambda *parts: SOFTMAX.combine(*(jax.tree.map(jnp.asarray, part) for part in parts))
        pairs = [(join(join(a, b), c), join(a, join(b, c))), (join(a, empty), a), (join(empty, a), a)]
        assert np.all(join(empty, empty).mean == 0) and np.all(join(empty, empty).log_sum == -np.inf)
    for left, right in pairs:
        for x, y in zip(left, right):
            np.testing.assert_allclose(x, y, rtol=1e-12)


def test_float32_over_100_000_tokens_of_equal_scores():
    """A running mean of ones and minus ones, from whose weights nothing may be lost."""
    signs = np.where(np.random.default_rng(0).random(100_000) < 0.5, -1, 1)
    y, sums = prefix_attention(jnp.full((1, 100_000, 1), 3.0), jnp.asarray(signs, jnp.float32)[None, :, None, None])
    np.testing.assert_allclose(y[0, :, 0, 0], signs.cumsum() / np.arange(1, 100_001), atol=1e-6)
    assert sums.denominator[0, 0] == 100_000


def test_an_unknown_implementation_is_named():
    with pytest.raises(ValueError, match="fast"):
        prefix_attention(jnp.zeros((1, 2, 1)), jnp.zeros((1, 2, 1, 1)), implementation="fast")
