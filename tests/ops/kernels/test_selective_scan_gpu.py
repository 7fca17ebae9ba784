"""The Mosaic GPU selective scan against a loop in NumPy float64, interpreted on CPU; and what ptxas makes of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from seqjax.ops.kernels import selective_scan_gpu
from seqjax.ops.kernels.selective_scan import Inputs
from seqjax.testing.gpu import available, compile_kernels, float32_operations

FORWARD_TOLERANCE = 2e-6
GRADIENT_TOLERANCE = 2e-5
BFLOAT16_TOLERANCE = 2.0**-8
OPTIONS = ("D", "z", "dt_bias", "starts")

interpreted = pytest.mark.skipif(
    not hasattr(plgpu, "force_gpu_interpret_mode"), reason="this JAX has no interpreter for Mosaic GPU; 0.11 has"
)
compiled = pytest.mark.skipif(
    not available() or not hasattr(plgpu, "force_gpu_interpret_mode"),
    reason="needs JAX 0.11 and its CUDA plugin: pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt",
)


def draw(length, width, state_dim, rows=1, groups=1, options=OPTIONS, softplus=True, dtype=jnp.float32):
    rng = np.random.default_rng(length + width + state_dim)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    dt = normal(rows, length, width) - 1
    starts = rng.random((rows, length)) < 0.15
    starts[:, 0] = np.arange(rows) % 2 == 1
    inputs = Inputs(
        u=normal(rows, length, width),
        dt=dt if softplus else np.abs(dt),
        A=-np.exp(normal(groups, state_dim, width)),
        B=normal(rows, length, state_dim),
        C=normal(rows, length, state_dim),
        D=normal(groups, width) if "D" in options else None,
        z=normal(rows, length, width) if "z" in options else None,
        dt_bias=np.abs(normal(groups, width)) if "dt_bias" in options else None,
        h0=normal(rows, state_dim, width),
        starts=starts if "starts" in options else None,
    )
    tokens = ("u", "dt", "B", "C", "z")
    arrays = {
        name: jnp.asarray(x, dtype if name in tokens else x.dtype) for name, x in inputs._asdict().items() if x is not None
    }
    d_out, d_last = normal(rows, length, width), normal(rows, state_dim, width)
    return inputs._replace(**arrays), jnp.asarray(d_out, dtype), jnp.asarray(d_last)


def double(inputs):
    return Inputs(*(x if x is None or x.dtype == bool else np.asarray(x, np.float64) for x in inputs))


def steps(inputs, row, h, softplus, reverse):
    """One row, a step at a time: (t, state before, decay, dt before the softplus, time step, state after)."""
    group, length = row % inputs.A.shape[0], inputs.u.shape[1]
    for t in reversed(range(length)) if reverse else range(length):
        rate = inputs.dt[row, t] + (0 if inputs.dt_bias is None else inputs.dt_bias[group])
        delta = np.logaddexp(0, rate) if softplus else rate
        edge = t + 1 if reverse else t
        crossed = inputs.starts is not None and edge < length and inputs.starts[row, edge]
        decay = np.zeros_like(h) if crossed else np.exp(delta * inputs.A[group])
        before, h = h, decay * h + delta * inputs.u[row, t] * inputs.B[row, t][:, None]
        yield t, before, decay, rate, delta, h


def by_hand(inputs, chunk_size, softplus, reverse):
    """Outputs, last states, and the states before each chunk."""
    inputs = double(inputs)
    out, last, kept = np.zeros(inputs.u.shape), np.zeros(inputs.h0.shape), []
    for row in range(len(last)):
        kept_here = []
        for number, (t, before, *_, h) in enumerate(steps(inputs, row, inputs.h0[row], softplus, reverse)):
            if number % chunk_size == 0:
                kept_here.append(before)
            y = (inputs.C[row, t][:, None] * h).sum(0)
            y += 0 if inputs.D is None else inputs.D[row % inputs.A.shape[0]] * inputs.u[row, t]
            out[row, t] = y if inputs.z is None else y * inputs.z[row, t] / (1 + np.exp(-inputs.z[row, t]))
        last[row] = h
        kept.append(kept_here)
    return out, last, np.array(kept)


def gradients_by_hand(inputs, d_out, d_last, softplus, reverse):
    inputs, d_out, d_last = double(inputs), np.asarray(d_out, np.float64), np.asarray(d_last, np.float64)
    d = {name: np.zeros_like(x) for name, x in inputs._asdict().items() if x is not None and name != "starts"}
    for row in range(len(d_last)):
        group, d_h = row % inputs.A.shape[0], d_last[row]
        D = 0 if inputs.D is None else inputs.D[group]
        for t, before, decay, rate, delta, h in reversed(list(steps(inputs, row, inputs.h0[row], softplus, reverse))):
            u, B, C, d_y = inputs.u[row, t], inputs.B[row, t][:, None], inputs.C[row, t][:, None], d_out[row, t]
            if inputs.z is not None:
                z, s = inputs.z[row, t], 1 / (1 + np.exp(-inputs.z[row, t]))
                d["z"][row, t] = d_y * ((C * h).sum(0) + D * u) * s * (1 + z * (1 - s))
                d_y = d_y * z * s
            d_h = d_h + d_y * C
            d["C"][row, t], d["B"][row, t] = (d_y * h).sum(1), (d_h * delta * u).sum(1)
            d["A"][group] += d_h * before * decay * delta
            d["u"][row, t] = delta * (d_h * B).sum(0) + D * d_y
            d_rate = u * (d_h * B).sum(0) + (d_h * before * decay * inputs.A[group]).sum(0)
            d_rate = d_rate / (1 + np.exp(-rate)) if softplus else d_rate
            d["dt"][row, t] = d_rate
            if inputs.D is not None:
                d["D"][group] += d_y * u
            if inputs.dt_bias is not None:
                d["dt_bias"][group] += d_rate
            d_h = d_h * decay
        d["h0"][row] = d_h
    return d


def assert_near(got, want, tolerance, name):
    error = np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max()
    assert error <= tolerance, f"{name}: {error:.1e}"


CASES = {
    "one_token": dict(length=1, width=20, state_dim=1),
    "short": dict(length=7, width=20, state_dim=4, groups=2, rows=4),
    "plain": dict(length=7, width=20, state_dim=16, options=(), softplus=False),
    "wide": dict(length=9, width=140, state_dim=16),
    "long": dict(length=33, width=20, state_dim=16, rows=2, groups=2),
    "reverse": dict(length=33, width=20, state_dim=16, reverse=True),
    "no_softplus": dict(length=7, width=20, state_dim=4, softplus=False, reverse=True),
    "gate_alone": dict(length=7, width=20, state_dim=4, options=("z",)),
    "skip_alone": dict(length=7, width=20, state_dim=4, options=("D",)),
    "bfloat16": dict(length=9, width=20, state_dim=4, dtype=jnp.bfloat16),
    "chunks_of_two_tiles": dict(length=19, width=20, state_dim=4, rows=2, chunk_size=16),
    "chunks_of_two_tiles_reverse": dict(length=19, width=20, state_dim=4, chunk_size=16, reverse=True),
    "parts": dict(length=20, width=20, state_dim=4, rows=2, groups=2, parts=3),
    "parts_reverse": dict(length=33, width=20, state_dim=4, parts=3, chunk_size=16, reverse=True),
    "many_states": dict(length=3, width=20, state_dim=64),
    "most_states": dict(length=3, width=20, state_dim=128),
}


@interpreted
@pytest.mark.parametrize("case", CASES)
def test_outputs_states_and_gradients_equal_a_loop(case):
    how = {"softplus": True, "reverse": False, "chunk_size": 8, "parts": 1} | CASES[case]
    how = {name: how.pop(name) for name in ("softplus", "reverse", "chunk_size", "parts")} | {"draw": how}
    inputs, d_out, d_last = draw(**how.pop("draw"), softplus=how["softplus"])

    @jax.jit
    def run(inputs, d_out, d_last):
        out, last, states = selective_scan_gpu.forward(inputs, **how, keep_states=True)
        return out, last, states, selective_scan_gpu.backward(inputs, states, d_out, d_last, **how)

    with plgpu.force_gpu_interpret_mode():
        out, last, states, gradients = run(inputs, d_out, d_last)
    how.pop("parts")
    bfloat16 = inputs.u.dtype == jnp.bfloat16
    want = by_hand(inputs, **how)
    assert_near(out, want[0], BFLOAT16_TOLERANCE if bfloat16 else FORWARD_TOLERANCE, "out")
    assert_near(last, want[1], FORWARD_TOLERANCE, "last")
    assert_near(states, want[2], FORWARD_TOLERANCE, "states")
    how.pop("chunk_size")
    for name, want in gradients_by_hand(inputs, d_out, d_last, **how).items():
        got = getattr(gradients, name)
        assert got.dtype == getattr(inputs, name).dtype
        assert_near(got, want, BFLOAT16_TOLERANCE if got.dtype == jnp.bfloat16 else GRADIENT_TOLERANCE, f"gradient of {name}")
    absent = [name for name, x in inputs._asdict().items() if x is None or name == "starts"]
    assert all(getattr(gradients, name) is None for name in absent)


@interpreted
def test_runs_with_x64_enabled():
    inputs, d_out, d_last = draw(9, 20, 4)
    how = {"softplus": True, "reverse": True, "chunk_size": 8}
    with jax.enable_x64(True), plgpu.force_gpu_interpret_mode():
        out, _, states = selective_scan_gpu.forward(inputs, **how, keep_states=True)
        gradients = selective_scan_gpu.backward(inputs, states, d_out, d_last, **how)
    assert out.dtype == gradients.u.dtype == gradients.A.dtype == jnp.float32
    assert_near(out, by_hand(inputs, **how)[0], FORWARD_TOLERANCE, "out")


@interpreted
def test_copies_and_threads_do_not_race(capfd):
    inputs, d_out, d_last = draw(41, 20, 4)
    how = {"softplus": True, "reverse": False, "chunk_size": 8, "parts": 1}
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        out, _, states = selective_scan_gpu.forward(inputs, **how, keep_states=True)
        jax.block_until_ready((out, selective_scan_gpu.backward(inputs, states, d_out, d_last, **how)))
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


@interpreted
def test_states_are_kept_only_on_request():
    inputs, *_ = draw(3, 20, 4, options=())
    with plgpu.force_gpu_interpret_mode():
        out = selective_scan_gpu.forward(inputs, softplus=True, reverse=False, chunk_size=8, keep_states=False)
    assert out[2] is None


@pytest.mark.parametrize(
    ("state_dim", "chunk_size", "message"), [(129, 8, "state_dim=129"), (4, 12, "chunk_size=12"), (4, 0, "chunk_size=0")]
)
def test_what_the_kernel_does_not_serve_is_an_error(state_dim, chunk_size, message):
    inputs, *_ = draw(3, 20, state_dim)
    with pytest.raises(ValueError, match=message):
        selective_scan_gpu.forward(inputs, softplus=True, reverse=False, chunk_size=chunk_size, keep_states=False)


def abstract(state_dim, rows=8, length=4096, width=2048, options=OPTIONS, dtype=jnp.bfloat16):
    """Shapes and dtypes of a call, and of what the backward pass adds."""
    shape = lambda dtype, *sizes: jax.ShapeDtypeStruct(sizes, dtype)
    optional = lambda name, *args: shape(*args) if name in options else None
    inputs = Inputs(
        u=shape(dtype, rows, length, width),
        dt=shape(dtype, rows, length, width),
        A=shape(jnp.float32, 1, state_dim, width),
        B=shape(dtype, rows, length, state_dim),
        C=shape(dtype, rows, length, state_dim),
        D=optional("D", jnp.float32, 1, width),
        z=optional("z", dtype, rows, length, width),
        dt_bias=optional("dt_bias", jnp.float32, 1, width),
        h0=shape(jnp.float32, rows, state_dim, width),
        starts=optional("starts", jnp.bool_, rows, length),
    )
    states = shape(jnp.float32, rows, length // 8, state_dim, width)
    return inputs, states, inputs.u, inputs.h0


HOW = {"softplus": True, "reverse": False, "chunk_size": 8}


@compiled
def test_four_operations_update_a_state():
    inputs, *_ = abstract(16, options=(), dtype=jnp.float32)
    how = HOW | {"softplus": False, "keep_states": False}
    [kernel] = compile_kernels(functools.partial(selective_scan_gpu.forward, **how), inputs)
    [loop] = kernel.loops
    assert loop["ex2.approx.ftz.f32"] == 16
    assert float32_operations(loop) / 16 <= 4.2
    assert kernel.spilled_bytes == 0
    assert kernel.registers <= 96


@compiled
def test_the_backward_pass_fits_a_multiprocessor_twice():
    inputs = abstract(16)
    [kernel] = compile_kernels(functools.partial(selective_scan_gpu.backward, **HOW), *inputs)
    again, back = kernel.loops
    assert again["ex2.approx.ftz.f32"] == back["ex2.approx.ftz.f32"] == 16
    assert float32_operations(again) + float32_operations(back) <= 21 * 16
    assert kernel.spilled_bytes == 0
    assert 2 * 128 * kernel.registers <= 65536
    assert 2 * (kernel.shared_bytes + 1024) <= 233472


@compiled
@pytest.mark.parametrize("state_dim", [4, 64, 128])
def test_nothing_is_spilled(state_dim):
    arguments = abstract(state_dim)
    forward = functools.partial(selective_scan_gpu.forward, **HOW, keep_states=True)
    kernels = compile_kernels(forward, arguments[0])
    kernels += compile_kernels(functools.partial(selective_scan_gpu.backward, **HOW), *arguments)
    assert [kernel.spilled_bytes for kernel in kernels] == [0, 0]


@compiled
def test_a_long_row_is_divided():
    arguments = abstract(16, rows=1, length=65536)
    forward = functools.partial(selective_scan_gpu.forward, **HOW, keep_states=True)
    kernels = compile_kernels(forward, arguments[0])
    kernels += compile_kernels(functools.partial(selective_scan_gpu.backward, **HOW), *arguments)
    assert [kernel.spilled_bytes for kernel in kernels] == [0, 0, 0, 0]
