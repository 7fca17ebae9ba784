"""Convolutions along the sequence against sums in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqjax.ops.convolution import Tail, fft_size, long_convolution, short_convolution

WIDTH, CHANNELS = 3, 2


def runs_of(starts):
    return None if starts is None else np.cumsum(starts, axis=1).astype(np.int32)


def long_by_hand(u, kernel, reverse_kernel=None, runs=None):
    """Each pair (input, output) of one run, at its lag."""
    batch, length, _ = u.shape
    y = np.zeros((batch, length, *kernel.shape[:2]))
    for b, t, s in np.ndindex(batch, length, length):
        if runs is not None and runs[b, t] != runs[b, s]:
            continue
        if s <= t:
            y[b, t] += kernel[:, :, t - s] * u[b, s]
        elif reverse_kernel is not None:
            y[b, t] += reverse_kernel[:, :, s - t - 1] * u[b, s]
    return y


def long_gradients(u, kernel, runs, weights):
    """Of `sum(weights * y)` with respect to u and the kernel."""
    d_u, d_kernel = np.zeros_like(u), np.zeros_like(kernel)
    for b, t in np.ndindex(u.shape[:2]):
        for s in range(t + 1):
            if runs is None or runs[b, t] == runs[b, s]:
                d_u[b, s] += (kernel[:, :, t - s] * weights[b, t]).sum(0)
                d_kernel[:, :, t - s] += weights[b, t] * u[b, s]
    return d_u, d_kernel


def short_by_hand(u, kernel, bias=None, runs=None, ahead=0):
    y = np.zeros_like(u) if bias is None else np.zeros_like(u) + bias
    for b, t in np.ndindex(u.shape[:2]):
        for w in range(len(kernel)):
            s = t + ahead - w
            if 0 <= s < u.shape[1] and (runs is None or runs[b, t] == runs[b, s]):
                y[b, t] += kernel[-1 - w] * u[b, s]
    return y


def draw(rng, length, lags):
    return rng.standard_normal((2, length, WIDTH)), rng.standard_normal((CHANNELS, WIDTH, lags))


def optional(array):
    return None if array is None else jnp.asarray(array)


@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 65])
def test_long_convolution_equals_its_sum(length, extra):
    rng = np.random.default_rng(length)
    u, kernel = draw(rng, length, length + extra)
    reverse = rng.standard_normal(kernel.shape)
    gate = rng.standard_normal((2, length, 1, WIDTH))
    with jax.enable_x64(True):
        u_, kernel_, reverse_ = (jnp.asarray(a) for a in (u, kernel, reverse))
        causal, tail = long_convolution(u_, kernel_)
        both, _ = long_convolution(u_, kernel_, reverse_kernel=reverse_)
        gated, _ = long_convolution(u_, kernel_, gate=jnp.asarray(gate))
        assert tail is None
    np.testing.assert_allclose(causal, long_by_hand(u, kernel), atol=1e-12)
    np.testing.assert_allclose(both, long_by_hand(u, kernel, reverse), atol=1e-12)
    np.testing.assert_allclose(gated, long_by_hand(u, kernel) * gate, atol=1e-12)


@jax.jit
def value_and_gradients(u, kernel, runs, weights):
    def loss(u, kernel):
        y, _ = long_convolution(u, kernel, runs=runs)
        return jnp.sum(weights * y), y

    grads, y = jax.grad(loss, (0, 1), has_aux=True)(u, kernel)
    return y, *grads


@settings(max_examples=30, deadline=None)
@given(starts=st.none() | st.lists(st.booleans(), min_size=22, max_size=22), seed=st.integers(0, 9))
def test_long_convolution_within_runs(starts, seed):
    rng = np.random.default_rng(seed)
    u, kernel = draw(rng, 11, 13)
    runs = None if starts is None else runs_of(np.reshape(starts, (2, 11)))
    weights = rng.standard_normal((2, 11, CHANNELS, WIDTH))
    with jax.enable_x64(True):
        found = value_and_gradients(u, kernel, optional(runs), weights)
    wanted = (long_by_hand(u, kernel, runs=runs), *long_gradients(u, kernel, runs, weights))
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


CUTS = st.sampled_from([(0, 9), (0, 1, 9), (0, 5, 6, 9), (0, 4, 8, 9)])
"""Ways to cut a sequence of 9: few, for each part's shape is compiled."""


