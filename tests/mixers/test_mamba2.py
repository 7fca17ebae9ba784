"""Mamba-2 against the paper's equations in NumPy float64, token by token, and the layer of Transformers."""

import pathlib

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

GOLDEN = np.load(pathlib.Path(__file__).parent / "data/mamba2.npz")
WIDTH, STATE, HEAD, LENGTH = 6, 3, 2, 21
IDS = np.array([[1] * 8 + [2] * 3 + [1] * 10, [0] * 4 + [7] * 17], np.int32)


def made(**options):
    """A mixer in float64, parameters moved off their initial values, and inputs `[B, L, D]`."""
    options = {"embed_dim": WIDTH, "state_dim": STATE, "head_dim": HEAD, "chunk_size": 8, **options}
    mixer = registry.mixer("mamba2")(dtype="float64", param_dtype="float64", **options)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, LENGTH, WIDTH))
    variables = nn.unbox(jax.jit(mixer.init)(jax.random.key(0), x))
    return mixer, jax.tree.map(lambda a: np.asarray(a) + 0.3 * rng.standard_normal(a.shape), variables), x


def silu(x):
    return x / (1 + np.exp(-x))


def expected(p, x, groups=1, dt_limit=(0, np.inf), epsilon=1e-5):
    """One row, which is one segment."""
    inner, heads = 2 * WIDTH, 2 * WIDTH // HEAD
    width = inner + 2 * groups * STATE
    projected = x @ p["in"]["kernel"] + p["in"].get("bias", 0)
    z, u, dt = projected[:, :inner], projected[:, inner : inner + width], projected[:, inner + width :]
    kernel, convolved = p["conv"]["kernel"], np.zeros_like(u) + p["conv"].get("bias", 0)
    for t in range(len(x)):
        for lag in range(min(len(kernel), t + 1)):
            convolved[t] += kernel[-1 - lag] * u[t - lag]
    u = silu(convolved)
    values = u[:, :inner].reshape(-1, heads, HEAD)
    b, c = u[:, inner:].reshape(-1, 2, groups, STATE).swapaxes(0, 1)
    dt = np.clip(np.log1p(np.exp(dt + p["dt_bias"])), *dt_limit)
    y, state = np.zeros_like(values), np.zeros((heads, HEAD, STATE))
    for t in range(len(x)):
        for h in range(heads):
            group = h // (heads // groups)
            decay = np.exp(-np.exp(p["a_log"][h]) * dt[t, h])
            state[h] = decay * state[h] + dt[t, h] * np.outer(values[t, h], b[t, group])
            y[t, h] = state[h] @ c[t, group] + p["skip"][h] * values[t, h]
    y = (y.reshape(len(x), inner) * silu(z)).reshape(len(x), groups, -1)
    y = y / np.sqrt((y**2).mean(-1, keepdims=True) + epsilon)
    return (y.reshape(len(x), inner) * p["norm"]["scale"]) @ p["out"]["kernel"] + p["out"].get("bias", 0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_groups": 2, "chunk_size": None, "norm_epsilon": 1e-2},
        {"conv_width": 2, "conv_bias": False, "use_bias": True, "dt_limit": (0.4, 0.9)},
    ],
)
def test_equals_the_equations(options):
    with jax.enable_x64(True):
        mixer, variables, x = made(**options)
        got = np.asarray(jax.jit(mixer.apply)(variables, x)[0])
    own = {"groups": mixer.num_groups, "dt_limit": mixer.dt_limit or (0, np.inf), "epsilon": mixer.norm_epsilon}
    want = np.stack([expected(variables["params"], row, **own) for row in x])
    assert np.abs(got - want).max() < 1e-12 * np.abs(want).max()


def test_packed_documents_equal_the_equations_of_each():
    """Convolution and state start anew where the id changes."""
    with jax.enable_x64(True):
        mixer, variables, x = made()
        got = np.asarray(jax.jit(mixer.apply)(variables, x, segment_ids=IDS)[0])
    for row in range(2):
        edges = [0, *(np.flatnonzero(np.diff(IDS[row])) + 1), LENGTH]
        want = np.concatenate([expected(variables["params"], x[row, a:b]) for a, b in zip(edges[:-1], edges[1:])])
        assert np.abs(got[row] - want).max() < 1e-12 * np.abs(want).max()


def ported():
    weights = {key[2:]: GOLDEN[key] for key in GOLDEN if key.startswith("w.")}
    return {
        "in": {"kernel": weights["in_proj.weight"].T},
        "conv": {"kernel": weights["conv1d.weight"][:, 0].T, "bias": weights["conv1d.bias"]},
        "dt_bias": weights["dt_bias"],
        "a_log": weights["A_log"],
        "skip": weights["D"],
        "norm": {"scale": weights["norm.weight"]},
        "out": {"kernel": weights["out_proj.weight"].T},
    }


@pytest.mark.parametrize("split", [[16], [5, 1, 1, 9]])
def test_equals_transformers(split):
    mixer = registry.mixer("mamba2")(embed_dim=32, state_dim=8, head_dim=16, chunk_size=8)
    call, outputs, state, at = jax.jit(mixer.apply), [], mixer.init_state(2, 16), 0
    for length in split:
        y, state = call({"params": ported()}, GOLDEN["x"][:, at : at + length], state)
        outputs.append(y)
        at += length
    assert np.abs(np.concatenate(outputs, axis=1) - GOLDEN["y"]).max() < 1e-6


