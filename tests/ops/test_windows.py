"""Windows along a sequence: each position is read from the first window that reaches it, whatever the segments."""

import jax.numpy as jnp
import numpy as np
import pytest

from seqjax.ops.windows import count_windows, over_packed_windows, over_windows

SHAPES = [(1, 1), (4, 1), (4, 2), (4, 4), (5, 3), (6, 4), (30, 7)]


def sums(x, ids):
    """Each token's segment up to it, summed."""
    length = x.shape[1]
    if ids is None:
        return jnp.cumsum(x, axis=1)
    starts = jnp.diff(ids, axis=1, prepend=ids[:, :1] - 1) != 0
    runs = jnp.cumsum(starts, axis=1)
    seen = (runs[:, :, None] == runs[:, None, :]) & jnp.tril(jnp.ones((length, length), bool))
    return jnp.einsum("bts,bsd->btd", seen.astype(x.dtype), x)


def loop(x, size, stride):
    """One segment `[L, D]`: for each position, try window after window until one reaches it."""
    out = []
    for position in range(len(x)):
        start = 0
        while start + size <= position:
            start += stride
        out.append(x[start : position + 1].sum(axis=0))
    return np.array(out)


@pytest.mark.parametrize(("size", "stride"), SHAPES)
@pytest.mark.parametrize("length", [1, 4, 5, 19])
def test_one_segment(size, stride, length):
    x = np.random.default_rng(0).standard_normal((2, length, 3)).astype(np.float32)
    y = over_windows(sums, jnp.asarray(x), size, stride)
    np.testing.assert_allclose(y, [loop(row, size, stride) for row in x], atol=1e-5)


@pytest.mark.parametrize(("size", "stride"), SHAPES)
def test_packed_segments(size, stride):
    rows = ([19], [7, 1, 11], [1] * 5 + [9, 5])
    x = np.random.default_rng(0).standard_normal((3, 19, 2)).astype(np.float32)
    positions = np.array([np.concatenate([np.arange(n) for n in lengths]) for lengths in rows])
    y = over_packed_windows(sums, jnp.asarray(x), jnp.asarray(positions), size, stride)
    for row, lengths, got in zip(x, rows, y):
        wanted = [loop(piece, size, stride) for piece in np.split(row, np.cumsum(lengths)[:-1])]
        np.testing.assert_allclose(got, np.concatenate(wanted), atol=1e-5)


@pytest.mark.parametrize(("size", "stride"), SHAPES)
def test_a_row_that_begins_in_mid_segment(size, stride):
    """Behind the first `size - 1` tokens, all windows begin within the row."""
    x = np.random.default_rng(0).standard_normal((1, 60, 2)).astype(np.float32)
    whole = loop(x[0], size, stride)
    for first in (1, 8, 17):
        positions = jnp.arange(first, 60)[None]
        y = over_packed_windows(sums, jnp.asarray(x[:, first:]), positions, size, stride)
        np.testing.assert_allclose(y[0, size - 1 :], whole[first + size - 1 :], atol=1e-5)


def test_how_many_windows():
    assert [count_windows(n, 4, 2) for n in (1, 4, 5, 6, 7)] == [1, 1, 2, 2, 3]
