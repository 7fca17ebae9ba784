"""Axial Transformer against dense attention with masks in NumPy, what its outputs see, and its accounts."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqjax
from seqjax.config import ConfigError


def build(**options):
    return seqjax.build({"name": "axial_transformer", **seqjax.registry.architecture("axial_transformer").example, **options})


def noisy(model, inputs):
    """Variables away from zeros and ones."""
    rng = np.random.default_rng(0)
    noise = lambda a: (a + 0.3 * rng.standard_normal(a.shape)).astype(a.dtype)
    return jax.tree.map(noise, jax.tree.map(np.asarray, nn.unbox(jax.jit(model.init)(jax.random.key(0), inputs))))


def norm(x, p):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def block(x, p, seen):
    """One block of all P tokens at once; `seen[t, s]`: token t attends to token s."""
    h = norm(x, p["norm_attention"])
    q, k, v = (np.einsum("td,dhk->htk", h, p[name]["kernel"]) for name in ("query", "key", "value"))
    logits = np.where(seen, np.einsum("htk,hsk->hts", q, k) / np.sqrt(q.shape[-1]), -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    mixed = np.einsum("hts,hsk->htk", weights / weights.sum(-1, keepdims=True), v)
    x = x + np.einsum("htk,hkd->td", mixed, p["out"]["kernel"])
    h = norm(x, p["norm_mlp"]) @ p["mlp"]["up"]["kernel"] + p["mlp"]["up"]["bias"]
    h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
    return x + h @ p["mlp"]["down"]["kernel"] + p["mlp"]["down"]["bias"]


def reference(params, shape, tokens, outer_layers, inner_layers):
    """Logits of one tensor, from section 3 of the paper: attention along an axis is dense attention that a mask confines."""
    p, axes = params["body"], len(shape)
    at = np.stack(np.unravel_index(np.arange(np.prod(shape)), shape), axis=1)

    def seen(axis, causal):
        others = [b for b in range(axes) if b != axis]
        line = np.all(at[:, None, others] == at[None, :, others], axis=-1)
        return line & (at[None, :, axis] <= at[:, None, axis]) if causal else line

    x = params["embedding"]["table"][tokens] + sum(p[f"positions_{a}"][at[:, a]] for a in range(axes))
    for a in range(axes - 1):
        u = x
        for layer in range(outer_layers):
            for i, b in enumerate(range(a + 1, axes)):
                u = block(u, p[f"outer_{a}_{layer}_{i}"], seen(b, causal=False))
            u = block(u, p[f"outer_{a}_{layer}_{axes - a - 1}"], seen(a, causal=True))
        step = np.prod(shape[a + 1 :])
        x = x + np.where(at[:, a, None] > 0, np.roll(u, step, axis=0), 0)
    for layer in range(inner_layers):
        x = block(x, p[f"inner_{layer}"], seen(axes - 1, causal=True))
    return norm(x, params["norm"]) @ params["embedding"]["table"].T


@pytest.mark.parametrize(("shape", "outer", "inner"), [((3, 4), 2, 1), ((2, 3, 2), 1, 2), ((1, 5), 1, 1), ((5, 1), 1, 1)])
def test_equals_dense_attention_under_masks(shape, outer, inner):
    tokens = np.random.default_rng(1).integers(0, 64, (2, np.prod(shape)))
    with jax.enable_x64(True):
        wide = {"dtype": "float64", "param_dtype": "float64"}
        model = build(shape=shape, outer_layers=outer, inner_layers=inner, **wide)
        variables = noisy(model, jnp.asarray(tokens))
        got = np.asarray(jax.jit(model.apply)(variables, jnp.asarray(tokens))[0])
    for row, logits in zip(tokens, got):
        want = reference(variables["params"], shape, row, outer, inner)
        np.testing.assert_allclose(logits, want, atol=1e-10 * np.abs(want).max())


def test_an_output_sees_every_earlier_input_of_its_tensor_and_no_other():
    """The joint distribution is whole: no pixel is independent of an earlier one, given those between."""
    model = build(shape=(3, 4), vocab_size=None, input_dim=1, head="regression", output_dim=1)
    x = np.random.default_rng(2).standard_normal((1, 24, 1)).astype(np.float32)
    variables = noisy(model, x)
    jacobian = jax.jit(jax.jacrev(lambda x, v: model.apply(v, x)[0][0, :, 0]))(x, variables)[:, 0, :, 0]
    tensor = np.arange(24) // 12
    wanted = (np.arange(24)[:, None] >= np.arange(24)) & (tensor[:, None] == tensor)
    np.testing.assert_array_equal(np.abs(jacobian) > 0, wanted)


def test_prefixes_of_any_length_go_on_as_the_whole():
    """A raster prefix that ends within a row, and one that ends with it; then a second tensor."""
    model = build(shape=(3, 4), outer_layers=2)
    tokens = jax.random.randint(jax.random.key(3), (2, 24), 0, 64)
    variables = noisy(model, tokens)
    whole, call = jax.jit(model.apply)(variables, tokens)[0], jax.jit(model.apply)
    for cut in (3, 8, 14):
        first, state = call(variables, tokens[:, :cut], model.init_state(2, 24))
        rest, _ = call(variables, tokens[:, cut:], state)
        np.testing.assert_allclose(jnp.concatenate([first, rest], axis=1), whole, atol=2e-4)


def test_attention_costs_the_axes_and_not_their_product():
    sizes = {"vocab_size": 256, "embed_dim": 64, "num_heads": 4}
    axial = build(shape=(28, 28), outer_layers=2, inner_layers=4, **sizes)
    full = seqjax.build({"name": "transformer", "num_layers": 8, "position": "learned", "max_length": 784, **sizes})
    assert axial.costs(784).parameters <= full.costs(784).parameters
    products = 784 * 8 * 24 * 64**2 + 2 * 784 * 64 * 256  # maps of eight blocks, and the head
    assert 4 * (axial.costs(784).flops - products) <= full.costs(784).flops - products
    assert axial.init_state(1, 784).segment is not None and 4 * axial.costs(784).state_bytes < 3 * full.costs(784).state_bytes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": (28,)}, r"model\.shape=\(28,\) is no tensor of several axes"),
        ({"shape": (4, 0)}, r"model\.shape=\(4, 0\) is no tensor of several axes"),
        ({"num_heads": 3}, r"model\.num_heads=3 does not divide"),
        ({"outer_layers": 0}, r"model\.outer_layers=0 is not positive"),
        ({"activation": "gleu"}, r"did you mean 'gelu'"),
        ({"norm": "lyer"}, r"did you mean 'layer'"),
        ({"causal": False}, r"model\.causal=False: axial_transformer predicts tensors in raster order"),
        ({"position": "rope"}, r"model\.position is not an option"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        build(**options)
