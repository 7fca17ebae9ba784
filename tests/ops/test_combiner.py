"""Combiner's factorisations against their definition, by loops in NumPy float64."""

import pathlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqjax.ops.combiner import CombinerCache, combiner_attention

LENGTH, HEADS, WIDTH = 11, 2, 3
DATA = pathlib.Path(__file__).parent / "data"


def softmax(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def pooled(q, k, span):
    """Key of a span, and the weights within it."""
    return k[span].max(0), softmax(k[span] @ q[span].max(0))


def fixed(q, k, i, size):
    own = i // size * size
    spans = [np.arange(start, start + size) for start in range(0, own, size)]
    return np.arange(own, i + 1), [(span, *pooled(q, k, span)) for span in spans]


def logsparse(q, k, i, size):
    spans, end = [], i
    for level in range(i.bit_length()):  # from the token backwards, a block for each binary digit that is 1
        if i >> level & 1:
            spans.append(np.arange(end - 2**level, end))
            end -= 2**level
    assert end == 0
    return np.arange(i, i + 1), [(span, *pooled(q, k, span)) for span in spans]


def axial(q, k, i, size):
    own, column = i // size * size, i % size
    spans = []
    for start in range(0, own, size):
        row, local = np.arange(start, start + size), start + column
        spans.append((row, k[local], softmax(k[row] @ q[local])))
    return np.arange(own, i + 1), spans


DEFINITIONS = {"fixed": fixed, "logsparse": logsparse, "axial": axial}


def effective_attention(q, k, factorization, size):
    """The weight of every token for every query `[query, key]` of one head; no scale."""
    weights = np.zeros((len(q), len(q)))
    for i in range(len(q)):
        direct, spans = DEFINITIONS[factorization](q, k, i, size)
        logits = np.array([*(k[direct] @ q[i]), *(key @ q[i] for _, key, _ in spans)])
        outer = softmax(logits)
        weights[i, direct] = outer[: len(direct)]
        for weight, (span, _, inner) in zip(outer[len(direct) :], spans):
            weights[i, span] += weight * inner
    return weights


def drawn(length=LENGTH, width=WIDTH, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((2, length, HEADS, width)) for _ in range(3)]


def attend(q, k, v, factorization, size, positions=None, **options):
    if positions is None:
        positions = np.arange(q.shape[1])[None]
    with jax.enable_x64(True):
        call = jax.jit(partial(combiner_attention, factorization=factorization, span_length=size, **options))
        return np.asarray(call(q, k, v, positions.astype(np.int32))[0])


def learned(q, k, factorization, size):
    """Effective attention `[B, H, query, key]` as the op has it: that of values which name their token."""
    batch, length = q.shape[:2]
    names = np.broadcast_to(np.eye(length)[:, None], (batch, length, HEADS, length))
    padded = [np.pad(a, [(0, 0)] * 3 + [(0, length - a.shape[-1])]) for a in (q, k)]
    return attend(*padded, names, factorization, size, scale=1.0).transpose(0, 2, 1, 3)


@pytest.mark.parametrize(("factorization", "size"), [("fixed", 4), ("logsparse", 1), ("axial", 4)])
def test_is_its_definition_also_within_segments(factorization, size):
    q, k, v = drawn()
    starts = [[0, 5, 6], [0, 2]]
    positions = np.stack([np.arange(LENGTH) - np.repeat(s, np.diff([*s, LENGTH])) for s in starts])
    got = attend(q, k, v, factorization, size, positions, scale=1.0)
    for row, begins in enumerate(starts):
        for a, b in zip(begins, [*begins[1:], LENGTH]):
            for head in range(HEADS):
                weights = effective_attention(q[row, a:b, head], k[row, a:b, head], factorization, size)
                np.testing.assert_allclose(got[row, a:b, head], weights @ v[row, a:b, head], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("factorization", "size"), [("fixed", 4), ("logsparse", 1)])
def test_golden_attention(factorization, size):
    golden = np.load(DATA / "combiner.npz")
    name = factorization + ("_s4" if factorization == "fixed" else "")
    q, k, v = (golden[key] for key in ("q_scaled", "k", "v"))
    np.testing.assert_allclose(attend(q, k, v, factorization, size, scale=1.0), golden[f"out_{name}"], rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(learned(q, k, factorization, size), golden[f"Q_{name}"], rtol=1e-12, atol=1e-14)
    scaled = attend(q * np.sqrt(3), k, v, factorization, size)
    np.testing.assert_allclose(scaled, golden[f"out_{name}"], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("factorization", "size"), [("fixed", 4), ("logsparse", 1), ("axial", 4)])
def test_every_earlier_token_has_weight_and_no_later_one(factorization, size):
    q, k, _ = drawn()
    weights = learned(q, k, factorization, size)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-12)
    assert np.array_equal(weights > 0, np.broadcast_to(np.tril(np.ones((LENGTH, LENGTH), bool)), weights.shape))


@pytest.mark.parametrize(("factorization", "size"), [("fixed", 1), ("fixed", 16), ("axial", 1), ("axial", 16)])
def test_one_token_spans_and_one_span_are_full_attention(factorization, size):
    golden = np.load(DATA / "combiner.npz")
    q, k, v = (golden[key] for key in ("q_scaled", "k", "v"))
    wanted = np.einsum("bhts,bshk->bthk", golden["full"], v)
    np.testing.assert_allclose(attend(q, k, v, factorization, size, scale=1.0), wanted, rtol=1e-12, atol=1e-14)


def test_a_span_of_equal_keys_weighs_as_one():
    q, k, _ = drawn(10)
    k = np.broadcast_to(k[:, :1], k.shape)
    weights = learned(q, k, "fixed", 4)[:, :, 9]  # two spans of 4, two direct tokens
    np.testing.assert_allclose(weights, np.broadcast_to([1 / 16] * 8 + [1 / 4] * 2, weights.shape), rtol=1e-12)


def test_blocks_off_the_diagonal_have_rank_one():
    q, k, _ = drawn(12)
    weights = learned(q, k, "fixed", 4)[0, 0]
    assert np.linalg.matrix_rank(weights[8:12, :4], tol=1e-12) == 1
    assert np.linalg.matrix_rank(weights[8:12, 8:12], tol=1e-12) == 4


def test_an_overrun_cache_gives_nan():
    q, k, v = (jnp.asarray(a, jnp.float32) for a in drawn(4))
    form = {"factorization": "fixed", "span_length": 2}
    cache = CombinerCache.fresh(2, 6, HEADS, WIDTH, jnp.float32, **form)
    positions = np.arange(4, dtype=np.int32)[None]
    call = jax.jit(partial(combiner_attention, **form))
    good, cache = call(q, k, v, positions, cache)
    assert np.all(np.isfinite(good))
    assert np.all(np.isnan(call(q, k, v, positions + 4, cache)[0]))
