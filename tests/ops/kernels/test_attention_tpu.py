"""Attention on TPU, interpreted on CPU, against all pairs in float64; and its static schedule for TPUs that are not here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

from seqjax.ops import flash_attention
from seqjax.ops.attention_mask import AttentionMask, AttentionSpec
from seqjax.ops.kernels import attention_tpu as kernel
from seqjax.testing import tpu

needs_libtpu = pytest.mark.skipif(tpu.libtpu_missing() is not None, reason=str(tpu.libtpu_missing()))
needs_gated_compiler = pytest.mark.skipif(tpu.compiler_differs() is not None, reason=str(tpu.compiler_differs()))


@pytest.fixture
def interpreted(monkeypatch):
    """Memory starts as NaN, rows run in random order, races are found. Blocks are small, so that short sequences have many."""
    monkeypatch.setattr(kernel, "BLOCK", 128)
    params = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True, random_seed=3)
    try:
        with pltpu.force_tpu_interpret_mode(params):
            yield
    finally:
        pltpu.reset_tpu_interpret_mode_state()


def draw(length, keys, heads=2, groups=1, width=8, value_width=8, dtype="float32"):
    rng = np.random.default_rng(length + keys)
    shapes = [(2, length, heads, width), (2, keys, groups, width), (2, keys, groups, value_width)]
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def segments(length, keys):
    """Ids that rise along a row, from pads on."""
    rng = np.random.default_rng(0)
    rising = np.sort(rng.integers(-1, 3, (2, max(length, keys))), axis=1)
    return jnp.asarray(rising[:, -length:], jnp.int32), jnp.asarray(rising[:, :keys], jnp.int32)


def outputs_and_gradients(implementation, operands, cotangents, options):
    attend = lambda *operands: flash_attention(*operands, **options, return_lse=True, implementation=implementation)
    outputs, pull = jax.vjp(jax.jit(attend), *operands)
    return (*outputs, *pull(cotangents))


def check(operands, **options):
    """Outputs and gradients as all pairs at once in float64 give them."""
    rng = np.random.default_rng(1)
    q, _, v = operands
    d_out = jnp.asarray(rng.standard_normal((*q.shape[:3], v.shape[-1])), v.dtype)
    d_lse = jnp.asarray(rng.standard_normal(q.shape[:3]), jnp.float32)
    got = outputs_and_gradients("pallas_tpu", operands, (d_out, d_lse), options)
    assert not interpreter.races.races_found
    with jax.enable_x64(True):
        wide = lambda *arrays: tuple(jnp.asarray(np.asarray(a), jnp.float64) for a in arrays)
        wanted = outputs_and_gradients("reference", wide(*operands), wide(d_out, d_lse), options)
    for name, result, expected in zip(("out", "lse", "dq", "dk", "dv"), got, wanted):
        result, expected = np.asarray(result, np.float64), np.asarray(expected)
        np.testing.assert_array_equal(np.isfinite(result), np.isfinite(expected), err_msg=name)
        finite = np.isfinite(expected)
        result, expected = result[finite], expected[finite]
        error = np.abs(result - expected).max() / np.abs(expected).max()
        # Weights and their gradients are rounded to the operands' dtype before they are multiplied.
        limit = 2e-6 if q.dtype == jnp.float32 else 1e-5 if name == "lse" else 8e-3
        assert error <= limit, (name, error)
    assert [a.dtype for a in got] == [v.dtype, jnp.float32, *(a.dtype for a in operands)]


CALLS = {
    "causal, grouped heads": ({"length": 256, "keys": 256, "heads": 4, "groups": 2}, {}),
    "window, cap, wide values": (
        {"length": 140, "keys": 300, "value_width": 24},
        {"window": 90, "q_offset": 160, "softcap": 0.8},
    ),
    "window to both sides": ({"length": 200, "keys": 140}, {"causal": False, "window": 70, "scale": 0.7}),
    "segments": ({"length": 200, "keys": 200}, {"causal": False, "segments": True}),
    "each row's offset, segments": ({"length": 140, "keys": 270}, {"q_offset": jnp.asarray([130, -7]), "segments": True}),
    "positions": ({"length": 16, "keys": 200}, {"q_offset": jnp.asarray(170), "kv_positions": jnp.arange(200)[::-1]}),
    "ALiBi": ({"length": 130, "keys": 130}, {"alibi_slopes": jnp.asarray([0.5, 0.1])}),
    "bfloat16": ({"length": 256, "keys": 256, "dtype": "bfloat16"}, {"segments": True}),
}


@pytest.mark.parametrize("call", CALLS)
def test_outputs_and_gradients(interpreted, call):
    shapes, options = CALLS[call]
    options = dict(options)
    if options.pop("segments", False):
        options["segment_ids"] = segments(shapes["length"], shapes["keys"])
    check(draw(**shapes), **options)


def test_several_chunks_of_keys_a_tile(interpreted, monkeypatch):
    monkeypatch.setattr(kernel, "BLOCK", 512)
    monkeypatch.setattr(kernel, "CHUNK", 256)
    check(draw(260, 500, groups=2), q_offset=240, segment_ids=segments(260, 500), softcap=0.8)


def test_gradients_in_parts_where_queries_do_not_fit_into_memory(interpreted, monkeypatch):
    """One block of one head at a time: neither the heads of a group nor a head's queries fit together."""
    monkeypatch.setattr(kernel, "QUERY_BYTES", 4 * 128 * 128)
    check(draw(200, 200), segment_ids=segments(200, 200))
    check(draw(200, 200), q_offset=jnp.asarray([5, -30]))


