"""Attention against NumPy in float64, under every combination of masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqjax.ops import attended_pairs, flash_attention
from seqjax.ops import attention as attention_module

IMPLEMENTATIONS = ("xla", "reference")
ARRAYS = ("segment_ids", "kv_positions", "alibi_slopes")


def by_hand(q, k, v, *, causal, window=None, segment_ids=None, q_offset=0, kv_positions=None, alibi_slopes=None, scale=None):
    """One query, head and row at a time, in float64."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    batch, length, heads, width = q.shape
    repeats = heads // k.shape[2]
    k_at = np.arange(k.shape[1]) if kv_positions is None else np.asarray(kv_positions)
    out = np.zeros((batch, length, heads, v.shape[-1]))
    for b, t, h in np.ndindex(batch, length, heads):
        distance = t + q_offset - k_at
        seen = np.ones(len(k_at), bool)
        if causal:
            seen &= distance >= 0
        if window is not None:
            seen &= np.abs(distance) < window
        if segment_ids is not None:
            seen &= (segment_ids[0][b, t] == segment_ids[1][b]) & (segment_ids[1][b] >= 0)
        if not seen.any():
            continue
        scores = k[b, :, h // repeats] @ q[b, t, h] * (width**-0.5 if scale is None else scale)
        if alibi_slopes is not None:
            scores = scores - alibi_slopes[h] * np.abs(distance)
        weights = np.exp(scores[seen] - scores[seen].max())
        out[b, t, h] = weights @ v[b, seen, h // repeats] / weights.sum()
    return out


def draw(rng, length, keys, heads=4, groups=2, width=6, value_width=6):
    shapes = [(2, length, heads, width), (2, keys, groups, width), (2, keys, groups, value_width)]
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


@st.composite
def calls(draw_from):
    length = draw_from(st.integers(1, 9))
    offset = draw_from(st.integers(0, 5))
    keys = length + offset if draw_from(st.booleans()) else draw_from(st.integers(1, 12))
    options = {
        "causal": draw_from(st.booleans()),
        "window": draw_from(st.none() | st.integers(1, 6)),
        "q_offset": offset,
        "scale": draw_from(st.none() | st.just(0.3)),
    }
    seed = draw_from(st.integers(0, 99))
    rng = np.random.default_rng(seed)
    if draw_from(st.booleans()):
        ids = np.sort(rng.integers(-1, 3, (2, length + keys)), axis=1).astype(np.int32)
        options["segment_ids"] = (ids[:, rng.integers(0, keys + 1) :][:, :length], ids[:, :keys])
    if draw_from(st.booleans()):
        options["alibi_slopes"] = rng.random(4).astype(np.float32)
    if draw_from(st.booleans()):
        options["kv_positions"] = rng.permutation(keys).astype(np.int32)
    return draw(rng, length, keys, value_width=draw_from(st.sampled_from([6, 3]))), options


@settings(max_examples=30, deadline=None)
@given(call=calls(), implementation=st.sampled_from(IMPLEMENTATIONS), block=st.sampled_from([2, 3, 128]))
def test_equals_a_loop_over_queries(call, implementation, block):
    (q, k, v), options = call
    size, attention_module._block_size = attention_module._block_size, lambda length: block
    try:
        with jax.disable_jit():
            arrays = {name: jax.tree.map(jnp.asarray, value) for name, value in options.items() if name in ARRAYS}
            out = flash_attention(*map(jnp.asarray, (q, k, v)), **(options | arrays), implementation=implementation)
    finally:
        attention_module._block_size = size
    np.testing.assert_allclose(out, by_hand(q, k, v, **options), atol=2e-6)


@pytest.mark.parametrize("block", [3, 128])
@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"causal": True, "window": 4},
        {"causal": False, "window": 3},
        {"causal": True, "ids": True, "slopes": True},
        {"causal": True, "q_offset": 5, "keys": 15},
        {"causal": False, "ids": True},
    ],
)
def test_gradients_equal_autodiff_of_the_reference(options, block, monkeypatch):
    monkeypatch.setattr(attention_module, "_block_size", lambda length: block)
    rng = np.random.default_rng(0)
    options = dict(options)
    with jax.enable_x64(True):
        q, k, v = (jnp.asarray(a, jnp.float64) for a in draw(rng, 10, options.pop("keys", 10), value_width=5))
        if options.pop("ids", False):
            ids = jnp.asarray([[1] * 4 + [2] * 6, [-1] * 3 + [5] * 7], jnp.int32)
            options["segment_ids"] = (ids, ids)
        if options.pop("slopes", False):
            options["alibi_slopes"] = jnp.asarray([0.5, 0.2, 0.1, 0.3])
        cotangent = jnp.asarray(rng.standard_normal((2, 10, 4, 5)))

        def gradients(implementation):
            value = lambda q, k, v: jnp.sum(flash_attention(q, k, v, implementation=implementation, **options) * cotangent)
            return jax.jit(jax.grad(value, argnums=(0, 1, 2)))(q, k, v)

        for got, wanted in zip(gradients("xla"), gradients("reference")):
            np.testing.assert_allclose(got, wanted, atol=1e-12)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_query_without_keys_gives_zeros_and_no_gradient(implementation):
    q, k, v = (jnp.asarray(a) for a in draw(np.random.default_rng(0), 3, 3))
    ids = (jnp.zeros((2, 3), jnp.int32), jnp.full((2, 3), -1, jnp.int32))
    attend = lambda q: flash_attention(q, k, v, segment_ids=ids, implementation=implementation)
    assert not np.any(attend(q))
    assert not np.any(jax.grad(lambda q: jnp.sum(attend(q)))(q))


