"""Hydra against its matrix, written from the paper's equations in NumPy float64, and its authors' block."""

import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqjax
from seqjax import registry
from seqjax.config import ConfigError
from seqjax.mixers.hydra import Direction, quasiseparable

GOLDEN = np.load(pathlib.Path(__file__).parent / "data/hydra.npz")
WIDTH, STATE, HEAD, LENGTH = 4, 3, 2, 13
HEADS = 2 * WIDTH // HEAD
IDS = np.array([[1] * 5 + [2] * 3 + [1] * 5, [0] * 4 + [7] * 9], np.int32)


def made(**options):
    """A mixer in float64, parameters moved off their initial values, and inputs `[B, L, D]`."""
    options = {"embed_dim": WIDTH, "state_dim": STATE, "head_dim": HEAD, "chunk_size": 4, **options}
    mixer = registry.mixer("hydra")(dtype="float64", param_dtype="float64", **options)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, LENGTH, WIDTH))
    variables = nn.unbox(jax.jit(mixer.init)(jax.random.key(0), x))
    return mixer, jax.tree.map(lambda a: np.asarray(a) + 0.3 * rng.standard_normal(a.shape), variables), x


def silu(x):
    return x / (1 + np.exp(-x))


def matrix(forward, backward, diagonal):
    """M of one head from (b, c, steps, decay) of both directions, by its entries."""
    length = len(diagonal)
    m = np.diag(diagonal)
    for i in range(length):
        for j in range(i):
            b, c, steps, decay = forward
            m[i, j] = c[i - 1] @ b[j] * np.prod(decay[j + 1 : i]) * steps[j]
            b, c, steps, decay = backward
            m[j, i] = c[j + 1] @ b[i] * np.prod(decay[j + 1 : i]) * steps[i]
    return m


def expected(p, x, groups=1):
    """One row, which is one segment."""
    inner, keys = 2 * WIDTH, groups * STATE
    z, u, dt = np.split(x @ p["in"]["kernel"], [inner, 2 * inner + 4 * keys], axis=-1)
    kernel, convolved = p["conv"]["kernel"], np.zeros_like(u) + p["conv"]["bias"]
    for t in range(len(x)):
        for tap in range(len(kernel)):
            s = t + tap - len(kernel) // 2
            if 0 <= s < len(x):
                convolved[t] += kernel[tap] * u[s]
    u = silu(convolved)
    mixed, *parts = np.split(u, inner + keys * np.arange(4), axis=-1)
    parts = [part.reshape(len(x), groups, STATE) for part in parts]
    dt = np.log1p(np.exp(dt.reshape(len(x), 2, HEADS) + p["dt_bias"]))
    weights = mixed @ p["diagonal"]["kernel"] + p["skip"]
    y = np.zeros((len(x), HEADS, HEAD))
    for h in range(HEADS):
        group = h // (HEADS // groups)
        decay = np.exp(-np.exp(p["a_log"][h]) * dt[:, :, h])
        forward, backward = (
            (parts[2 * way][:, group], parts[2 * way + 1][:, group], dt[:, way, h], decay[:, way]) for way in (0, 1)
        )
        y[:, h] = matrix(forward, backward, weights[:, h]) @ mixed.reshape(len(x), HEADS, HEAD)[:, h]
    y = y.reshape(len(x), inner)
    y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-5) * p["norm"]["scale"]
    return (y * silu(z)) @ p["out"]["kernel"]


@pytest.mark.parametrize("options", [{}, {"num_groups": 2, "conv_width": 3, "chunk_size": None}])
def test_equals_the_equations(options):
    with jax.enable_x64(True):
        mixer, variables, x = made(**options)
        got = np.asarray(jax.jit(mixer.apply)(variables, x)[0])
    want = np.stack([expected(variables["params"], row, mixer.num_groups) for row in x])
    assert np.abs(got - want).max() < 1e-12 * np.abs(want).max()


def test_packed_documents_equal_the_equations_of_each():
    with jax.enable_x64(True):
        mixer, variables, x = made()
        got = np.asarray(jax.jit(mixer.apply)(variables, x, segment_ids=IDS)[0])
    for row in range(2):
        edges = [0, *(np.flatnonzero(np.diff(IDS[row])) + 1), LENGTH]
        want = np.concatenate([expected(variables["params"], x[row, a:b]) for a, b in zip(edges[:-1], edges[1:])])
        assert np.abs(got[row] - want).max() < 1e-12 * np.abs(want).max()


