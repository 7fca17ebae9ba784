"""Normalisation by name: layer and RMS, each with and without a scale, batch and none."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from seqjax.config import choose


class LayerNorm(nn.Module):
    """Layer normalisation over the last dimension (Ba et al. 2016), computed in at least float32.

    Attributes:
      use_scale: multiply each feature by a parameter and add another.
    """

    epsilon: float = 1e-5
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    use_scale: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "... D"], train: bool = False) -> Float[Array, "... D"]:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean = jnp.mean(wide, axis=-1, keepdims=True)
        centred = wide - mean
        variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
        y = centred * jax.lax.rsqrt(variance + self.epsilon)
        if self.use_scale:
            y = y * _vector(self, "scale", nn.initializers.ones, x) + _vector(self, "bias", nn.initializers.zeros, x)
        return y.astype(self.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (Zhang and Sennrich 2019), computed in at least float32.

    Attributes:
      use_scale: multiply each feature by a parameter.
      offset: the parameter is what the factor exceeds 1 by, and starts at 0 (Gemma, 2024).
    """

    epsilon: float = 1e-5
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    use_scale: bool = True
    offset: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "... D"], train: bool = False) -> Float[Array, "... D"]:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        y = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        if self.use_scale:
            init = nn.initializers.zeros if self.offset else nn.initializers.ones
            y = y * (_vector(self, "scale", init, x).astype(y.dtype) + self.offset)
        return y.astype(self.dtype)


class GatedRMSNorm(nn.Module):
    """Root-mean-square normalisation by groups of features, and a gate: `norm(y silu(z))`, or `norm(y) silu(z)` with
    `norm_before_gate` (Mamba-2, Dao and Gu 2024). Computed in at least float32."""

    groups: int = 1
    norm_before_gate: bool = False
    epsilon: float = 1e-5
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, y: Float[Array, "... D"], z: Float[Array, "... D"]) -> Float[Array, "... D"]:
        wide = jnp.promote_types(y.dtype, jnp.float32)
        y, gate = y.astype(wide), jax.nn.silu(z.astype(wide))
        y = y if self.norm_before_gate else y * gate
        grouped = y.reshape(*y.shape[:-1], self.groups, -1)
        grouped = grouped * jax.lax.rsqrt(jnp.mean(grouped * grouped, axis=-1, keepdims=True) + self.epsilon)
        y = grouped.reshape(y.shape) * _vector(self, "scale", nn.initializers.ones, y)
        return (y * gate if self.norm_before_gate else y).astype(self.dtype)


class BatchNorm(nn.Module):
    """Batch normalisation over every dimension but the last (Ioffe and Szegedy 2015).

    Running statistics live in the collection `batch_stats`; `train=False` uses them, so that evaluation treats each
    token alone and keeps the chunk law.
    """

    epsilon: float = 1e-5
    momentum: float = 0.9
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... D"], train: bool = False) -> Float[Array, "... D"]:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        shape = (x.shape[-1],)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, wide.dtype)
        running_variance = self.variable("batch_stats", "variance", jnp.ones, shape, wide.dtype)
        mean, variance = running_mean.value, running_variance.value
        if train:
            over = tuple(range(x.ndim - 1))
            mean, variance = jnp.mean(wide, axis=over), jnp.var(wide, axis=over)
            if not self.is_initializing():
                keep = self.momentum
                running_mean.value = keep * running_mean.value + (1 - keep) * mean
                running_variance.value = keep * running_variance.value + (1 - keep) * variance
        y = (wide - mean) * jax.lax.rsqrt(variance + self.epsilon)
        y = y * _vector(self, "scale", nn.initializers.ones, x) + _vector(self, "bias", nn.initializers.zeros, x)
        return y.astype(self.dtype)


class NoNorm(nn.Module):
    """Leaves features as they are: levels and scales of a series stay, and a linear model stays linear."""

    epsilon: float = 1e-5
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __call__(self, x: Float[Array, "... D"], train: bool = False) -> Float[Array, "... D"]:
        return x.astype(self.dtype)


NORMS = {
    "layer": LayerNorm,
    "layer_unscaled": functools.partial(LayerNorm, use_scale=False),
    "rms": RMSNorm,
    "rms_unscaled": functools.partial(RMSNorm, use_scale=False),
    "rms_offset": functools.partial(RMSNorm, offset=True),
    "batch": BatchNorm,
    "none": NoNorm,
}


def make_norm(kind: str, **options: Any) -> nn.Module:
    """The normalisation called `kind`."""
    return choose(NORMS, kind, "model.norm")(**options)


def norm_parameters(kind: str, width: int) -> int:
    """How many parameters a normalisation of this kind trains."""
    return {"none": 0, "rms_unscaled": 0, "layer_unscaled": 0, "rms": width, "rms_offset": width}.get(kind, 2 * width)


def _vector(module: nn.Module, name: str, init: Any, x: Array) -> Array:
    return module.param(name, nn.with_logical_partitioning(init, ("norm",)), (x.shape[-1],), module.param_dtype)
