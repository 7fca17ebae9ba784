"""Attention by blocks of queries and of keys, in XLA: memory linear in length, forward and backward.

A loop runs over a list, made when the program is compiled, of the pairs of blocks that may attend: first those that need no
mask, then the others. Forward, each step folds a block of keys into its queries' running softmax (Milakov & Gimelshein
2018); backward, it makes the block's weights again from the log-sum-exp of each row (Dao et al. 2022).

Arrays lead with `[B, G]`, batch and key heads. The rows of a block run over the R query heads of a group and, for each,
over the block's queries: with one axis of rows every product is a plain matrix product.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from seqjax.ops.attention_mask import AttentionMask, AttentionSpec, Blocks, distances, live_blocks, static_blocks, visible

MOST_BLOCKS = 128
"""Bound on the blocks of one sequence, and so on the steps of a loop over pairs of them."""
AT_ONCE = 1024
"""Up to so many tokens, each block of queries takes all its keys at once, without a loop."""


def forward(spec: AttentionSpec, mask: AttentionMask, q: Array, k: Array, v: Array, bias: Array | None) -> tuple[Array, Array]:
    """Output `[B, T, H, W]` in the dtype of `v`, and each row's log-sum-exp `[B, T, H]` in at least float32."""
    parts = _parts(spec, mask, q.shape[1], k.shape[1])
    # With one block of queries each key is read once, from where it lies: to bring heads first is to copy them all.
    in_place = not parts and _blocks(q.shape[1], k.shape[1])[0].count == 1
    q = _by_head(q, k.shape[2])
    if not in_place:
        k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    if parts:
        found = [_mix(*_part(spec, mask, q, k, v, bias, *part), in_place=False) for part in parts]
        mixed, log_sum = (jnp.concatenate(pieces, axis=3) for pieces in zip(*found))
    else:
        mixed, log_sum = _mix(spec, mask, q, k, v, bias, in_place=in_place)
    return _by_token(mixed), _by_token(log_sum)[..., 0]


def _mix(
    spec: AttentionSpec, mask: AttentionMask, q: Array, k: Array, v: Array, bias: Array | None, *, in_place: bool
) -> tuple[Array, Array]:
    """Output `[B, G, R, T, W]` and log-sum-exp `[B, G, R, T, 1]` of queries `[B, G, R, T, K]`, and of keys and values
    `[B, G, S, ...]`, or `[B, S, G, ...]` in place."""
    length, num_keys = q.shape[3], k.shape[1 if in_place else 2]
    call = _Call(spec, mask, bias, *_blocks(length, num_keys), repeats=q.shape[2])
    at_once = call.queries.count == call.keys.count == 1 and bias is None
    wide = jnp.promote_types(q.dtype, jnp.float32)
    lowest = float(jnp.finfo(wide).min)  # not -inf: the difference of two of them is a number

    def take_keys(a: Array, tile: _Tile) -> Array:
        block = _take(a, tile.key, call.keys, axis=1 if in_place else 2)
        return block.transpose(0, 2, 1, 3) if in_place else block

    def fold(tile: _Tile, masked: bool, running: tuple[Array, ...]) -> tuple[Array, ...]:
        top, total, mixed = running
        logits, _ = _logits(call, tile, _take_rows(q, tile, call), take_keys(k, tile), masked)
        peak = jnp.maximum(top, jnp.max(logits, axis=-1, keepdims=True))
        weights, kept = jnp.exp(logits - peak), jnp.exp(top - peak)
        added = _matmul("bgqs,bgsw->bgqw", weights.astype(v.dtype), take_keys(v, tile))
        return peak, kept * total + jnp.sum(weights, axis=-1, keepdims=True), kept * mixed + added

    def fold_once(tile: _Tile, masked: bool, _: tuple[Array, ...]) -> tuple[Array, ...]:
        """The same where nothing runs: XLA makes one loop of a maximum and of what is less that maximum, and of no more."""
        logits, _ = _logits(call, tile, _take_rows(q, tile, call), take_keys(k, tile), masked, hidden=lowest)
        peak = jnp.max(logits, axis=-1, keepdims=True)
        weights = jnp.exp(logits - peak)
        added = _matmul("bgqs,bgsw->bgqw", weights.astype(v.dtype), take_keys(v, tile))
        total = jnp.sum(weights, axis=-1, keepdims=True)
        if masked:  # rows that see no key
            some = visible(spec, mask, jnp.arange(length), jnp.arange(num_keys)).any(axis=-1)
            total, added = (jnp.where(_tile_rows(some[..., None], call), a, 0) for a in (total, added))
        return peak, total, added

    def step(tile: _Tile, masked: bool, running: tuple[Array, ...]) -> tuple[Array, ...]:
        before = tuple(_take_rows(a, tile, call) for a in running)
        after = _if_live(tile, functools.partial(fold_once if at_once else fold, tile, masked), before)
        return tuple(_put_rows(a, block, tile, call) for a, block in zip(running, after))

    filled = lambda width, value: jnp.full_like(q, value, wide, shape=(*q.shape[:-1], width))
    top, total, mixed = _walk(call, step, (filled(1, lowest), filled(1, 0), filled(v.shape[-1], 0)))
    log_sum = jnp.where(total == 0, -jnp.inf, top + jnp.log(jnp.where(total == 0, 1, total)))
    return (mixed / jnp.where(total == 0, 1, total)).astype(v.dtype), log_sum