def test_mixes_by_a_quasiseparable_matrix():
    """Unit vectors in, columns of the matrix out: blocks off the diagonal have rank N, and the diagonal is free."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal((1, LENGTH, *shape))
    steps, decay = rng.uniform(0.5, 1, (2, 1, LENGTH, 1)), rng.uniform(0.8, 1, (2, 1, LENGTH, 1))
    ways = [Direction(draw(1, STATE), draw(1, STATE), steps[i], np.log(decay[i])) for i in (0, 1)]
    diagonal = draw(1)
    with jax.enable_x64(True):
        probes = jnp.eye(LENGTH)[None, :, None]  # one head, whose features are the probes
        arguments = jax.tree.map(jnp.asarray, (*ways, diagonal))
        m = np.asarray(quasiseparable(probes, *arguments, chunk_size=4))[0, :, 0]
    one = lambda way, i: (way.b[0, :, 0], way.c[0, :, 0], way.steps[0, :, 0], decay[i, 0, :, 0])
    want = matrix(one(ways[0], 0), one(ways[1], 1), diagonal[0, :, 0])
    assert np.abs(m - want).max() < 1e-12 * np.abs(want).max()
    ranks = lambda m: [np.linalg.matrix_rank(m[i:, :i], tol=1e-10) for i in range(1, LENGTH)]
    assert max(ranks(m)) == max(ranks(m.T)) == STATE
    assert np.abs(np.diag(m) - diagonal[0, :, 0]).max() < 1e-14


def test_equals_the_authors():
    weights = {key[2:]: GOLDEN[key] for key in GOLDEN if key.startswith("w.")}
    parameters = {
        "in": {"kernel": weights["in_proj.weight"].T},
        "conv": {"kernel": weights["conv1d.weight"][:, 0].T, "bias": weights["conv1d.bias"]},
        "dt_bias": weights["dt_bias"],
        "a_log": weights["A_log"],
        "skip": weights["D"],
        "diagonal": {"kernel": weights["fc_D.weight"].T},
        "norm": {"scale": weights["norm.weight"]},
        "out": {"kernel": weights["out_proj.weight"].T},
    }
    mixer = registry.mixer("hydra")(embed_dim=8, state_dim=4, head_dim=4)
    got, _ = jax.jit(mixer.apply)({"params": parameters}, GOLDEN["x"])
    assert np.abs(np.asarray(got) - GOLDEN["y"]).max() < 1e-6


def test_turned_around_with_its_directions_exchanged_it_is_the_same():
    with jax.enable_x64(True):
        mixer, variables, x = made()
        p, inner = variables["params"], 2 * WIDTH
        own, ways = slice(0, inner), np.arange(4 * STATE).reshape(2, -1)[::-1].ravel()
        columns = np.r_[own, inner + np.r_[own, inner + ways]]
        steps = len(columns) + np.arange(2 * HEADS).reshape(2, -1)[::-1].ravel()
        turned = p | {
            "in": {"kernel": p["in"]["kernel"][:, np.r_[columns, steps]]},
            "conv": {
                "kernel": p["conv"]["kernel"][::-1][:, np.r_[own, inner + ways]],
                "bias": p["conv"]["bias"][np.r_[own, inner + ways]],
            },
        }
        call = jax.jit(mixer.apply)
        y, _ = call(variables, x)
        back, _ = call({"params": turned}, x[:, ::-1])
    assert np.abs(back[:, ::-1] - y).max() < 1e-12 * np.abs(y).max()


def test_has_as_many_parameters_as_published():
    """A layer of Hydra for BERT; with 23 of them and BERT's vocabulary, 111 million."""
    assert registry.mixer("hydra")(embed_dim=768).costs(128).parameters == 3_825_224


def test_is_bidirectional_only():
    assert "hydra" in seqjax.list_architectures(causal=False, segments=True)
    assert "hydra" not in seqjax.list_architectures(causal=True) + seqjax.list_architectures(carries_state=True)
    model = seqjax.build(seqjax.example_config("hydra"))
    assert not model.causal and model.norm == "rms"
    with pytest.raises(ConfigError, match="carries no state"):
        model.init_state(1, 8)
    mixer = registry.mixer("hydra")(embed_dim=8)
    with pytest.raises(ConfigError, match="carries no state; allowed: a call without a state"):
        mixer.init_state(1, 8)
    with pytest.raises(ConfigError, match="carries no state; allowed: a call without a state"):
        mixer.init(jax.random.key(0), jnp.zeros((1, 4, 8)), ())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"causal": True}, "model.causal=True: Hydra has no causal form; allowed: False"),
        ({"conv_width": 4}, "model.conv_width=4 has no middle; allowed: odd numbers"),
        ({"head_dim": 3}, "model.head_dim=3 does not divide the inner width 16"),
    ],
)
def test_mistakes_are_told_before_anything_compiles(options, words):
    with pytest.raises(ConfigError, match=words):
        registry.mixer("hydra")(embed_dim=8, **options)
    with pytest.raises(ConfigError, match=words):
        seqjax.build({"name": "hydra", "vocab_size": 8, "embed_dim": 8, **options})


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_lowers_for_accelerators(platform):
    mixer = registry.mixer("hydra")(embed_dim=8, state_dim=4)
    x, ids = jnp.zeros((1, 80, 8)), jnp.zeros((1, 80), jnp.int32)
    variables = jax.eval_shape(lambda key, x: nn.unbox(mixer.init(key, x)), jax.random.key(0), x)
    loss = lambda v, x: mixer.apply(v, x)[0].sum() + mixer.apply(v, x, segment_ids=ids)[0].sum()
    lowered = jax.jit(jax.grad(loss)).trace(variables, x).lower(lowering_platforms=(platform,))
    assert "stablehlo" in lowered.as_text()
