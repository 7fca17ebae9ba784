"""Attention against NumPy in float64, under every combination of masks."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqjax.ops import (
    attended_pairs,
    blockwise_attention,
    decode_attention,
    flash_attention,
    merge_attention,
)
from seqjax.ops.attention_mask import AttentionMask, AttentionSpec, Blocks, live_blocks, static_blocks, visible, whole_blocks

IMPLEMENTATIONS = ("xla", "reference")


def seen_by_hand(b, t, length, keys, *, causal, window=None, segment_ids=None, q_offset=0, kv_positions=None, **_):
    """Distance of query t of row b from each key, and which keys it sees."""
    k_at = np.arange(keys) if kv_positions is None else np.asarray(kv_positions)
    distance = t + np.broadcast_to(q_offset, (2,))[b] - k_at
    seen = np.ones(keys, bool)
    if causal:
        seen &= distance >= 0
    if window is not None:
        seen &= np.abs(distance) < window
    if segment_ids is not None:
        seen &= (segment_ids[0][b, t] == segment_ids[1][b]) & (segment_ids[1][b] >= 0)
    return distance, seen


def by_hand(q, k, v, d_out=None, d_lse=None, **options):
    """One query, head and row at a time, in float64: output and log-sum-exp, and the gradients of q, k, v, bias and sinks
    from those of both, by the derivative of the softmax."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    batch, length, heads, width = q.shape
    keys, repeats = k.shape[1], heads // k.shape[2]
    scale, cap = options.get("scale") or width**-0.5, options.get("softcap")
    bias, sinks, slopes = (options.get(name) for name in ("bias", "sinks", "alibi_slopes"))
    shape = (batch, heads, length, keys)
    full_bias = np.zeros(shape) if bias is None else np.broadcast_to(np.asarray(bias, np.float64), shape)
    out, lse = np.zeros((batch, length, heads, v.shape[-1])), np.full((batch, length, heads), -np.inf)
    dq, dk, dv, d_bias, d_sinks = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v), np.zeros(shape), np.zeros(heads)
    for b, t, h in np.ndindex(batch, length, heads):
        distance, seen = seen_by_hand(b, t, length, keys, **options)
        key, value = k[b, seen, h // repeats], v[b, seen, h // repeats]
        product = key @ q[b, t, h] * scale
        logits = (product if cap is None else cap * np.tanh(product / cap)) + full_bias[b, h, t, seen]
        if slopes is not None:
            logits = logits - slopes[h] * np.abs(distance[seen])
        if sinks is not None:
            logits = np.append(logits, sinks[h])
        if not len(logits) or logits.max() == -np.inf:
            continue
        lse[b, t, h] = logits.max() + np.log(np.exp(logits - logits.max()).sum())
        weights = np.exp(logits - lse[b, t, h])
        padded = value if sinks is None else np.vstack([value, np.zeros(v.shape[-1])])
        out[b, t, h] = weights @ padded
        if d_out is None:
            continue
        d_weights = padded @ d_out[b, t, h]
        d_logits = weights * (d_weights - weights @ d_weights + d_lse[b, t, h])
        if sinks is not None:
            d_sinks[h] += d_logits[-1]
        d_logits, weights = d_logits[: len(key)], weights[: len(key)]
        d_bias[b, h, t, seen] = d_logits
        d_product = scale * (d_logits if cap is None else d_logits * (1 - np.tanh(product / cap) ** 2))
        dq[b, t, h] = d_product @ key
        dk[b, seen, h // repeats] += np.outer(d_product, q[b, t, h])
        dv[b, seen, h // repeats] += np.outer(weights, d_out[b, t, h])
    gradients = {"q": dq, "k": dk, "v": dv}
    if bias is not None:
        over = tuple(axis for axis in (0, 1) if bias.shape[axis] == 1)
        gradients["bias"] = d_bias.sum(axis=over, keepdims=True)
    if sinks is not None:
        gradients["sinks"] = d_sinks
    return out, lse, gradients


def draw(rng, length, keys, heads=4, groups=2, width=6, value_width=6):
    shapes = [(2, length, heads, width), (2, keys, groups, width), (2, keys, groups, value_width)]
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


@st.composite
def calls(draw_from):
    # Few shapes, since each one compiles every operation anew; all else is free.
    length, keys = draw_from(st.sampled_from([(1, 8), (5, 8), (8, 5)]))
    offset = draw_from(st.integers(0, 5))
    options = {
        "causal": draw_from(st.booleans()),
        "window": draw_from(st.none() | st.integers(1, 6)),
        "q_offset": draw_from(st.sampled_from([offset, np.int32(offset), np.asarray([offset, 2], np.int32)])),
        "scale": draw_from(st.none() | st.just(0.3)),
        "softcap": draw_from(st.none() | st.just(0.8)),
    }
    seed = draw_from(st.integers(0, 99))
    rng = np.random.default_rng(seed)
    if draw_from(st.booleans()):
        ids = np.sort(rng.integers(-1, 3, (2, length + keys)), axis=1).astype(np.int32)
        if draw_from(st.booleans()):
            ids = rng.permuted(ids, axis=1)
        options["segment_ids"] = (ids[:, rng.integers(0, keys + 1) :][:, :length], ids[:, :keys])
    if draw_from(st.booleans()):
        options["alibi_slopes"] = rng.random(4).astype(np.float32)
    if draw_from(st.booleans()):
        options["kv_positions"] = rng.permutation(keys).astype(np.int32)
    if draw_from(st.booleans()):
        shape = (draw_from(st.sampled_from([1, 2])), draw_from(st.sampled_from([1, 4])), length, keys)
        options["bias"] = rng.standard_normal(shape).astype(np.float32)
        if draw_from(st.booleans()):
            options["bias"][rng.random(shape) < 0.3] = -np.inf
    if draw_from(st.booleans()):
        options["sinks"] = rng.standard_normal(4).astype(np.float32)
    return draw(rng, length, keys, value_width=3), options


@contextlib.contextmanager
def blocks_of(queries, keys):
    """Blocks of these sizes, so that short sequences have many."""
    chosen, sized = blockwise_attention._blocks, lambda length, size: Blocks(length, max(1, min(length, size)))
    blockwise_attention._blocks = lambda length, num_keys: (sized(length, queries), sized(num_keys, keys))
    try:
        yield
    finally:
        blockwise_attention._blocks = chosen


def as_arrays(options):
    """The options with JAX arrays for NumPy's; a Python number stays static."""
    return jax.tree.map(lambda a: jnp.asarray(a) if isinstance(a, np.ndarray | np.generic) else a, options)


def check_call(call, implementation):
    """Output, log-sum-exp and all gradients, as `by_hand`."""
    (q, k, v), options = call
    rng = np.random.default_rng(7)
    operands = {"q": q, "k": k, "v": v} | {name: options[name] for name in ("bias", "sinks") if name in options}
    rest = as_arrays({name: value for name, value in options.items() if name not in operands})
    attend = lambda operands: flash_attention(**operands, **rest, return_lse=True, implementation=implementation)
    (out, lse), pull = jax.vjp(attend, as_arrays(operands))
    d_out, d_lse = (rng.standard_normal(a.shape).astype(np.float32) for a in (out, lse))
    (gradients,) = pull((jnp.asarray(d_out), jnp.asarray(d_lse)))
    wanted_out, wanted_lse, wanted = by_hand(q, k, v, d_out, d_lse, **options)
    np.testing.assert_allclose(out, wanted_out, atol=3e-6)
    np.testing.assert_allclose(lse, wanted_lse, atol=3e-6)
    for name, value in wanted.items():
        np.testing.assert_allclose(gradients[name], value, atol=2e-5, err_msg=name)


BLOCK_SIZES = [(2, 3), (128, 3), (2, 128), (128, 128)]


@settings(max_examples=25, deadline=None)
@given(call=calls(), sizes=st.sampled_from(BLOCK_SIZES))
def test_blocks_equal_a_loop_over_queries(call, sizes):
    with blocks_of(*sizes), jax.disable_jit():
        check_call(call, "xla")


@settings(max_examples=15, deadline=None)
@given(call=calls())
def test_the_reference_equals_a_loop_over_queries(call):
    with jax.disable_jit():
        check_call(call, "reference")


@pytest.mark.exhaustive
@settings(max_examples=400, deadline=None)
@given(call=calls(), sizes=st.sampled_from(BLOCK_SIZES))
def test_many_more_calls(call, sizes):
    with blocks_of(*sizes), jax.disable_jit():
        check_call(call, "xla")


IDS = np.asarray([[1] * 4 + [2] * 6, [-1] * 3 + [5] * 7], np.int32)


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"causal": True, "window": 4, "softcap": 0.8},
        {"causal": False, "window": 3},
        {"causal": True, "segment_ids": (IDS, IDS), "alibi_slopes": np.asarray([0.5, 0.2, 0.1, 0.3])},
        {"causal": True, "q_offset": 5, "keys": 15, "bias": (2, 1)},
        {"causal": True, "q_offset": np.asarray([5, 2], np.int32), "keys": 15, "bias": (1, 4)},
        {"causal": False, "segment_ids": (IDS, IDS), "sinks": np.asarray([0.1, -1.0, 2.0, 0.4])},
    ],
)
def test_gradients_in_float64_equal_the_derivative_by_hand(options):
    """Compiled, so that the loops run as they do elsewhere."""
    rng = np.random.default_rng(0)
    options = dict(options)
    with jax.enable_x64(True), blocks_of(3, 4):
        q, k, v = (a.astype(np.float64) for a in draw(rng, 10, options.pop("keys", 10), value_width=5))
        if "bias" in options:
            options["bias"] = rng.standard_normal((*options["bias"], 10, k.shape[1]))
        operands = {"q": q, "k": k, "v": v} | {name: options[name] for name in ("bias", "sinks") if name in options}
        rest = as_arrays({name: value for name, value in options.items() if name not in operands})
        d_out, d_lse = rng.standard_normal((2, 10, 4, 5)), rng.standard_normal((2, 10, 4))

        @jax.jit
        def outputs_and_gradients(operands):
            attend = lambda operands: flash_attention(**operands, **rest, return_lse=True, implementation="xla")
            outputs, pull = jax.vjp(attend, operands)
            return outputs, pull((jnp.asarray(d_out), jnp.asarray(d_lse)))[0]

        (out, lse), gradients = outputs_and_gradients(as_arrays(operands))
        wanted_out, wanted_lse, wanted = by_hand(q, k, v, d_out, d_lse, **{"causal": True, **options})
        np.testing.assert_allclose(out, wanted_out, atol=1e-12)
        np.testing.assert_allclose(lse, wanted_lse, atol=1e-12)
        for name, value in wanted.items():
            np.testing.assert_allclose(gradients[name], value, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_query_without_keys_gives_zeros_and_no_gradient(implementation):
    q, k, v = (jnp.asarray(a) for a in draw(np.random.default_rng(0), 3, 3))
    ids = (jnp.zeros((2, 3), jnp.int32), jnp.full((2, 3), -1, jnp.int32))
    attend = functools.partial(flash_attention, segment_ids=ids, implementation=implementation)
    out, lse = attend(q, k, v, return_lse=True)
    assert not np.any(out)
    assert np.all(lse == -np.inf)
    with_lse = lambda q: sum(jnp.sum(jnp.where(jnp.isfinite(a), a, 0)) for a in attend(q, k, v, return_lse=True))
    assert not np.any(jax.grad(with_lse)(q))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_keys_at_all(implementation):
    q, k, v = (jnp.asarray(a) for a in draw(np.random.default_rng(0), 3, 0))
    out, lse = flash_attention(q, k, v, return_lse=True, implementation=implementation)
    assert out.shape == (2, 3, 4, 6) and not np.any(out)
    assert np.all(lse == -np.inf)


def test_bfloat16_keeps_its_dtype_and_stays_close():
    q, k, v = draw(np.random.default_rng(0), 20, 20)
    out, lse = flash_attention(*(jnp.asarray(a, jnp.bfloat16) for a in (q, k, v)), return_lse=True)
    assert (out.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)
    wanted_out, wanted_lse, _ = by_hand(q, k, v, causal=True)
    np.testing.assert_allclose(out.astype(jnp.float32), wanted_out, atol=3e-2)
    np.testing.assert_allclose(lse, wanted_lse, atol=3e-2)


def test_the_last_queries_of_a_longer_input():
    """Latents that are the last T of S tokens (Perceiver AR): rows of the whole attention."""
    q, k, v = (jnp.asarray(a) for a in draw(np.random.default_rng(1), 9, 9))
    latents = flash_attention(q[:, 5:], k, v, q_offset=5)
    np.testing.assert_allclose(latents, flash_attention(q, k, v)[:, 5:], atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"window": 3}, {"softcap": 0.7}])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_decoding_sees_each_row_s_own_length(options, implementation):
    q, k, v = draw(np.random.default_rng(1), 2, 11)
    lengths = np.asarray([4, 11])
    decode = jax.jit(functools.partial(decode_attention, return_lse=True, implementation=implementation, **options))
    with blocks_of(128, 4):
        out, lse = decode(*map(jnp.asarray, (q, k, v, lengths)))
    for row, length in enumerate(lengths):
        alone = [a[row : row + 1] for a in (q, k[:, :length], v[:, :length])]
        wanted_out, wanted_lse, _ = by_hand(*alone, causal=True, q_offset=length - 2, **options)
        np.testing.assert_allclose(out[row], wanted_out[0], atol=2e-6)
        np.testing.assert_allclose(lse[row], wanted_lse[0], atol=2e-6)


