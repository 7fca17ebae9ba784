"""Routing attention against a loop over tokens in NumPy float64, and its clusters against online k-means."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqjax import registry
from seqjax.config import ConfigError

WIDTH, HEADS, LENGTH = 8, 2, 13
IDS = jnp.array([[1] * 6 + [2] * 3 + [1] * 4, [0] * 4 + [7] * 9], jnp.int32)


def made(**options):
    options = {"num_clusters": 3, "position": "none", "num_heads": HEADS, **options}
    mixer = registry.mixer("routing")(embed_dim=WIDTH, dtype="float64", param_dtype="float64", **options)
    x = np.random.default_rng(0).standard_normal((2, LENGTH, WIDTH))
    return mixer, jax.tree.map(np.asarray, nn.unbox(mixer.init(jax.random.key(0), jnp.asarray(x)))), x


def normed_queries(variables, x):
    q = np.einsum("bld,dhk->blhk", x, variables["params"]["query"]["kernel"])
    q = q - q.mean(-1, keepdims=True)
    return q / np.sqrt((q**2).mean(-1, keepdims=True) + 1e-5)


def clusters_of(variables, x):
    return np.einsum("blhk,hck->blhc", normed_queries(variables, x), variables["batch_stats"]["centroids"]).argmax(-1)


@pytest.mark.parametrize("num_clusters", [1, 3])
def test_equals_attention_within_clusters(num_clusters):
    with jax.enable_x64(True):
        mixer, variables, x = made(num_clusters=num_clusters)
        y, _ = mixer.apply(variables, jnp.asarray(x), segment_ids=IDS)
    q, clusters = normed_queries(variables, x), clusters_of(variables, x)
    assert len(np.unique(clusters)) == num_clusters
    v = np.einsum("bld,dhk->blhk", x, variables["params"]["value"]["kernel"])
    runs = np.cumsum(np.diff(IDS, axis=1, prepend=0) != 0, axis=1)
    for b, t in np.ndindex(2, LENGTH):
        mixed = np.zeros((HEADS, WIDTH // HEADS))
        for h in range(HEADS):
            seen = [s for s in range(t + 1) if clusters[b, s, h] == clusters[b, t, h] and runs[b, s] == runs[b, t]]
            weights = np.exp(q[b, seen, h] @ q[b, t, h] / np.sqrt(WIDTH // HEADS))
            mixed[h] = weights @ v[b, seen, h] / weights.sum()
        wanted = np.einsum("hk,hkd->d", mixed, variables["params"]["out"]["kernel"])
        np.testing.assert_allclose(y[b, t], wanted, atol=1e-10)


def test_centroids_move_to_their_tokens():
    """Moving averages, padding left out; without memory they become the means of their tokens."""
    for decay in (0.9, 0.0):
        with jax.enable_x64(True):
            mixer, variables, x = made(centroid_decay=decay)
            _, changed = mixer.apply(variables, jnp.asarray(x), segment_ids=IDS, train=True, mutable=["batch_stats", "losses"])
        q, clusters, real = normed_queries(variables, x), clusters_of(variables, x), np.asarray(IDS) != 0
        before, distances = variables["batch_stats"]["centroids"], []
        for h, c in np.ndindex(HEADS, 3):
            mine = q[:, :, h][(clusters[:, :, h] == c) & real]
            distances += list(np.mean((mine - before[h, c]) ** 2, axis=-1))
            count = decay + (1 - decay) * len(mine)
            wanted = (decay * before[h, c] + (1 - decay) * mine.sum(0)) / (count + 1e-5)
            np.testing.assert_allclose(changed["batch_stats"]["centroids"][h, c], wanted, atol=1e-10)
            np.testing.assert_allclose(changed["batch_stats"]["sizes"][h, c], count, atol=1e-12)
        np.testing.assert_allclose(changed["losses"]["commitment"][0], 1e-4 * np.mean(distances), rtol=1e-10)


def test_the_distance_pulls_queries_to_their_centroids():
    def loss(params):
        _, sown = mixer.apply({**variables, "params": params}, jnp.asarray(x), train=True, mutable=["batch_stats", "losses"])
        return sown["losses"]["commitment"][0]

    with jax.enable_x64(True):
        mixer, variables, x = made()
        assert np.any(jax.grad(loss)(variables["params"])["query"]["kernel"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "model.num_heads=3 does not divide model.embed_dim=8"),
        ({"num_clusters": 0}, "model.num_clusters=0"),
        ({"centroid_decay": 1.5}, "model.centroid_decay=1.5 is out of range"),
        ({"num_heads": 8, "position": "rope"}, "the head width 1 is odd"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        registry.mixer("routing")(embed_dim=WIDTH, **options)
