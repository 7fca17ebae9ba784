"""Running maxima and sums of numbers that are given by their logarithms, each forgotten step by step.

Recurrences with exponential gates are linear in numbers that overflow. They are computed relative to a running maximum m:
the recurrence then has decays `exp(m_(t-1) + log_decay_t - m_t)` and inputs `exp(x_t - m_t)`, none of them above 1.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from seqjax.ops.scan import Monoid, prefix_scan
from seqjax.ops.segments import segment_ends


def running_max(
    values: Float[Array, "B L *N"],
    log_decay: Float[Array, "#B #L *N"],
    initial: Float[Array, "B *N"],
    *,
    starts: Bool[Array, "B L"] | None = None,
) -> Float[Array, "B L *N"]:
    """`m_t = max(m_(t-1) + log_decay_t, values_t)`, a constant to gradients: what is measured in it does not depend on it.

    Args:
      initial: m before the first step; -inf for nothing.
      starts: where a segment starts: nothing came before.
    """
    operands = jax.lax.stop_gradient((jnp.broadcast_to(log_decay, values.shape), values, initial))
    return _by_platform(_MAXIMA, *operands, starts)


def running_log_sum(
    values: Float[Array, "B L *N"], initial: Float[Array, "B *N"], *, starts: Bool[Array, "B L"] | None = None
) -> Float[Array, "B L *N"]:
    """`z_t = log(exp(z_(t-1)) + exp(values_t))`; arguments as in `running_max`."""
    return _by_platform(_LOG_SUMS, jnp.zeros_like(values), values, initial, starts)


def segment_log_sum(values: Float[Array, "B L *N"], *, starts: Bool[Array, "B L"] | None = None) -> Float[Array, "B #L *N"]:
    """`log sum exp(values)` over all tokens of each token's segment; without `starts`, once for a row."""
    if starts is None:
        return jax.nn.logsumexp(values, axis=1, keepdims=True)
    sums = running_log_sum(values, jnp.full_like(values[:, 0], -jnp.inf), starts=starts)
    length = values.shape[1]
    last = jax.lax.cummin(jnp.where(segment_ends(starts), jnp.arange(length), length), axis=1, reverse=True)
    return jnp.take_along_axis(sums, last.reshape(*last.shape, *[1] * (values.ndim - 2)), axis=1)


def _combine(join, earlier: tuple[Array, Array], later: tuple[Array, Array]) -> tuple[Array, Array]:
    return earlier[0] + later[0], join(earlier[1] + later[0], later[1])


def _log_sum(a: Array, b: Array) -> Array:
    """`log(e^a + e^b)`, with gradients of zero where both are -inf."""
    top = jax.lax.stop_gradient(jnp.maximum(jnp.maximum(a, b), jnp.finfo(a.dtype).min))
    return top + jnp.log(jnp.exp(a - top) + jnp.exp(b - top))


_identity = lambda e: (jnp.zeros_like(e[0]), jnp.full_like(e[1], -jnp.inf))
_MAXIMA = Monoid(functools.partial(_combine, jnp.maximum), _identity)
_LOG_SUMS = Monoid(functools.partial(_combine, _log_sum), _identity)


def _by_platform(monoid: Monoid, log_decay: Array, values: Array, initial: Array, starts: Array | None) -> Array:
    def run(how: str, log_decay: Array, values: Array, initial: Array, starts: Array | None) -> Array:
        before = (jnp.zeros_like(initial), initial)
        return prefix_scan(monoid, (log_decay, values), initial=before, starts=starts, implementation=how)[0][1]

    options = {how: functools.partial(run, how) for how in ("sequential", "associative")}
    operands = (log_decay, values, initial, starts)
    return jax.lax.platform_dependent(*operands, cpu=options["sequential"], default=options["associative"])
