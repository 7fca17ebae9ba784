"""SpaceTime against the equations in NumPy float64, token by token, and the authors' code."""

import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqjax import registry
from seqjax.config import ConfigError
from seqjax.mixers.spacetime import preprocessing

GOLDEN = np.load(pathlib.Path(__file__).parent / "data/spacetime.npz")
BATCH, LENGTH, WIDTH = 2, 40, 8
LINEAR = {"activation": "identity", "output": "none"}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def made(width=WIDTH, **options):
    types = {"dtype": "float64", "param_dtype": "float64"}
    mixer = registry.mixer("spacetime")(embed_dim=width, **{"state_dim": 5, **LINEAR, **types, **options})
    x = np.random.default_rng(0).standard_normal((BATCH, LENGTH, width))
    return mixer, jax.tree.map(np.asarray, nn.unbox(jax.jit(mixer.init)(jax.random.key(0), x))), x


def applied(mixer, variables, x):
    return np.asarray(jax.jit(mixer.apply)(variables, x)[0])


def companion(a):
    return np.diag(np.ones(len(a) - 1), -1) + np.outer(a, np.eye(len(a))[-1])


def stepped(a, b, c, u):
    """`x_t = A x_(t-1) + b u_t`, `y_t = c x_t`, of one feature: `u [L]`, `y [L]`."""
    A, x, y = companion(a), np.zeros(len(a)), []
    for now in u:
        x = A @ x + b * now
        y.append(c @ x)
    return np.array(y)