def backward(
    spec: AttentionSpec,
    mask: AttentionMask,
    operands: tuple[Array, Array, Array, Array | None],
    outputs: tuple[Array, Array],
    cotangents: tuple[Array, Array],
) -> tuple[Array, Array, Array, Array | None]:
    """Cotangents of `operands = (q, k, v, bias)` from those of `outputs = (mixed, log_sum)` of `forward`."""
    q, k, v, bias = operands
    dtypes, groups = [a if a is None else a.dtype for a in operands], k.shape[2]
    call = _Call(spec, mask, bias, *_blocks(q.shape[1], k.shape[1]), repeats=q.shape[2] // groups)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    log_sum, inner = (_by_head(a[..., None], groups) for a in row_terms(outputs, cotangents, wide))
    q, d_mixed = _by_head(q, groups), _by_head(cotangents[0], groups)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)

    def fold(tile: _Tile, masked: bool, gradients: tuple[Array | None, ...]) -> tuple[Array | None, ...]:
        dq, dk, dv, d_bias = gradients
        rows, d_rows, row_sum, row_inner = (_take_rows(a, tile, call) for a in (q, d_mixed, log_sum, inner))
        keys, values = (_take(a, tile.key, call.keys, axis=2) for a in (k, v))
        logits, slope = _logits(call, tile, rows, keys, masked)
        weights = jnp.exp(logits - row_sum)
        d_logits = weights * (_matmul("bgqw,bgsw->bgqs", d_rows, values) - row_inner)
        if d_bias is not None:
            d_bias = d_bias + _sum_like_bias(d_logits, bias.shape, call).astype(d_bias.dtype)
        d_scores = (d_logits if slope is None else d_logits * slope).astype(q.dtype)
        dq = dq + _matmul("bgqs,bgsk->bgqk", d_scores, keys)
        dk = (dk + _matmul("bgqs,bgqk->bgsk", d_scores, rows)).astype(dk.dtype)
        dv = (dv + _matmul("bgqs,bgqw->bgsw", weights.astype(v.dtype), d_rows)).astype(dv.dtype)
        return dq, dk, dv, d_bias

    def step(tile: _Tile, masked: bool, gradients: tuple[Array | None, ...]) -> tuple[Array | None, ...]:
        dq, dk, dv, d_bias = gradients
        dk_block, dv_block = (_take(a, tile.key, call.keys, axis=2) for a in (dk, dv))
        before = (_take_rows(dq, tile, call), dk_block, dv_block, _take_bias(d_bias, tile, call))
        after = _if_live(tile, functools.partial(fold, tile, masked), before)
        dk, dv = (_put(a, block, tile.key, call.keys, axis=2) for a, block in zip((dk, dv), after[1:3]))
        return _put_rows(dq, after[0], tile, call), dk, dv, _put_bias(d_bias, after[3], tile, call)

    # Sums over blocks of queries are wide; with one block there is nothing to sum.
    sums = wide if call.queries.count > 1 else None
    start = (
        jnp.zeros_like(q, wide),
        *(jnp.zeros_like(a, sums) for a in (k, v)),
        None if bias is None else jnp.zeros_like(bias),
    )
    dq, dk, dv, d_bias = _walk(call, step, start)
    dq, dk, dv = _by_token(spec.scale * dq), spec.scale * dk.transpose(0, 2, 1, 3), dv.transpose(0, 2, 1, 3)
    return (*(a.astype(dtype) for a, dtype in zip((dq, dk, dv), dtypes)), d_bias)


