"""Matrix states with a decay per head, or none: linear attention, retention, Mamba-2.

Inside a chunk it is attention without a softmax, between chunks the state is carried: quadratic in the chunk, linear in the
sequence (Dao and Gu 2024, section 6). The backward pass is written by hand: heads that share queries and keys make those
products once.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from seqjax.ops.chunk_scan import from_chunks, matmul, scan_chunks, to_chunks
from seqjax.ops.recurrence import sum_modes

BLOCKS = (16, 8)
"""Sizes of the blocks that a chunk's decays are made of; chunks longer than the first are multiples of the second."""


def head_decay_attention(chunk_size: int, q: Array, k: Array, v: Array, log_decay: Array, state: Array) -> tuple[Array, Array]:
    """`linear_attention` with `[B, L, H]` decays, without the delta rule."""
    groups, length = q.shape[2], v.shape[1]
    count, size = equal_chunks(length, chunk_size)
    # What fills the last chunk up, k = 0 and no decay, leaves the state as it is.
    q, k, v, log_decay = (to_chunks(a, count, size) for a in (q, k, v, log_decay))
    v, log_decay = (a.reshape(*a.shape[:2], groups, -1, *a.shape[3:]) for a in (v, log_decay))
    grouped = state.reshape(state.shape[0], groups, -1, *state.shape[2:])
    y, last = scan_chunks(_forward, _backward, _Chunk(q, k, v, log_decay), grouped)
    return from_chunks(y.reshape(*y.shape[:2], -1, *y.shape[4:]), length), last.reshape(state.shape)


def equal_chunks(length: int, chunk_size: int) -> tuple[int, int]:
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


class Decays(NamedTuple):
    """What is left of a chunk's inputs and of the state before it.

    Attributes:
      pairs: `[..., t, s]`, of input s at token t; 0 where s > t.
      since: `[..., t]`, of the state before the chunk at token t.
      until: `[..., s]`, of input s at the end of the chunk.
    """

    pairs: Array
    since: Array
    until: Array


def head_decays(log_decay: Array) -> Decays:
    """Every decay is the exponential of a sum of its own terms. A difference of running sums would lose digits where both
    are large, and meet inf - inf at a reset."""
    since = jnp.exp(jnp.cumsum(log_decay, axis=-1))
    return Decays(_pair_decays(log_decay), since, jnp.exp(_sum_after(log_decay)))


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


def _forward(state: Array, chunk: _Chunk) -> tuple[Array, Array]:
    q, k, v, log_decay = chunk
    decays = head_decays(log_decay)
    scores = matmul("bgtk,bgsk->bgts", q, k)[:, :, None] * decays.pairs
    y = matmul("bgrts,bgrsw->bgrtw", scores.astype(v.dtype), v)
    y = y + decays.since[..., None] * matmul("bgtk,bgrkw->bgrtw", q, state.astype(v.dtype))
    left = (decays.until[..., None] * v).astype(v.dtype)
    state = decays.since[..., -1, None, None] * state + matmul("bgsk,bgrsw->bgrkw", k, left)
    return state, y.astype(v.dtype)


def _backward(d_after: Array, saved: tuple) -> tuple[Array, _Chunk]:
    """Through one chunk: from the gradient of the state after it to that of the state before it."""
    (q, k, v, log_decay), state, d_y = saved
    dtype = v.dtype
    decays = head_decays(log_decay)
    scores = matmul("bgtk,bgsk->bgts", q, k)[:, :, None] * decays.pairs
    d_scores = matmul("bgrtw,bgrsw->bgrts", d_y, v)
    shared = (d_scores * decays.pairs).reshape(-1, *d_scores.shape[2:])
    d_products = sum_modes(shared).reshape(*q.shape[:2], *d_scores.shape[3:]).astype(dtype)
    d_since = (decays.since[..., None] * d_y).astype(dtype)  # what the state before the chunk gets of each output
    left = (decays.until[..., None] * v).astype(dtype)
    low_state, low_after = state.astype(dtype), d_after.astype(dtype)
    d_q = matmul("bgts,bgsk->bgtk", d_products, k) + matmul("bgrtw,bgrkw->bgtk", d_since, low_state)
    d_k = matmul("bgts,bgtk->bgsk", d_products, q) + matmul("bgrsw,bgrkw->bgsk", left, low_after)
    d_left = decays.until[..., None] * matmul("bgsk,bgrkw->bgrsw", k, low_after)
    d_v = matmul("bgrts,bgrtw->bgrsw", scores.astype(dtype), d_y) + d_left
    whole = decays.since[..., -1, None, None]
    d_state = whole * d_after + matmul("bgtk,bgrtw->bgrkw", q, d_since)

    # A token's decay lies on the way of every input before it to every output from it on.
    size = log_decay.shape[-1]
    earlier = np.arange(size)[:, None] > np.arange(size)
    weights = jnp.where(earlier, d_scores * scores, 0)
    by_output = weights.sum(-1) + jnp.sum(d_since * matmul("bgtk,bgrkw->bgrtw", q, low_state), axis=-1)
    by_end = jnp.sum(d_left * v, axis=-1)
    inner = jax.lax.cumsum(by_output - weights.sum(-2), axis=log_decay.ndim - 1, reverse=True)
    before = jnp.cumsum(jnp.pad(by_end[..., :-1], [(0, 0)] * 3 + [(1, 0)]), axis=-1)
    d_log_decay = inner + before + jnp.sum(whole * d_after * state, axis=(-2, -1))[..., None]
    return d_state, _Chunk(d_q.astype(dtype), d_k.astype(dtype), d_v.astype(dtype), d_log_decay)
