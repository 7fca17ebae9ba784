"""Positions against complex arithmetic and published values, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqjax.layers.positions import (
    alibi_slopes,
    lrpe,
    lrpe_frequencies,
    raster_coordinates,
    rotary_frequencies,
    rotate,
    sinusoids,
)


def test_rotation_is_multiplication_by_a_complex_phase():
    rng = np.random.default_rng(0)
    x, positions = rng.standard_normal((2, 5, 3, 8)), np.array([[0, 1, 2, 0, 1], [4, 5, 6, 7, 8]])
    frequencies = rotary_frequencies(8, theta=100.0)
    np.testing.assert_allclose(frequencies, 100.0 ** -np.array([0, 0.25, 0.5, 0.75]))
    phases = np.exp(1j * positions[..., None] * frequencies)[:, :, None]
    wanted = (x[..., :4] + 1j * x[..., 4:]) * phases
    with jax.enable_x64(True):
        turned = rotate(jnp.asarray(x), jnp.asarray(positions), frequencies)
    np.testing.assert_allclose(turned, np.concatenate([wanted.real, wanted.imag], -1), atol=1e-12)


def test_scores_of_rotated_vectors_depend_on_distance_alone():
    rng = np.random.default_rng(1)
    q, k = rng.standard_normal((2, 1, 1, 1, 16)).astype(np.float32)
    frequencies = rotary_frequencies(16)
    score = lambda i, j: jnp.sum(
        rotate(jnp.asarray(q), jnp.full((1, 1), i), frequencies) * rotate(jnp.asarray(k), jnp.full((1, 1), j), frequencies)
    )
    np.testing.assert_allclose(score(9, 4), score(25, 20), rtol=1e-4)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3


def test_llama3_scaling_keeps_short_waves_and_stretches_long_ones():
    plain, scaled = rotary_frequencies(64), rotary_frequencies(64, llama3=(8.0, 1.0, 4.0, 1024))
    waves = 2 * np.pi / plain
    np.testing.assert_allclose(scaled[waves < 1024 / 4], plain[waves < 1024 / 4])
    np.testing.assert_allclose(scaled[waves > 1024], plain[waves > 1024] / 8)
    between = (waves > 1024 / 4) & (waves < 1024)
    assert between.any() and (scaled[between] < plain[between]).all() and (scaled[between] > plain[between] / 8).all()


def test_sinusoids_follow_the_formula():
    features = sinusoids(jnp.array([[0, 3]]), 6)
    angles = 3 * 10000.0 ** (-np.arange(3) / 3)
    np.testing.assert_allclose(features[0, 1], np.concatenate([np.sin(angles), np.cos(angles)]), rtol=1e-5)
    np.testing.assert_allclose(features[0, 0], [0, 0, 0, 1, 1, 1])
    assert sinusoids(jnp.array([[0, 3]]), 7).shape == (1, 2, 7)


@pytest.mark.parametrize(
    ("heads", "slopes"),
    [(8, [2.0**-i for i in range(1, 9)]), (4, [0.25, 0.0625, 0.015625, 0.00390625]), (3, [0.0625, 0.00390625, 0.25])],
)
def test_alibi_slopes_are_the_published_ones(heads, slopes):
    np.testing.assert_allclose(alibi_slopes(heads), slopes)


def test_raster_coordinates_are_those_of_an_array():
    wanted = np.stack(np.unravel_index(np.arange(24), (2, 3, 4)), axis=-1)
    np.testing.assert_array_equal(raster_coordinates(jnp.arange(48)[None], (2, 3, 4))[0], np.tile(wanted, (2, 1)))


def test_the_band_of_lrpe_runs_over_all_heads_and_serves_every_axis():
    np.testing.assert_allclose(lrpe_frequencies(2, 4, 1, theta=100.0).ravel(), 100.0 ** (-np.arange(8) / 4))
    np.testing.assert_allclose(lrpe_frequencies(2, 4, 2)[1], 10000.0 ** -np.array([1, 1.25, 1, 1.25]))
    assert lrpe_frequencies(1, 5, 2).shape == (1, 5)  # three features of the first axis, two of the second


def test_scores_under_lrpe_depend_on_the_differences_along_each_axis_alone():
    rng = np.random.default_rng(2)
    q, k = rng.standard_normal((2, 1, 1, 3, 5))
    frequencies = lrpe_frequencies(3, 5, 2)
    angles = np.concatenate([4 * frequencies[:, :3], -7 * frequencies[:, 3:]], axis=1)
    with jax.enable_x64(True):
        place = lambda a, row, column: np.asarray(lrpe(jnp.asarray(a), jnp.array([[[row, column]]]), frequencies))
        score = lambda p, s: np.sum(place(q, *p) * place(k, *s), axis=-1)[0, 0]
        here, there, elsewhere = score((6, 1), (2, 8)), score((50, 22), (46, 29)), score((6, 1), (2, 9))
    np.testing.assert_allclose(here, np.sum(q * k * np.cos(angles), axis=-1)[0, 0], atol=1e-12)
    np.testing.assert_allclose(there, here, atol=1e-12)
    assert np.abs(elsewhere - here).max() > 1e-3
