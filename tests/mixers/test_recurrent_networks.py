"""GRU, LSTM, ParaGRU, ParaLSTM and minGRU against the papers' equations in NumPy float64, token by token."""

import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqjax import registry
from seqjax.config import ConfigError

WIDTH, LENGTH = 8, 13
IDS = jnp.array([[1] * 6 + [2] * 3 + [1] * 4, [0] * 4 + [7] * 9], jnp.int32)
GOLDEN = np.load(pathlib.Path(__file__).parent / "data" / "min_gru.npz")


def made(name, **options):
    """A mixer in float64, parameters moved off their initial values, and inputs `[B, L, D]`."""
    mixer = registry.mixer(name)(embed_dim=WIDTH, dtype="float64", param_dtype="float64", **options)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, LENGTH, WIDTH))
    variables = nn.unbox(jax.jit(mixer.init)(jax.random.key(0), x))
    return mixer, jax.tree.map(lambda a: np.asarray(a) + 0.3 * rng.standard_normal(a.shape), variables), x


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def convolved(p, u):
    """Each feature through its own taps, the last one on the present token."""
    taps = len(p["kernel"])
    padded = np.concatenate([np.zeros((taps - 1, u.shape[1])), u])
    return sum(p["kernel"][i] * padded[i : i + len(u)] for i in range(taps)) + p["bias"]


def gru(p, x):
    h, y = np.zeros(WIDTH), []
    for token in x:
        mapped = np.einsum("d,dge->ge", token, p["in"]["kernel"]) + p["bias"]
        fed = np.einsum("d,dge->ge", h, p["recurrent"])
        r, z = sigmoid(mapped[0] + fed[0]), sigmoid(mapped[1] + fed[1])
        h = (1 - z) * np.tanh(mapped[2] + r * (fed[2] + p["recurrent_bias"])) + z * h
        y.append(h @ p["out"]["kernel"] + p["out"]["bias"])
    return np.array(y)


def lstm(p, x):
    h, c, y = np.zeros(WIDTH), np.zeros(WIDTH), []
    for token in x:
        gates = np.einsum("d,dge->ge", token, p["in"]["kernel"]) + p["bias"] + np.einsum("d,dge->ge", h, p["recurrent"])
        c = sigmoid(gates[1]) * c + sigmoid(gates[0]) * np.tanh(gates[2])
        h = sigmoid(gates[3]) * np.tanh(c)
        y.append(h @ p["out"]["kernel"] + p["out"]["bias"])
    return np.array(y)


def around(cell):
    """The block of ParaRNN: convolution before the cell, norm and gate after it."""

    def block(p, x):
        u, z = np.split(x @ p["in"]["kernel"], 2, axis=-1)
        u = silu(convolved(p["conv"], u))
        heads, width = p["blocks"].shape[:2]
        mapped = np.stack([u[:, i * width : (i + 1) * width] @ p["blocks"][i].reshape(width, -1) for i in range(heads)], axis=1)
        mapped = mapped.reshape(len(x), heads, 3, width).transpose(0, 2, 1, 3).reshape(len(x), 3, -1) + p["bias"]
        h = cell(p, mapped)
        normed = h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-5) * p["norm"]["scale"]
        return (normed * silu(z)) @ p["out"]["kernel"]

    return block


def para_gru(p, mapped):
    h, y, (a_z, a_r, a_c) = 0, [], p["recurrent"]
    for z, r, c in mapped:
        z, r = sigmoid(a_z * h + z), sigmoid(a_r * h + r)
        h = (1 - z) * h + z * np.tanh(a_c * (h * r) + c)
        y.append(h)
    return np.array(y)


def para_lstm(p, mapped):
    c, h, y, (a_f, a_o, a_c), (p_f, p_o) = 0, 0, [], p["recurrent"], p["peephole"]
    for f, o, g in mapped:
        f = sigmoid(a_f * h + p_f * c + f)
        c = f * c + (1 - f) * np.tanh(a_c * h + g)
        h = sigmoid(a_o * h + p_o * c + o) * np.tanh(c)
        y.append(h)
    return np.array(y)


def min_gru(p, x):
    mapped = np.einsum("ld,dge->lge", convolved(p["conv"], x), p["in"]["kernel"])
    h, y = 0, []
    for gate, candidate in mapped:
        h = (1 - sigmoid(gate)) * h + sigmoid(gate) * candidate
        y.append(h @ p["out"]["kernel"])
    return np.array(y)


CASES = [
    ("gru", {}, gru),
    ("lstm", {}, lstm),
    ("para_gru", {"implementation": "newton", "num_heads": 2}, around(para_gru)),
    ("para_gru", {"expand": 2}, around(para_gru)),
    ("para_lstm", {"implementation": "newton", "expand": 2}, around(para_lstm)),
    ("min_gru", {}, min_gru),
]


