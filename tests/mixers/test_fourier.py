"""Causal Fourier mixing against NumPy's transforms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqjax
from seqjax import registry
from seqjax.config import ConfigError

WIDTH, LENGTH = 6, 9


def mix(x, **options):
    mixer = registry.mixer("fourier")(embed_dim=WIDTH, dtype="float64", **{"max_length": LENGTH, **options})
    with jax.enable_x64(True):
        return np.asarray(mixer.apply({}, jnp.asarray(x))[0])


def test_equals_a_masked_transform():
    x = np.random.default_rng(0).standard_normal((2, LENGTH, WIDTH))
    y, features = mix(x, max_length=16), np.fft.fft(x, axis=-1)
    for n in range(LENGTH):
        turns = np.exp(-2j * np.pi * n * np.arange(n + 1) / 16)
        wanted = np.einsum("m,bmd->bd", turns, features[:, : n + 1]).real / np.sqrt((n + 1) * WIDTH)
        np.testing.assert_allclose(y[:, n], wanted, atol=1e-12)


def test_the_last_token_sees_what_fnet_shows_it():
    """At the full length the last row is that of the two-dimensional transform."""
    x = np.random.default_rng(0).standard_normal((2, LENGTH, WIDTH))
    np.testing.assert_allclose(mix(x)[:, -1], np.fft.fft2(x).real[:, -1] / np.sqrt(LENGTH * WIDTH), atol=1e-12)


def test_keeps_the_variance_of_white_noise():
    x = np.random.default_rng(0).standard_normal((4000, LENGTH, WIDTH))
    np.testing.assert_allclose((mix(x, max_length=64) ** 2).mean(axis=(0, 2)), 0.5, atol=0.5)


def test_too_long_a_sequence_is_refused():
    with pytest.raises(ConfigError, match=r"10 tokens is longer than model\.max_length=9"):
        mix(np.zeros((1, 10, WIDTH)))
    with pytest.raises(ConfigError, match=r"model\.max_length=0 is out of range"):
        registry.mixer("fourier")(embed_dim=WIDTH, max_length=0)
    assert seqjax.build({**seqjax.example_config("fnet_ar").to_dict(), "max_length": 32}).pattern[0][0].options == (
        ("max_length", 32),
    )
