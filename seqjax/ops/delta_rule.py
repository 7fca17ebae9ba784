"""Matrix states under the delta rule: what is written is the error of what the state would have read.

The writes of a chunk depend on one another: `(I + A) U = beta (V - K S)`, A strictly lower triangular with entries
`beta_t k_t . k_s` under the decays. The inverse gives them all (the UT transform: Yang et al. 2024, section 3.2; with decays,
Yang et al. 2025, section 3.3); the rest of a chunk is linear attention with values U. Sums of powers of A would lose all
digits where keys repeat.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array

from seqjax.ops.channel_decay import decayed_products, power_of_two_chunks
from seqjax.ops.chunk_scan import differentiated, from_chunks, matmul, scan_chunks, to_chunks
from seqjax.ops.head_decay import equal_chunks, head_decays
from seqjax.ops.triangular import unit_lower_inverse


def delta_rule_attention(
    chunk_size: int, q: Array, k: Array, v: Array, log_decay: Array, beta: Array, state: Array
) -> tuple[Array, Array]:
    """`linear_attention` with the delta rule, decays `[B, L, H]` or `[B, L, H, K]`, and as many queries as heads."""
    split = equal_chunks if log_decay.ndim == 3 else power_of_two_chunks
    count, size = split(v.shape[1], chunk_size)
    # What fills the last chunk up, beta = 0 and no decay, leaves the state as it is.
    chunks = tuple(to_chunks(a, count, size) for a in (q, k, v, log_decay, beta))
    y, state = scan_chunks(_forward, differentiated(_forward), chunks, state)
    return from_chunks(y, v.shape[1]), state


def _forward(state: Array, chunk: tuple) -> tuple[Array, Array]:
    q, k, v, log_decay, beta = chunk
    decayed = (_under_head_decays if log_decay.ndim == 3 else _under_channel_decays)(q, k, log_decay)
    low = state.astype(v.dtype)
    errors = v - matmul("bhtk,bhkw->bhtw", decayed.k_since, low)
    solve = unit_lower_inverse(beta[..., None] * decayed.overlaps)
    writes = matmul("bhts,bhsw->bhtw", solve, beta[..., None] * errors).astype(v.dtype)
    y = matmul("bhts,bhsw->bhtw", decayed.scores.astype(v.dtype), writes)
    y = y + matmul("bhtk,bhkw->bhtw", decayed.q_since, low)
    state = decayed.whole * state + matmul("bhsk,bhsw->bhkw", decayed.k_until, writes)
    return state, y.astype(v.dtype)


class _Decayed(NamedTuple):
    """A chunk's queries and keys under its decays.

    Attributes:
      overlaps, scores: `[..., t, s]`, of keys and of queries with keys, decayed from s to t; only entries s < t of the
        overlaps are read.
      k_since, q_since: with what is left of the state before the chunk.
      k_until: with what is left at the end of the chunk.
      whole: what is left of the state before the chunk at its end.
    """

    overlaps: Array
    scores: Array
    k_since: Array
    q_since: Array
    k_until: Array
    whole: Array


def _under_head_decays(q: Array, k: Array, log_decay: Array) -> _Decayed:
    decays = head_decays(log_decay)
    overlaps, scores = (matmul("bhtk,bhsk->bhts", x, k) * decays.pairs for x in (k, q))
    k_since, q_since = ((decays.since[..., None] * x).astype(k.dtype) for x in (k, q))
    k_until = (decays.until[..., None] * k).astype(k.dtype)
    return _Decayed(overlaps, scores, k_since, q_since, k_until, decays.since[..., -1, None, None])


def _under_channel_decays(q: Array, k: Array, log_decay: Array) -> _Decayed:
    (overlaps, scores), decays = decayed_products((k, q), k, log_decay)
    k_since, q_since = ((decays.since * x).astype(k.dtype) for x in (k, q))
    return _Decayed(overlaps, scores, k_since, q_since, (decays.until * k).astype(k.dtype), decays.whole)