@pytest.mark.parametrize(("name", "options", "reference"), CASES, ids=[f"{name}-{len(o)}" for name, o, _ in CASES])
def test_equals_its_equations(name, options, reference):
    with jax.enable_x64(True):
        mixer, variables, x = made(name, **options)
        y, _ = jax.jit(lambda v, x: mixer.apply(v, x, segment_ids=IDS))(variables, x)
    params, edges = variables["params"], [[0, 6, 9, 13], [0, 4, 13]]
    for row in range(2):
        pieces = [reference(params, x[row, a:b]) for a, b in zip(edges[row], edges[row][1:])]
        np.testing.assert_allclose(y[row], np.concatenate(pieces), atol=1e-10)


@pytest.mark.parametrize(("candidate", "array"), [("identity", "mingru_plain"), ("positive", "mingru_log_g")])
def test_min_gru_equals_the_reference(candidate, array):
    """The recurrence alone: maps in and out are the reference's and the identity, and so there is no convolution."""
    with jax.enable_x64(True):
        mixer = registry.mixer("min_gru")(
            embed_dim=7, expand=1, conv_width=1, candidate=candidate, dtype="float64", param_dtype="float64"
        )
        x, kernels = GOLDEN["x"], np.stack([GOLDEN["Wz"], GOLDEN["Wh"]], axis=1)
        wide = np.pad(x, [(0, 0), (0, 0), (0, 2)])  # the mixer's inputs are as wide as its outputs
        params = {"in": {"kernel": np.pad(kernels, [(0, 2), (0, 0), (0, 0)])}, "out": {"kernel": np.eye(7)}}
        state = mixer.init_state(2, 60)
        state = state.replace(cell=jnp.asarray(GOLDEN["h0"]))
        y, after = mixer.apply({"params": params}, jnp.asarray(wide), state)
    np.testing.assert_allclose(y, GOLDEN[array], atol=1e-12)
    np.testing.assert_allclose(after.cell, GOLDEN[array][:, -1], atol=1e-12)


def test_the_forget_gate_starts_open_and_recurrent_maps_orthogonal():
    mixer = registry.mixer("lstm")(embed_dim=WIDTH)
    params = nn.unbox(mixer.init(jax.random.key(0), jnp.zeros((1, 2, WIDTH))))["params"]
    np.testing.assert_array_equal(params["bias"], np.eye(4)[1][:, None] * np.ones(WIDTH))
    for gate in range(4):
        map_ = np.asarray(params["recurrent"][:, gate])
        np.testing.assert_allclose(map_ @ map_.T, np.eye(WIDTH), atol=1e-5)


def test_para_gru_starts_as_published():
    mixer = registry.mixer("para_gru")(embed_dim=64)
    params = nn.unbox(mixer.init(jax.random.key(0), jnp.zeros((1, 2, 64))))["params"]
    np.testing.assert_allclose(params["bias"][0], -np.linspace(0, 1, 64), atol=1e-6)
    assert not params["bias"][1:].any()
    assert params["recurrent"].std() == pytest.approx(2 / np.sqrt(5 * 64), rel=0.2)
    assert np.abs(params["blocks"]).max() <= np.sqrt(6 / (16 + 64))


def test_newton_reports_its_iterations():
    mixer = registry.mixer("para_lstm")(embed_dim=WIDTH, implementation="newton")
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 32, WIDTH)), jnp.float32)
    variables = mixer.init(jax.random.key(0), x)
    _, sown = mixer.apply({"params": variables["params"]}, x, mutable=["intermediates"])
    assert 2 <= sown["intermediates"]["iterations"][0] <= 5


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gru", {"hidden_dim": 0}, "model.hidden_dim=0 is not positive"),
        ("para_gru", {"num_heads": 3}, "model.num_heads=3 does not divide the inner width 8; allowed: 1, 2, 4, 8"),
        ("para_gru", {"implementation": "newtno"}, "model.implementation='newtno'.*newton"),
        ("para_lstm", {"max_iterations": 0}, "model.max_iterations=0"),
        ("para_gru", {"recurrent_init": 0.0}, "model.recurrent_init=0.0"),
        ("para_lstm", {"tolerance": 0.0}, "model.tolerance=0.0"),
        ("min_gru", {"candidate": "positiv"}, "model.candidate='positiv'.*positive"),
        ("min_gru", {"expand": 0}, "model.expand=0"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ConfigError, match=message):
        registry.mixer(name)(embed_dim=WIDTH, **options)
