"""Mixers with a matrix state against the papers' equations in NumPy float64, token by token."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqjax
from seqjax import registry
from seqjax.config import ConfigError
from seqjax.layers.feature_maps import FEATURE_MAPS
from seqjax.training.groups import settings_by_leaf
from seqjax.training.optimizer import OptimizerConfig

WIDTH, HEADS, LENGTH = 16, 2, 13
IDS = np.array([[1] * 6 + [2] * 3 + [1] * 4, [0] * 4 + [7] * 9], np.int32)
NAMES = ("linear_transformer", "retnet", "gla", "deltanet", "gated_deltanet")


def made(name, **options):
    """A mixer in float64, parameters moved off their initial values, and inputs `[B, L, D]`."""
    options = {"embed_dim": WIDTH, "num_heads": HEADS, "chunk_size": 8, **options}
    mixer = registry.mixer(name)(dtype="float64", param_dtype="float64", **options)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, LENGTH, WIDTH))
    variables = nn.unbox(jax.jit(mixer.init)(jax.random.key(0), x))
    return mixer, jax.tree.map(lambda a: np.asarray(a) + 0.3 * rng.standard_normal(a.shape), variables), x


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def rms(y, scale=1.0):
    return y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-5) * scale


def linear(p, x):
    """`[L, D]` through a kernel `[D, ...]`."""
    return np.tensordot(x, p["kernel"], 1) + p.get("bias", 0)


def convolved(p, *parts):
    """Queries, keys and values, each through its taps and a SiLU."""
    found, at = [], 0
    for part in parts:
        flat = part.reshape(len(part), -1)
        kernel = p["conv"]["kernel"][:, at : at + flat.shape[1]]
        padded = np.concatenate([np.zeros((len(kernel) - 1, flat.shape[1])), flat])
        y = sum(kernel[i] * padded[i : i + len(flat)] for i in range(len(kernel)))
        found.append(silu(y).reshape(part.shape))
        at += flat.shape[1]
    return found


def unit(x):
    return x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6)


def turned(x, t):
    """Rotary positions: planes (i, i + K/2) by the angle `t 10000^(-2i/K)`."""
    left, right = np.split(x, 2, axis=-1)
    angle = t * 10000.0 ** (-np.arange(0, x.shape[-1], 2) / x.shape[-1])
    return np.concatenate([left * np.cos(angle) - right * np.sin(angle), right * np.cos(angle) + left * np.sin(angle)], -1)


def linear_transformer(p, x):
    phi = lambda a: np.where(a > 0, a + 1, np.exp(np.minimum(a, 0)))
    q, k, v = phi(linear(p["query"], x)), phi(linear(p["key"], x)), linear(p["value"], x)
    y = np.zeros_like(v)
    for t in range(len(x)):
        weights = np.einsum("hk,shk->sh", q[t], k[: t + 1])
        y[t] = np.einsum("sh,shw->hw", weights, v[: t + 1]) / (weights.sum(0)[:, None] + 1e-6)
    return np.tensordot(y, p["out"]["kernel"], 2) + p["out"]["bias"]


def retnet(p, x):
    q, k, v = (linear(p[name], x) for name in ("query", "key", "value"))
    y, gamma = np.zeros_like(v), 1 - 2.0 ** (-5 - np.arange(HEADS))
    for t in range(len(x)):
        for s in range(t + 1):
            weight = np.sum(turned(q[t], t) * turned(k[s], s), -1) * gamma ** (t - s) * k.shape[-1] ** -0.5
            y[t] += weight[:, None] * v[s]
    return np.tensordot(silu(linear(p["gate"], x)) * rms(y), p["out"]["kernel"], 2)


def gla(p, x):
    q, k, v = (linear(p[name], x) for name in ("query", "key", "value"))
    alpha = sigmoid(linear(p["decay_out"], linear(p["decay_in"], x))) ** (1 / 16)
    y, state = np.zeros_like(v), np.zeros((HEADS, k.shape[-1], v.shape[-1]))
    for t in range(len(x)):
        state = alpha[t, :, :, None] * state + k[t, :, :, None] * v[t, :, None, :]
        y[t] = np.einsum("hk,hkw->hw", q[t] * k.shape[-1] ** -0.5, state)
    return np.tensordot(silu(linear(p["gate"], x)) * rms(y, p["norm"]["scale"]), p["out"]["kernel"], 2)


def delta(p, x, alpha, most=1.0):
    """Heads of the delta rule, written with the matrix `I - beta k k^T` that their authors write."""
    q, k, v = convolved(p, *(linear(p[name], x) for name in ("query", "key", "value")))
    q, k, beta = unit(q), unit(k), most * sigmoid(linear(p["beta"], x))
    y, state = np.zeros_like(v), np.zeros((HEADS, k.shape[-1], v.shape[-1]))
    for t in range(len(x)):
        for h in range(HEADS):
            erase = np.eye(k.shape[-1]) - beta[t, h] * np.outer(k[t, h], k[t, h])
            state[h] = alpha[t, h] * erase @ state[h] + beta[t, h] * np.outer(k[t, h], v[t, h])
            y[t, h] = state[h].T @ q[t, h] * k.shape[-1] ** -0.5
    return rms(y, p["norm"]["scale"])


def deltanet(p, x, most=1.0):
    return np.tensordot(delta(p, x, np.ones((len(x), HEADS)), most), p["out"]["kernel"], 2)


def gated_deltanet(p, x, most=1.0):
    alpha = np.exp(-np.exp(p["a_log"]) * np.log1p(np.exp(linear(p["decay"], x) + p["dt_bias"])))
    return np.tensordot(delta(p, x, alpha, most) * silu(linear(p["gate"], x)), p["out"]["kernel"], 2)


CASES = [(name, {}) for name in NAMES] + [(name, {"negative_eigenvalues": True}) for name in NAMES[3:]]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_equals_the_equations(name, options):
    """A whole row, and packed documents, each as if it were alone."""
    expected = globals()[name]
    own = {"most": 2.0} if options else {}
    with jax.enable_x64(True):
        mixer, variables, x = made(name, **options)
        call = jax.jit(mixer.apply)
        got, packed = np.asarray(call(variables, x)[0]), np.asarray(call(variables, x, segment_ids=IDS)[0])
    p = variables["params"]
    for row in range(2):
        want = expected(p, x[row], **own)
        assert np.abs(got[row] - want).max() < 1e-12 * np.abs(want).max()
        edges = [0, *(np.flatnonzero(np.diff(IDS[row])) + 1), LENGTH]
        want = np.concatenate([expected(p, x[row, a:b], **own) for a, b in zip(edges[:-1], edges[1:])])
        assert np.abs(packed[row] - want).max() < 1e-12 * np.abs(want).max()


def test_retention_does_not_depend_on_where_a_sequence_starts():
    """Shifting all positions turns queries and keys alike."""
    with jax.enable_x64(True):
        mixer, variables, x = made("retnet")
        state = mixer.init_state(2, 64)
        moved = state.replace(segment=state.segment._replace(position=state.segment.position + 1000))
        call = jax.jit(mixer.apply)
        here, there = (np.asarray(call(variables, x, s)[0]) for s in (state, moved))
    assert np.abs(here - there).max() < 1e-12 * np.abs(here).max()


@pytest.mark.parametrize("name", ["elu_plus_one", "relu", "softmax", "dpfp", "taylor"])
def test_positive_feature_maps_have_positive_products(name):
    x = jax.random.normal(jax.random.key(0), (50, 6))
    image = FEATURE_MAPS[name](x)
    assert image.shape == (50, FEATURE_MAPS[name].width(6))
    assert np.all(np.asarray(image @ image.T) >= 0)


def test_the_second_order_map_expands_the_exponential():
    x, y = jax.random.normal(jax.random.key(0), (2, 5, 4))
    phi, products = FEATURE_MAPS["taylor"], np.asarray((x * y).sum(-1)) / 4**0.5
    np.testing.assert_allclose((phi(x) * phi(y)).sum(-1), 1 + products + products**2 / 2, rtol=1e-5)


def test_mixers_have_as_many_parameters_as_published():
    """GLA: `4 D^2 + 24.5 D + D / 4` of 4 heads. Linear Transformer: an encoder layer of width 256 and an MLP of 1024."""
    assert registry.mixer("gla")(embed_dim=512).costs(8).parameters == 4 * 512**2 + 24.5 * 512 + 512 / 4
    sizes = {"embed_dim": 256, "num_heads": 8, "vocab_size": 1}
    one, two = (seqjax.build({"name": "linear_transformer", "num_layers": n, **sizes}).costs(8).parameters for n in (1, 2))
    assert two - one == 789_760


def test_initial_values_are_the_authors():
    wide = lambda variables: jax.tree.map(lambda a: np.asarray(a, np.float64), nn.unbox(variables)["params"])
    init = lambda mixer: wide(jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 2, mixer.embed_dim))))
    p = init(registry.mixer("gated_deltanet")(embed_dim=512, num_heads=128))
    steps = np.log(np.log1p(np.exp(p["dt_bias"])))
    for values, low, high in ((np.exp(p["a_log"]), 0, 16), (steps, np.log(0.001), np.log(0.1))):
        assert low - 1e-4 <= values.min() and values.max() <= high + 1e-3
        np.testing.assert_allclose([values.mean(), values.std()], [(low + high) / 2, (high - low) / 12**0.5], rtol=0.15)
    kernel = init(registry.mixer("retnet")(embed_dim=64))["value"]["kernel"]  # Xavier with a gain of 2^-2.5
    assert 0.97 < np.abs(kernel).max() / (2**-2.5 * (6 / (64 + 128)) ** 0.5) <= 1


def test_decays_of_gated_deltanet_train_apart():
    model = seqjax.build(seqjax.example_config("gated_deltanet"))
    parameters = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.2, groups={"state_space": {"learning_rate": 0.01}})
    found = settings_by_leaf(config, parameters, model.optimizer_groups())["repeats"]["gated_deltanet_0"]
    assert all(found[key].learning_rate == 0.01 and found[key].weight_decay == 0.0 for key in ("a_log", "dt_bias"))
    assert found["beta"]["kernel"].weight_decay == 0.2


@pytest.mark.parametrize("name", NAMES)
def test_state_stays_in_float32_and_does_not_grow(name):
    mixer = registry.mixer(name)(embed_dim=16, dtype="bfloat16")
    states = [mixer.init_state(2, length) for length in (8, 10**6)]
    assert states[0].heads.dtype == jnp.float32
    assert jax.tree.map(jnp.shape, states[0]) == jax.tree.map(jnp.shape, states[1])


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("gla", {"num_heads": 3}, "model.expand_k=0.5 makes 8 features, which model.num_heads=3 does not divide"),
        ("gla", {"gate_rank": 0}, "model.gate_rank=0 is not positive"),
        ("gla", {"gate_temperature": 0.0}, "model.gate_temperature=0.0 is not positive"),
        ("gla", {"output_gate": "swish"}, "model.output_gate='swish' is unknown"),
        ("gla", {"chunk_size": 0}, "model.chunk_size=0 is too small"),
        ("gla", {"head_norm": "batch"}, "model.head_norm='batch' is unknown"),
        ("gla", {"implementation": "pallas"}, "model.implementation='pallas' is unknown"),
        ("retnet", {"num_heads": 16}, "leaves keys of odd width 1, which cannot be rotated"),
        ("linear_transformer", {"feature_map": "elu"}, "model.feature_map='elu' is unknown.*elu_plus_one"),
        ("linear_transformer", {"feature_map": "identity"}, "divides by sums of either sign; allowed: model.normalize=False"),
        ("deltanet", {"qk_norm": "none"}, "lets states of the delta rule grow without bound"),
        ("gated_deltanet", {"dt_min": 0.2}, "model.dt_min=0.2 and model.dt_max=0.1 are no range"),
        ("retnet", {"causal": False}, "RetNet has no bidirectional form"),
    ],
)
def test_mistakes_are_told_before_anything_compiles(name, options, words):
    with pytest.raises(ConfigError, match=words):
        registry.mixer(name)(embed_dim=16, **options)
