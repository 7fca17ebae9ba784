"""LightNet and its encodings of position against their equations, token by token in NumPy float64."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqjax
from seqjax import registry
from seqjax.config import ConfigError

WIDTH, HEADS, LENGTH = 8, 2, 17
IDS = np.array([[1] * 7 + [2] * 3 + [1] * 7, [0] * 4 + [7] * 13], np.int32)
EDGES = [[0, 7, 10, 17], [0, 4, 17]]


def made(name, **options):
    """A mixer in float64, parameters moved off their initial values, and inputs `[B, L, D]`."""
    mixer = registry.mixer(name)(embed_dim=WIDTH, num_heads=HEADS, dtype="float64", param_dtype="float64", **options)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, LENGTH, WIDTH))
    variables = nn.unbox(jax.jit(mixer.init)(jax.random.key(0), x))
    return mixer, jax.tree.map(lambda a: np.asarray(a) + 0.3 * rng.standard_normal(a.shape), variables), x


def run(mixer, variables, x, segment_ids=None):
    ids = None if segment_ids is None else jnp.asarray(segment_ids)
    return np.asarray(jax.jit(mixer.apply)(variables, jnp.asarray(x), segment_ids=ids)[0])


def silu(a):
    return a / (1 + np.exp(-a))


def scores(q, weights, p, s, shape):
    """Of the query at position p and the weights at s: each channel's product, turned by the distance along its axis."""
    if shape is None:
        return np.sum(q * weights, axis=-1)
    heads, width = q.shape
    size = -(-width // len(shape))
    steps = np.subtract(*(np.unravel_index(place % np.prod(shape), shape) for place in (p, s)))
    total = np.zeros(heads)
    for h, j in np.ndindex(heads, width):
        frequency = 10000.0 ** (-2 * (h * width + j % size) / (heads * width))
        total[h] += q[h, j] * weights[h, j] * np.cos(frequency * steps[j // size])
    return total


def lightnet(p, x, *, causal, shape, initial_unit):
    """One segment."""
    q, k, v = (np.einsum("ld,dhk->lhk", x, p[name]["kernel"]) for name in ("query", "key", "value"))
    y = np.zeros_like(v)
    for t in range(len(x)):
        seen = range(t + 1 if causal else len(x))
        total = sum(np.exp(k[s]) for s in seen) + initial_unit
        y[t] = sum(scores(silu(q[t]), np.exp(k[s]) / total, t, s, shape)[:, None] * v[s] for s in seen)
    y, gate = y.reshape(x.shape), x @ p["gate_in"]["kernel"] @ p["gate_out"]["kernel"]
    normed = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-5) * p["norm"]["scale"]
    return (normed * silu(gate)) @ p["out"]["kernel"]


def tpe(p, x, *, shape):
    """One segment: every token sums up its line through each axis by itself."""
    axes = len(shape or (1,))
    y, heads = np.zeros_like(x), x.reshape(len(x), HEADS, -1)
    size = np.prod(shape) if shape else len(x)
    for t, (a, h) in ((t, place) for t in range(len(x)) for place in np.ndindex(axes, HEADS)):
        first = t - t % size  # of its tensor
        at = np.unravel_index(t - first, shape) if shape else (t,)
        line = np.zeros(heads.shape[-1])
        for back in range(at[a] + 1):
            place = tuple(c - back * (b == a) for b, c in enumerate(at))
            s = first + (np.ravel_multi_index(place, shape) if shape else place[0])
            line += (1 + np.exp(-p["decay"][a, h])) ** -back * heads[s, h]
        line = line * (p["query"][a, h] @ p["key"][a, h])
        line = line / np.sqrt((line**2).mean() + 1e-5) * p["scale"][a, h]
        y[t] += line @ p["out"]["kernel"][a, h]
    return y


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("shape", "initial_unit"), [(None, False), (None, True), ((2, 3), True), ((3, 1, 2), False)])
def test_equals_its_equations(causal, shape, initial_unit):
    form = {"causal": causal, "shape": shape, "initial_unit": initial_unit}
    with jax.enable_x64(True):
        mixer, variables, x = made("lightnet", chunk_size=4, **form)
        y, packed = run(mixer, variables, x), run(mixer, variables, x, IDS)
    for row, edges in enumerate(EDGES):
        np.testing.assert_allclose(y[row], lightnet(variables["params"], x[row], **form), atol=1e-10)
        pieces = [lightnet(variables["params"], x[row, a:b], **form) for a, b in zip(edges, edges[1:])]
        np.testing.assert_allclose(packed[row], np.concatenate(pieces), atol=1e-10)


def test_the_last_token_of_the_causal_form_sees_what_the_other_does():
    with jax.enable_x64(True):
        mixer, variables, x = made("lightnet", shape=(4, 5))
        causal, whole = run(mixer, variables, x), run(mixer.clone(causal=False), variables, x)
    np.testing.assert_allclose(causal[:, -1], whole[:, -1], atol=1e-12)
    assert np.abs(causal[:, 0] - whole[:, 0]).max() > 1e-2


def test_without_positions_tokens_may_change_places():
    order = np.random.default_rng(1).permutation(LENGTH)
    with jax.enable_x64(True):
        mixer, variables, x = made("lightnet", causal=False)
        y, moved = run(mixer, variables, x), run(mixer, variables, x[:, order])
        placed = mixer.clone(shape=(4, 5))
        unlike = run(placed, variables, x[:, order]) - run(placed, variables, x)[:, order]
    np.testing.assert_allclose(moved, y[:, order], atol=1e-12)
    assert np.abs(unlike).max() > 1e-2


@pytest.mark.parametrize("shape", [None, (2, 3), (2, 1, 3), (20,)])
def test_tpe_equals_its_equations(shape):
    with jax.enable_x64(True):
        mixer, variables, x = made("tpe", shape=shape)
        y, packed = run(mixer, variables, x), run(mixer, variables, x, IDS)
    for row, edges in enumerate(EDGES):
        np.testing.assert_allclose(y[row], tpe(variables["params"], x[row], shape=shape), atol=1e-10)
        pieces = [tpe(variables["params"], x[row, a:b], shape=shape) for a, b in zip(edges, edges[1:])]
        np.testing.assert_allclose(packed[row], np.concatenate(pieces), atol=1e-10)


def test_tpe_looks_along_axes_alone():
    """In a 3 x 4 tensor: back along its row and its column, not at what lies between."""
    with jax.enable_x64(True):
        mixer, variables, x = made("tpe", shape=(3, 4))
        influence = jax.jit(jax.grad(lambda x: mixer.apply(variables, x)[0][0, 10].sum()))(jnp.asarray(x[:1]))
    assert list(np.flatnonzero(np.any(np.asarray(influence)[0], axis=-1))) == [2, 6, 8, 9, 10]


def test_tpe_keeps_of_its_query_and_key_little_more_than_a_sign():
    with jax.enable_x64(True):
        mixer, variables, x = made("tpe", shape=(3, 4), norm_epsilon=0.0)
        p = variables["params"]
        longer, turned = ({"params": p | {"query": factor * p["query"]}} for factor in (3.0, -1.0))
        y, long, turn = (run(mixer, v, x) for v in (variables, longer, turned))
    np.testing.assert_allclose(long, y, atol=1e-12)
    np.testing.assert_allclose(turn, -y, atol=1e-12)


def test_sees_both_sides_on_request():
    assert "lightnet" in seqjax.list_architectures(causal=False) and "lightnet" in seqjax.list_architectures(causal=True)
    mixer = registry.mixer("lightnet")(embed_dim=8, causal=False)
    with pytest.raises(ConfigError, match="carries no state; allowed: causal=True, or a call without a state"):
        mixer.init_state(1, 8)
    with pytest.raises(ConfigError, match="carries no state; allowed: causal=True, or a call without a state"):
        mixer.init(jax.random.key(0), jnp.zeros((1, 4, 8)), ())


@pytest.mark.parametrize("name", ["lightnet", "tpe"])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_heads": 3}, "model.num_heads=3 does not divide model.embed_dim=8"),
        ({"shape": ()}, r"model.shape=\(\) is no tensor; allowed: None, or positive sizes such as \(7, 7\)"),
        ({"shape": (7, 0)}, r"model.shape=\(7, 0\) is no tensor"),
    ],
)
def test_mistakes_are_told_before_anything_compiles(name, options, words):
    with pytest.raises(ConfigError, match=words):
        registry.mixer(name)(embed_dim=WIDTH, **options)


@pytest.mark.parametrize("key", ["gate_rank", "chunk_size"])
def test_sizes_are_positive(key):
    with pytest.raises(ConfigError, match=f"model.{key}=0 is not positive"):
        registry.mixer("lightnet")(embed_dim=WIDTH, **{key: 0})


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_lowers_for_accelerators(platform):
    stack = {"vocab_size": 8, "embed_dim": 8, "num_layers": 1, "shape": (7, 7), "causal": False}
    model = seqjax.build({"name": "lightnet", "pattern": (("tpe", "lightnet", "glu"),), **stack})
    tokens, ids = jnp.zeros((1, 49), jnp.int32), jnp.ones((1, 49), jnp.int32)
    variables = jax.eval_shape(lambda key, x: nn.unbox(model.init(key, x)), jax.random.key(0), tokens)
    loss = lambda v, x: model.apply(v, x)[0].sum() + model.apply(v, x, segment_ids=ids)[0].sum()
    lowered = jax.jit(jax.grad(loss)).trace(variables, tokens).lower(lowering_platforms=(platform,))
    assert "stablehlo" in lowered.as_text()