def test_bfloat16_keeps_its_dtype_and_stays_close():
    q, k, v = draw(np.random.default_rng(0), 20, 20)
    out = flash_attention(*(jnp.asarray(a, jnp.bfloat16) for a in (q, k, v)))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), by_hand(q, k, v, causal=True), atol=3e-2)


def test_a_traced_offset_equals_a_static_one():
    q, k, v = (jnp.asarray(a) for a in draw(np.random.default_rng(1), 4, 9))
    traced = jax.jit(lambda offset: flash_attention(q, k, v, q_offset=offset))(jnp.int32(3))
    np.testing.assert_allclose(traced, flash_attention(q, k, v, q_offset=3), atol=1e-6)


def test_nothing_quadratic_is_kept_for_the_backward_pass():
    shape = jax.ShapeDtypeStruct((1, 2048, 1, 8), jnp.float32)
    kept = jax.eval_shape(lambda q, k, v: jax.vjp(flash_attention, q, k, v)[1], shape, shape, shape)
    assert max(leaf.size for leaf in jax.tree.leaves(kept)) <= 2048 * 8


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 3, 50])
def test_attended_pairs_counts_the_mask(causal, window):
    distance = np.arange(11)[:, None] - np.arange(11)
    seen = (distance >= 0) if causal else np.ones_like(distance, bool)
    if window is not None:
        seen &= np.abs(distance) < window
    assert attended_pairs(11, causal=causal, window=window) == seen.sum()


def test_bad_calls_are_refused():
    q, k, v = (jnp.asarray(a) for a in draw(np.random.default_rng(0), 3, 3, heads=3, groups=2))
    with pytest.raises(ValueError, match="3 query heads are not a multiple of 2 key heads"):
        flash_attention(q, k, v)
    q, k, v = (jnp.asarray(a) for a in draw(np.random.default_rng(0), 3, 3))
    with pytest.raises(ValueError, match="window=0 is not positive"):
        flash_attention(q, k, v, window=0)
    with pytest.raises(ValueError, match=r"implementation='cuda'.*reference, xla"):
        flash_attention(q, k, v, implementation="cuda")
