"""Positions without parameters: sinusoids, rotations, distance penalties, and coordinates of tensors."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from seqjax.config import ConfigError

POSITIONS = ("learned", "sinusoidal", "rope", "alibi", "none")
"""What `model.position` may say: the first two are added to the embedding, the next two act inside attention."""


def sinusoids(positions: Int[Array, "B L"], width: int, dtype=jnp.float32) -> Float[Array, "B L D"]:
    """Sines, then cosines of positions (Vaswani et al. 2017, section 3.5, not interleaved)."""
    half = width // 2
    frequencies = np.exp(-math.log(10000.0) * np.arange(half) / max(half, 1))
    angles = positions[..., None].astype(jnp.promote_types(dtype, jnp.float32)) * frequencies
    features = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return jnp.pad(features, [(0, 0)] * positions.ndim + [(0, width - 2 * half)]).astype(dtype)


def rotary_frequencies(
    head_dim: int, theta: float = 10000.0, llama3: tuple[float, float, float, int] | None = None
) -> np.ndarray:
    """Angle per position of each of the `head_dim / 2` planes, float64 (Su et al. 2021, eq. 15).

    Args:
      llama3: `(factor, low, high, original_length)` of Llama 3.1's context extension: wavelengths above
        `original_length / low` are stretched by `factor`, those below `original_length / high` kept, a ramp between.
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    if llama3 is None:
        return frequencies
    factor, low, high, original_length = llama3
    turns = original_length * frequencies / (2 * math.pi)
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / factor


def rotate(x: Float[Array, "B L H K"], positions: Int[Array, "#B L"], frequencies: np.ndarray) -> Float[Array, "B L H K"]:
    """Rotary position embedding (Su et al. 2021) in the half-split layout: plane i is features `(i, i + K/2)`."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    angles = (positions[..., None].astype(dtype) * frequencies.astype(dtype))[:, :, None, :]
    sine, cosine = jnp.sin(angles), jnp.cos(angles)
    left, right = jnp.split(x.astype(dtype), 2, axis=-1)
    return jnp.concatenate([left * cosine - right * sine, right * cosine + left * sine], axis=-1).astype(x.dtype)


def alibi_slopes(num_heads: int) -> np.ndarray:
    """Slopes of the distance penalty, `[H]` (Press et al. 2022): powers of `2^(-8/n)`, n the power of 2 below H."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = 2.0 ** (-8.0 / power * np.arange(1, power + 1))
    extra = 2.0 ** (-4.0 / power * np.arange(1, 2 * (num_heads - power) + 1, 2))
    return np.concatenate([slopes, extra])


def check_shape(shape: tuple[int, ...] | None) -> None:
    """Raise a ConfigError if `shape` is neither None nor the sizes of a tensor's axes."""
    if shape is not None and (not shape or min(shape) < 1):
        raise ConfigError(f"model.shape={shape} is no tensor; allowed: None, or positive sizes such as (7, 7).")


def raster_coordinates(positions: Int[Array, "#B L"], shape: tuple[int, ...]) -> Int[Array, "#B L A"]:
    """Coordinates along the A axes of tensors of this shape that follow one another in raster order, the last axis fastest."""
    strides = [math.prod(shape[a + 1 :]) for a in range(len(shape))]
    return jnp.stack([positions // stride % size for stride, size in zip(strides, shape)], axis=-1)


def lrpe_frequencies(num_heads: int, head_dim: int, num_axes: int, theta: float = 10000.0) -> np.ndarray:
    """Angle per step along its axis of each feature, `[H, K]`, float64; feature j turns along axis `j // ceil(K / A)`.

    One band `theta^(-2 i / (H K))` runs over all heads, so that the first turns fastest (the code of LightNet's authors). The
    first `ceil(K / A)` frequencies of a head serve every axis again.
    """
    band = theta ** (-2 * np.arange(num_heads * head_dim) / (num_heads * head_dim)).reshape(num_heads, head_dim)
    return np.tile(band[:, : -(-head_dim // num_axes)], num_axes)[:, :head_dim]


def lrpe(x: Float[Array, "B L H K"], coordinates: Int[Array, "#B L A"], frequencies: np.ndarray) -> Float[Array, "B L H 2*K"]:
    """`(x cos, x sin)` of each feature's angle: MD-LRPE in cosine form (Qin et al. 2024, "LightNet"; Qin et al. 2023, "LRPE").

    Products of a query and a key become `sum_c q_c k_c cos(frequency_c (p - s))`, p and s the coordinates along c's axis.

    Args:
      frequencies: of `lrpe_frequencies` for A axes.
    """
    width, axes = x.shape[-1], coordinates.shape[-1]
    along = np.arange(width) // -(-width // axes)
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    angles = coordinates[:, :, None, along].astype(dtype) * frequencies.astype(dtype)
    x = x.astype(dtype)
    return jnp.concatenate([x * jnp.cos(angles), x * jnp.sin(angles)], axis=-1)
