"""RG-LRU, wkv, the memories of xLSTM and running log-sums against reference arrays, and their scans in parts."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from seqjax.ops import SoftmaxSums, bidirectional_linear_attention, linear_attention
from seqjax.ops.cells import slstm_cell
from seqjax.ops.log_space import running_log_sum, running_max, segment_log_sum
from seqjax.ops.mlstm import MatrixMemory, mlstm
from seqjax.ops.recurrence import recurrence
from seqjax.ops.rg_lru import rg_lru
from seqjax.ops.wkv import wkv

DATA = pathlib.Path(__file__).parent / "data"
STARTS = np.array([[False] * 4 + [True] + [False] * 6, [True] + [False] * 9 + [True]])
arrays = functools.partial(jax.tree.map, jnp.asarray)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("implementation", ["sequential", "associative"])
def test_rg_lru_equals_the_reference(implementation):
    """A row of two packed sequences, the second from position 17 on."""
    golden = np.load(DATA / "rg_lru.npz")
    x = golden["x"]
    blocks = x.reshape(2, 40, 2, 4)
    gates = [
        sigmoid(np.einsum("blhi,hio->blho", blocks, golden[f"w_{name}"]) + golden[f"b_{name}"]).reshape(x.shape)
        for name in ("a", "input")
    ]
    opens = golden["segment_pos"] == 0
    with jax.enable_x64(True):
        operands = arrays((x, *gates, golden["lam"], np.zeros((2, 8))))
        y, last = rg_lru(*operands, opens=jnp.asarray(opens), starts=jnp.asarray(opens), implementation=implementation)
    np.testing.assert_allclose(y, golden["y"], atol=1e-12)
    np.testing.assert_allclose(last, golden["y"][:, -1], atol=1e-12)


def test_rg_lru_that_forgets_nothing_has_finite_gradients():
    loss = lambda decay: rg_lru(x, x, x, decay, x[:, 0], opens=jnp.zeros((1, 5), bool))[0].sum()
    x = jnp.full((1, 5, 2), 0.5)
    assert np.isfinite(jax.grad(loss)(jnp.full(2, -60.0))).all()


def test_wkv_equals_the_reference():
    golden = np.load(DATA / "wkv.npz")
    with jax.enable_x64(True):
        k, v, u = arrays((golden["wkv_key"], golden["wkv_value"], golden["wkv_time_first"]))
        decay = jnp.exp(jnp.asarray(golden["wkv_time_decay"]))
        y, sums = wkv(k, v, decay, u, SoftmaxSums.empty((2, 8), 1, "float64"))
    np.testing.assert_allclose(y, golden["wkv_y"], atol=1e-12)
    # The published state, in single precision, is of the same sums in other units.
    sums = jax.tree.map(np.asarray, sums)
    scale = np.exp(sums.maximum - golden["hf_state_max"])
    np.testing.assert_allclose(sums.numerator[..., 0] * scale, golden["hf_state_num"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(sums.denominator * scale, golden["hf_state_den"], rtol=1e-4)


def test_wkv_by_hand_and_its_gradients():
    rng = np.random.default_rng(0)
    k, v = (2 * rng.standard_normal((2, 11, 3)) for _ in range(2))
    decay, bonus = rng.random(3) + 0.1, rng.standard_normal(3)
    wanted = np.zeros_like(v)
    for b in range(2):
        for t in range(11):
            first = max([0, *np.flatnonzero(STARTS[b, : t + 1])])
            scores = np.concatenate([k[b, first:t] - (t - 1 - np.arange(first, t))[:, None] * decay, [bonus + k[b, t]]])
            weights = np.exp(scores)
            wanted[b, t] = (weights * v[b, first : t + 1]).sum(0) / weights.sum(0)

    def run(*operands):
        return wkv(*arrays(operands), SoftmaxSums.empty((2, 3), 1, "float64"), starts=jnp.asarray(STARTS))[0]

    with jax.enable_x64(True):
        np.testing.assert_allclose(run(k, v, decay, bonus), wanted, atol=1e-12)
        check_grads(run, (k, v, decay, bonus), order=1, modes=["rev"], rtol=1e-6)


@pytest.mark.parametrize("options", [{"chunk_size": 16}, {"implementation": "reference"}])
def test_mlstm_equals_the_reference(options):
    golden = np.load(DATA / "xlstm.npz")
    tokens = lambda name: np.swapaxes(golden[f"m_{name}"], 1, 2)
    with jax.enable_x64(True):
        operands = arrays([tokens(name) for name in "qkv"] + [tokens(f"{name}gate")[..., 0] for name in "if"])
        y, memory = mlstm(*operands, MatrixMemory.empty(2, 2, 8, 8, "float64"), **options)
    np.testing.assert_allclose(y, tokens("y"), rtol=1e-9, atol=1e-10)
    assert memory.matrix.shape == (2, 2, 8, 9)


def test_mlstm_without_its_units():
    """By the equations as they stand, where nothing overflows; and gradients, to which the units are constants."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 11, 2, 3)) for _ in range(3))
    i, f = rng.standard_normal((2, 11, 2)), rng.standard_normal((2, 11, 2)) + 2
    wanted = np.zeros_like(v)
    for b, h in np.ndindex(2, 2):
        c, n = np.zeros((3, 3)), np.zeros(3)
        for t in range(11):
            c, n = (0 * c, 0 * n) if STARTS[b, t] else (c, n)
            forget, write = sigmoid(f[b, t, h]), np.exp(i[b, t, h]) / np.sqrt(3)
            c, n = forget * c + write * np.outer(k[b, t, h], v[b, t, h]), forget * n + write * k[b, t, h]
            wanted[b, t, h] = q[b, t, h] @ c / max(abs(q[b, t, h] @ n), 1)
    run = lambda *a: mlstm(*arrays(a), MatrixMemory.empty(2, 2, 3, 3, "float64"), starts=jnp.asarray(STARTS), chunk_size=4)[0]
    with jax.enable_x64(True):
        np.testing.assert_allclose(run(q, k, v, i, f), wanted, atol=1e-12)
        check_grads(run, (q, k, v, i, f), order=1, modes=["rev"], rtol=1e-5)