def row_terms(outputs: tuple[Array, Array], cotangents: tuple[Array, Array], wide: jnp.dtype) -> tuple[Array, Array]:
    """Of each row, `[B, T, H]`: the log-sum-exp, finite, and what to subtract from the gradients of its weights.

    The softmax's Jacobian needs <weights, their gradient>, which is <output, its gradient>; and the log-sum-exp's gradient
    with respect to the logits is the weights.
    """
    (mixed, log_sum), (d_mixed, d_log_sum) = outputs, cotangents
    inner = jnp.sum(mixed.astype(wide) * d_mixed.astype(wide), axis=-1)
    seen = log_sum > -jnp.inf
    return jnp.where(seen, log_sum, 0), inner - jnp.where(seen, d_log_sum, 0)


class _Call(NamedTuple):
    """What all steps share; R is `repeats`."""

    spec: AttentionSpec
    mask: AttentionMask
    bias: Array | None
    queries: Blocks
    keys: Blocks
    repeats: int


class _Tile(NamedTuple):
    """One step's block of queries and block of keys, by number, and whether any pair in them attends (None: it may)."""

    query: int | Array
    key: int | Array
    live: Array | None


def _parts(spec: AttentionSpec, mask: AttentionMask, length: int, num_keys: int) -> list[tuple[slice, slice]]:
    """Of a short call, the blocks of queries, each with the keys that it may see; none where there is one block, or a loop
    skips more."""
    queries, keys = _blocks(length, num_keys)
    if not mask.known_positions or queries.count == 1 or not 0 < num_keys <= AT_ONCE or length > AT_ONCE:
        return []
    some, _ = static_blocks(spec, mask, queries, keys)
    if not some[:, 0].all():
        return []
    ends = [min(num_keys, keys.size * (1 + int(np.flatnonzero(live)[-1]))) for live in some]
    starts = range(0, length, queries.size)
    return [(slice(i, min(i + queries.size, length)), slice(0, end)) for i, end in zip(starts, ends)]


def _part(
    spec: AttentionSpec, mask: AttentionMask, q: Array, k: Array, v: Array, bias: Array | None, rows: slice, keys: slice
) -> tuple:
    """The arguments of `_mix` for a range of queries and one of keys that starts at the first."""
    if mask.segment_ids is not None:
        mask = mask._replace(segment_ids=(mask.segment_ids[0][:, rows], mask.segment_ids[1][:, keys]))
    bias = None if bias is None else bias[:, :, rows, keys]
    return spec._replace(q_offset=spec.q_offset + rows.start), mask, q[:, :, :, rows], k[:, :, keys], v[:, :, keys], bias


