"""RG-LRU, RWKV-4 and xLSTM: blocks against reference arrays, or the papers' equations token by token in float64."""

import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqjax import registry
from seqjax.config import ConfigError

DATA = pathlib.Path(__file__).parent / "data"
WIDTH, LENGTH = 8, 13
IDS = jnp.array([[1] * 6 + [2] * 3 + [1] * 4, [0] * 4 + [7] * 9], jnp.int32)


def mixer_of(name, **options):
    return registry.mixer(name)(dtype="float64", param_dtype="float64", **options)


def made(name, **options):
    """A mixer in float64, parameters moved off their initial values, and inputs `[B, L, D]`."""
    mixer = mixer_of(name, embed_dim=WIDTH, **options)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, LENGTH, WIDTH))
    variables = nn.unbox(jax.jit(mixer.init)(jax.random.key(0), x))
    return mixer, jax.tree.map(lambda a: np.asarray(a) + 0.3 * rng.standard_normal(a.shape), variables), x


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def layer_norm(x, scale=1.0, bias=0.0):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * scale + bias


def convolved(p, u):
    taps = len(p["kernel"])
    padded = np.concatenate([np.zeros((taps - 1, u.shape[1])), u])
    return sum(p["kernel"][i] * padded[i : i + len(u)] for i in range(taps)) + p["bias"]


def rg_lru(p, x):
    gate, u = gelu(x @ p["gate"]["kernel"] + p["gate"]["bias"]), x @ p["in"]["kernel"] + p["in"]["bias"]
    u, h, y = convolved(p["conv"], u), 0, []
    for t, token in enumerate(u):
        r, i = (
            sigmoid(np.einsum("hi,hio->ho", token.reshape(2, 4), p[f"{gate}_gate_kernel"]) + p[f"{gate}_gate_bias"]).reshape(-1)
            for gate in ("recurrence", "input")
        )
        log_a = -8 * np.log1p(np.exp(p["decay"])) * r
        h = np.exp(log_a) * h + (1 if t == 0 else np.sqrt(1 - np.exp(2 * log_a))) * i * token
        y.append((h * gate[t]) @ p["out"]["kernel"] + p["out"]["bias"])
    return np.array(y)


def slstm(p, x):
    silu = lambda a: a * sigmoid(a)
    mixed, heads = silu(convolved(p["conv"], x)), lambda a: a.reshape(2, 4)
    c, n, h, y = 0, 0, np.zeros((2, 4)), []
    for u, token in zip(mixed, x):
        inputs = [np.einsum("hi,ghio->gho", heads(a), p[name]) for name, a in (("convolved", u), ("plain", token))]
        i, f, z, o = np.concatenate(inputs) + p["bias"] + np.einsum("hi,higo->gho", h, p["recurrent"])
        c, n = sigmoid(f) * c + np.exp(i) * np.tanh(z), sigmoid(f) * n + np.exp(i)
        h = sigmoid(o) * c / n
        y.append((layer_norm(h).reshape(-1) * p["norm"]) @ p["out"]["kernel"])
    return np.array(y)


CASES = [
    ("rg_lru", {"num_heads": 2}, rg_lru),
    ("slstm", {"num_heads": 2}, slstm),
]


@pytest.mark.parametrize(("name", "options", "reference"), CASES)
def test_equals_its_equations(name, options, reference):
    with jax.enable_x64(True):
        mixer, variables, x = made(name, **options)
        y, _ = jax.jit(lambda v, x: mixer.apply(v, x, segment_ids=IDS))(variables, x)
    edges = [[0, 6, 9, 13], [0, 4, 13]]
    for row in range(2):
        pieces = [reference(variables["params"], x[row, a:b]) for a, b in zip(edges[row], edges[row][1:])]
        np.testing.assert_allclose(y[row], np.concatenate(pieces), atol=1e-10)


def test_rwkv_equals_a_published_block():
    w = np.load(DATA / "rwkv.npz")
    linear = lambda name: {"kernel": w[f"{name}.weight"].T.astype(np.float64)}
    vector = lambda name: w[name].reshape(-1).astype(np.float64)
    time = {name: linear(f"attention.{name}") for name in ("key", "value", "receptance")}
    time |= {f"{name}_mix": vector(f"attention.time_mix_{name}") for name in ("key", "value", "receptance")}
    time |= {"out": linear("attention.output"), "decay": w["attention.time_decay"], "bonus": w["attention.time_first"]}
    channel = {name: linear(f"feed_forward.{name}") for name in ("key", "value", "receptance")}
    channel |= {f"{name}_mix": vector(f"feed_forward.time_mix_{name}") for name in ("key", "receptance")}
    x = w["x"].astype(np.float64)
    with jax.enable_x64(True):
        apply = lambda name, p, x, **options: np.asarray(
            mixer_of(name, embed_dim=16, **options).apply({"params": jax.tree.map(jnp.asarray, p)}, jnp.asarray(x))[0]
        )
        x = x + apply("rwkv_time_mix", time, layer_norm(x, w["ln1.weight"], w["ln1.bias"]))
        x = x + apply("rwkv_channel_mix", channel, layer_norm(x, w["ln2.weight"], w["ln2.bias"]), mlp_ratio=2.5)
    np.testing.assert_allclose(x, w["y"], atol=1e-5)


