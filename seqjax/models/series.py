"""What forecasting models do around their body: take a window's level and scale away, and give each channel its own row."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seqjax.config import ConfigError, choose
from seqjax.models.heads import HEADS, last_segment, pool

NORMS = ("none", "mean", "last", "standard")
EPSILON = 1e-5  # added to a window's variance: RevIN's

Restore = Callable[[Float[Array, "R T O"]], Float[Array, "B T C"]]


def check_series(norm: str, channel_independent: bool, head: str, input_dim: int | None, output_dim: int | None = None) -> None:
    """Raise a ConfigError for an unknown norm, or for series options on a model that does not forecast its own channels.

    Args:
      norm, channel_independent: the model's options `series_norm` and `channel_independent`.
      head, input_dim, output_dim: the model's; `output_dim` None is that of the input.
    """
    choose(dict.fromkeys(NORMS), norm, "model.series_norm")
    if norm == "none" and not channel_independent:
        return
    option = "model.channel_independent=True" if norm == "none" else f"model.series_norm={norm!r}"
    if input_dim is None:
        raise ConfigError(f"{option} acts on continuous inputs; allowed: a model with input_dim, or no series options.")
    if HEADS[head].serves != "forecast":
        raise ConfigError(f"{option} sees the whole window, which model.head={head!r} must not; allowed: forecasting heads.")
    if channel_independent and HEADS[head].variates:
        raise ConfigError(f"model.channel_independent=True leaves model.head={head!r} one token a row; allowed: False.")
    if output_dim not in (None, input_dim):
        raise ConfigError(
            f"{option} forecasts the channels it is given, but model.input_dim={input_dim} and "
            f"model.output_dim={output_dim}; allowed: the same for both."
        )


def series_rows(
    inputs: Array, segment_ids: Int[Array, "B L"] | None, norm: str, channel_independent: bool
) -> tuple[Array, Int[Array, "R L"] | None, Restore]:
    """The rows that a forecasting model's body sees, and how its forecasts become those of the inputs.

    A window is the segment of a row's last token outside segment 0. `norm` subtracts its "mean" (by channel) or its
    "last" value and adds it to the forecast again (NLinear, Zeng et al. 2023); "standard" also divides by the standard
    deviation (RevIN, Kim et al. 2022, without its affine map). Independent channels are rows that share one model
    (PatchTST, Nie et al. 2023).

    Args:
      inputs: `[B, L, C]` values; anything at all where both options are off.
      segment_ids: of the tokens.
    Returns:
      rows: `[B, L, C]`, or `[B * C, L, 1]` of independent channels.
      segment_ids: of the rows.
      restore: from the body's forecasts `[B, T, C]` or `[B * C, T, 1]` to `[B, T, C]` at the inputs' level.
    """
    normalize = norm != "none"
    if normalize:
        inputs, level, scale = _normalized(inputs, segment_ids, norm)
    channels = inputs.shape[-1]
    if channel_independent:
        inputs = inputs.swapaxes(1, 2).reshape(-1, inputs.shape[1], 1)
        segment_ids = None if segment_ids is None else jnp.repeat(segment_ids, channels, axis=0)

    def restore(forecasts: Array) -> Array:
        if channel_independent:
            forecasts = forecasts.reshape(-1, channels, forecasts.shape[1]).swapaxes(1, 2)
        return forecasts * scale + level if normalize else forecasts

    return inputs, segment_ids, restore


def _normalized(
    inputs: Float[Array, "B L C"], segment_ids: Int[Array, "B L"] | None, norm: str
) -> tuple[Float[Array, "B L C"], Float[Array, "B 1 C"], Float[Array, "B 1 C"]]:
    """Inputs at level 0 (and scale 1), and the level and scale that they had, in at least float32."""
    inputs = inputs.astype(jnp.promote_types(inputs.dtype, jnp.float32))
    window = None if segment_ids is None else last_segment(segment_ids)
    level = pool(inputs, window, "last" if norm == "last" else "mean")[:, None]
    scale = jnp.ones_like(level)
    inputs = inputs - level
    if norm == "standard":
        scale = jnp.sqrt(pool(jnp.square(inputs), window, "mean")[:, None] + EPSILON)
        inputs = inputs / scale
    return inputs, level, scale
