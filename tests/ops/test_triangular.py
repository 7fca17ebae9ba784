"""The inverse of unit triangular matrices, beside NumPy's in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqjax.ops.triangular import unit_lower_inverse, unit_lower_inverse_flops
from seqjax.scaling.flops import count_flops


@pytest.mark.parametrize("size", [1, 2, 3, 8, 9, 37, 64])
def test_equals_numpys_inverse(size):
    a = np.random.default_rng(size).standard_normal((2, size, size)) / 2
    with jax.enable_x64(True):
        got = unit_lower_inverse(jnp.asarray(a))
    want = np.linalg.inv(np.eye(size) + np.tril(a, -1))
    np.testing.assert_allclose(got, want, atol=1e-12 * np.abs(want).max())


def test_repeated_keys_cost_no_digits():
    """With ones everywhere, the powers that a sum would need reach 1e18, and the inverse is of ones and zeros."""
    got = unit_lower_inverse(jnp.ones((64, 64)))
    np.testing.assert_array_equal(got, np.eye(64) - np.eye(64, k=-1))


def test_gradients_are_those_of_the_inverse():
    rng = np.random.default_rng(0)
    a, cotangent = rng.standard_normal((2, 13, 13)) / 3
    with jax.enable_x64(True):
        _, pull = jax.vjp(unit_lower_inverse, jnp.asarray(a))
        (got,) = pull(jnp.asarray(cotangent))
    turned = np.linalg.inv(np.eye(13) + np.tril(a, -1)).T
    np.testing.assert_allclose(got, np.tril(-turned @ cotangent @ turned, -1), atol=1e-12)


@pytest.mark.parametrize("size", [1, 5, 16, 37])
def test_flops_are_those_traced(size):
    counted = count_flops(unit_lower_inverse, jax.ShapeDtypeStruct((size, size), jnp.float32))
    assert unit_lower_inverse_flops(size) == counted


def test_calls_no_library():
    """Its batched calls can wait for one another for ever."""
    text = jax.jit(unit_lower_inverse).lower(jax.ShapeDtypeStruct((8, 64, 64), jnp.float32)).compile().as_text()
    assert 'custom_call_target="lapack' not in text
