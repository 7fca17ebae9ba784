"""Windows of fixed size that step along a sequence, and a function of sequences applied within each.

The first window covers positions `0 .. size-1`; the next ones start `stride` later each. The output at a position is that of
the first window that reaches it, so the window's start is a function of the position alone: `stride * k`, with the least k
of 0 and above for which `stride * k + size > position`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

Mix = Callable[[Array, Array | None], Array]
"""From `[B, L, D]` and segment ids `[B, L]`, or None for one segment a row, to `[B, L, D]`; causal."""


def window_begins(positions: Int[Array, "*B"], size: int, stride: int) -> Bool[Array, "*B"]:
    """Whether a position is the first that is read from its window. Those of the first window start at position 0."""
    return (positions == 0) | _later_begins(positions, size, stride)


def count_windows(length: int, size: int, stride: int) -> int:
    """How many windows a sequence of `length` positions needs."""
    return 1 + max(0, -(-(length - size) // stride))


def over_windows(mix: Mix, x: Float[Array, "B L D"], size: int, stride: int) -> Float[Array, "B L D"]:
    """`mix` applied to each window, for rows that start at position 0 and are one segment each.

    A sequence no longer than a window is one window, of its own length.
    """
    batch, length, width = x.shape
    count = count_windows(length, size, stride)
    if count == 1:
        return mix(x, None)
    starts = stride * np.arange(count)
    x = jnp.pad(x, [(0, 0), (0, starts[-1] + size - length), (0, 0)])
    windows = x[:, starts[:, None] + np.arange(size)]
    y = mix(windows.reshape(batch * count, size, width), None).reshape(windows.shape)
    later = y[:, 1:, size - stride :].reshape(batch, -1, width)
    return jnp.concatenate([y[:, 0], later], axis=1)[:, :length]


def over_packed_windows(
    mix: Mix, x: Float[Array, "B L D"], positions: Int[Array, "B L"], size: int, stride: int
) -> Float[Array, "B L D"]:
    """`mix` applied to each window, for rows of several segments that each have their own windows.

    Args:
      mix: must keep segments apart.
      positions: of each token within its segment; consecutive, 0 where a segment starts. A row may begin in mid-segment:
        outputs are then wrong for tokens whose window begins before the row.
    """
    batch, _, width = x.shape
    layout = lay_windows(positions, size, stride)
    total = layout.sources.shape[1]
    latents = jnp.take_along_axis(x, layout.sources[..., None], axis=1)
    # No window is longer than `size`: pieces of that length need the piece before them and no more.
    pieces = -(-total // size)
    after = [(0, 0), (0, pieces * size - total)]
    latents = jnp.pad(latents, [*after, (0, 0)]).reshape(batch, pieces, size, width)
    ids = jnp.pad(layout.windows, after).reshape(batch, pieces, size)
    both = lambda a: jnp.concatenate([jnp.roll(a, 1, axis=1), a], axis=2).reshape(batch * pieces, 2 * size, *a.shape[3:])
    y = mix(both(latents), both(ids))[:, size:].reshape(batch, pieces * size, width)
    return jnp.take_along_axis(y, layout.slots[..., None], axis=1)


class Layout(NamedTuple):
    """The windows of each row one after another: those of a segment that are not its first repeat `size - stride` tokens.

    Attributes:
      sources: which token is in each of the T slots; windows: which window the slot belongs to, counted along the row.
      slots: where each token's output is read.
    """

    sources: Int[Array, "B T"]
    windows: Int[Array, "B T"]
    slots: Int[Array, "B L"]


def lay_windows(positions: Int[Array, "B L"], size: int, stride: int) -> Layout:
    """The slots of all windows that begin within the rows; slots that are left over repeat the last token."""
    length, repeated = positions.shape[1], size - stride
    begins = _later_begins(positions, size, stride)
    windows = jnp.cumsum(begins | (positions == 0), axis=1, dtype=jnp.int32)
    slots = jnp.arange(length) + repeated * jnp.cumsum(begins, axis=1, dtype=jnp.int32)
    places = jnp.arange(length + repeated * -(-length // stride))  # beginnings are at least a stride apart
    following = jax.vmap(lambda row: jnp.searchsorted(row, places))(slots)
    following = jnp.minimum(following, length - 1)
    take = lambda a: jnp.take_along_axis(a, following, axis=1)
    sources = jnp.clip(following - (take(slots) - places), 0, length - 1)
    return Layout(sources, take(windows), slots)


def _later_begins(positions: Int[Array, "*B"], size: int, stride: int) -> Bool[Array, "*B"]:
    return (positions >= size) & ((positions - size) % stride == 0)
