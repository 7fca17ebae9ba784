"""Discretisation against SciPy, against closed forms in complex128, and of diagonal systems against dense ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

from seqjax.ops.discretization import DENSE_METHODS, DIAGONAL_METHODS, discretize_dense, discretize_diagonal
from seqjax.ops.hippo import hippo

SCIPY_NAMES = {"bilinear": "bilinear", "zoh": "zoh", "euler": "euler", "backward_euler": "backward_diff"}


def scipy_says(A, B, dt, method, alpha=None):
    empty = np.zeros((1, len(B)))
    A_bar, B_bar, *_ = scipy.signal.cont2discrete((A, B[:, None], empty, np.zeros((1, 1))), dt, method=method, alpha=alpha)
    return A_bar, B_bar[:, 0]


def as_complex(pair):
    return np.asarray(pair.real) + 1j * np.asarray(pair.imag)


@pytest.mark.parametrize("method", DENSE_METHODS)
@pytest.mark.parametrize("measure", ["legs", "legt", "lmu"])
def test_dense_equals_scipy(method, measure):
    A, B = hippo(measure, 6)
    steps = np.array([0.001, 0.03, 0.1])
    with jax.enable_x64(True):
        got_A, got_B = discretize_dense(A, B, steps, method)
    assert got_A.shape == (3, 6, 6) and got_B.shape == (3, 6)
    for i, dt in enumerate(steps):
        wanted_A, wanted_B = scipy_says(A, B, dt, SCIPY_NAMES[method])
        np.testing.assert_allclose(got_A[i], wanted_A, atol=1e-13)
        np.testing.assert_allclose(got_B[i], wanted_B, atol=1e-13)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_generalised_bilinear_equals_scipy(alpha):
    A, B = hippo("legs", 5)
    with jax.enable_x64(True):
        got = discretize_dense(A, B, 0.05, "bilinear", alpha=alpha)
    for a, b in zip(got, scipy_says(A, B, 0.05, "gbt", alpha)):
        np.testing.assert_allclose(a, b, atol=1e-14)


@pytest.mark.parametrize("method", DENSE_METHODS)
def test_dense_broadcasts_leading_axes(method):
    rng = np.random.default_rng(0)
    A, B = rng.standard_normal((2, 1, 3, 3)), rng.standard_normal((4, 3))
    dt = np.array([[0.1], [0.2]])
    with jax.enable_x64(True):
        got_A, got_B = jax.jit(lambda *a: discretize_dense(*a, method))(A, B, dt)
        assert got_A.shape == (2, 4, 3, 3) and got_B.shape == (2, 4, 3)
        for i, j in np.ndindex(2, 4):
            wanted_A, wanted_B = discretize_dense(A[i, 0], B[j], dt[i, 0], method)
            np.testing.assert_allclose(got_A[i, j], wanted_A, atol=1e-14)
            np.testing.assert_allclose(got_B[i, j], wanted_B, atol=1e-14)


def test_zero_order_hold_of_an_integrator():
    # A double integrator: A is singular, and position under a constant push is dt^2 / 2.
    A, B, dt = np.array([[0.0, 1.0], [0.0, 0.0]]), np.array([0.0, 1.0]), 0.3
    A_bar, B_bar = discretize_dense(A, B, dt, "zoh")
    np.testing.assert_allclose(A_bar, [[1, dt], [0, 1]], atol=1e-7)
    np.testing.assert_allclose(B_bar, [dt**2 / 2, dt], atol=1e-7)


@pytest.mark.parametrize("state_dim", [8, 64])
def test_bilinear_keeps_legs_stable_where_euler_does_not(state_dim):
    # LegS has eigenvalues -1 ... -N, at dt = 0.1 mapped to (1 - n/20) / (1 + n/20), and by Euler to 1 - n/10.
    A, B = hippo("legs", state_dim)
    with jax.enable_x64(True):
        bilinear, euler = (np.diag(discretize_dense(A, B, 0.1, method)[0]) for method in ("bilinear", "euler"))
    n = np.arange(1, state_dim + 1)
    np.testing.assert_allclose(bilinear, (1 - n / 20) / (1 + n / 20), atol=1e-12)
    assert np.abs(bilinear).max() < 1
    assert (np.abs(euler).max() > 1) == (state_dim == 64)


def test_dense_in_float32_is_close():
    A, B = hippo("legs", 16)
    for method in DENSE_METHODS:
        got = discretize_dense(A, B, 0.05, method)
        assert all(a.dtype == jnp.float32 for a in got)
        # Entries are of size one; exponentials of a matrix far from normal lose two digits.
        for a, b in zip(got, scipy_says(A, B, 0.05, SCIPY_NAMES[method])):
            np.testing.assert_allclose(a, b, atol=1e-5)


def wanted_diagonal(a, dt, method):
    z = a * dt
    held = np.where(z == 0, dt, np.expm1(z) / np.where(z == 0, 1, a))
    return {
        "zoh": (np.exp(z), held),
        "bilinear": ((1 + z / 2) / (1 - z / 2), dt / (1 - z / 2)),
        "euler": (1 + z, dt + 0 * z),
        "exponential_euler": (np.exp(z), dt + 0 * z),
    }[method]


@pytest.mark.parametrize("method", DIAGONAL_METHODS)
def test_diagonal_equals_complex_arithmetic(method):
    rng = np.random.default_rng(0)
    # Sizes of |a| from 1e-12 to 1e3, on both sides of the switch to the power series, and zero itself.
    a = 10 ** np.linspace(-12, 3, 61) * np.exp(1j * rng.uniform(np.pi / 2, 3 * np.pi / 2, 61))
    a = np.concatenate([a, [0]])
    dt = np.array([[0.001], [0.1], [1.0]])
    wanted = wanted_diagonal(a, dt, method)
    with jax.enable_x64(True):
        got = jax.jit(lambda *z: discretize_diagonal(*z, method))(a.real, a.imag, dt)
    for pair, value in zip(got, wanted):
        assert pair.real.dtype == pair.imag.dtype == np.float64 and pair.real.shape == pair.imag.shape == (3, 62)
        np.testing.assert_allclose(as_complex(pair), value, rtol=1e-12, atol=1e-15)
    for pair, value in zip(discretize_diagonal(a.real, a.imag, dt, method), wanted):
        assert pair.real.dtype == np.float32
        # Phases reach 1e3 radians, whose float32 rounding is 6e-5.
        np.testing.assert_allclose(as_complex(pair), value, atol=2e-4)


def test_zero_order_hold_keeps_its_digits_near_zero_in_float32():
    # The quotient is at its worst just above the switch from the series, 0.1.
    sizes = np.concatenate([10 ** np.linspace(-30, 0, 10_000), np.linspace(0.1, 0.3, 10_000)])
    z = sizes * np.exp(1j * np.tile(np.linspace(np.pi / 2, np.pi, 10_000), 2))
    z = z.astype(np.complex64).astype(np.complex128)
    _, gain = discretize_diagonal(z.real, z.imag, 1.0, "zoh")
    wanted = np.where(np.abs(z) < 1e-7, 1 + z / 2, np.expm1(z) / z)
    # Measured 4.8e-7; 7.6e-7 with exp(z) - 1 in the obvious way.
    np.testing.assert_allclose(as_complex(gain), wanted, rtol=6e-7)


@pytest.mark.parametrize("method", ["zoh", "bilinear", "euler"])
def test_diagonal_equals_dense_on_a_diagonal_system(method):
    # A mode x + iy is the real system [[x, -y], [y, x]].
    rng = np.random.default_rng(1)
    a_real, a_imag, dt = -rng.random(4) * 3, rng.standard_normal(4) * 5, rng.random(4) * 0.2
    with jax.enable_x64(True):
        decay, gain = discretize_diagonal(a_real, a_imag, dt, method)
        for x, y, step, d, g in zip(a_real, a_imag, dt, as_complex(decay), as_complex(gain)):
            A_bar, B_bar = discretize_dense(np.array([[x, -y], [y, x]]), np.array([1.0, 0.0]), step, method)
            np.testing.assert_allclose(A_bar, [[d.real, -d.imag], [d.imag, d.real]], atol=1e-13)
            np.testing.assert_allclose(B_bar, [g.real, g.imag], atol=1e-13)


@pytest.mark.parametrize("method", DIAGONAL_METHODS)
def test_diagonal_gradients_are_finite_and_right_through_zero(method):
    a_real = np.array([0.0, -1e-30, -1e-8, -1e-4, -0.05, -0.0999, -0.1001, -0.5, -300.0])
    a_imag = np.array([0.0, 0.0, 1e-8, 0.0, 0.01, 0.0, 0.0, 2.0, 0.0])
    at = [a_real, a_imag, np.ones(9)]
    each = lambda *z: sum(a for pair in discretize_diagonal(*z, method) for a in pair)
    gradients = jax.jit(jax.grad(lambda *z: jnp.sum(each(*z)), argnums=(0, 1, 2)))
    with jax.enable_x64(True):
        wanted = gradients(*at)
        for i, gradient in enumerate(wanted):
            # Modes do not mix, so all of them move at once; values near one make 1e-10 of truncation and rounding.
            ahead, behind = (each(*(a + s * 1e-5 * (j == i) for j, a in enumerate(at))) for s in (1, -1))
            np.testing.assert_allclose(gradient, np.asarray(ahead - behind) / 2e-5, rtol=1e-7, atol=1e-9)
    got = gradients(*(jnp.asarray(a, jnp.float32) for a in at))
    for g, w in zip(got, wanted):
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", DENSE_METHODS)
@pytest.mark.parametrize("singular", [False, True])
def test_dense_gradients_equal_central_differences(method, singular):
    rng = np.random.default_rng(2)
    A, B = hippo("legs", 4)
    A = 0 * A if singular else A
    weights = [rng.standard_normal((2, 4, 4)), rng.standard_normal((2, 4))]
    direction = [rng.standard_normal(s) for s in ((4, 4), (4,), (2,))]
    with jax.enable_x64(True):
        value = jax.jit(lambda *a: sum(jnp.sum(x * w) for x, w in zip(discretize_dense(*a, method), weights)))
        at = [A, B, np.array([0.01, 0.3])]
        gradients = jax.grad(value, argnums=(0, 1, 2))(*at)
        ahead, behind = (float(value(*(a + s * 1e-6 * d for a, d in zip(at, direction)))) for s in (1, -1))
    along = sum(np.sum(np.asarray(g) * d) for g, d in zip(gradients, direction))
    np.testing.assert_allclose(along, (ahead - behind) / 2e-6, rtol=1e-7)


def test_low_precision_input_is_computed_in_float32():
    half = lambda *values: jnp.asarray(values, jnp.bfloat16)
    decay, gain = discretize_diagonal(half(-1, -2), half(0, 3), half(0.1, 0.1))
    A_bar, B_bar = discretize_dense(-jnp.eye(2, dtype=jnp.bfloat16), half(1, 1), jnp.bfloat16(0.1))
    assert all(a.dtype == jnp.float32 for a in (*decay, *gain, A_bar, B_bar))


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda A, B: discretize_dense(A, B, 0.1, "tustin"), "method='tustin' is unknown; allowed: bilinear, zoh, euler, back"),
        (lambda A, B: discretize_dense(A, B, 0.1, "bilinear", alpha=1.5), "alpha=1.5 with method='bilinear' is not possible"),
        (lambda A, B: discretize_dense(A, B, 0.1, "zoh", alpha=0.5), "alpha=0.5 with method='zoh' is not possible"),
        (lambda A, B: discretize_diagonal(B, B, 0.1, "gbt"), "method='gbt' is unknown; allowed: zoh, bilinear, euler, expo"),
    ],
)
def test_bad_arguments_are_one_clear_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call(-np.eye(2), np.ones(2))
