"""Norms against NumPy in float64, and the dense layer against einsum."""

import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqjax.layers.dense import Dense
from seqjax.layers.norms import GatedRMSNorm, make_norm

X = np.random.default_rng(0).standard_normal((3, 4, 6)) * 3 + 1


@pytest.mark.parametrize("kind", ["layer", "rms", "batch"])
def test_training_norms_equal_their_definition(kind):
    norm = make_norm(kind, epsilon=1e-3)
    x = jnp.asarray(X, jnp.float32)
    variables = nn.unbox(norm.init(jax.random.key(0), x))
    scale = np.linspace(0.5, 2, 6)
    variables["params"]["scale"] = jnp.asarray(scale, jnp.float32)
    got, _ = norm.apply(variables, x, True, mutable=["batch_stats"])
    axis = (0, 1) if kind == "batch" else -1
    mean = 0 if kind == "rms" else X.mean(axis, keepdims=True)
    wanted = (X - mean) / np.sqrt(((X - mean) ** 2).mean(axis, keepdims=True) + 1e-3) * scale
    np.testing.assert_allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize(("kind", "plain"), [("rms_offset", "rms"), ("layer_unscaled", "layer")])
def test_variants_of_scales(kind, plain):
    """A scale stored as an offset from 1; none at all."""
    x = jnp.asarray(X, jnp.float32)
    offset = jnp.linspace(-0.5, 1, 6) if kind == "rms_offset" else jnp.zeros(6)
    params = {"scale": 1 + offset} | ({"bias": jnp.zeros(6)} if plain == "layer" else {})
    wanted = make_norm(plain).apply({"params": params}, x)
    got = make_norm(kind).apply({"params": {"scale": offset} if kind == "rms_offset" else {}}, x)
    np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_batch_norm_averages_its_statistics():
    norm = make_norm("batch")
    x = jnp.asarray(X, jnp.float32)
    variables = nn.unbox(norm.init(jax.random.key(0), x))
    for _ in range(60):
        _, moved = norm.apply(variables, x, True, mutable=["batch_stats"])
        variables = {**variables, **moved}
    np.testing.assert_allclose(variables["batch_stats"]["mean"], X.mean((0, 1)), rtol=1e-2)
    np.testing.assert_allclose(variables["batch_stats"]["variance"], X.var((0, 1)), rtol=1e-2)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_gated_norm_equals_its_definition_and_the_authors(groups, norm_before_gate):
    golden = np.load(pathlib.Path(__file__).parent / "data/gated_rms_norm.npz")
    y, z = golden["x"].astype(np.float64), golden["z"].astype(np.float64)
    gate = z / (1 + np.exp(-z))
    wanted = (y if norm_before_gate else y * gate).reshape(2, 3, groups, -1)
    wanted = (wanted / np.sqrt((wanted**2).mean(-1, keepdims=True) + 1e-5)).reshape(y.shape) * golden["weight"]
    wanted = wanted * gate if norm_before_gate else wanted
    norm = GatedRMSNorm(groups, norm_before_gate)
    scale, *inputs = (jnp.asarray(golden[key]) for key in ("weight", "x", "z"))
    got = norm.apply({"params": {"scale": scale}}, *inputs)
    np.testing.assert_allclose(got, wanted, atol=1e-6)
    np.testing.assert_allclose(got, golden[f"out_before{int(norm_before_gate)}_group{8 // groups}"], atol=1e-6)


def test_norms_keep_bfloat16_and_compute_wide():
    x = jnp.asarray(X * 100, jnp.bfloat16)
    norm = make_norm("layer", dtype=jnp.bfloat16)
    y = norm.apply(norm.init(jax.random.key(0), x), x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32).mean(-1), 0, atol=0.02)


def test_dense_contracts_and_expands_several_axes():
    x = jnp.asarray(X, jnp.float32)
    split = Dense((2, 5), ("embed", "heads", "head_dim"))
    variables = split.init(jax.random.key(0), x)
    heads = split.apply(variables, x)
    kernel, bias = (nn.unbox(variables)["params"][name] for name in ("kernel", "bias"))
    assert kernel.shape == (6, 2, 5) and bias.shape == (2, 5)
    np.testing.assert_allclose(heads, np.einsum("bld,dhk->blhk", X, kernel), atol=1e-5)
    merge = Dense(7, ("heads", "head_dim", "embed"), in_axes=2, use_bias=False)
    merged = merge.init_with_output(jax.random.key(1), heads)
    kernel = nn.unbox(merged[1])["params"]["kernel"]
    np.testing.assert_allclose(merged[0], np.einsum("blhk,hkd->bld", heads, kernel), atol=1e-5)
    # Variance 1 / inputs, whatever the number of axes.
    big = nn.unbox(Dense(400, ("heads", "head_dim", "embed"), 2).init(jax.random.key(0), jnp.zeros((1, 10, 40))))
    np.testing.assert_allclose(big["params"]["kernel"].std(), 400**-0.5, rtol=0.02)
