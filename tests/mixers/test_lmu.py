"""LMU against its equations in NumPy float64, against the authors' cell, and as a memory of a window."""

import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.special

from seqjax.config import ConfigError
from seqjax.mixers.lmu import LMU

GOLDEN = np.load(pathlib.Path(__file__).parent / "data/lmu_cell.npz")


def memory_matrices(order, theta):
    """`A_ij = (2i + 1) (-1 if i < j else (-1)^(i - j + 1))`, `B_i = (2i + 1) (-1)^i`, over theta; zero-order hold of 1."""
    a, b = np.zeros((order, order)), np.zeros(order)
    for i in range(order):
        b[i] = (2 * i + 1) * (-1) ** i
        for j in range(order):
            a[i, j] = (2 * i + 1) * (-1 if i < j else (-1) ** (i - j + 1))
    held = scipy.linalg.expm(a / theta)
    return held, np.linalg.solve(a, (held - np.eye(order)) @ b)


@pytest.mark.parametrize("implementation", ["convolution", "scan"])
def test_equals_the_equations(implementation):
    with jax.enable_x64(True):
        options = {"dtype": "float64", "param_dtype": "float64", "implementation": implementation}
        mixer = LMU(embed_dim=4, state_dim=5, theta=12.0, **options)
        x = np.random.default_rng(0).standard_normal((2, 37, 4))
        variables = jax.tree.map(np.asarray, nn.unbox(jax.jit(mixer.init)(jax.random.key(0), x)))
        got = np.asarray(jax.jit(mixer.apply)(variables, x)[0])
    p = variables["params"]
    linear = lambda name, x: x @ p[name]["kernel"] + p[name]["bias"]
    a, b = memory_matrices(5, 12.0)
    u, memory, want = np.maximum(linear("encoder", x), 0), np.zeros((2, 5)), []
    for t in range(37):
        memory = memory @ a.T + b * u[:, t]
        want.append(linear("out", np.maximum(linear("hidden", np.concatenate([memory, x[:, t]], axis=-1)), 0)))
    want = np.stack(want, axis=1)
    assert np.abs(got - want).max() < 1e-10 * np.abs(want).max()


def test_cell_equals_the_authors():
    """The cell's hidden states are those before our map back to the residual stream, which is set to the identity."""
    g = GOLDEN
    width, hidden = 4, 5
    memory = LMU(embed_dim=width, state_dim=6, theta=float(g["theta"]), implementation="convolution").system()
    assert np.abs(np.asarray(memory.matrix[0]) - g["w.A"]).max() < 1e-6
    assert np.abs(np.asarray(memory.inputs[0]) - g["w.B"][:, 0]).max() < 1e-6
    u = np.maximum(g["x"] @ g["w.W_u.weight"].T + g["w.W_u.bias"], 0)
    m, _ = memory.scan(jnp.asarray(u), memory.init_state(2))
    both = np.concatenate([np.asarray(m)[..., 0], g["x"]], axis=-1)
    h = np.maximum(both @ g["w.W_h.weight"].T + g["w.W_h.bias"], 0)
    assert h.shape[-1] == hidden
    assert np.abs(h - g["h"]).max() < 2e-6


def test_memory_holds_the_window():
    """`u(t - s) = sum_n m_n P_n(2 s / theta - 1)` for a slow sine, up to half a token's delay of the held input."""
    order, theta, length = 10, 200.0, 600
    with jax.enable_x64(True):
        memory = LMU(embed_dim=4, state_dim=order, theta=theta, param_dtype="float64").system()
        u = np.sin(2 * np.pi * np.arange(length) / 150)
        m, _ = memory.scan(jnp.asarray(u)[None, :, None], memory.init_state(1))
    last = np.asarray(m)[0, -1, :, 0]
    for delay in (0, 50, 100, 150, 199):
        decoded = sum(last[n] * scipy.special.eval_legendre(n, 2 * delay / theta - 1) for n in range(order))
        assert abs(decoded - u[length - 1 - delay]) < 0.04


@pytest.mark.parametrize(
    ("options", "words"),
    [({"theta": 0.0}, "model.theta=0.0"), ({"state_dim": 0}, "model.state_dim=0"), ({"implementation": "fft"}, "'fft'")],
)
def test_mistakes_are_told(options, words):
    with pytest.raises(ConfigError, match=words):
        LMU(embed_dim=8, **options)
