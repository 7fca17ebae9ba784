"""Forecasting by tokens that are channels: S-Mamba against the authors' encoder, and iTransformer's symmetries."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

import seqjax
from seqjax.config import ConfigError

DATA = pathlib.Path(__file__).parent / "data"
SIZES = {
    "input_dim": 5,
    "output_dim": 5,
    "horizon": 6,
    "embed_dim": 8,
    "num_layers": 2,
    "mlp_ratio": 2,
    "activation": "gelu_exact",
}


def torch_weights():
    """The authors' weights as this model's parameters."""
    stored = np.load(DATA / "s_mamba.npz")
    layers = []
    for layer in range(2):
        root = f"enc.attn_layers.{layer}."
        made = {}
        for theirs, suffix in (("attention.m.", ""), ("attention_r.m.", "_reverse")):
            read = lambda name, path=root + theirs: stored[path + name]
            both, weights = read("in_proj.weight"), read("x_proj.weight")
            for name, array in {
                "in{}/kernel": both[:8].T,
                "gate{}/kernel": both[8:].T,
                "conv{}/kernel": read("conv1d.weight")[:, 0].T,
                "conv{}/bias": read("conv1d.bias"),
                "dt_down{}/kernel": weights[:1].T,
                "b{}/kernel": weights[1:5].T,
                "c{}/kernel": weights[5:].T,
                "dt_up{}/kernel": read("dt_proj.weight").T,
                "dt_bias{}": read("dt_proj.bias"),
                "a_log{}": read("A_log").T,
                "skip{}": read("D"),
                "out{}/kernel": read("out_proj.weight").T,
            }.items():
                made["mamba_0/" + name.format(suffix)] = array
        for ours, theirs in (("up", "conv1"), ("down", "conv2")):
            made[f"mlp_1/{ours}/kernel"] = stored[f"{root}{theirs}.weight"][..., 0].T
            made[f"mlp_1/{ours}/bias"] = stored[f"{root}{theirs}.bias"]
        for i in range(2):
            made[f"norm_{i}/scale"] = stored[f"{root}norm{i + 1}.weight"]
            made[f"norm_{i}/bias"] = stored[f"{root}norm{i + 1}.bias"]
        layers.append(made)
    params = {f"repeats/{name}": np.stack([layer[name] for layer in layers]) for name in layers[0]}
    params |= {"embedding/kernel": stored["emb.w"].T, "embedding/bias": stored["emb.b"]}
    params |= {"norm/scale": stored["enc.norm.weight"], "norm/bias": stored["enc.norm.bias"]}
    params |= {"head/forecast/kernel": stored["proj.w"].T, "head/forecast/bias": stored["proj.b"]}
    return stored, {"params": unflatten_dict(params, sep="/")}


def test_s_mamba_is_the_authors():
    stored, variables = torch_weights()
    model = seqjax.build({"name": "s_mamba", "state_dim": 4, **SIZES})
    forecast, _ = jax.jit(model.apply)(variables, jnp.asarray(stored["x"]))
    np.testing.assert_allclose(forecast, stored["y"], atol=2e-5)
    parameters = sum(a.size for a in jax.tree.leaves(variables))
    assert model.costs(12).parameters == parameters


def built(name, seed=0, **options):
    model = seqjax.build({"name": name, **SIZES, **options})
    x = jax.random.normal(jax.random.key(seed), (2, 12, 5))
    variables = jax.jit(model.init)(jax.random.key(seed + 1), x)
    leaves, structure = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(seed + 2), len(leaves))
    leaves = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys)]
    return model, jax.tree.unflatten(structure, leaves), x


@pytest.mark.parametrize("name", ["itransformer", "s_mamba"])
def test_forecasts_follow_level_and_scale(name):
    model, variables, x = built(name)
    apply = jax.jit(model.apply)
    scale, level = jnp.array([1.0, 2.0, 0.5, 3.0, 10.0]), jnp.array([0.0, 5.0, -2.0, 1.0, 7.0])
    expected = apply(variables, x)[0] * scale + level
    np.testing.assert_allclose(apply(variables, x * scale + level)[0], expected, rtol=2e-3, atol=2e-3)


def test_itransformer_has_no_order_of_channels_and_s_mamba_has():
    order = jnp.array([3, 0, 4, 1, 2])
    for name, same in (("itransformer", True), ("s_mamba", False)):
        model, variables, x = built(name, **({"num_heads": 2} if name == "itransformer" else {"state_dim": 4}))
        forecast = jax.jit(model.apply)(variables, x)[0][..., order]
        permuted = jax.jit(model.apply)(variables, x[..., order])[0]
        assert np.allclose(forecast, permuted, atol=1e-5) == same


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"causal": True}, "makes tokens of channels"),
        ({"channel_independent": True}, "one token a row"),
        ({"input_dim": None, "vocab_size": 7, "series_norm": "none"}, "makes tokens of channels"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ConfigError, match=message):
        seqjax.build({"name": "itransformer", **SIZES, **options})


def test_of_packed_windows_the_last_counts():
    model, variables, x = built("itransformer")
    ids = jnp.asarray(np.repeat([[1] * 5 + [2] * 7], 2, axis=0))
    apply = jax.jit(model.apply)
    forecast, _ = apply(variables, x, segment_ids=ids)
    changed, _ = apply(variables, x.at[:, :5].add(3.0), segment_ids=ids)
    np.testing.assert_array_equal(forecast, changed)
    assert not np.allclose(forecast, apply(variables, x)[0])
