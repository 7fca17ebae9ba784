"""Cross-layer attention: a sub-layer that reads the keys and values of the attention before it."""

import flax.linen as nn
import jax
import numpy as np
import pytest

import seqjax
from seqjax.config import ConfigError
from seqjax.testing import conformance

WIDTH, HEADS, LENGTH = 8, 2, 7
FOLLOWER = {"name": "attention", "shares": True}
CONFIG = {
    "name": "transformer",
    "input_dim": 3,
    "head": "regression",
    "output_dim": 3,
    "embed_dim": WIDTH,
    "num_heads": HEADS,
    "num_kv_heads": 1,
    "residual_init": 1.0,
    "dtype": "float64",
    "param_dtype": "float64",
}


def built(pattern, **options):
    return seqjax.build({**CONFIG, "pattern": pattern, **options})


@pytest.fixture(scope="module")
def follower():
    """A model of two attentions, the second without keys and values, its parameters, inputs, and outputs."""
    model = built((("attention",), (FOLLOWER,)))
    with jax.enable_x64(True):
        x = np.random.default_rng(0).standard_normal((2, LENGTH, 3))
        variables = jax.tree.map(np.asarray, nn.unbox(jax.jit(model.init)(jax.random.key(0), x)))
        return model, variables, x, np.asarray(jax.jit(model.apply)(variables, x)[0])


def turned(a, base=10000.0):
    """Rotary positions of `[L, heads, K]`."""
    angles = np.arange(len(a))[:, None] * base ** (-np.arange(0, a.shape[-1], 2) / a.shape[-1])
    cosine, sine, (left, right) = np.cos(angles)[:, None], np.sin(angles)[:, None], np.split(a, 2, axis=-1)
    return np.concatenate([left * cosine - right * sine, right * cosine + left * sine], axis=-1)


def test_is_attention_to_the_keys_and_values_of_the_first(follower):
    _, variables, inputs, outputs = follower
    params = variables["params"]
    unit = jax.tree.map(lambda a: a[0], params["repeats"])
    linear = lambda p, x, axes=1: np.tensordot(x, p["kernel"], axes) + p.get("bias", 0)

    def norm(p, x):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]

    for row, x in enumerate(inputs):
        x = linear(params["embedding"], x)
        first, second = unit["attention_0"], unit["attention_1"]
        normed = norm(unit["norm_0"], x)
        k, v = turned(linear(first["key"], normed))[:, 0], linear(first["value"], normed)[:, 0]
        for layer, seen in ((first, unit["norm_0"]), (second, unit["norm_1"])):
            q = turned(linear(layer["query"], norm(seen, x)))
            logits = np.einsum("thk,sk->hts", q, k) / np.sqrt(WIDTH // HEADS)
            weights = np.exp(np.where(np.tril(np.ones((LENGTH, LENGTH), bool)), logits, -np.inf))
            mixed = np.einsum("hts,sk->thk", weights / weights.sum(-1, keepdims=True), v)
            x = x + linear(layer["out"], mixed, 2)
        wanted = linear(params["head"]["values"], norm(params["norm"], x))
        np.testing.assert_allclose(outputs[row], wanted, rtol=1e-10, atol=1e-12)


def test_the_follower_has_no_keys_of_its_own_and_teaches_those_it_reads(follower):
    model, variables, x, _ = follower
    unit = variables["params"]["repeats"]
    assert set(unit["attention_1"]) == {"query", "out"}
    # The first attention's own way to the output is cut: what reaches its keys comes through the second.
    unit = {**unit, "attention_0": {**unit["attention_0"], "out": jax.tree.map(np.zeros_like, unit["attention_0"]["out"])}}
    cut = {**variables["params"], "repeats": unit}
    with jax.enable_x64(True):
        gradient = jax.jit(jax.grad(lambda params, x: (model.apply({"params": params}, x)[0] ** 2).sum()))(cut, x)
    for name in ("key", "value"):
        assert np.any(gradient["repeats"]["attention_0"][name]["kernel"])


def test_saves_half_of_the_cache_and_of_the_key_and_value_parameters():
    options = {"dtype": "float32", "param_dtype": "float32"}
    plain, shared = (built((("attention",), (second,)), **options) for second in ("attention", FOLLOWER))
    assert plain.costs(64).parameters - shared.costs(64).parameters == 2 * WIDTH * WIDTH // HEADS
    held = [sum(a.nbytes for a in jax.tree.leaves(m.init_state(1, 64).repeats)) for m in (plain, shared)]
    assert held[0] == 2 * held[1]


def test_continues_from_the_cache_of_the_first():
    model = built((("attention",), (FOLLOWER,), (FOLLOWER,)), num_layers=2, dtype="float32", param_dtype="float32")
    conformance.chunks_equal_one_call(conformance.model_subject(model), seeds=[0, 1])


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ((FOLLOWER, "mlp"), "has no attention before it in its pattern unit"),
        (("attention", {**FOLLOWER, "num_kv_heads": 2}), "has num_kv_heads=2, and the attention whose keys it reads has 1"),
        (({"name": "attention", "window": 4}, FOLLOWER), "has window=None, and the attention whose keys it reads has 4"),
    ],
)
def test_what_does_not_fit_is_refused(pattern, said):
    with pytest.raises(ConfigError, match=said):
        built(pattern)
