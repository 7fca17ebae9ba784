"""GSS against the paper's equations in NumPy float64, token by token."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqjax
from seqjax import registry
from seqjax.config import ConfigError
from seqjax.training.groups import settings_by_leaf
from seqjax.training.optimizer import OptimizerConfig

WIDTH, INNER, MODES, LENGTH = 6, 3, 5, 40


def made(**options):
    """A mixer in float64, parameters moved off their initial values, and inputs `[B, L, D]`."""
    options = {"embed_dim": WIDTH, "inner_dim": INNER, "state_dim": MODES, **options}
    mixer = registry.mixer("gss")(dtype="float64", param_dtype="float64", **options)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, LENGTH, WIDTH))
    variables = nn.unbox(jax.jit(mixer.init)(jax.random.key(0), x))
    return mixer, jax.tree.map(lambda a: np.asarray(a) + 0.1 * rng.standard_normal(a.shape), variables), x


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def state_space(p, v):
    """A recurrence over complex modes, one feature after the other: steps of 1, B of ones, zero-order hold."""
    eigenvalues = -np.exp(p["lambda_real"][:, 0]) + 1j * np.exp(p["lambda_imag"][:, 0])
    y = np.zeros_like(v)
    for row in range(v.shape[0]):
        for feature in range(v.shape[2]):
            c = p["c_real"][0, :, feature] + 1j * p["c_imag"][0, :, feature]
            h = np.zeros(len(eigenvalues), complex)
            for t in range(v.shape[1]):
                h = np.exp(eigenvalues) * h + (np.exp(eigenvalues) - 1) / eigenvalues * v[row, t, feature]
                y[row, t, feature] = (c @ h).real + p["skip"][feature] * v[row, t, feature]
    return y


def expected(p, x):
    v = gelu(x @ p["down"]["kernel"])
    v = (v - v.mean(-1, keepdims=True)) / np.sqrt(v.var(-1, keepdims=True) + 1e-5)
    y = state_space(p, v * p["norm"]["scale"] + p["norm"]["bias"])
    gated = gelu(x @ p["gate"]["kernel"]) * (y @ p["up"]["kernel"])
    return gated @ p["out"]["kernel"] + p["out"]["bias"]


@pytest.mark.parametrize("implementation", ["convolution", "scan", None])
def test_equals_the_equations(implementation):
    with jax.enable_x64(True):
        mixer, variables, x = made(implementation=implementation)
        got = np.asarray(jax.jit(mixer.apply)(variables, x)[0])
    want = expected(variables["params"], x)
    assert np.abs(got - want).max() < 1e-11 * np.abs(want).max()


def test_a_longer_sequence_is_read_alike():
    """Unlike a kernel that is normalised over its length, this one's first lags do not depend on how many there are."""
    with jax.enable_x64(True):
        mixer, variables, x = made(implementation="convolution")
        long = np.concatenate([x, x[:, ::-1]], axis=1)
        short, long = (np.asarray(jax.jit(mixer.apply)(variables, a)[0]) for a in (x, long))
    assert np.abs(long[:, :LENGTH] - short).max() < 1e-12 * np.abs(short).max()


def test_has_as_many_parameters_as_published():
    """The paper's widths (E = 1024, a quarter within, N = 512); the layer's outer norm, 2 E, is the stack's."""
    mixer = registry.mixer("gss")(embed_dim=1024, state_dim=512)
    assert mixer.inner == 256
    assert mixer.costs(16).parameters == 9_966_336 - 2 * 1024


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"inner_dim": 0}, "model.inner_dim=0 is not positive; allowed: 1 and above"),
        ({"state_dim": 0}, "model.state_dim=0 is not positive"),
        ({"expand": 0}, "model.expand=0 is not positive"),
        ({"implementation": "fft"}, "model.implementation='fft' is unknown"),
        ({"causal": False}, "GSS has no bidirectional form"),
    ],
)
def test_mistakes_are_told_before_anything_compiles(options, words):
    with pytest.raises(ConfigError, match=words):
        registry.mixer("gss")(embed_dim=8, **options)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_lowers_for_accelerators(platform):
    mixer = registry.mixer("gss")(embed_dim=8, state_dim=4)
    x, ids = jnp.zeros((1, 64, 8)), jnp.zeros((1, 64), jnp.int32)
    variables = jax.eval_shape(lambda key, x: nn.unbox(mixer.init(key, x)), jax.random.key(0), x)
    loss = lambda v, x: mixer.apply(v, x)[0].sum() + mixer.apply(v, x, segment_ids=ids)[0].sum()
    lowered = jax.jit(jax.grad(loss)).trace(variables, x).lower(lowering_platforms=(platform,))
    assert "stablehlo" in lowered.as_text()


def test_the_spectrum_trains_apart():
    model = seqjax.build(seqjax.example_config("gss"))
    parameters = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.2, groups={"state_space": {"learning_rate": 0.01}})
    found = settings_by_leaf(config, parameters, model.optimizer_groups())["repeats"]["gss_0"]
    rates = {key: found[key].learning_rate for key in ("lambda_real", "lambda_imag", "c_real", "c_imag", "skip")}
    assert rates == {"lambda_real": 0.01, "lambda_imag": 0.01, "c_real": 0.1, "c_imag": 0.1, "skip": 0.1}
    assert found["lambda_real"].weight_decay == 0.0 and found["out"]["kernel"].weight_decay == 0.2