def _blocks(length: int, num_keys: int) -> tuple[Blocks, Blocks]:
    """Blocks of 128 on short sequences, of 256 on longer ones, so that scores stay in cache; larger where they are too many."""
    least = 128 if max(length, num_keys) <= 1024 else 256
    queries, keys = (Blocks(n, max(1, min(n, max(least, -(-n // MOST_BLOCKS))))) for n in (length, num_keys))
    at_once = queries.count == 1 and 0 < num_keys <= AT_ONCE
    return queries, Blocks(num_keys, num_keys) if at_once else keys


def _walk(call: _Call, step: Callable, carry: tuple) -> tuple:
    """`step(tile, masked, carry)` over all tiles in which a pair may attend."""
    some, every = static_blocks(call.spec, call.mask, call.queries, call.keys)
    whole = every.copy()
    for axis, blocks in enumerate((call.queries, call.keys)):
        if blocks.length % blocks.size:  # the last block repeats tokens of the one before, which a mask must drop
            np.moveaxis(whole, axis, 0)[-1] = False
    known = call.mask.known_positions and call.mask.segment_ids is None
    for masked, chosen in ((False, whole), (True, some & ~whole)):
        tiles = np.argwhere(chosen).astype(np.int32)
        if len(tiles) == 1:
            carry = step(_Tile(*map(int, tiles[0]), None), masked, carry)
        elif len(tiles):
            live = None if known else live_blocks(call.spec, call.mask, call.queries, call.keys).any(axis=0)[*tiles.T]
            body = lambda carry, tile, masked=masked: (step(tile, masked, carry), None)
            carry, _ = jax.lax.scan(body, carry, _Tile(*map(jnp.asarray, tiles.T), live))
    return carry


def _if_live(tile: _Tile, fold: Callable, blocks: tuple) -> tuple:
    return fold(blocks) if tile.live is None else jax.lax.cond(tile.live, fold, lambda blocks: blocks, blocks)


def _logits(
    call: _Call, tile: _Tile, rows: Array, keys: Array, masked: bool, hidden: float = -jnp.inf
) -> tuple[Array, Array | None]:
    """Logits `[B, G, R * t, s]` of a tile, `hidden` where masked, and their derivative by the scaled products (None for 1)."""
    logits, slope = call.spec.scale * _matmul("bgqk,bgsk->bgqs", rows, keys), None
    if call.spec.softcap is not None:
        squashed = jnp.tanh(logits / call.spec.softcap)
        logits, slope = call.spec.softcap * squashed, 1 - squashed**2
    queries, key_range = (_start(n, b) + jnp.arange(b.size) for n, b in zip(tile, (call.queries, call.keys)))
    if call.bias is not None:
        logits = logits + _bias_rows(_take_bias(call.bias, tile, call), logits.shape, call).astype(logits.dtype)
    if call.mask.alibi_slopes is not None:
        slopes = call.mask.alibi_slopes.astype(logits.dtype).reshape(-1, call.repeats)
        slopes = jnp.repeat(slopes, call.queries.size, axis=1)[:, :, None]
        distance = jnp.abs(distances(call.spec, call.mask, queries, key_range)).astype(logits.dtype)
        logits = logits - slopes * _tile_rows(distance, call)
    if masked:
        seen = visible(call.spec, call.mask, queries, key_range)
        seen = seen & (queries >= tile.query * call.queries.size)[:, None] & (key_range >= tile.key * call.keys.size)
        logits = jnp.where(_tile_rows(seen, call), logits, hidden)
    return logits, slope


def _start(number: int | Array, blocks: Blocks) -> int | Array:
    """First token of a block: the last block starts early where it would stand over the end."""
    smaller = min if isinstance(number, int) else jnp.minimum
    return smaller(number * blocks.size, blocks.length - blocks.size)


def _take(a: Array, number: int | Array, blocks: Blocks, axis: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(a, _start(number, blocks), blocks.size, axis)


def _put(a: Array, block: Array, number: int | Array, blocks: Blocks, axis: int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(a, block, _start(number, blocks), axis)


def _take_rows(a: Array, tile: _Tile, call: _Call) -> Array:
    """`[B, G, R, T, ...]` to a block's rows `[B, G, R * t, ...]`."""
    block = _take(a, tile.query, call.queries, axis=3)
    return block.reshape(*block.shape[:2], -1, block.shape[-1])


def _put_rows(a: Array, rows: Array, tile: _Tile, call: _Call) -> Array:
    block = rows.reshape(*rows.shape[:2], call.repeats, -1, rows.shape[-1])
    return _put(a, block, tile.query, call.queries, axis=3)


def _tile_rows(a: Array, call: _Call) -> Array:
    """`[b, t, s]`, the same for all heads, to rows `[b, 1, R * t, s]`."""
    return jnp.tile(a, (1, call.repeats, 1))[:, None]


def _take_bias(a: Array | None, tile: _Tile, call: _Call) -> Array | None:
    return a if a is None else _take(_take(a, tile.query, call.queries, axis=2), tile.key, call.keys, axis=3)


def _put_bias(a: Array | None, block: Array | None, tile: _Tile, call: _Call) -> Array | None:
    if a is None:
        return None
    starts = (0, 0, _start(tile.query, call.queries), _start(tile.key, call.keys))
    return jax.lax.dynamic_update_slice(a, block, [jnp.asarray(start, jnp.int32) for start in starts])


def _bias_rows(block: Array, shape: Sequence[int], call: _Call) -> Array:
    """A block of bias `[#B, #H, t, s]` to rows of the logits' `shape`, with an axis of length 1 for all G or all B."""
    batch, heads, length, keys = block.shape
    if heads == 1:
        return jnp.tile(block, (1, 1, call.repeats, 1))
    return block.reshape(batch, shape[1], call.repeats * length, keys)


def _sum_like_bias(rows: Array, shape: Sequence[int], call: _Call) -> Array:
    """Rows `[B, G, R * t, s]` summed to a block of a bias of that shape."""
    per_head = rows.reshape(rows.shape[0], -1, call.queries.size, call.keys.size)
    return jnp.sum(per_head, axis=[axis for axis in (0, 1) if shape[axis] == 1], keepdims=True)


def _by_head(a: Array, groups: int) -> Array:
    """`[B, T, H, ...]` to `[B, G, R, T, ...]`."""
    batch, length, heads, width = a.shape
    return a.reshape(batch, length, groups, heads // groups, width).transpose(0, 2, 3, 1, 4)


def _by_token(a: Array) -> Array:
    """`[B, G, R, T, ...]` to `[B, T, H, ...]`."""
    batch, groups, repeats, length, width = a.shape
    return a.transpose(0, 3, 1, 2, 4).reshape(batch, length, groups * repeats, width)


def _matmul(spec: str, a: Array, b: Array) -> Array:
    """An einsum that accumulates in at least float32."""
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))
