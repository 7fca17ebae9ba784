"""Matrix states with a decay per channel of the keys, as in gated linear attention.

The products of a chunk, `sum_k q_tk k_sk exp(sum of log_decay_k over s < j <= t)`, are no matrix product times decays: each
channel has its own. Written as a product of `q exp(sum up to t)` and `k exp(-sum up to s)` they would overflow.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from seqjax.ops.chunk_scan import differentiated, from_chunks, matmul, scan_chunks, to_chunks


def channel_decay_attention(
    chunk_size: int, q: Array, k: Array, v: Array, log_decay: Array, state: Array
) -> tuple[Array, Array]:
    """`linear_attention` with `[B, L, H, K]` decays and as many queries and keys as heads, without the delta rule."""
    count, size = power_of_two_chunks(v.shape[1], chunk_size)
    chunks = tuple(to_chunks(a, count, size) for a in (q, k, v, log_decay))
    y, state = scan_chunks(_forward, differentiated(_forward), chunks, state)
    return from_chunks(y, v.shape[1]), state


def _forward(state: Array, chunk: tuple) -> tuple[Array, Array]:
    q, k, v, log_decay = chunk
    (scores,), decays = decayed_products((q,), k, log_decay)
    y = matmul("bhts,bhsw->bhtw", scores.astype(v.dtype), v)
    y = y + matmul("bhtk,bhkw->bhtw", (decays.since * q).astype(v.dtype), state.astype(v.dtype))
    left = matmul("bhsk,bhsw->bhkw", (decays.until * k).astype(v.dtype), v)
    return decays.whole * state + left, y.astype(v.dtype)


class ChannelDecays(NamedTuple):
    """Of a chunk of Q tokens.

    Attributes:
      since: what is left at token t of the state before the chunk.
      until: what is left at the end of the chunk of input s.
    """

    since: Array  # [..., Q, K]
    until: Array  # [..., Q, K]

    @property
    def whole(self) -> Array:
        """What is left of the state before the chunk at its end, `[..., K, 1]`."""
        return self.since[..., -1, :, None]


@jax.custom_vjp
def decayed_products(rows: tuple[Array, ...], k: Array, log_decay: Array) -> tuple[list[Array], ChannelDecays]:
    """`[..., t, s]` of each of `rows` with `k`, decayed from s to t in every channel, 0 where s > t; and the decays.

    Blocks of one token are merged in pairs until one is left. Tokens t of the second of a pair meet tokens s of the first
    in a matrix product: what is left at t of what came before its block, with what is left of s at the end of its own. All
    decays are products of factors of at most 1, so that nothing overflows, and a reset is exact.

    Args:
      rows, k, log_decay: `[..., Q, K]`, Q a power of 2.
    """
    products = [jnp.sum(x.astype(log_decay.dtype) * k, axis=-1)[..., None, None] for x in rows]
    *levels, decays = _levels(log_decay)
    for level in levels:
        first = _first(k, level)
        across = [matmul("...tk,...sk->...ts", _second(x, level), first) for x in rows]
        products = [_merged(*_halves(p), a) for p, a in zip(products, across)]
    return [p[..., 0, :, :] for p in products], ChannelDecays(*(a[..., 0, :, :] for a in decays))


def _products_forward(rows: tuple[Array, ...], k: Array, log_decay: Array) -> tuple:
    return decayed_products(rows, k, log_decay), (rows, k, log_decay)


def _products_backward(saved: tuple, cotangents: tuple) -> tuple:
    rows, k, log_decay = saved
    d_products, d_decays = cotangents
    *levels, decays = _levels(log_decay)
    d_rows, d_k = [jnp.zeros_like(log_decay) for _ in rows], jnp.zeros_like(log_decay)
    d_products = [d[..., None, :, :] for d in d_products]
    for level in reversed(levels):
        first, d_first = _first(k, level), 0
        for i, x in enumerate(rows):
            d_products[i], across = _split(d_products[i])
            across = across.astype(k.dtype)
            d_second = _halves(level.since)[1] * matmul("...ts,...sk->...tk", across, first)
            d_first += matmul("...ts,...tk->...sk", across, _second(x, level))
            d_rows[i] += jnp.stack([jnp.zeros_like(d_second), d_second], axis=-3).reshape(k.shape)
        d_first = _halves(level.until)[0] * d_first
        d_k += jnp.stack([d_first, jnp.zeros_like(d_first)], axis=-3).reshape(k.shape)
    # A token's decay lies on the way of every input before it to every row from it on.
    since, until = (a[..., 0, :, :] * d for a, d in zip(decays, d_decays))
    inner = sum((x * d for x, d in zip(rows, d_rows)), since - k * d_k)
    d_log_decay = jax.lax.cumsum(inner, axis=k.ndim - 2, reverse=True)
    d_log_decay += jnp.cumsum(until, axis=-2) - until
    own = [d.reshape(*k.shape[:-1], 1) for d in d_products]
    d_k += sum(d * x for d, x in zip(own, rows))
    d_rows = tuple((d + e * k).astype(x.dtype) for d, e, x in zip(d_rows, own, rows))
    return d_rows, d_k.astype(k.dtype), d_log_decay


decayed_products.defvjp(_products_forward, _products_backward)


def _levels(log_decay: Array) -> list[ChannelDecays]:
    """Decays within blocks of 1, 2, 4, ... Q tokens, `[..., blocks, block, K]`."""
    since = jnp.exp(log_decay)[..., None, :]
    levels = [ChannelDecays(since, jnp.ones_like(since))]
    while levels[-1].since.shape[-3] > 1:
        (since, later), (until, last) = (_halves(a) for a in levels[-1])
        later, until = later * since[..., -1:, :], until * later[..., -1:, :]
        levels.append(ChannelDecays(*(jnp.concatenate(halves, axis=-2) for halves in ((since, later), (until, last)))))
    return levels


def _first(k: Array, level: ChannelDecays) -> Array:
    """What is left of the first of each pair of blocks at the first's end."""
    return (_halves(level.until)[0] * _halves(k.reshape(level.until.shape))[0]).astype(k.dtype)


