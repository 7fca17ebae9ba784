"""Mixtures of log-normal distributions: a density of positive times that can have any shape, in closed form."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LOG_SCALE_BOUNDS = (-5.0, 1.0)
"""Of the standard deviations' logarithms. The mean of a component grows as the exponential of half its variance, so that the
authors' upper bound of 3 lets one component, however little its weight, decide the mean of all."""


class LogNormalMixture(NamedTuple):
    """The distribution of a time whose logarithm has a mixture of K normal distributions (Shchur et al. 2020,
    "Intensity-Free Learning of Temporal Point Processes", section 3.2).

    Attributes:
      log_weights: of the components; their exponentials sum to 1.
      locations, scales: mean and standard deviation of the time's logarithm in each component.
    """

    log_weights: Float[Array, "*N K"]
    locations: Float[Array, "*N K"]
    scales: Float[Array, "*N K"]

    @classmethod
    def of(cls, parameters: Float[Array, "*N K3"], log_mean: float = 0.0, log_std: float = 1.0) -> LogNormalMixture:
        """From unbounded `[..., 3K]`, in at least float32: K logits of weights, K means and K logarithms of scales.

        The latter two are those of `(log time - log_mean) / log_std`. Scales out of bounds are cut off, and their gradients
        pass as if they were not.
        """
        parameters = parameters.astype(jnp.promote_types(parameters.dtype, jnp.float32))
        logits, locations, log_scales = jnp.split(parameters, 3, axis=-1)
        log_scales += jax.lax.stop_gradient(jnp.clip(log_scales, *LOG_SCALE_BOUNDS) - log_scales)
        return cls(jax.nn.log_softmax(logits), log_mean + log_std * locations, log_std * jnp.exp(log_scales))

    def log_density(self, times: Float[Array, "*N"]) -> Float[Array, "*N"]:
        """Of the times themselves, in nats, not of their logarithms; times above 0."""
        log_times = jnp.log(times)
        deviations = (log_times[..., None] - self.locations) / self.scales
        normal = -0.5 * jnp.square(deviations) - jnp.log(self.scales) - 0.5 * math.log(2 * math.pi)
        return jax.nn.logsumexp(self.log_weights + normal, axis=-1) - log_times

    def mean(self) -> Float[Array, "*N"]:
        """The expected time."""
        return jnp.exp(jax.nn.logsumexp(self.log_weights + self.locations + 0.5 * jnp.square(self.scales), axis=-1))
