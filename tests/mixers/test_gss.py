"""GSS against its equations in NumPy float64, token by token."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from seqjax.config import ConfigError
from seqjax.mixers.gss import GSS


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("implementation", ["convolution", "scan"])
def test_equals_the_equations(implementation):
    with jax.enable_x64(True):
        options = {"dtype": "float64", "param_dtype": "float64", "implementation": implementation}
        mixer = GSS(embed_dim=8, state_dim=5, inner_dim=3, **options)
        x = np.random.default_rng(0).standard_normal((2, 37, 8))
        variables = jax.tree.map(np.asarray, nn.unbox(jax.jit(mixer.init)(jax.random.key(0), x)))
        got = np.asarray(jax.jit(mixer.apply)(variables, x)[0])
    p = variables["params"]
    gate = gelu_tanh(x @ p["gate"]["kernel"])
    v = gelu_tanh(x @ p["down"]["kernel"])
    v = (v - v.mean(-1, keepdims=True)) / np.sqrt(v.var(-1, keepdims=True) + 1e-5) * p["norm"]["scale"] + p["norm"]["bias"]
    spectrum = (-np.exp(p["lambda_real"]) + 1j * np.exp(p["lambda_imag"]))[:, 0]
    c = (p["c_real"] + 1j * p["c_imag"])[0]
    y = np.zeros_like(v)
    state = np.zeros((2, 5, 3), complex)
    for t in range(37):
        state = np.exp(spectrum)[:, None] * state + ((np.exp(spectrum) - 1) / spectrum)[:, None] * v[:, t, None]
        y[:, t] = np.einsum("nd,bnd->bd", c, state).real + p["skip"] * v[:, t]
    want = (gate * (y @ p["up"]["kernel"])) @ p["out"]["kernel"] + p["out"]["bias"]
    assert np.abs(got - want).max() < 1e-10 * np.abs(want).max()


def test_has_as_many_parameters_as_the_published_layer():
    """9 966 336 at widths 1024 and 256 and 512 modes, the stack's own norm (two vectors) included."""
    assert GSS(embed_dim=1024, state_dim=512).costs(16).parameters + 2 * 1024 == 9966336


@pytest.mark.parametrize(
    ("options", "words"),
    [({"inner_dim": 0}, "model.inner_dim=0"), ({"state_dim": 0}, "model.state_dim=0"), ({"causal": False}, "no bidirectional")],
)
def test_mistakes_are_told(options, words):
    with pytest.raises(ConfigError, match=words):
        GSS(embed_dim=8, **options)