def test_tiles_that_differ_by_row_beyond_the_table(interpreted, monkeypatch):
    monkeypatch.setattr(kernel, "TABLE_SIZE", 4)
    check(draw(200, 200), causal=False, segment_ids=segments(200, 200))


def test_dead_tiles_are_neither_computed_nor_copied(interpreted):
    """Keys that no query sees are NaN: to multiply them by a weight of zero would show."""
    q, k, v = draw(128, 512)
    ids = jnp.repeat(jnp.asarray([[-1, 1, 2, 1]]), 128, axis=1)
    hidden = (ids != 1)[:, :, None, None]
    k, v = (jnp.where(hidden, jnp.nan, a) for a in (k, v))
    options = {"causal": False, "segment_ids": (jnp.ones((1, 128), jnp.int32), ids)}
    cotangents = jnp.ones_like(q), jnp.ones(q.shape[:3])
    for result in outputs_and_gradients("pallas_tpu", (q, k, v), cotangents, options):
        assert np.isfinite(result).all()
    plan = kernel._Plan(AttentionSpec(False, None, 0, 1.0, None), *map(kernel._blocks, (128, 512)), 2, 1, by_key=False)
    tiles, _ = kernel._tiles(plan, AttentionMask(None, None, options["segment_ids"], None))
    loaded, kinds = tiles.inner >> kernel.KIND_BITS, tiles.inner & 3
    np.testing.assert_array_equal(kinds, [[kernel.DEAD, kernel.WHOLE, kernel.DEAD, kernel.WHOLE]])
    np.testing.assert_array_equal(loaded, [[0, 1, 1, 3]])


def test_calls_that_are_not_served():
    q, k, v = draw(20, 20)
    refused = [
        ((q[:, :15], k, v), {}),  # decoding
        ((q, k, v), {"bias": jnp.zeros((1, 1, 20, 20))}),
        ((q, k, v.astype(jnp.bfloat16)), {}),
        ((q, k, jnp.zeros((2, 20, 1, 264))), {}),
        ((q, k[:, :0], v[:, :0]), {}),
    ]
    for operands, options in refused:
        assert np.isfinite(flash_attention(*operands, **options)).all()
        with pytest.raises(ValueError, match=r"implementation='pallas_tpu' does not serve this call; allowed here: None, ref"):
            flash_attention(*operands, **options, implementation="pallas_tpu")


def shapes(B, T, S, H, G, K, dtype, *, per_row=False):
    """Arguments of both passes: masks, operands and outputs."""
    array = lambda *shape: jax.ShapeDtypeStruct(shape, dtype)
    i32, f32 = (lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, jnp.float32))
    mask = AttentionMask(None, None, None, None)
    if per_row:
        mask = AttentionMask(i32(B), i32(S), (i32(B, T), i32(B, S)), f32(H))
    return mask, (array(B, T, H, K), array(B, S, G, K), array(B, S, G, K), None), (array(B, T, H, K), f32(B, T, H))


def passes(spec):
    forward = lambda mask, operands, _: kernel.forward(spec, mask, *operands)
    backward = lambda mask, operands, outputs: kernel.backward(spec, mask, operands, outputs, outputs)
    return forward, backward


@needs_libtpu
def test_the_widest_heads_compile():
    """For the chip with the least VMEM, with all that a call may ask for."""
    spec = AttentionSpec(True, 700, None, 0.1, 30.0)
    for function in passes(spec):
        tpu.compile_for("v5p", function, *shapes(1, 8192, 1024, 2, 1, 256, jnp.float32, per_row=True))


@needs_libtpu
@pytest.mark.parametrize(("chip", "width"), [("v5e", 6), ("v5p", 64), ("v6e", 80)])
def test_narrow_heads_compile(chip, width):
    for function in passes(AttentionSpec(True, None, 0, 0.1, None)):
        tpu.compile_for(chip, function, *shapes(1, 200, 300, 2, 2, width, jnp.bfloat16))


@needs_gated_compiler
@pytest.mark.parametrize(("chip", "forward", "backward"), [("v5e", 5500, 8900), ("v5p", 5500, 9200), ("v6e", 3700, 5500)])
def test_cycles_per_tile(chip, forward, backward):
    """Of 1024 queries and 1024 keys of width 128 in bfloat16, none masked. Splash attention takes 6234 and 10280 on v5e."""
    arguments = shapes(1, 2048, 2048, 1, 1, 128, jnp.bfloat16)
    spec = AttentionSpec(False, None, 0, 0.1, None)
    for name, function, target in zip(("forward", "backward"), passes(spec), (forward, backward)):
        loops = tpu.schedule(chip, function, *arguments, kernel=f"{name}_kernel")
        chunk = max(loops, key=lambda loop: loop.slots["EUP"] if loop.depth == 2 else -1)
        chunks = kernel.BLOCK // kernel.CHUNK
        assert chunks * chunk.bundles <= target, tpu.report(loops)
