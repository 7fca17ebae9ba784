"""LMU against the papers' equations in NumPy float64, token by token, and LMUFormer's code."""

import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.special

import seqjax
from seqjax import registry
from seqjax.config import ConfigError
from seqjax.mixers.lmu import LegendreMemory

GOLDEN = np.load(pathlib.Path(__file__).parent / "data/lmu_cell.npz")
WIDTH, ORDER, THETA, LENGTH = 4, 6, 20.0, 40


def made(**options):
    """A mixer in float64, parameters moved off their initial values, and inputs `[B, L, D]`."""
    options = {"embed_dim": WIDTH, "state_dim": ORDER, "theta": THETA, **options}
    mixer = registry.mixer("lmu")(dtype="float64", param_dtype="float64", **options)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, LENGTH, WIDTH))
    variables = nn.unbox(jax.jit(mixer.init)(jax.random.key(0), x))
    return mixer, jax.tree.map(lambda a: np.asarray(a) + 0.1 * rng.standard_normal(a.shape), variables), x


def legendre_delay(order, theta):
    """Voelker et al. 2019, eq. 2, held for one token: `exp(A)` and `A^(-1) (exp(A) - I) B`."""
    A, B = np.zeros((order, order)), np.zeros(order)
    for i in range(order):
        B[i] = (2 * i + 1) * (-1) ** i / theta
        for j in range(order):
            A[i, j] = (2 * i + 1) / theta * (-1 if i < j else (-1) ** (i - j + 1))
    held = scipy.linalg.expm(A)
    return held, np.linalg.solve(A, (held - np.eye(order)) @ B)


def expected(p, x, f):
    A, B = legendre_delay(ORDER, THETA)
    linear = lambda name, z: z @ p[name]["kernel"] + p[name]["bias"]
    m, y = np.zeros((x.shape[0], ORDER)), np.zeros_like(x)
    for t in range(x.shape[1]):
        u = f(linear("encoder", x[:, t]))
        m = m @ A.T + u * B
        y[:, t] = linear("out", f(linear("hidden", np.concatenate([m, x[:, t]], axis=1))))
    return y


ACTIVATIONS = {"relu": lambda z: np.maximum(z, 0), "identity": lambda z: z}


@pytest.mark.parametrize("implementation", ["convolution", "scan", None])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_the_equations(activation, implementation):
    with jax.enable_x64(True):
        mixer, variables, x = made(activation=activation, implementation=implementation)
        got = np.asarray(jax.jit(mixer.apply)(variables, x)[0])
    want = expected(variables["params"], x, ACTIVATIONS[activation])
    assert np.abs(got - want).max() < 1e-11 * np.abs(want).max()


@pytest.mark.parametrize("theta", [2.0, 784.0])
def test_memory_equals_its_powers_of_a_matrix(theta):
    """Also where the window is short beside the order, and where it is long."""
    A, B = legendre_delay(16, theta)
    want = np.stack([np.linalg.matrix_power(A, lag) @ B for lag in range(100)], axis=1)
    got = np.asarray(LegendreMemory.of(16, theta, jnp.float32).kernel(100))[:, 0]
    assert np.abs(got - want).max() < 1e-7 * np.abs(want).max()


def test_memory_equals_the_authors():
    memory = LegendreMemory.of(6, float(GOLDEN["theta"]), jnp.float32)
    assert np.abs(memory.matrix - GOLDEN["w.A"]).max() < 1e-6
    assert np.abs(memory.inputs - GOLDEN["w.B"][:, 0]).max() < 1e-6


@pytest.mark.parametrize("implementation", ["convolution", "scan"])
def test_cell_equals_the_authors(implementation):
    """Four of the cell's five hidden units, for inputs of width 4; the map after the cell is set to the identity."""
    dense = lambda name, units: {"kernel": GOLDEN[f"w.{name}.weight"][:units].T, "bias": GOLDEN[f"w.{name}.bias"][:units]}
    p = {"encoder": dense("W_u", 1), "hidden": dense("W_h", 4), "out": {"kernel": np.eye(4), "bias": np.zeros(4)}}
    mixer = registry.mixer("lmu")(embed_dim=4, state_dim=6, theta=24.0, implementation=implementation)
    got, _ = jax.jit(mixer.apply)({"params": p}, GOLDEN["x"])
    assert np.abs(np.asarray(got) - GOLDEN["h"][..., :4]).max() < 1e-6


def test_memory_holds_the_window():
    """`sum_n m_n P_n(2 s / theta - 1)` is the input s tokens ago; an input held for a token lags by half of one."""
    order, theta, period = 10, 200.0, 150.0
    wave = lambda t: np.sin(2 * np.pi * t / period)
    with jax.enable_x64(True):
        memory = LegendreMemory.of(order, theta, jnp.float64)
        m, _ = memory.scan(jnp.asarray(wave(np.arange(1000)))[None, :, None], memory.init_state(1))
    ago = np.arange(0.0, theta + 1, 5.0)
    polynomials = np.stack([scipy.special.eval_legendre(n, 2 * ago / theta - 1) for n in range(order)])
    decoded = np.asarray(m)[0, :, :, 0] @ polynomials
    at = np.arange(600, 1000)[:, None]  # long after the start
    assert np.abs(decoded[600:] - wave(at - ago + 0.5)).max() < 2e-3
    assert np.abs(decoded[600:] - wave(at - ago)).max() < 0.03


def test_a_block_that_starts_as_the_identity_learns():
    """Under `residual_init=0` all but the last map have no gradient at first; that one must."""
    mixer = registry.mixer("lmu")(embed_dim=8, state_dim=4, theta=8.0, residual_init=0.0)
    x = jax.random.normal(jax.random.key(0), (2, 10, 8))
    variables = nn.unbox(jax.jit(mixer.init)(jax.random.key(1), x))
    total, gradient = jax.jit(jax.value_and_grad(lambda v: mixer.apply(v, x)[0].sum()))(variables)
    assert total == 0
    assert np.any(gradient["params"]["out"]["kernel"])


def test_an_mlp_follows_in_the_stack():
    config = seqjax.example_config("lmu")
    assert [s.name for s in seqjax.build(config).unit] == ["lmu", "mlp"]
    config.theta = 50.0
    assert dict(seqjax.build(config).unit[0].options)["theta"] == 50.0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"theta": 0.0}, "model.theta=0.0 is no window; allowed: above 0"),
        ({"theta": float("nan")}, "model.theta=nan is no window"),
        ({"theta": float("inf")}, "model.theta=inf is no window"),
        ({"state_dim": 0}, "model.state_dim=0 is not positive"),
        ({"activation": "rely"}, "did you mean 'relu'"),
        ({"implementation": "fft"}, "model.implementation='fft' is unknown"),
        ({"causal": False}, "LMU has no bidirectional form"),
    ],
)
def test_mistakes_are_told_before_anything_compiles(options, words):
    with pytest.raises(ConfigError, match=words):
        registry.mixer("lmu")(embed_dim=8, **options)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_lowers_for_accelerators(platform):
    mixer = registry.mixer("lmu")(embed_dim=8, state_dim=4)
    x, ids = jnp.zeros((1, 64, 8)), jnp.zeros((1, 64), jnp.int32)
    variables = jax.eval_shape(lambda key, x: nn.unbox(mixer.init(key, x)), jax.random.key(0), x)
    loss = lambda v, x: mixer.apply(v, x)[0].sum() + mixer.apply(v, x, segment_ids=ids)[0].sum()
    lowered = jax.jit(jax.grad(loss)).trace(variables, x).lower(lowering_platforms=(platform,))
    assert "stablehlo" in lowered.as_text()
