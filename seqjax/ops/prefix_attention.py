"""Softmax attention of one fixed query over every prefix: a recurrence with a state of constant size."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from seqjax.ops.affine_scan import affine_scan
from seqjax.ops.scan import SCANS, prefix_scan
from seqjax.ops.softmax import SOFTMAX, SoftmaxSums, decay_between, inverse


def prefix_attention(
    scores: Float[Array, "B L H"],
    values: Float[Array, "B L H W"],
    state: SoftmaxSums | None = None,
    *,
    starts: Bool[Array, "B L"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B L H W"], SoftmaxSums]:
    """`y_t = sum_(i <= t) exp(s_i) v_i / sum_(i <= t) exp(s_i)`: attention as an RNN (Feng et al. 2024, section 3).

    The query is the same at every token, so a key's score is too, and the sums over all prefixes are one prefix scan.

    Args:
      scores: products of query and keys, already scaled; -inf leaves a token out.
      values: any float dtype; sums are kept in at least float32.
      state: sums over what came before, `[B, H]` and `[B, H, W]`; default nothing.
      starts: where a segment starts: what came before is forgotten.
      implementation: of `prefix_scan`, "sequential", "associative" or "chunked"; "reference" weighs all pairs; None is
        "sequential" on CPU and "associative" elsewhere.
    Returns:
      Outputs in the dtype of `values`, zeros where nothing has been seen yet, and the sums after the last token. The
      backward pass is a linear recurrence in reverse, and keeps nothing wider than the inputs and outputs. The maximum
      counts as a constant, see `SoftmaxSums`.
    Raises:
      ValueError: the implementation is unknown.
    """
    if implementation not in (None, "reference", *SCANS):
        allowed = ", ".join(("None", "reference", *SCANS))
        raise ValueError(f"implementation={implementation!r} of prefix attention is unknown; allowed: {allowed}.")
    dtype = jnp.result_type(jnp.float32, scores.dtype, values.dtype)
    if state is None:
        state = SoftmaxSums.empty((scores.shape[0], scores.shape[2]), values.shape[-1], dtype)
    state = jax.tree.map(lambda a: a.astype(dtype), state)
    run = _reference if implementation == "reference" else functools.partial(_prefix_attention, implementation)
    outputs, state = run(scores.astype(dtype), values.astype(dtype), state, starts)
    return outputs.astype(values.dtype), state


def _reference(scores: Array, values: Array, state: SoftmaxSums, starts: Array | None) -> tuple[Array, SoftmaxSums]:
    """All pairs at once, differentiated by JAX."""
    length = scores.shape[1]
    starts = jnp.zeros(scores.shape[:2], bool) if starts is None else starts
    runs = jnp.cumsum(starts, axis=1)
    seen = jnp.tril(jnp.ones((length, length), bool)) & (runs[:, :, None] == runs[:, None, :])
    each = jnp.where(seen[..., None], scores[:, None], -jnp.inf)  # [B, t, i, H]
    continued = jnp.where(runs[..., None] == 0, state.maximum[:, None], -jnp.inf)
    maximum = jax.lax.stop_gradient(jnp.maximum(each.max(axis=2), continued))
    weights, kept = decay_between(each, maximum[:, :, None]), decay_between(continued, maximum)
    sums = SoftmaxSums(
        maximum,
        jnp.einsum("btih,bihw->bthw", weights, values) + kept[..., None] * state.numerator[:, None],
        weights.sum(axis=2) + kept * state.denominator[:, None],
    )
    return sums.mean, jax.tree.map(lambda a: a[:, -1], sums)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _prefix_attention(
    implementation: str | None, scores: Array, values: Array, state: SoftmaxSums, starts: Array | None
) -> tuple[Array, SoftmaxSums]:
    return _forward(implementation, scores, values, state, starts)[0]


def _forward(
    implementation: str | None, scores: Array, values: Array, state: SoftmaxSums, starts: Array | None
) -> tuple[tuple[Array, SoftmaxSums], tuple]:
    tokens = SoftmaxSums(scores, values, jnp.ones_like(scores))
    if implementation is None:
        run = lambda how: functools.partial(_scan, how)
        sums, last = jax.lax.platform_dependent(tokens, state, starts, cpu=run("sequential"), default=run("associative"))
    else:
        sums, last = _scan(implementation, tokens, state, starts)
    outputs = sums.mean
    return (outputs, last), (scores, values, state, starts, sums.maximum, sums.denominator, outputs)


def _scan(
    implementation: str, tokens: SoftmaxSums, state: SoftmaxSums, starts: Array | None
) -> tuple[SoftmaxSums, SoftmaxSums]:
    return prefix_scan(SOFTMAX, tokens, initial=state, starts=starts, implementation=implementation)


def _backward(implementation: str | None, saved: tuple, cotangents: tuple) -> tuple:
    """With the maxima m as constants, every sum is linear in `exp(s_i - m_t)`, whose factors `exp(m_t - m_(t+1))` are the
    decays of the adjoint recurrence: at most 1, and exactly 1 where the maximum stays."""
    scores, values, state, starts, maximum, denominator, outputs = saved
    d_outputs, d_last = cotangents
    d_numerator = d_outputs * inverse(denominator)[..., None]
    d_denominator = -jnp.sum(d_numerator * outputs, axis=-1)
    d_sums = jnp.concatenate([d_numerator, d_denominator[..., None]], axis=-1)
    d_sums = d_sums.at[:, -1].add(jnp.concatenate([d_last.numerator, d_last.denominator[..., None]], axis=-1))
    before = jnp.concatenate([state.maximum[:, None], maximum[:, :-1]], axis=1)
    decay = decay_between(before if starts is None else jnp.where(starts[..., None], -jnp.inf, before), maximum)
    to_next = jnp.concatenate([decay[:, 1:], jnp.zeros_like(decay[:, :1])], axis=1)[..., None]
    d_sums, _ = affine_scan(to_next, d_sums, reverse=True, implementation=implementation)
    d_numerator, d_denominator = d_sums[..., :-1], d_sums[..., -1]
    weight = decay_between(scores, maximum)
    d_scores = weight * (jnp.sum(values * d_numerator, axis=-1) + d_denominator)
    d_numerator_0, d_denominator_0 = decay[:, 0, :, None] * d_numerator[:, 0], decay[:, 0] * d_denominator[:, 0]
    d_maximum_0 = jnp.sum(state.numerator * d_numerator_0, axis=-1) + state.denominator * d_denominator_0
    return d_scores, weight[..., None] * d_numerator, SoftmaxSums(d_maximum_0, d_numerator_0, d_denominator_0), None


_prefix_attention.defvjp(_forward, _backward)
