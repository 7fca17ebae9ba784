"""Learning-rate schedules, as fractions of the peak: functions of the number of updates made so far."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array

Schedule = Callable[[Array | int], Array]


def warmup(step: Array | int, warmup_steps: int) -> Array:
    """Linear rise that reaches 1 at the last of `warmup_steps` updates; the first update is not wasted on a zero rate."""
    return jnp.minimum(1.0, (jnp.asarray(step, jnp.float32) + 1.0) / max(1, warmup_steps))


def constant(num_steps: int, warmup_steps: int, decay_steps: int | None, final_fraction: float) -> Schedule:
    """Warm-up, then 1."""
    return lambda step: warmup(step, warmup_steps)


def cosine(num_steps: int, warmup_steps: int, decay_steps: int | None, final_fraction: float) -> Schedule:
    """Warm-up, then half a cosine from 1 to `final_fraction` over `decay_steps` (default: the rest of the run)."""
    span = max(1, num_steps - warmup_steps if decay_steps is None else decay_steps)

    def schedule(step: Array | int) -> Array:
        progress = jnp.clip((jnp.asarray(step, jnp.float32) - warmup_steps) / span, 0.0, 1.0)
        fall = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        return warmup(step, warmup_steps) * (final_fraction + (1.0 - final_fraction) * fall)

    return schedule


def warmup_stable_decay(num_steps: int, warmup_steps: int, decay_steps: int | None, final_fraction: float) -> Schedule:
    """Warm-up, then 1, then linear to `final_fraction` over the last `decay_steps` (default: a fifth of the run).

    Hu et al. 2024, "MiniCPM".
    """
    span = max(1, num_steps // 5 if decay_steps is None else decay_steps)

    def schedule(step: Array | int) -> Array:
        progress = jnp.clip((jnp.asarray(step, jnp.float32) - (num_steps - span)) / span, 0.0, 1.0)
        return warmup(step, warmup_steps) * (1.0 + (final_fraction - 1.0) * progress)

    return schedule


def inverse_square_root(num_steps: int, warmup_steps: int, decay_steps: int | None, final_fraction: float) -> Schedule:
    """Warm-up, then `sqrt(warmup_steps / step)`, never under `final_fraction` (Vaswani et al. 2017, section 5.3)."""
    scale = max(1, warmup_steps)

    def schedule(step: Array | int) -> Array:
        fall = jnp.sqrt(scale / jnp.maximum(scale, jnp.asarray(step, jnp.float32) + 1.0))
        return warmup(step, warmup_steps) * jnp.maximum(fall, final_fraction)

    return schedule


SCHEDULES = {"constant": constant, "cosine": cosine, "rsqrt": inverse_square_root, "wsd": warmup_stable_decay}