def in_parts(convolve, u, runs, tail, cuts):
    y = []
    for a, b in zip(cuts, cuts[1:]):
        part, tail = convolve(jnp.asarray(u[:, a:b]), runs=None if runs is None else jnp.asarray(runs[:, a:b]), tail=tail)
        y.append(part)
    return np.concatenate(y, axis=1), tail


@settings(max_examples=12, deadline=None)
@given(cuts=CUTS, starts=st.none() | st.lists(st.booleans(), min_size=18, max_size=18))
def test_a_long_convolution_continues_from_its_tail(cuts, starts):
    u, kernel = draw(np.random.default_rng(0), 9, 18)
    runs = None if starts is None else runs_of(np.reshape(starts, (2, 9)))
    with jax.enable_x64(True):
        convolve = functools.partial(jax.jit(long_convolution), kernel=jnp.asarray(kernel))
        y, tail = in_parts(convolve, u, runs, Tail.fresh(2, 9, WIDTH, jnp.float64), cuts)
    np.testing.assert_allclose(y, long_by_hand(u, kernel, runs=runs), atol=1e-12)
    np.testing.assert_array_equal(tail.inputs, u)


def test_a_tail_shorter_than_the_past_is_all_that_is_seen():
    u, kernel = draw(np.random.default_rng(0), 10, 8)
    with jax.enable_x64(True):
        convolve = functools.partial(jax.jit(long_convolution), kernel=jnp.asarray(kernel))
        y, tail = in_parts(convolve, u, None, Tail.fresh(2, 3, WIDTH, jnp.float64), [0, 5, 10])
    np.testing.assert_allclose(y[:, 5:], long_by_hand(u[:, 2:], kernel)[:, 3:], atol=1e-12)
    np.testing.assert_array_equal(tail.inputs, u[:, 7:])


@settings(max_examples=20, deadline=None)
@given(
    taps=st.sampled_from([1, 2, 4, 12]),
    cuts=CUTS,
    starts=st.none() | st.lists(st.booleans(), min_size=18, max_size=18),
    biased=st.booleans(),
)
def test_short_convolution_whole_and_in_parts(taps, cuts, starts, biased):
    rng = np.random.default_rng(taps)
    u, kernel = rng.standard_normal((2, 9, WIDTH)), rng.standard_normal((taps, WIDTH))
    bias = rng.standard_normal(WIDTH) if biased else None
    runs = None if starts is None else runs_of(np.reshape(starts, (2, 9)))
    wanted = short_by_hand(u, kernel, bias, runs)
    with jax.enable_x64(True):
        convolve = functools.partial(jax.jit(short_convolution), kernel=jnp.asarray(kernel), bias=optional(bias))
        whole, none = convolve(jnp.asarray(u), runs=optional(runs))
        parts, tail = in_parts(convolve, u, runs, Tail.fresh(2, taps - 1, WIDTH, jnp.float64), cuts)
    assert none is None
    np.testing.assert_allclose(whole, wanted, atol=1e-13)
    np.testing.assert_allclose(parts, wanted, atol=1e-13)
    np.testing.assert_array_equal(tail.inputs, np.concatenate([np.zeros_like(u), u, u], axis=1)[:, 19 - taps : 18])