@pytest.mark.parametrize(
    ("width", "layers", "published"),
    [(768, 24, 128_989_632), (1024, 48, 368_346_624), (1536, 48, 780_161_280), (2560, 64, 2_702_599_680)],
)
def test_models_have_as_many_parameters_as_published(width, layers, published):
    """130m, 370m, 780m and 2.7b, with their vocabulary padded to a multiple of 16."""
    model = seqjax.build({"name": "mamba2", "vocab_size": 50_288, "embed_dim": width, "num_layers": layers})
    assert model.costs(16).parameters == published
    assert (model.norm, model.position, [s.name for s in model.unit]) == ("rms", "none", ["mamba2"])


def test_initial_values_are_the_authors():
    mixer = registry.mixer("mamba2")(embed_dim=256, head_dim=2, dt_min=0.01, dt_max=0.2)
    wide = lambda variables: jax.tree.map(lambda a: np.asarray(a, np.float64), nn.unbox(variables)["params"])
    p = wide(jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 2, 256))))
    steps = np.log(np.log1p(np.exp(p["dt_bias"])))
    for values, low, high in ((np.exp(p["a_log"]), 1, 16), (steps, np.log(0.01), np.log(0.2))):
        assert low - 1e-4 <= values.min() and values.max() <= high + 1e-4
        np.testing.assert_allclose([values.mean(), values.std()], [(low + high) / 2, (high - low) / 12**0.5], rtol=0.15)
    assert np.all(p["skip"] == 1) and np.all(p["norm"]["scale"] == 1)
    for values, inputs in ((p["conv"]["kernel"], 4), (p["conv"]["bias"], 4), (p["in"]["kernel"], 256)):
        assert 0.98 * inputs**-0.5 < np.abs(values).max() <= inputs**-0.5
    tiny = registry.mixer("mamba2")(embed_dim=8, head_dim=2, dt_min=1e-7, dt_max=1e-7)
    bias = wide(tiny.init(jax.random.key(0), jnp.zeros((1, 2, 8))))["dt_bias"]
    np.testing.assert_allclose(np.log1p(np.exp(bias)), 1e-7, rtol=1e-4)


@pytest.mark.parametrize(("width", "heads", "head"), [(3, 3, 2), (16, 1, 32), (48, 3, 32), (256, 8, 64)])
def test_heads_fit_any_width(width, heads, head):
    mixer = registry.mixer("mamba2")(embed_dim=width)
    assert (mixer.heads, mixer.head_width) == (heads, head)


def test_state_stays_in_float32_and_does_not_grow():
    mixer = registry.mixer("mamba2")(embed_dim=8, state_dim=4, dtype="bfloat16")
    state = mixer.init_state(2, 10**6)
    assert state.heads.dtype == jnp.float32 and state.heads.shape == (2, 1, 4, 16)
    assert state.convolution.inputs.shape == (2, 3, 24)


def test_decay_rates_and_steps_train_apart():
    model = seqjax.build(seqjax.example_config("mamba2"))
    parameters = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.2, groups={"state_space": {"learning_rate": 0.01}})
    found = settings_by_leaf(config, parameters, model.optimizer_groups())["repeats"]["mamba2_0"]
    rates = {key: found[key].learning_rate for key in ("a_log", "skip", "dt_bias")}
    assert rates == {"a_log": 0.01, "skip": 0.01, "dt_bias": 0.01}
    assert all(found[key].weight_decay == 0.0 for key in rates)
    assert found["in"]["kernel"].weight_decay == 0.2 and found["conv"]["kernel"].learning_rate == 0.1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"head_dim": 5}, "model.head_dim=5 does not divide the inner width 16.*allowed: 1, 2, 4, 8, 16"),
        ({"head_dim": 4, "num_groups": 3}, "model.num_groups=3 does not divide the 4 heads; allowed: 1, 2, 4"),
        ({"state_dim": 0}, "model.state_dim=0 is not positive"),
        ({"chunk_size": 0}, "model.chunk_size=0 is not positive"),
        ({"dt_min": 0.2}, "model.dt_min=0.2 and model.dt_max=0.1 are no range"),
        ({"dt_limit": (0.2, 0.1)}, r"model.dt_limit=\(0.2, 0.1\) is no range"),
        ({"causal": False}, "Mamba2 has no bidirectional form"),
    ],
)
def test_mistakes_are_told_before_anything_compiles(options, words):
    with pytest.raises(ConfigError, match=words):
        registry.mixer("mamba2")(embed_dim=8, **options)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_lowers_for_accelerators(platform):
    mixer = registry.mixer("mamba2")(embed_dim=8, state_dim=4)
    x, ids = jnp.zeros((1, 80, 8)), jnp.zeros((1, 80), jnp.int32)
    variables = jax.eval_shape(lambda key, x: nn.unbox(mixer.init(key, x)), jax.random.key(0), x)
    loss = lambda v, x: mixer.apply(v, x)[0].sum() + mixer.apply(v, x, segment_ids=ids)[0].sum()
    lowered = jax.jit(jax.grad(loss)).trace(variables, x).lower(lowering_platforms=(platform,))
    assert "stablehlo" in lowered.as_text()