def test_an_empty_cache_gives_zeros_and_rubbish_in_free_slots_does_not_matter():
    q, k, v = (jnp.asarray(a) for a in draw(np.random.default_rng(1), 1, 6))
    lengths = jnp.asarray([0, 3])
    out = decode_attention(q, k, v, lengths)
    assert not np.any(out[0])
    changed = decode_attention(q, k.at[1, 3:].set(1e9), v.at[1, 3:].set(1e9), lengths)
    np.testing.assert_array_equal(changed, out)


@pytest.mark.parametrize("parts", [2, 3])
def test_parts_merge_to_the_whole_and_so_do_their_gradients(parts):
    """Of a row without keys in some part, or in all, too."""
    rng = np.random.default_rng(0)
    q, k, v = draw(rng, 7, 12)
    ids = np.zeros((2, 12), np.int32)
    ids[0, 6:] = 1
    queries = np.zeros((2, 7), np.int32)
    queries[0, 3:5], queries[0, 5:] = 1, 2  # no key has id 2
    d_out, d_lse = (rng.standard_normal(shape).astype(np.float32) for shape in [(2, 7, 4, 6), (2, 7, 4)])
    cuts = np.array_split(np.arange(12), parts)

    def whole(q, k, v):
        part = lambda at: flash_attention(
            q, k[:, at], v[:, at], causal=False, segment_ids=(jnp.asarray(queries), jnp.asarray(ids[:, at])), return_lse=True
        )
        return merge_attention(*zip(*map(part, cuts)))

    (out, lse), pull = jax.vjp(whole, *map(jnp.asarray, (q, k, v)))
    gradients = pull((jnp.asarray(d_out), jnp.asarray(d_lse)))
    wanted_out, wanted_lse, wanted = by_hand(q, k, v, d_out, d_lse, causal=False, segment_ids=(queries, ids))
    np.testing.assert_allclose(out, wanted_out, atol=2e-6)
    np.testing.assert_allclose(lse, wanted_lse, atol=2e-6)
    for got, value in zip(gradients, wanted.values()):
        np.testing.assert_allclose(got, value, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_temporaries_stay_linear_in_length(packed):
    """Compiled, not run: causal attention of 32,768 tokens and 8 heads, below 5 % of its scores."""
    shape = jax.ShapeDtypeStruct((1, 32768, 8, 64), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, 32768), jnp.int32)

    def attend(q, k, v, ids):
        return flash_attention(q, k, v, segment_ids=(ids, ids) if packed else None, implementation="xla")

    def both(q, k, v, ids, cotangent):
        return jax.vjp(lambda *a: attend(*a, ids), q, k, v)[1](cotangent)

    bound = 0.05 * 8 * 32768**2 * 4
    assert jax.jit(attend).lower(shape, shape, shape, ids).compile().memory_analysis().temp_size_in_bytes < bound
    assert jax.jit(both).lower(shape, shape, shape, ids, shape).compile().memory_analysis().temp_size_in_bytes < bound