def test_mlstm_equals_a_published_block():
    w = np.load(DATA / "mlstm.npz")
    params = {
        "in": {"kernel": w["xlstm.proj_up.weight"].T},
        "conv": {"kernel": w["xlstm.conv1d.conv.weight"][:, 0].T, "bias": w["xlstm.conv1d.conv.bias"]},
        **{name: np.swapaxes(w[f"xlstm.{name[0]}_proj.weight"], 1, 2) for name in ("query", "key", "value")},
        "gates": {
            "kernel": np.concatenate([w[f"xlstm.mlstm_cell.{g}gate.weight"] for g in "if"]).T,
            "bias": np.concatenate([w[f"xlstm.mlstm_cell.{g}gate.bias"] for g in "if"]),
        },
        "norm": 1 + w["xlstm.mlstm_cell.outnorm.weight"],
        "skip": w["xlstm.learnable_skip"],
        "out": {"kernel": w["xlstm.proj_down.weight"].T},
    }
    x = layer_norm(w["x"].astype(np.float64), 1 + w["xlstm_norm.weight"])
    with jax.enable_x64(True):
        params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), params)
        y, _ = mixer_of("mlstm", embed_dim=32).apply({"params": params}, jnp.asarray(x))
    np.testing.assert_allclose(w["x"] + np.asarray(y), w["y"], atol=2e-5)


def test_initial_values_are_the_published_ones():
    start = lambda name, **o: nn.unbox(registry.mixer(name)(embed_dim=64, **o).init(jax.random.key(0), jnp.zeros((1, 2, 64))))[
        "params"
    ]
    # exp(-softplus(Lambda)) uniform by area between 0.9 and 0.999.
    unit_decay = np.sort(np.exp(-np.log1p(np.exp(start("rg_lru")["decay"]))) ** 2)
    np.testing.assert_allclose(unit_decay.mean(), (0.9**2 + 0.999**2) / 2, atol=0.02)
    assert unit_decay[0] >= 0.81 and unit_decay[-1] <= 0.999**2
    time = start("rwkv_time_mix", depth=0.0)
    np.testing.assert_allclose(time["decay"], -5 + 8 * (np.arange(64) / 63) ** 0.7, atol=1e-5)
    np.testing.assert_allclose(time["bonus"][:3], np.log(0.3) + 0.5 * np.array([0, 1, -1]), rtol=1e-5)
    np.testing.assert_allclose(time["receptance_mix"], np.sqrt(np.arange(64) / 64), rtol=1e-5)
    assert not np.any(time["key"]["kernel"]) and not np.any(time["receptance"]["kernel"])
    gates = start("mlstm")["gates"]
    np.testing.assert_allclose(gates["bias"][4:], np.linspace(3, 6, 4))
    assert not np.any(gates["kernel"])
    bias = start("slstm")["bias"]
    assert bias[1, :, 0] == pytest.approx(5) and bias[1, :, -1] == pytest.approx(-7) and not np.any(np.delete(bias, 1, axis=0))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("rg_lru", {"num_heads": 3}, "model.num_heads=3 does not divide the inner width 8; allowed: 1, 2, 4, 8"),
        ("rwkv_time_mix", {"depth": 1.5}, "model.depth=1.5 is out of range"),
        ("rwkv_time_mix", {"inner_dim": 0}, "model.inner_dim=0"),
        ("rwkv_channel_mix", {"mlp_ratio": 0.0}, "model.mlp_ratio=0.0"),
        ("mlstm", {"qkv_block": 3}, "model.qkv_block=3 does not divide the inner width 16"),
        ("mlstm", {"chunk_size": 0}, "model.chunk_size=0"),
        ("slstm", {"num_heads": 3}, "model.num_heads=3 does not divide the width 8"),
        ("slstm", {"conv_width": 1}, "model.conv_width=1 is too small"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ConfigError, match=message):
        registry.mixer(name)(embed_dim=WIDTH, **options)
