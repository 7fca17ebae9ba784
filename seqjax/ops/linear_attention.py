"""Linear attention: a matrix state, computed chunk by chunk with matrix products.

One recurrence is at the bottom of linear attention (no decay), retention (a constant one), Mamba-2 (one that depends on the
token), gated linear attention (one for each channel of the keys), and the delta rule (which writes an error). Each form has
a file of its own: `head_decay`, `channel_decay`, `delta_rule`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from seqjax.ops.channel_decay import channel_decay_attention, power_of_two_chunks
from seqjax.ops.delta_rule import delta_rule_attention
from seqjax.ops.dispatch import dispatch
from seqjax.ops.head_decay import equal_chunks, head_decay_attention
from seqjax.ops.segments import reversed_starts, segment_ends
from seqjax.ops.triangular import unit_lower_inverse_flops

CHUNK_SIZE = 64
NORMALIZER_EPSILON = 1e-6
"""Added to the normaliser, as the authors of the Linear Transformer do."""


def linear_attention(
    q: Float[Array, "B L G K"],
    k: Float[Array, "B L G K"],
    v: Float[Array, "B L H W"],
    log_decay: Float[Array, "#B #L H"] | Float[Array, "#B #L H K"] | None = None,
    state: Float[Array, "B H K S"] | None = None,
    *,
    beta: Float[Array, "#B #L H"] | None = None,
    normalize: bool = False,
    starts: Bool[Array, "B L"] | None = None,
    reverse: bool = False,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B L H W"], Float[Array, "B H K _"]]:
    """`S_t = exp(log_decay_t) S_(t-1) + k_t v_t^T`, `y_t = S_t^T q_t` for each head.

    With `beta`, the delta rule: `D = exp(log_decay_t) S_(t-1)`, `S_t = D + beta_t k_t (v_t - D^T k_t)^T`, which is
    `(I - beta_t k_t k_t^T) D + beta_t k_t v_t^T` (Schlag et al. 2021; Yang et al. 2024 and 2025). With `normalize`,
    `y_t = S_t^T q_t / (z_t . q_t + 1e-6)`, z the state of values that are 1 (Katharopoulos et al. 2020, eqs. 9 to 12).
    The state-space duality of Mamba-2 in these letters: q = C, k = B, v = delta x, log_decay = delta A.

    Args:
      q, k: queries and keys; head h reads group `h // (H / G)`.
      v: values. Products of matrices take operands in its dtype, and accumulate in at least float32.
      log_decay: per head, or per head and channel of its keys (gated linear attention: Yang et al. 2023, eq. 3); at most 0;
        -inf forgets everything. None does not decay. Decays, their sums and the state are kept in at least float32.
      state: S before the first step, S = W, or W + 1 with z as the last column where outputs are normalised; None is zero.
      beta: how much of an error is written; the recurrence stays bounded where `0 <= beta |k|^2 <= 2`. None adds values.
      starts: where a segment starts: the state before that step counts as exactly zero.
      reverse: run from the last token to the first, `S_t = exp(log_decay_t) S_(t+1) + ...`; the state then resets after
        the last token of a segment.
      chunk_size: tokens in a chunk, at most; the result does not depend on it. Any length will do: chunks are made
        equal, and the last one is filled up.
      implementation: "xla" (chunks), "reference" (a loop over tokens), or None for the platform's fastest.
    Returns:
      Outputs in the dtype of `v`, and the state after the last step in at least float32. Differentiable in reverse mode;
      the backward pass keeps the states between chunks only.
    Raises:
      ValueError: G does not divide H, the chunk size is not positive, or the implementation is unknown.
    """
    (batch, length, groups, _), heads = q.shape, v.shape[2]
    if heads % groups:
        raise ValueError(f"{heads} heads are not a multiple of {groups} groups of queries and keys.")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} is not positive.")
    wide = jnp.promote_types(v.dtype, jnp.float32)
    q, k = q.astype(v.dtype), k.astype(v.dtype)
    v = jnp.pad(v, [(0, 0)] * 3 + [(0, 1)], constant_values=1) if normalize else v
    decay = jnp.zeros((1, 1, heads), wide) if log_decay is None else log_decay.astype(wide)
    if decay.shape[:2] == (1, 1):  # no constant to XLA, which would sum it, slowly, when it compiles
        decay = jax.lax.optimization_barrier(decay)
    decay = jnp.broadcast_to(decay, (batch, length, *decay.shape[2:]))
    rates = None if beta is None else jnp.broadcast_to(beta.astype(wide), (batch, length, heads))
    state = jnp.zeros((batch, heads, q.shape[-1], v.shape[-1]), wide) if state is None else state.astype(wide)
    if reverse:
        q, k, v, decay, rates = jax.tree.map(lambda a: jnp.flip(a, 1), (q, k, v, decay, rates))
        starts = reversed_starts(starts)
    if starts is not None:  # exact: decays are products and sums of logarithms, which never meet as inf - inf
        decay = jnp.where(starts.reshape(batch, length, *[1] * (decay.ndim - 2)), -jnp.inf, decay)
    in_chunks = functools.partial(_in_chunks, chunk_size or CHUNK_SIZE)
    available = {"xla": in_chunks if length > 1 else _one_step, "reference": _reference}
    y, state = dispatch(implementation, available, q, k, v, decay, rates, state)
    if normalize:
        y = y[..., :-1] / (y[..., -1:] + NORMALIZER_EPSILON)
    y = y.astype(v.dtype)
    return (jnp.flip(y, 1) if reverse else y), state


def bidirectional_linear_attention(
    q: Float[Array, "B L H K"],
    k: Float[Array, "B L H K"],
    v: Float[Array, "B L H W"],
    *,
    starts: Bool[Array, "B L"] | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "B L H W"]:
    """`y_t = sum_s (q_t . k_s) v_s` over all tokens s, in the dtype of `v`; arguments as in `linear_attention`.

    Without `starts` these are two products of matrices. With them s is of the segment of t, and the sum is made of what comes
    up to the token and what comes behind it, each by chunks: lengths that only the data know would make no array.
    """
    if starts is None:
        wide = jnp.promote_types(v.dtype, jnp.float32)
        matrix = jnp.einsum("blhk,blhw->bhkw", k.astype(v.dtype), v, preferred_element_type=wide)
        y = jnp.einsum("blhk,bhkw->blhw", q.astype(v.dtype), matrix.astype(v.dtype), preferred_element_type=wide)
        return y.astype(v.dtype)
    chunks = {"starts": starts, "chunk_size": chunk_size, "implementation": implementation}
    later_k, later_v = (jnp.pad(a[:, 1:], [(0, 0), (0, 1), (0, 0), (0, 0)]) for a in (k, v))
    later_v = jnp.where(segment_ends(starts)[..., None, None], 0, later_v)
    return linear_attention(q, k, v, **chunks)[0] + linear_attention(q, later_k, later_v, reverse=True, **chunks)[0]


def linear_attention_flops(
    length: int,
    heads: int,
    groups: int,
    key_dim: int,
    value_dim: int,
    chunk_size: int | None = None,
    *,
    channel_decay: bool = False,
    delta_rule: bool = False,
) -> int:
    """Floating-point operations of `linear_attention` on one sequence, forward; a normaliser is one more value."""
    entries = heads * key_dim * value_dim
    if length == 1:
        return (7 if delta_rule else 5) * entries
    split = power_of_two_chunks if channel_decay else equal_chunks
    count, size = split(length, chunk_size or CHUNK_SIZE)
    rows = 2 if delta_rule else 1  # what meets the keys: queries, and keys
    per_token = 4 * entries + 2 * size * heads * value_dim
    if channel_decay:
        per_token += heads * key_dim * (rows * (size + size.bit_length() + 1) + 2 * size.bit_length())
    else:
        per_token += 2 * rows * size * (heads if delta_rule else groups) * key_dim + (2 + rows) * size * heads
    if delta_rule:  # what the state would have read, and what to write
        per_token += 2 * entries + 2 * size * heads * value_dim + 3 * heads * key_dim
    inverses = count * heads * unit_lower_inverse_flops(size) if delta_rule else 0
    return count * size * per_token + inverses


def _step(state: Array, token: tuple) -> tuple[Array, Array]:
    """One token: the recurrence itself."""
    q, k, v, log_decay, beta = token
    q, k = (jnp.repeat(a, v.shape[1] // a.shape[1], axis=1)[..., None] for a in (q, k))
    decay = jnp.exp(log_decay)
    state = decay.reshape(*decay.shape[:2], -1, 1) * state
    if beta is not None:
        v = beta[..., None] * (v - jnp.sum(k * state, axis=2))
    state = state + k * v[:, :, None]
    return state, jnp.sum(q * state, axis=2)


def _reference(*args: Array | None) -> tuple[Array, Array]:
    """One token after the other."""
    *sequences, state = args
    inputs = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1).astype(state.dtype), tuple(sequences))
    state, y = jax.lax.scan(_step, state, inputs)
    return jnp.swapaxes(y, 0, 1), state


def _one_step(*args: Array | None) -> tuple[Array, Array]:
    """Decoding: no chunk, no loop."""
    *sequences, state = args
    state, y = _step(state, jax.tree.map(lambda a: a[:, 0].astype(state.dtype), tuple(sequences)))
    return y[:, None], state


def _in_chunks(
    chunk_size: int, q: Array, k: Array, v: Array, log_decay: Array, beta: Array | None, state: Array
) -> tuple[Array, Array]:
    if beta is None and log_decay.ndim == 3:
        return head_decay_attention(chunk_size, q, k, v, log_decay, state)
    q, k = (jnp.repeat(a, v.shape[2] // a.shape[2], axis=2) for a in (q, k))
    if beta is None:
        return channel_decay_attention(chunk_size, q, k, v, log_decay, state)
    return delta_rule_attention(chunk_size, q, k, v, log_decay, beta, state)
