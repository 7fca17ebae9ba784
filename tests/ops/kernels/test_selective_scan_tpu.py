"""The TPU selective scan, interpreted on CPU, against loops in float64; and its static schedule for TPUs that are not here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

from seqjax.ops.kernels import selective_scan_tpu as kernel
from seqjax.ops.kernels.selective_scan import Inputs
from seqjax.testing import tpu

CHIPS = ["v5e", "v5p", "v6e"]
needs_libtpu = pytest.mark.skipif(tpu.libtpu_missing() is not None, reason=str(tpu.libtpu_missing()))
needs_gated_compiler = pytest.mark.skipif(tpu.compiler_differs() is not None, reason=str(tpu.compiler_differs()))


def draw(R, G, L, E, N, dtype, *, plain, starts):
    """Random arguments; `plain` leaves out D, z and dt_bias. The first decay rate is zero, as if it had underflowed."""
    rng = np.random.default_rng(R + L + E + N)
    normal = lambda *shape, dtype=dtype: jnp.asarray(rng.standard_normal(shape), dtype)
    f32 = functools.partial(normal, dtype=jnp.float32)
    return Inputs(
        u=normal(R, L, E),
        dt=0.1 + jnp.abs(normal(R, L, E)) if plain else normal(R, L, E) - 1,
        A=-jnp.exp(f32(G, N, E)).at[0, 0, 0].set(0),
        B=normal(R, L, N),
        C=normal(R, L, N),
        D=None if plain else f32(G, E),
        z=None if plain else normal(R, L, E),
        dt_bias=None if plain else f32(G, E),
        h0=f32(R, N, E),
        starts=jnp.asarray(rng.random((R, L)) < 0.2) if starts else None,
    )


def by_hand(x, d_out, d_last, softplus, reverse):
    """Outputs, last state and gradients in float64, one step at a time."""
    (R, L, E), groups = x.u.shape, x.A.shape[0]
    group = np.arange(R) % groups
    double = lambda a: np.asarray(a).astype(np.float64)
    u, dt, B, C, h, d_out, dh = map(double, (x.u, x.dt, x.B, x.C, x.h0, d_out, d_last))
    A = double(x.A)[group]
    D = np.zeros((R, E)) if x.D is None else double(x.D)[group]
    bias = np.zeros((R, E)) if x.dt_bias is None else double(x.dt_bias)[group]
    sigmoid = lambda a: 1 / (1 + np.exp(-a))
    raw = dt + bias[:, None]
    delta = np.logaddexp(raw, 0) if softplus else raw
    starts = np.zeros((R, L), bool) if x.starts is None else np.asarray(x.starts)
    forgets = np.pad(starts[:, 1:], [(0, 0), (0, 1)]) if reverse else starts
    order = range(L - 1, -1, -1) if reverse else range(L)
    y, before, after, decay = np.zeros_like(u), {}, {}, {}
    for t in order:
        decay[t] = np.exp(delta[:, t, None] * A) * ~forgets[:, t, None, None]
        before[t] = h
        h = after[t] = decay[t] * h + (delta[:, t] * u[:, t])[:, None] * B[:, t, :, None]
        y[:, t] = (C[:, t, :, None] * h).sum(1) + D * u[:, t]
    z = None if x.z is None else double(x.z)
    gate = 1 if z is None else z * sigmoid(z)
    dy = d_out * gate
    du, d_delta, dA, dB, dC = (np.zeros_like(a) for a in (u, u, A, B, C))
    for t in reversed(order):
        dC[:, t] = np.einsum("re,rne->rn", dy[:, t], after[t])
        dh = dh + C[:, t, :, None] * dy[:, t, None]
        dB[:, t] = np.einsum("re,rne->rn", delta[:, t] * u[:, t], dh)
        d_drive = np.einsum("rn,rne->re", B[:, t], dh)
        dh = dh * decay[t]
        du[:, t] = d_drive * delta[:, t] + dy[:, t] * D
        d_delta[:, t] = d_drive * u[:, t] + (dh * before[t] * A).sum(1)
        dA += dh * before[t] * delta[:, t, None]
    d_raw = d_delta * sigmoid(raw) if softplus else d_delta
    by_group = lambda a: a.reshape(-1, groups, *a.shape[1:]).sum(0)
    grads = Inputs(
        u=du,
        dt=d_raw,
        A=by_group(dA),
        B=dB,
        C=dC,
        D=None if x.D is None else by_group((dy * u).sum(1)),
        z=None if z is None else d_out * y * sigmoid(z) * (1 + z * (1 - sigmoid(z))),
        dt_bias=None if x.dt_bias is None else by_group(d_raw.sum(1)),
        h0=dh,
        starts=None,
    )
    return y * gate, h, grads


@pytest.fixture
def interpreted(monkeypatch):
    """Memory starts as NaN, rows run in random order, races are found. Loops are unrolled less, to be compiled faster."""
    for name in ("UNROLL_FORWARD", "UNROLL_RECOMPUTE", "UNROLL_BACKWARD"):
        monkeypatch.setattr(kernel, name, 1)
    params = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True, random_seed=3)
    try:
        with pltpu.force_tpu_interpret_mode(params):
            yield
    finally:
        pltpu.reset_tpu_interpret_mode_state()


def assert_close(name, got, wanted, tolerance):
    assert (got is None) == (wanted is None), name
    if wanted is not None:
        error = np.abs(np.asarray(got, np.float64) - wanted).max() / np.abs(wanted).max()
        assert error <= tolerance, (name, error)


def check(x, *, softplus, reverse, chunk_size):
    rng = np.random.default_rng(1)
    d_out = jnp.asarray(rng.standard_normal(x.u.shape), x.u.dtype)
    d_last = jnp.asarray(rng.standard_normal(x.h0.shape), jnp.float32)
    how = {"softplus": softplus, "reverse": reverse, "chunk_size": chunk_size}
    out, last, states = jax.jit(functools.partial(kernel.forward, **how, keep_states=True))(x)
    grads = jax.jit(functools.partial(kernel.backward, **how))(x, states, d_out, d_last)
    wanted_out, wanted_last, wanted = by_hand(x, d_out, d_last, softplus, reverse)
    assert not interpreter.races.races_found
    assert states.shape == (x.u.shape[0], -(-x.u.shape[1] // chunk_size), *x.A.shape[1:])
    narrow = x.u.dtype == jnp.bfloat16  # results are then rounded to it
    assert_close("out", out, wanted_out, 4e-3 if narrow else 2e-6)
    assert_close("last", last, wanted_last, 2e-6)
    for name, argument, got, expected in zip(Inputs._fields, x, grads, wanted):
        assert_close(name, got, expected, 4e-3 if narrow and argument.dtype == jnp.bfloat16 else 2e-5)
        assert got is None or (got.dtype, got.shape) == (argument.dtype, argument.shape)


@pytest.mark.parametrize(
    ("shape", "dtype", "plain", "starts", "softplus", "reverse", "chunk_size"),
    [
        ((1, 1, 1, 96, 16), "float32", False, False, True, False, 128),
        ((2, 1, 7, 1100, 4), "float32", False, True, True, True, 128),  # two blocks of channels, the second not full
        ((2, 2, 33, 130, 4), "float32", False, True, True, False, 16),  # the last chunk is not full
        ((1, 1, 17, 96, 16), "float32", True, False, False, False, 16),
        ((4, 2, 33, 40, 1), "bfloat16", False, True, True, True, 16),
        ((1, 1, 7, 40, 64), "float32", False, True, True, True, 16),  # states in several passes over time
    ],
    ids=str,
)
def test_outputs_and_gradients(interpreted, shape, dtype, plain, starts, softplus, reverse, chunk_size):
    x = draw(*shape, dtype, plain=plain, starts=starts)
    check(x, softplus=softplus, reverse=reverse, chunk_size=chunk_size)


def test_the_unrolled_loops_that_chips_run(interpreted, monkeypatch):
    monkeypatch.setattr(kernel, "UNROLL_FORWARD", 8)
    monkeypatch.setattr(kernel, "UNROLL_RECOMPUTE", 16)
    monkeypatch.setattr(kernel, "UNROLL_BACKWARD", 8)
    check(draw(1, 1, 20, 40, 1, "float32", plain=False, starts=True), softplus=True, reverse=False, chunk_size=16)


def test_states_are_kept_on_request(interpreted):
    x = draw(1, 1, 7, 40, 1, "float32", plain=True, starts=False)
    assert kernel.forward(x, softplus=False, reverse=False, chunk_size=16, keep_states=False)[2] is None


@pytest.mark.parametrize("chunk_size", [0, 8, 100])
def test_chunks_are_multiples_of_a_tile(chunk_size):
    x = draw(1, 1, 1, 8, 1, "float32", plain=True, starts=False)
    with pytest.raises(ValueError, match=f"chunk_size={chunk_size} is not a positive multiple of 16"):
        kernel.forward(x, softplus=False, reverse=False, chunk_size=chunk_size, keep_states=False)


def shapes(R, L, E, N, dtype=jnp.float32, starts=False, chunk_size=128):
    """Arguments of `backward`; the first is `forward`'s."""
    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    array = lambda *shape: jax.ShapeDtypeStruct(shape, dtype)
    tokens, modes = array(R, L, E), array(R, L, N)
    x = Inputs(tokens, tokens, f32(1, N, E), modes, modes, f32(1, E), tokens, f32(1, E), f32(R, N, E), None)
    if starts:
        x = x._replace(starts=jax.ShapeDtypeStruct((R, L), jnp.bool_))
    return x, f32(R, -(-L // chunk_size), N, E), tokens, f32(R, N, E)


HOW = {"softplus": True, "reverse": False, "chunk_size": 128}
FORWARD = functools.partial(kernel.forward, **HOW, keep_states=True)
BACKWARD = functools.partial(kernel.backward, **HOW)


@needs_libtpu
@pytest.mark.parametrize("chip", CHIPS)
def test_the_widest_scans_compile(chip):
    arguments = shapes(2, 300, 8192, 128, jnp.bfloat16, starts=True)
    tpu.compile_for(chip, FORWARD, arguments[0])
    tpu.compile_for(chip, BACKWARD, *arguments)


@needs_gated_compiler
@pytest.mark.parametrize("chip", CHIPS)
def test_cycles_per_update(chip):
    """An update is one mode of 1024 channels in one step, with one exponential. Softplus, bias, skip and gate are on."""
    arguments = shapes(8, 4096, 2048, 16)
    loops = tpu.schedule(chip, FORWARD, arguments[0], kernel="forward_kernel")
    step = max(loops, key=lambda loop: loop.slots["EUP"] if loop.depth == 2 else 0)
    assert step.bundles <= 2.0 * step.slots["EUP"], tpu.report(loops)
    assert step.spills <= 0.1 * step.slots["EUP"], tpu.report(loops)

    loops = tpu.schedule(chip, BACKWARD, *arguments, kernel="backward_kernel")
    recompute, back = (loop for loop in loops if loop.depth == 3 and loop.slots["EUP"])
    cycles = [loop.bundles / loop.slots["EUP"] for loop in (recompute, back)]
    assert sum(cycles) <= 6.5, tpu.report(loops)
    assert recompute.spills + back.spills <= 0.1 * back.slots["EUP"], tpu.report(loops)