def test_nothing_quadratic_is_kept_for_the_backward_pass():
    shape = jax.ShapeDtypeStruct((1, 2048, 1, 8), jnp.float32)
    kept = jax.eval_shape(lambda q, k, v: jax.vjp(flash_attention, q, k, v)[1], shape, shape, shape)
    assert max(leaf.size for leaf in jax.tree.leaves(kept)) <= 2048 * 8


@settings(max_examples=60, deadline=None)
@given(call=calls(), sizes=st.sampled_from([(2, 3), (3, 2), (1, 4)]))
def test_blocks_are_skipped_only_where_no_pair_attends(call, sizes):
    (q, k, _), options = call
    length, num_keys = q.shape[1], k.shape[1]
    static = isinstance(options["q_offset"], int)
    spec = AttentionSpec(options["causal"], options["window"], options["q_offset"] if static else None, 1.0, None)
    ids, positions = (as_arrays(options.get(name)) for name in ("segment_ids", "kv_positions"))
    mask = AttentionMask(None if static else jnp.atleast_1d(options["q_offset"]), positions, ids, None)
    cuts = Blocks(length, min(sizes[0], length)), Blocks(num_keys, min(sizes[1], num_keys))
    by_rows = [[seen_by_hand(b, t, length, num_keys, **options)[1] for t in range(length)] for b in range(2)]
    seen = np.asarray(by_rows)[:, cuts[0].tokens()][..., cuts[1].tokens()]  # [B, query blocks, t, key blocks, s]
    np.testing.assert_array_equal(
        np.broadcast_to(visible(spec, mask, jnp.arange(length), jnp.arange(num_keys)), (2, length, num_keys)), by_rows
    )
    some, every = static_blocks(spec, mask, *cuts)
    live = np.broadcast_to(live_blocks(spec, mask, *cuts), (2, *some.shape))
    any_seen = seen.any(axis=(2, 4))
    assert not np.any(any_seen & ~live), "a live block was skipped"
    assert not np.any(any_seen & ~some), "a block was skipped at compile time"
    assert np.all(seen.all(axis=(0, 2, 4)) | ~every), "a block lost its mask"
    whole = np.broadcast_to(whole_blocks(spec, mask, *cuts), live.shape)
    np.testing.assert_array_equal(whole, seen.all(axis=(2, 4)))


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
    with pytest.raises(ValueError, match=r"softcap=-1.0 is not positive"):
        decode_attention(q, k, v, jnp.asarray([3, 3]), softcap=-1.0)
    with pytest.raises(ValueError, match=r"implementation='cuda'.*reference, xla"):
        flash_attention(q, k, v, implementation="cuda")
