"""Aaren against reference arrays and attention with one query, in float64."""

import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqjax
from seqjax import registry
from seqjax.config import ConfigError

GOLDEN = np.load(pathlib.Path(__file__).parent / "data" / "aaren.npz")


def test_two_layers_equal_the_reference():
    with jax.enable_x64(True):
        mixer = registry.mixer("aaren")(embed_dim=8, num_heads=2, dtype="float64", param_dtype="float64")
        x = jnp.asarray(GOLDEN["stack_x"])
        for layer in ("l0", "l1"):
            weights = {key: GOLDEN[f"{layer}_W{key[0]}"] for key in ("query", "key", "value", "out")}
            params = {key: {"kernel": jnp.asarray(w).reshape(8, 2, 4)} for key, w in weights.items()}
            params["out"] = {"kernel": jnp.asarray(weights["out"]).reshape(2, 4, 8)}
            x, _ = mixer.apply({"params": params | {"token": jnp.asarray(GOLDEN[f"{layer}_q"])}}, x)
            np.testing.assert_allclose(x, GOLDEN[f"{layer}_out"], atol=1e-12)


def test_a_layer_sees_a_set():
    """An output does not depend on the order of the tokens up to it, but on all of them, and not alike."""
    mixer = registry.mixer("aaren")(embed_dim=8, num_heads=2)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 9, 8)), jnp.float32)
    variables = nn.unbox(mixer.init(jax.random.key(0), x))
    y, _ = mixer.apply(variables, x)
    turned, _ = mixer.apply(variables, jnp.concatenate([x[:, 5::-1], x[:, 6:]], axis=1))
    np.testing.assert_allclose(turned[:, 5:], y[:, 5:], atol=1e-5)
    assert np.abs(turned[:, :5] - y[:, :5]).max() > 0.01


def test_parameters_are_those_of_a_transformer_and_a_token_for_each_layer():
    """Published sizes of one layer 512 wide with an MLP of 2048 and biases: 3,152,384 and 3,152,896."""
    sizes = {"vocab_size": 2, "embed_dim": 512, "num_layers": 1, "num_heads": 8, "qkv_bias": True, "out_bias": True}
    counts = [seqjax.build({"name": n, **sizes, "position": "none"}).costs(8).parameters for n in ("transformer", "aaren")]
    frame = 2 * 512 + 2 * 512  # embedding and last norm
    assert [count - frame for count in counts] == [3_152_384, 3_152_896]


def test_the_state_does_not_grow():
    mixer = registry.mixer("aaren")(embed_dim=64)
    assert mixer.costs(10).state_bytes == mixer.costs(100_000).state_bytes == (64 + 2 * 4) * 4 + 12


def test_bad_options():
    with pytest.raises(ConfigError, match=r"model\.num_heads=3 does not divide model\.embed_dim=8"):
        registry.mixer("aaren")(embed_dim=8, num_heads=3)