def test_slstm_equals_the_reference():
    golden = np.load(DATA / "xlstm.npz")
    with jax.enable_x64(True):
        x, weights = arrays((golden["s_Wx"] + golden["s_b"], golden["s_R"]))
        y, (c, n, _, m) = recurrence(slstm_cell, weights, tuple(jnp.zeros((4, 2, 2, 4))), x)
    np.testing.assert_allclose(y, golden["s_y"], atol=1e-12)
    c, n, m = map(np.asarray, (c, n, m))
    unit = np.exp(m - golden["s_m"])
    np.testing.assert_allclose(c * unit, golden["s_c"], rtol=1e-10)
    np.testing.assert_allclose(n * unit, golden["s_n"], rtol=1e-10)


def test_the_softmax_over_time_of_lightnet_equals_the_reference():
    golden = np.load(DATA / "lightnet.npz")
    with jax.enable_x64(True):
        q, k, v = arrays([golden[name] for name in "qkv"])
        z = running_log_sum(k, jnp.full((2, 2, 6), -jnp.inf))
        log_decay = jnp.pad(z[:, :-1] - z[:, 1:], [(0, 0), (1, 0), (0, 0), (0, 0)])
        y, state = linear_attention(jax.nn.silu(q), jnp.exp(k - z), v, log_decay)
    np.testing.assert_allclose(z, golden["z"], atol=1e-12)
    np.testing.assert_allclose(log_decay, golden["log_decay"], atol=1e-12)
    np.testing.assert_allclose(y, golden["y_causal"], atol=1e-10)
    np.testing.assert_allclose(state, golden["final_S"], atol=1e-10)


def test_the_softmax_over_whole_rows_of_lightnet_equals_the_reference():
    golden = np.load(DATA / "lightnet.npz")
    with jax.enable_x64(True):
        q, k, v = arrays([golden[name] for name in "qkv"])
        totals = segment_log_sum(k)
        y = bidirectional_linear_attention(jax.nn.silu(q), jnp.exp(k - totals), v)
    np.testing.assert_allclose(totals[:, 0], golden["z"][:, -1], atol=1e-12)
    np.testing.assert_allclose(y, golden["y_noncausal"], atol=1e-12)


def test_sums_over_segments_equal_sums_over_pairs():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 11, 2, 3)) for _ in range(3))
    runs = np.cumsum(STARTS, axis=1)
    same = runs[:, :, None] == runs[:, None, :]
    totals = np.log(np.einsum("bts,bshk->bthk", same, np.exp(k)))
    wanted = np.einsum("bthk,bshk,bts,bshw->bthw", q, k, same, v)
    with jax.enable_x64(True):
        starts = jnp.asarray(STARTS)
        sums = lambda k: segment_log_sum(jnp.asarray(k), starts=starts)
        run = lambda *a: bidirectional_linear_attention(*arrays(a), starts=starts, chunk_size=4)
        np.testing.assert_allclose(sums(k), totals, atol=1e-12)
        np.testing.assert_allclose(run(q, k, v), wanted, atol=1e-12)
        check_grads(sums, (k,), order=1, modes=["rev"], rtol=1e-6)
        check_grads(run, (q, k, v), order=1, modes=["rev"], rtol=1e-6)


def test_running_maxima_and_log_sums_equal_loops():
    rng = np.random.default_rng(0)
    values, decay, first = 30 * rng.standard_normal((2, 11, 3)), -rng.random((2, 11, 3)), rng.standard_normal((2, 3))
    maxima, sums = np.zeros_like(values), np.zeros_like(values)
    m = z = first
    for t in range(11):
        m, z = (np.where(STARTS[:, t, None], -np.inf, a) for a in (m, z))
        maxima[:, t] = m = np.maximum(m + decay[:, t], values[:, t])
        sums[:, t] = z = np.logaddexp(z, values[:, t])
    with jax.enable_x64(True):
        starts = jnp.asarray(STARTS)
        np.testing.assert_allclose(running_max(*arrays((values, decay, first)), starts=starts), maxima, atol=1e-12)
        np.testing.assert_allclose(running_log_sum(*arrays((values, first)), starts=starts), sums, atol=1e-12)
        run = lambda *a: running_log_sum(*arrays(a), starts=starts)
        check_grads(run, (values / 30, first), order=1, modes=["rev"], rtol=1e-6)
        assert not np.any(jax.grad(lambda v: running_max(v, *arrays((decay, first))).sum())(jnp.asarray(values)))
