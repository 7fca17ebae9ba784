"""The Mosaic GPU attention against NumPy float64, interpreted on CPU; and what ptxas makes of it.

The interpreter does not know products of arrays in registers: they are plain products here.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from seqjax.ops.attention import GPU_WIDTHS, flash_attention
from seqjax.ops.attention_mask import AttentionMask, AttentionSpec
from seqjax.ops.dispatch import platform_kernel
from seqjax.ops.kernels import attention_gpu
from seqjax.testing.gpu import available, compile_kernels

LOG_SUM_TOLERANCE = 2e-6

interpreted = pytest.mark.skipif(
    not hasattr(plgpu, "force_gpu_interpret_mode"), reason="this JAX has no interpreter for Mosaic GPU; 0.11 has"
)
compiled = pytest.mark.skipif(
    not available() or not hasattr(plgpu, "force_gpu_interpret_mode"),
    reason="needs JAX 0.11 and its CUDA plugin: pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt",
)


def draw(length, keys, width=64, *, rows=1, heads=1, groups=1, dtype=jnp.bfloat16, segments=None, **options):
    """Operands, cotangents, spec and mask of a call."""
    rng = np.random.default_rng(length + keys)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    operands = normal(rows, length, heads, width), normal(rows, keys, groups, width), normal(rows, keys, groups, width), None
    cotangents = normal(rows, length, heads, width), normal(rows, length, heads).astype(jnp.float32)
    ids = None
    if segments:
        ids = np.sort(rng.integers(-1, segments, (rows, max(length, keys))), axis=1).astype(np.int32)
        ids = jnp.asarray(ids[:, -length:]), jnp.asarray(ids[:, :keys])
    options = {"causal": True, "window": None, "q_offset": 0} | options
    offset = options["q_offset"]
    arrays = None if isinstance(offset, int) else jnp.asarray(offset, jnp.int32)
    spec = AttentionSpec(options["causal"], options["window"], offset if arrays is None else None, width**-0.5, None)
    return operands, cotangents, spec, AttentionMask(arrays, None, ids, None)


def by_hand(operands, cotangents, spec, mask):
    """Output, log-sum-exp, and the gradients of q, k and v, all pairs at once in float64."""
    q, k, v, d_out, d_lse = (np.asarray(a, np.float64) for a in (*operands[:3], *cotangents))
    repeats = q.shape[2] // k.shape[2]
    k, v = (a.repeat(repeats, axis=2) for a in (k, v))
    at = np.arange(q.shape[1])[:, None] + np.reshape(spec.q_offset if mask.q_offset is None else mask.q_offset, (-1, 1, 1))
    distance = at - np.arange(k.shape[1])
    seen = (distance >= 0) if spec.causal else np.ones_like(distance, bool)
    if spec.window is not None:
        seen = seen & (np.abs(distance) < spec.window)
    if mask.segment_ids is not None:
        q_ids, k_ids = (np.asarray(ids) for ids in mask.segment_ids)
        seen = seen & (q_ids[:, :, None] == k_ids[:, None]) & (k_ids[:, None] >= 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        weights = np.where(seen[:, None], np.exp(spec.scale * np.einsum("bthk,bshk->bhts", q, k)), 0)
        total = weights.sum(axis=-1, keepdims=True)
        lse = np.log(total)[..., 0].transpose(0, 2, 1)
        weights = np.where(total > 0, weights / total, 0)
    out = np.einsum("bhts,bshk->bthk", weights, v)
    d_weights = np.einsum("bthk,bshk->bhts", d_out, v) + d_lse.transpose(0, 2, 1)[..., None]
    inner = np.einsum("bthk,bthk->bht", d_out, out)[..., None]
    d_products = spec.scale * weights * (d_weights - inner)
    shared = lambda a: a.reshape(*a.shape[:2], -1, repeats, a.shape[3]).sum(axis=3)
    dq = np.einsum("bhts,bshk->bthk", d_products, k)
    dk, dv = np.einsum("bhts,bthk->bshk", d_products, q), np.einsum("bhts,bthk->bshk", weights, d_out)
    return out, lse, dq, shared(dk), shared(dv)


@pytest.fixture
def plain_products(monkeypatch):
    def multiply(terms, meanwhile=lambda: None):
        found = [sums + jnp.dot(a[...].astype(jnp.float32), b[...].astype(jnp.float32)) for sums, a, b in terms]
        plgpu.commit_smem()  # as products do, read before copies that come after
        meanwhile()
        return found

    monkeypatch.setattr(attention_gpu, "_multiply", multiply)


def run(operands, cotangents, spec, mask):
    """Outputs and gradients by the kernels."""

    @jax.jit
    def both(operands, cotangents, mask):
        outputs = attention_gpu.forward(spec, mask, *operands)
        return *outputs, *attention_gpu.backward(spec, mask, operands, outputs, cotangents)[:3]

    return both(operands, cotangents, mask)


def assert_near(got, want, tolerance, name):
    finite = np.isfinite(want)
    got = np.asarray(got, np.float64)
    assert (got[~finite] == want[~finite]).all(), name
    error = np.abs(got[finite] - want[finite]).max() / np.abs(want[finite]).max()
    assert error <= tolerance, f"{name}: {error:.1e}"


CASES = {
    "causal": dict(length=300, keys=300, heads=2),
    "everything": dict(length=130, keys=256, causal=False),
    "window": dict(length=150, keys=300, q_offset=150, window=100, dtype=jnp.float16),
    "window_both_sides": dict(length=130, keys=200, width=128, causal=False, window=70, segments=3),
    "offsets_of_rows": dict(length=100, keys=300, rows=2, q_offset=[130, 200], segments=4),
    "wide_heads": dict(length=130, keys=140, width=256, heads=2, segments=2),
}


@interpreted
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_equal_all_pairs(case, plain_products):
    call = draw(**CASES[case])
    with plgpu.force_gpu_interpret_mode():
        got = run(*call)
    eps = float(jnp.finfo(call[0][0].dtype).eps)
    tolerances = {"out": eps / 2, "lse": LOG_SUM_TOLERANCE, "dq": eps, "dk": eps, "dv": eps}
    for (name, tolerance), found, want in zip(tolerances.items(), got, by_hand(*call)):
        assert found.dtype == (jnp.float32 if name == "lse" else call[0][0].dtype)
        assert_near(found, want, tolerance, name)


@interpreted
@pytest.mark.parametrize("width", [64, 256])
def test_copies_and_warpgroups_do_not_race(width, plain_products, capfd):
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        jax.block_until_ready(run(*draw(250, 250, width)))
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


@compiled
@pytest.mark.parametrize("width", GPU_WIDTHS)
def test_nothing_is_spilled(width):
    operands, cotangents, spec, mask = (
        jax.eval_shape(lambda: draw(1000, 1000, width, rows=2, heads=4, groups=2, segments=4)[:2])
        + draw(1000, 1000, width, rows=2, segments=4, window=300)[2:]
    )
    outputs = operands[0], cotangents[1]
    kernels = compile_kernels(lambda mask, *o: attention_gpu.forward(spec, mask, *o, None), mask, *operands[:3])
    back = lambda mask, *o: attention_gpu.backward(spec, mask, (*o[0], None), *o[1:])
    kernels += compile_kernels(back, mask, operands[:3], outputs, cotangents)
    assert [kernel.spilled_bytes for kernel in kernels] == [0, 0, 0]


UNSERVED = {
    "float32": dict(dtype=jnp.float32),
    "width": dict(width=32),
    "softcap": dict(softcap=5.0),
    "alibi_slopes": dict(alibi_slopes=jnp.ones(1)),
    "bias": dict(bias=jnp.zeros((1, 1, 32, 32))),
    "one_query": dict(length=1),
}


@pytest.mark.parametrize("case", UNSERVED)
def test_what_the_kernel_does_not_serve_is_an_error(case):
    sizes = {"length": 32, "width": 64, "dtype": jnp.bfloat16}
    options = {name: x for name, x in UNSERVED[case].items() if name not in sizes}
    (q, k, v, _), *_ = draw(keys=32, **sizes | {name: x for name, x in UNSERVED[case].items() if name in sizes})
    with pytest.raises(ValueError, match="'pallas_gpu' does not serve this call"):
        flash_attention(q, k, v, **options, implementation="pallas_gpu")


@pytest.mark.parametrize("options", [dict(window=9), dict(q_offset=3), dict(return_lse=True)], ids=str)
def test_what_cudnn_does_not_serve_is_an_error(options):
    (q, k, v, _), *_ = draw(32, 32)
    with pytest.raises(ValueError, match="'cudnn' does not serve this call"):
        flash_attention(q, k, v, **options, implementation="cudnn")


def test_cudnn_comes_first_on_a_gpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert platform_kernel(("xla", "pallas_gpu", "cudnn")) == "cudnn"
    assert platform_kernel(("xla", "pallas_gpu")) == "pallas_gpu"
    assert platform_kernel(("xla", "reference")) is None


@interpreted
def test_named_by_the_caller_it_is_differentiated(plain_products):
    (q, k, v, _), (d_out, d_lse), *_ = call = draw(64, 72, heads=2)
    attend = functools.partial(flash_attention, return_lse=True, implementation="pallas_gpu")
    with plgpu.force_gpu_interpret_mode():
        outputs, pull = jax.vjp(attend, q, k, v)
        found = *outputs, *pull((d_out, d_lse))
    for got, want in zip(found, by_hand(*call)):
        assert_near(got, want, 2.0**-7, "")
