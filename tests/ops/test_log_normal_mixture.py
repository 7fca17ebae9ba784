import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from seqjax.ops.log_normal_mixture import LOG_SCALE_BOUNDS, LogNormalMixture

RNG = np.random.default_rng(0)
PARAMETERS = RNG.standard_normal((2, 7, 9)) * np.repeat([1.0, 1.0, 0.4], 3)
TIMES = np.exp(RNG.standard_normal((2, 7)))
LOG_MEAN, LOG_STD = 0.7, 1.3


@pytest.fixture
def mixture():
    with jax.enable_x64(True):
        yield LogNormalMixture.of(jnp.asarray(PARAMETERS), LOG_MEAN, LOG_STD)


def components(place):
    """Weights and SciPy's distributions."""
    logits, locations, log_scales = np.split(PARAMETERS[place], 3)
    weights = np.exp(logits) / np.exp(logits).sum()
    scales = LOG_STD * np.exp(log_scales)
    return weights, [scipy.stats.lognorm(s, scale=np.exp(LOG_MEAN + LOG_STD * m)) for s, m in zip(scales, locations)]


def test_density_and_mean_equal_scipy(mixture):
    density, mean = mixture.log_density(jnp.asarray(TIMES)), mixture.mean()
    for place in np.ndindex(TIMES.shape):
        weights, parts = components(place)
        assert density[place] == pytest.approx(np.log(weights @ [p.pdf(TIMES[place]) for p in parts]), rel=1e-10)
        assert mean[place] == pytest.approx(weights @ [p.mean() for p in parts], rel=1e-10)


def test_density_of_times_integrates_to_one(mixture):
    for place in ((0, 0), (1, 3), (1, 6)):
        one = LogNormalMixture(*(a[place] for a in mixture))
        density = lambda times, one=one: np.exp(one.log_density(jnp.asarray(times)))
        edges = np.exp(np.linspace(-14, 18, 65))  # of times, not of their logarithms
        pieces = [scipy.integrate.fixed_quad(density, a, b, n=20)[0] for a, b in zip(edges, edges[1:])]
        assert sum(pieces) == pytest.approx(1, abs=1e-6)


def test_scales_out_of_bounds_are_cut_and_keep_their_gradient():
    density = lambda p: LogNormalMixture.of(p).log_density(jnp.float32(2.0))
    low, high = LOG_SCALE_BOUNDS
    for beyond, bound in ((low - 1, low), (high + 1, high)):
        there, cut = (jnp.array([0.0, 0.3, value]) for value in (beyond, bound))
        assert density(there) == density(cut)
        np.testing.assert_array_equal(jax.grad(density)(there), jax.grad(density)(cut))
        assert jax.grad(density)(there)[2] != 0


def test_half_precision_is_computed_in_float32():
    assert LogNormalMixture.of(jnp.zeros((2, 3), jnp.bfloat16)).log_density(jnp.ones(2)).dtype == jnp.float32
