"""Linear attention with a decay per head: a matrix state, computed chunk by chunk with matrix products.

One recurrence is at the bottom of linear attention (no decay), retention (a constant one) and Mamba-2 (one that depends on
the token). Inside a chunk it is attention without a softmax, between chunks it is carried as a state: quadratic in the
chunk, linear in the sequence (Dao and Gu 2024, section 6).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from seqjax.ops.dispatch import dispatch
from seqjax.ops.recurrence import sum_modes

CHUNK_SIZE = 64
BLOCKS = (16, 8)
"""Sizes of the blocks that a chunk's decays are made of; chunks longer than the first are multiples of the second."""


def linear_attention(
    q: Float[Array, "B L G K"],
    k: Float[Array, "B L G K"],
    v: Float[Array, "B L H W"],
    log_decay: Float[Array, "#B #L H"] | None = None,
    state: Float[Array, "B H K W"] | None = None,
    *,
    starts: Bool[Array, "B L"] | None = None,
    reverse: bool = False,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B L H W"], Float[Array, "B H K W"]]:
    """`S_t = exp(log_decay_t) S_(t-1) + k_t v_t^T`, `y_t = S_t^T q_t` for each head.

    The state-space duality of Mamba-2 in its own letters: q = C, k = B, v = delta x, log_decay = delta A.

    Args:
      q, k: queries and keys; head h reads group `h // (H / G)`.
      v: values. Products of matrices take operands in its dtype, and accumulate in at least float32.
      log_decay: at most 0; -inf forgets everything. None does not decay. Decays, their sums and the state are kept in at
        least float32.
      state: S before the first step; None is zero.
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
    decay = jnp.zeros((1, 1, heads), wide) if log_decay is None else log_decay.astype(wide)
    decay = jnp.broadcast_to(decay, (batch, length, heads))
    state = jnp.zeros((batch, heads, q.shape[-1], v.shape[-1]), wide) if state is None else state.astype(wide)
    if reverse:
        q, k, v, decay = (jnp.flip(a, 1) for a in (q, k, v, decay))
        if starts is not None:
            starts = jnp.pad(jnp.flip(starts[:, 1:], 1), [(0, 0), (1, 0)])
    if starts is not None:  # exact: decays are products and sums of logarithms, which never meet as inf - inf
        decay = jnp.where(starts[..., None], -jnp.inf, decay)
    chunked = functools.partial(_in_chunks, chunk_size or CHUNK_SIZE)
    available = {"xla": chunked if length > 1 else _one_step, "reference": _reference}
    y, state = dispatch(implementation, available, q, k, v, decay, state)
    y = y.astype(v.dtype)
    return (jnp.flip(y, 1) if reverse else y), state


def linear_attention_flops(
    length: int, heads: int, groups: int, key_dim: int, value_dim: int, chunk_size: int | None = None
) -> int:
    """Floating-point operations of `linear_attention` on one sequence, forward."""
    if length == 1:
        return 5 * heads * key_dim * value_dim
    count, size = _chunks(length, chunk_size or CHUNK_SIZE)
    inside = size * (2 * groups * key_dim + 2 * heads * value_dim + 3 * heads)
    return count * size * (inside + 4 * heads * key_dim * value_dim)


def _reference(q: Array, k: Array, v: Array, log_decay: Array, state: Array) -> tuple[Array, Array]:
    """One token after the other."""
    repeats = v.shape[2] // q.shape[2]

    def step(state: Array, x: tuple) -> tuple[Array, Array]:
        q, k, v, log_decay = x
        q, k = (jnp.repeat(a, repeats, axis=1) for a in (q, k))
        state = jnp.exp(log_decay)[..., None, None] * state + k[..., :, None] * v[..., None, :]
        return state, jnp.sum(q[..., :, None] * state, axis=2)

    inputs = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1).astype(state.dtype), (q, k, v, log_decay))
    state, y = jax.lax.scan(step, state, inputs)
    return jnp.swapaxes(y, 0, 1), state


def _one_step(q: Array, k: Array, v: Array, log_decay: Array, state: Array) -> tuple[Array, Array]:
    """Decoding: no chunk, no loop."""
    repeats, wide = v.shape[2] // q.shape[2], state.dtype
    q, k = (jnp.repeat(a[:, 0].astype(wide), repeats, axis=1)[..., None] for a in (q, k))
    state = jnp.exp(log_decay[:, 0])[..., None, None] * state + k * v[:, 0, :, None].astype(wide)
    return jnp.sum(q * state, axis=2)[:, None], state


def _in_chunks(chunk_size: int, q: Array, k: Array, v: Array, log_decay: Array, state: Array) -> tuple[Array, Array]:
    """Split heads into groups and the length into chunks, which lead: `[chunks, B, G, ..., size, ...]`."""
    batch, length, heads, _ = v.shape
    groups = q.shape[2]
    count, size = _chunks(length, chunk_size)
    # What fills the last chunk up, k = 0 and no decay, leaves the state as it is.
    filled = (jnp.pad(a, [(0, 0), (0, count * size - length), *[(0, 0)] * (a.ndim - 2)]) for a in (q, k, v, log_decay))
    q, k, v, log_decay = (a.reshape(batch, count, size, groups, -1, *a.shape[3:]) for a in filled)
    q, k = (a[:, :, :, :, 0].transpose(1, 0, 3, 2, 4) for a in (q, k))
    v, log_decay = v.transpose(1, 0, 3, 4, 2, 5), log_decay.transpose(1, 0, 3, 4, 2)
    y, state = _scan(_Chunk(q, k, v, log_decay), state.reshape(batch, groups, -1, *state.shape[2:]))
    y = y.transpose(1, 0, 4, 2, 3, 5).reshape(batch, count * size, heads, -1)[:, :length]
    return y, state.reshape(batch, heads, *state.shape[3:])


def _chunks(length: int, chunk_size: int) -> tuple[int, int]:
    """How many chunks, and their common size: near the least that so many chunks need."""
    if chunk_size > BLOCKS[0]:
        chunk_size -= chunk_size % BLOCKS[-1]
    count = -(-length // chunk_size)
    size = -(-length // count)
    return count, size if size <= BLOCKS[0] else -(-size // BLOCKS[-1]) * BLOCKS[-1]


class _Chunk(NamedTuple):
    """Inputs of a chunk of Q tokens: H = G * R heads, R to each group of queries and keys."""

    q: Array  # [B, G, Q, K]
    k: Array  # [B, G, Q, K]
    v: Array  # [B, G, R, Q, W]
    log_decay: Array  # [B, G, R, Q]


class _Decays(NamedTuple):
    """What is left of a chunk's inputs and of the state before it.

    Attributes:
      pairs: `[..., t, s]`, of input s at token t; 0 where s > t.
      since: `[..., t]`, of the state before the chunk at token t.
      until: `[..., s]`, of input s at the end of the chunk.
    """

    pairs: Array
    since: Array
    until: Array


def _decays(log_decay: Array) -> _Decays:
    """Every decay is the exponential of a sum of its own terms. A difference of running sums would lose digits where both
    are large, and meet inf - inf at a reset."""
    since = jnp.exp(jnp.cumsum(log_decay, axis=-1))
    return _Decays(_pair_decays(log_decay), since, jnp.exp(_sum_after(log_decay)))


def _pair_decays(log_decay: Array) -> Array:
    """`exp(sum of log_decay over s < j <= t)`, `[..., Q]` to `[..., Q (t), Q (s)]`; 0 where s > t.

    Tokens of one block have a sum for each pair. For others it has three parts: the rest of the block of s, whole blocks,
    and the block of t up to t. Products of their exponentials need no exponential for each pair.
    """
    size = log_decay.shape[-1]
    block = next((b for b in BLOCKS if size % b == 0), size)
    count = size // block
    a = log_decay.reshape(*log_decay.shape[:-1], count, block)
    row, column = np.arange(block)[:, None], np.arange(block)
    inside = jnp.exp(jnp.cumsum(jnp.where(row > column, a[..., None], 0), axis=-2))
    inside = jnp.where(row >= column, inside, 0)
    if count == 1:
        return inside[..., 0, :, :]
    row, column = np.arange(count)[:, None], np.arange(count)
    previous = jnp.pad(a[..., :-1, :].sum(-1), [(0, 0)] * (a.ndim - 2) + [(1, 0)])
    between = jnp.exp(jnp.cumsum(jnp.where(row > column + 1, previous[..., None], 0), axis=-2))
    between = jnp.where(row > column, between, 0)
    later = jnp.exp(jnp.cumsum(a, axis=-1))[..., None] * between[..., :, None, :]  # [..., block, t, block of s]
    across = later[..., None] * jnp.exp(_sum_after(a))[..., None, None, :, :]  # [..., block, t, block of s, s]
    same = (row == column)[:, None, :, None]
    return jnp.where(same, inside[..., None, :], across).reshape(*log_decay.shape, size)


def _sum_after(a: Array) -> Array:
    """Sums over the entries after each, along the last axis."""
    later = jnp.pad(a[..., 1:], [(0, 0)] * (a.ndim - 1) + [(0, 1)])
    return jax.lax.cumsum(later, axis=a.ndim - 1, reverse=True)


@jax.custom_vjp
def _scan(chunks: _Chunk, state: Array) -> tuple[Array, Array]:
    """Outputs `[chunks, B, G, R, Q, W]` and the last state `[B, G, R, K, W]`."""
    state, y = _over_chunks(_forward, state, chunks)
    return y, state


def _scan_forward(chunks: _Chunk, state: Array) -> tuple:
    def keep(state: Array, chunk: _Chunk) -> tuple[Array, tuple]:
        after, y = _forward(state, chunk)
        return after, (y, state)

    last, (y, kept) = _over_chunks(keep, state, chunks)
    return (y, last), (chunks, kept)


def _scan_backward(saved: tuple, cotangents: tuple) -> tuple:
    chunks, kept = saved
    d_outputs, d_last = cotangents
    d_state, d_chunks = _over_chunks(_backward, d_last, (chunks, kept, d_outputs), reverse=True)
    return d_chunks, d_state


_scan.defvjp(_scan_forward, _scan_backward)


def _over_chunks(function, carry: Array, chunks: tuple, reverse: bool = False) -> tuple:
    """`lax.scan`, without the loop where there is one chunk."""
    if jax.tree.leaves(chunks)[0].shape[0] > 1:
        return jax.lax.scan(function, carry, chunks, reverse=reverse)
    carry, y = function(carry, jax.tree.map(lambda a: a[0], chunks))
    return carry, jax.tree.map(lambda a: a[None], y)


def _forward(state: Array, chunk: _Chunk) -> tuple[Array, Array]:
    q, k, v, log_decay = chunk
    decays = _decays(log_decay)
    scores = _matmul("bgtk,bgsk->bgts", q, k)[:, :, None] * decays.pairs
    y = _matmul("bgrts,bgrsw->bgrtw", scores.astype(v.dtype), v)
    y = y + decays.since[..., None] * _matmul("bgtk,bgrkw->bgrtw", q, state.astype(v.dtype))
    left = (decays.until[..., None] * v).astype(v.dtype)
    state = decays.since[..., -1, None, None] * state + _matmul("bgsk,bgrsw->bgrkw", k, left)
    return state, y.astype(v.dtype)


def _backward(d_after: Array, saved: tuple) -> tuple[Array, _Chunk]:
    """Through one chunk: from the gradient of the state after it to that of the state before it."""
    (q, k, v, log_decay), state, d_y = saved
    dtype = v.dtype
    decays = _decays(log_decay)
    scores = _matmul("bgtk,bgsk->bgts", q, k)[:, :, None] * decays.pairs
    d_scores = _matmul("bgrtw,bgrsw->bgrts", d_y, v)
    shared = (d_scores * decays.pairs).reshape(-1, *d_scores.shape[2:])
    d_products = sum_modes(shared).reshape(*q.shape[:2], *d_scores.shape[3:]).astype(dtype)
    d_since = (decays.since[..., None] * d_y).astype(dtype)  # what the state before the chunk gets of each output
    left = (decays.until[..., None] * v).astype(dtype)
    low_state, low_after = state.astype(dtype), d_after.astype(dtype)
    d_q = _matmul("bgts,bgsk->bgtk", d_products, k) + _matmul("bgrtw,bgrkw->bgtk", d_since, low_state)
    d_k = _matmul("bgts,bgtk->bgsk", d_products, q) + _matmul("bgrsw,bgrkw->bgsk", left, low_after)
    d_left = decays.until[..., None] * _matmul("bgsk,bgrkw->bgrsw", k, low_after)
    d_v = _matmul("bgrts,bgrtw->bgrsw", scores.astype(dtype), d_y) + d_left
    whole = decays.since[..., -1, None, None]
    d_state = whole * d_after + _matmul("bgtk,bgrtw->bgrkw", q, d_since)

    # A token's decay lies on the way of every input before it to every output from it on.
    size = log_decay.shape[-1]
    earlier = np.arange(size)[:, None] > np.arange(size)
    weights = jnp.where(earlier, d_scores * scores, 0)
    by_output = weights.sum(-1) + jnp.sum(d_since * _matmul("bgtk,bgrkw->bgrtw", q, low_state), axis=-1)
    by_end = jnp.sum(d_left * v, axis=-1)
    inner = jax.lax.cumsum(by_output - weights.sum(-2), axis=log_decay.ndim - 1, reverse=True)
    before = jnp.cumsum(jnp.pad(by_end[..., :-1], [(0, 0)] * 3 + [(1, 0)]), axis=-1)
    d_log_decay = inner + before + jnp.sum(whole * d_after * state, axis=(-2, -1))[..., None]
    return d_state, _Chunk(d_q.astype(dtype), d_k.astype(dtype), d_v.astype(dtype), d_log_decay)


def _matmul(spec: str, a: Array, b: Array) -> Array:
    """An einsum that accumulates in at least float32, and does not round float32 operands."""
    wide = jnp.promote_types(a.dtype, jnp.float32)
    return jnp.einsum(spec, a, b, preferred_element_type=wide, precision="highest")