@pytest.mark.parametrize(("taps", "ahead"), [(3, 1), (7, 3), (4, 3), (25, 12)])
@pytest.mark.parametrize("packed", [False, True])
def test_short_convolution_looks_ahead(taps, ahead, packed):
    rng = np.random.default_rng(taps)
    u, kernel = rng.standard_normal((2, 9, WIDTH)), rng.standard_normal((taps, WIDTH))
    runs = runs_of(rng.random((2, 9)) < 0.3) if packed else None
    with jax.enable_x64(True):
        y, tail = short_convolution(jnp.asarray(u), jnp.asarray(kernel), ahead=ahead, runs=optional(runs))
    assert tail is None
    np.testing.assert_allclose(y, short_by_hand(u, kernel, None, runs, ahead), atol=1e-13)


def test_gradients_of_a_short_convolution_within_runs():
    rng = np.random.default_rng(0)
    u, kernel, weights = rng.standard_normal((2, 9, WIDTH)), rng.standard_normal((4, WIDTH)), rng.standard_normal((2, 9, WIDTH))
    runs = runs_of(rng.random((2, 9)) < 0.3)
    d_u, d_kernel = np.zeros_like(u), np.zeros_like(kernel)
    for b, t, w in np.ndindex(2, 9, 4):
        if t >= w and runs[b, t] == runs[b, t - w]:
            d_u[b, t - w] += kernel[-1 - w] * weights[b, t]
            d_kernel[-1 - w] += u[b, t - w] * weights[b, t]
    with jax.enable_x64(True):
        loss = lambda u, kernel: jnp.sum(weights * short_convolution(u, kernel, runs=jnp.asarray(runs))[0])
        found = jax.grad(loss, (0, 1))(jnp.asarray(u), jnp.asarray(kernel))
    np.testing.assert_allclose(found[0], d_u, atol=1e-13)
    np.testing.assert_allclose(found[1], d_kernel, atol=1e-13)


def test_half_precision_is_convolved_in_single_precision():
    u, kernel = draw(np.random.default_rng(0), 40, 40)
    half = jnp.asarray(u, jnp.bfloat16)
    y, _ = long_convolution(half, jnp.asarray(kernel, jnp.float32))
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, long_by_hand(np.asarray(half, np.float64), kernel), atol=1e-4)
    assert short_convolution(half, jnp.ones((4, WIDTH)))[0].dtype == jnp.bfloat16


def test_fft_sizes_are_the_next_products_of_two_three_and_five():
    quick = sorted(2**a * 3**b * 5**c for a in range(13) for b in range(8) for c in range(6))
    for least in (0, 1, 2, 7, 11, 13, 127, 1025, 2047, 4095):
        assert fft_size(least) == min(n for n in quick if n >= least)


def test_bad_calls_are_refused():
    u, kernel = (jnp.asarray(a) for a in draw(np.random.default_rng(0), 5, 5))
    runs, tail = jnp.zeros((2, 5), jnp.int32), Tail.fresh(2, 5, WIDTH)
    with pytest.raises(ValueError, match="a kernel of 4 lags is too short for 5 inputs"):
        long_convolution(u, kernel[..., :4])
    with pytest.raises(ValueError, match="a kernel of 5 lags is too short for 10 inputs"):
        long_convolution(u, kernel, tail=tail)
    for option in ({"runs": runs}, {"tail": tail}):
        with pytest.raises(ValueError, match="a reverse kernel sees both sides"):
            long_convolution(u, kernel, reverse_kernel=kernel, **option)
    with pytest.raises(ValueError, match="a convolution of 4 taps continues from 3 inputs, not 5"):
        short_convolution(u, jnp.ones((4, WIDTH)), tail=tail)
    with pytest.raises(ValueError, match="looks ahead=1 inputs waits for them: it takes no tail"):
        short_convolution(u, jnp.ones((4, WIDTH)), ahead=1, tail=Tail.fresh(2, 3, WIDTH))
    with pytest.raises(ValueError, match="ahead=4 is outside a kernel of 4 taps; allowed: 0 to 3"):
        short_convolution(u, jnp.ones((4, WIDTH)), ahead=4)
