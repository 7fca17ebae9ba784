"""Linear recurrences with changing transitions against a loop in NumPy float64, feature by feature."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from seqjax.ops import affine_scan

STARTS = np.array([[False] * 4 + [True] + [False] * 3, [True] + [False] * 6 + [True]])
FEATURES = (3,)
arrays = functools.partial(jax.tree.map, jnp.asarray)


def draw(components, length=8, seed=0):
    rng = np.random.default_rng(seed)
    entry = lambda *axes: rng.standard_normal((2, *axes, *FEATURES))
    if components is None:
        return 0.7 * entry(length), entry(length), entry()
    matrix = tuple(tuple(0.5 * entry(length) for _ in range(components)) for _ in range(components))
    vectors = lambda *axes: tuple(entry(*axes) for _ in range(components))
    return matrix, vectors(length), vectors()


def by_hand(transitions, inputs, initial, starts, reverse):
    """One token at a time, with dense blocks: states `[K, B, L, *N]`."""
    single = not isinstance(inputs, tuple)
    blocks = np.asarray([[transitions]] if single else transitions)
    inputs, state = (np.asarray([a] if single else a) for a in (inputs, initial))
    states, length = np.zeros_like(inputs), inputs.shape[2]
    for t in reversed(range(length)) if reverse else range(length):
        edge = t + 1 if reverse else t
        if starts is not None and edge < length:
            state = np.where(starts[:, edge, None], 0, state)
        state = np.einsum("ijbn,jbn->ibn", blocks[:, :, :, t], state) + inputs[:, :, t]
        states[:, :, t] = state
    return states, state


@pytest.mark.parametrize("implementation", ["sequential", "associative", "chunked"])
@pytest.mark.parametrize(("components", "starts", "reverse"), [(None, STARTS, False), (2, None, True), (2, STARTS, True)])
def test_states_equal_a_loop(components, starts, reverse, implementation):
    operands = draw(components)
    with jax.enable_x64(True):
        run = functools.partial(affine_scan, reverse=reverse, implementation=implementation)
        states, last = jax.jit(run)(*arrays(operands), starts=arrays(starts))
    wanted, wanted_last = by_hand(*operands, starts, reverse)
    got = (states, last) if components else ((states,), (last,))
    np.testing.assert_allclose(np.stack(got[0]), wanted, atol=1e-12)
    np.testing.assert_allclose(np.stack(got[1]), wanted_last, atol=1e-12)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("components", [None, 2])
def test_gradients_equal_finite_differences(components, reverse):
    with jax.enable_x64(True):
        run = lambda *a: affine_scan(*arrays(a), starts=jnp.asarray(STARTS), reverse=reverse)
        check_grads(run, arrays(draw(components)), order=1, modes=["rev"], rtol=1e-6)


def test_without_an_initial_state_it_starts_from_zero():
    a, x, initial = arrays(draw(None))
    np.testing.assert_array_equal(affine_scan(a, x)[0], affine_scan(a, x, jnp.zeros_like(initial))[0])
    assert affine_scan(a.astype(jnp.bfloat16), x.astype(jnp.bfloat16))[0].dtype == jnp.float32


def test_an_unknown_implementation_is_named():
    with pytest.raises(ValueError, match="fast"):
        affine_scan(*arrays(draw(None)), implementation="fast")