def _second(x: Array, level: ChannelDecays) -> Array:
    """The second of each pair, with what is left there of what came before it."""
    return (_halves(level.since)[1] * _halves(x.reshape(level.since.shape))[1]).astype(x.dtype)


def _halves(blocks: Array) -> tuple[Array, Array]:
    """The first and the second of each pair of blocks `[..., blocks, m, n]`."""
    pairs = blocks.reshape(*blocks.shape[:-3], -1, 2, *blocks.shape[-2:])
    return pairs[..., 0, :, :], pairs[..., 1, :, :]


def _merged(first: Array, second: Array, across: Array) -> Array:
    """Products of two neighbouring blocks, with those of the second's rows and the first's columns."""
    upper = jnp.concatenate([first, jnp.zeros_like(across)], axis=-1)
    return jnp.concatenate([upper, jnp.concatenate([across, second], axis=-1)], axis=-2)


def _split(products: Array) -> tuple[Array, Array]:
    """The two halves' own products, and those across: `[..., 2 m, 2 m]` of n blocks to 2 n and n of m."""
    *batch, count, size, _ = products.shape
    half = size // 2
    own = jnp.stack([products[..., :half, :half], products[..., half:, half:]], axis=-3)
    return own.reshape(*batch, 2 * count, half, half), products[..., half:, :half]


def power_of_two_chunks(length: int, chunk_size: int) -> tuple[int, int]:
    """How many chunks, and their common size: the least power of 2 that so many chunks need."""
    count = -(-length // (1 << chunk_size.bit_length() - 1))
    return count, 1 << (-(-length // count) - 1).bit_length()