def expected(p, x, normalize=True, shared=1, causal=True):
    y = np.zeros_like(x)
    for row in range(x.shape[0]):
        for h in range(x.shape[2]):
            a, b, c = (p[name][..., h // shared] for name in ("last_column", "b", "c"))
            a = a / np.abs(a).sum() if normalize else a
            y[row, :, h] = stepped(a, b, c[0], x[row, :, h])
            if not causal:
                y[row, :-1, h] += stepped(a, b, c[1], x[row, ::-1, h])[::-1][1:]
    return y


@pytest.mark.parametrize("implementation", ["convolution", "scan"])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_kernels": 2}, {"normalize": False}, {"state_dim": 1}, {"state_dim": 64}, {"causal": False}],
    ids=lambda options: "-".join(map(str, options)) or "defaults",
)
def test_outputs_are_those_of_the_equations(implementation, options):
    mixer, variables, x = made(implementation=implementation, **options)
    p = variables["params"]
    if not mixer.normalize:
        p["last_column"] = 0.1 * p["last_column"]
    want = expected(p, x, mixer.normalize, WIDTH // (mixer.num_kernels or WIDTH), mixer.causal) + p["skip"] * x
    np.testing.assert_allclose(applied(mixer, variables, x), want, atol=1e-9 * np.abs(want).max())


@pytest.mark.parametrize("implementation", ["convolution", "scan"])
@pytest.mark.parametrize("sign", [1, -1])
def test_an_eigenvalue_on_the_unit_circle_stays_exact(implementation, sign):
    mixer, variables, x = made(implementation=implementation, state_dim=4)
    p = variables["params"]
    p["last_column"] = np.abs(p["last_column"]) * np.array([sign**n for n in (4, 3, 2, 1)])[:, None]
    values = np.linalg.eigvals(companion(p["last_column"][:, 0] / np.abs(p["last_column"][:, 0]).sum()))
    assert np.abs(values - sign).min() < 1e-12
    want = expected(p, x) + p["skip"] * x
    np.testing.assert_allclose(applied(mixer, variables, x), want, atol=1e-9 * np.abs(want).max())


@pytest.mark.parametrize("implementation", ["convolution", "scan"])
def test_preprocessing_filters_the_inputs_of_the_system(implementation):
    mixer, variables, x = made(implementation=implementation, preprocess=True)
    taps = preprocessing(WIDTH)
    filtered = np.zeros_like(x)
    for lag in range(LENGTH):
        filtered[:, lag:] += taps[lag] * x[:, : LENGTH - lag]
    want = expected(variables["params"], filtered) + variables["params"]["skip"] * x
    np.testing.assert_allclose(applied(mixer, variables, x), want, atol=1e-9 * np.abs(want).max())


def test_preprocessing_is_differences_and_residuals_of_moving_averages():
    taps = preprocessing(16)
    cubic = np.arange(200.0) ** 3
    seen = np.stack([np.convolve(cubic, taps[:, h])[100:200] for h in range(16)])
    np.testing.assert_allclose(seen[0], cubic[100:])
    np.testing.assert_allclose(seen[1], np.diff(cubic)[99:])
    np.testing.assert_allclose(seen[2], np.diff(cubic, n=2)[98:])
    np.testing.assert_allclose(seen[3], 6.0, atol=1e-8)
    constant = taps.sum(axis=0)
    np.testing.assert_allclose(constant[[0, 8]], 1)
    np.testing.assert_allclose(np.delete(constant, [0, 8]), 0, atol=1e-12)
    windows = (taps < 0).sum(axis=0)[[4, 5, 6, 7, 12, 13, 14, 15]] + 1
    assert windows[0] == 4 and windows[-1] == 63 and (np.diff(windows) > 0).all()
    m = windows[2]
    np.testing.assert_allclose(seen[6], [cubic[t] - cubic[t - m + 1 : t + 1].mean() for t in range(100, 200)])


@pytest.mark.parametrize("implementation", ["convolution", "scan"])
@pytest.mark.parametrize("layer", ["companion", "shift"])
def test_layers_equal_the_authors(layer, implementation):
    weights = {name: GOLDEN[f"{layer}_w.{name}"].astype(np.float64) for name in "abc"}
    mixer, _, _ = made(6, num_kernels=3, state_dim=4, normalize=layer == "companion", implementation=implementation)
    params = {"last_column": weights["a"].T, "b": weights["b"].T, "c": weights["c"].T[None], "skip": np.zeros((1, 6))}
    got = applied(mixer, {"params": params}, GOLDEN[f"{layer}_u"].astype(np.float64))
    np.testing.assert_allclose(got, GOLDEN[f"{layer}_y"], atol=2e-6 * np.abs(GOLDEN[f"{layer}_y"]).max())


def test_a_shift_system_predicts_an_autoregression_exactly():
    coefficients = np.array([2.561, -3.152, 2.351, -0.867])
    mixer, variables, _ = made(state_dim=4, normalize=False)
    p = jax.tree.map(np.zeros_like, variables["params"])
    p["b"][0], p["c"][0, :] = 1, coefficients[:, None]
    series = np.zeros((1, LENGTH + 1, WIDTH))
    series[:, :4] = np.random.default_rng(1).standard_normal((1, 4, WIDTH))
    for t in range(4, LENGTH + 1):
        series[:, t] = np.einsum("p,bpd->bd", coefficients, series[:, t - 4 : t][:, ::-1])
    got = applied(mixer, {"params": p}, series[:, :-1])
    np.testing.assert_allclose(got[:, 3:], series[:, 4:], atol=1e-10)


def test_mistakes_are_named():
    make = registry.mixer("spacetime")
    with pytest.raises(ConfigError, match=r"model\.num_kernels=5 does not divide model\.embed_dim=8; did you mean 4\?"):
        make(embed_dim=8, num_kernels=5)
    with pytest.raises(ConfigError, match=r"model\.state_dim=0 does not fit; did you mean 1\?"):
        make(embed_dim=8, state_dim=0)


def test_what_does_not_train_is_no_parameter():
    mixer, variables, _ = made(preprocess=True)
    assert set(variables) == {"params"} and set(variables["params"]) == {"last_column", "b", "c", "skip"}
    state = jax.eval_shape(lambda: mixer.init_state(1, 10))
    assert state.system.shape == (1, 5 + 62, WIDTH) and state.system.dtype == jnp.float64
