"""The selective scan against a float64 loop with its gradients by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
from jax.test_util import check_grads

from seqjax.ops.complex_pairs import Pair
from seqjax.ops.selective_scan import selective_scan

NAMES = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias", "h0")


def made(seed, batch_size, length, features, modes, groups=1, without=()):
    """Inputs by name, float32."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    inputs = {
        "u": normal(batch_size, length, features),
        "dt": normal(batch_size, length, features) - 2,
        "A": -np.exp(normal(features, modes)),
        "B": normal(batch_size, length, groups, modes),
        "C": normal(batch_size, length, groups, modes),
        "D": normal(features),
        "z": normal(batch_size, length, features),
        "dt_bias": normal(features),
        "h0": normal(batch_size, modes, features),
    }
    return {name: value for name, value in inputs.items() if name not in without}


def scan(inputs, **options):
    return jax.jit(functools.partial(selective_scan, **options))(**jax.tree.map(jnp.asarray, inputs))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def expected(inputs, d_y, d_last, *, softplus=True, reverse=False, starts=None):
    """Outputs, last state, and gradients of `sum(d_y y) + sum(d_last last)`, token by token in float64."""
    given_names = set(inputs)
    batch_size, length, features = inputs["u"].shape
    modes = inputs["A"].shape[1]
    optional = {
        "D": np.zeros(features), "z": None, "dt_bias": np.zeros(features), "h0": np.zeros((batch_size, modes, features))
    }  # fmt: skip
    v = {k: None if x is None else np.asarray(x, np.float64) for k, x in {**optional, **inputs}.items()}
    repeats = features // v["B"].shape[2]
    b, c = (np.repeat(v[k], repeats, axis=2).swapaxes(2, 3) for k in ("B", "C"))  # [B, L, N, E]
    raw = v["dt"] + v["dt_bias"]
    delta = np.logaddexp(raw, 0) if softplus else raw
    gate = np.ones_like(v["u"]) if v["z"] is None else v["z"] * sigmoid(v["z"])
    A = v["A"].T
    starts = np.zeros((batch_size, length), bool) if starts is None else np.asarray(starts)
    # In reverse, a segment's last token comes first.
    resets = np.pad(starts[:, 1:], [(0, 0), (0, 1)]) if reverse else starts
    order = range(length)[::-1] if reverse else range(length)
    h, before, after, plain = v["h0"], {}, {}, np.zeros_like(v["u"])
    for t in order:
        before[t] = np.where(resets[:, t, None, None], 0, h)
        h = after[t] = np.exp(delta[:, t, None] * A) * before[t] + (delta * v["u"])[:, t, None] * b[:, t]
        plain[:, t] = (after[t] * c[:, t]).sum(1) + v["D"] * v["u"][:, t]
    last = h
    grads = {k: np.zeros_like(v[k]) for k in NAMES if v[k] is not None}
    if v["z"] is not None:
        s = sigmoid(v["z"])
        grads["z"] = d_y * plain * (s + v["z"] * s * (1 - s))
    d_plain = d_y * gate
    d_h, d_delta = np.asarray(d_last, np.float64), np.zeros_like(delta)
    grouped = lambda a: a.reshape(batch_size, modes, -1, repeats).sum(3).swapaxes(1, 2)  # [B, N, E] to [B, G, N]
    for t in reversed(order):
        d_h = d_h + c[:, t] * d_plain[:, t, None]
        grads["C"][:, t] = grouped(after[t] * d_plain[:, t, None])
        grads["B"][:, t] = grouped(d_h * (delta * v["u"])[:, t, None])
        d_driven = (d_h * b[:, t]).sum(1)
        decay = np.exp(delta[:, t, None] * A)
        d_exponent = d_h * decay * before[t]
        d_delta[:, t] = (d_exponent * A).sum(1) + d_driven * v["u"][:, t]
        grads["A"] += (d_exponent * delta[:, t, None]).sum(0).T
        grads["u"][:, t] = d_driven * delta[:, t] + v["D"] * d_plain[:, t]
        d_h = np.where(resets[:, t, None, None], 0, d_h * decay)
    grads["h0"] = d_h
    grads["D"] = (d_plain * v["u"]).sum((0, 1))
    grads["dt"] = d_delta * (sigmoid(raw) if softplus else 1)
    grads["dt_bias"] = grads["dt"].sum((0, 1))
    return plain * gate, last, {k: g for k, g in grads.items() if k in given_names}


def check(inputs, *, softplus=True, reverse=False, starts=None, tolerance=2e-6, gradient_tolerance=2e-5, **options):
    rng = np.random.default_rng(1)
    batch_size, _, features = inputs["u"].shape
    d_y, d_last = rng.normal(size=inputs["u"].shape), rng.normal(size=(batch_size, inputs["A"].shape[1], features))
    y, last, grads = expected(inputs, d_y, d_last, softplus=softplus, reverse=reverse, starts=starts)
    how = {"dt_softplus": softplus, "reverse": reverse, "return_state": True, **options}
    run = jax.jit(lambda inputs, starts: selective_scan(**inputs, starts=starts, **how))
    arrays = jax.tree.map(jnp.asarray, inputs)
    found, pull = jax.vjp(lambda inputs: run(inputs, None if starts is None else jnp.asarray(starts)), arrays)
    for mine, reference in zip(found, (y, last)):
        assert np.abs(mine - reference).max() <= tolerance * max(1, np.abs(reference).max())
    (mine,) = jax.jit(pull)((jnp.asarray(d_y, jnp.float32), jnp.asarray(d_last, jnp.float32)))
    assert set(mine) == set(grads)
    for name, reference in grads.items():
        assert np.abs(mine[name] - reference).max() <= gradient_tolerance * max(1, np.abs(reference).max()), name


IMPLEMENTATIONS = ["xla", "reference"]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [1, 7, 41])
def test_equals_a_float64_loop(implementation, length, reverse):
    starts = np.random.default_rng(5).random((2, length)) < 0.2
    check(made(0, 2, length, 6, 4), reverse=reverse, starts=starts, implementation=implementation)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_gpu"])
def test_kernels_behind_the_same_function(implementation, reverse):
    """Groups folded and unfolded, states and gradients; the kernels' own tests are wider."""
    module = pltpu if implementation == "pallas_tpu" else plgpu
    interpreted = getattr(module, f"force_{implementation[-3:]}_interpret_mode", None)
    if interpreted is None:
        pytest.skip("this JAX has no interpreter for Mosaic GPU; 0.11 has")
    starts = np.random.default_rng(5).random((2, 18)) < 0.2
    with interpreted():
        check(made(14, 2, 18, 6, 4, groups=2), reverse=reverse, starts=starts, chunk_size=9, implementation=implementation)


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="this JAX has what the GPU kernel needs")
def test_the_gpu_kernel_is_refused_by_an_older_jax():
    with pytest.raises(ValueError, match="implementation='pallas_gpu' does not serve this call; allowed here: None"):
        scan(made(16, 1, 4, 2, 2), implementation="pallas_gpu")


def test_kernels_do_not_serve_what_they_cannot():
    inputs = made(15, 1, 4, 2, 130)
    with pytest.raises(ValueError, match="does not serve this call"):
        scan(inputs, implementation="pallas_tpu")


@pytest.mark.parametrize("without", [(), ("D",), ("z", "dt_bias"), ("h0", "D", "z", "dt_bias")])
@pytest.mark.parametrize("groups", [1, 3])
def test_groups_and_optional_inputs(groups, without):
    check(made(1, 2, 9, 6, 4, groups, without))


@pytest.mark.parametrize("modes", [1, 16, 64])
def test_numbers_of_modes(modes):
    check(made(2, 1, 11, 5, modes))


@settings(deadline=None, max_examples=10)
@given(
    length=st.integers(2, 40),
    chunk_size=st.sampled_from([1, 3, 8, 100]),
    reverse=st.booleans(),
    probability=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 99),
)
def test_any_chunks_and_segments(length, chunk_size, reverse, probability, seed):
    starts = np.random.default_rng(seed).random((2, length)) < probability
    check(made(seed, 2, length, 3, 2), reverse=reverse, starts=starts, chunk_size=chunk_size)


def test_steps_without_softplus_may_be_zero_or_long():
    inputs = made(3, 2, 12, 4, 3, without=("dt_bias",))
    inputs["dt"] = np.abs(inputs["dt"])
    inputs["dt"][:, 3], inputs["dt"][:, 7] = 0, 1e3
    check(inputs, softplus=False, tolerance=2e-5, gradient_tolerance=1e-4)


def test_segment_ids_continue_the_first_segment_from_the_state():
    inputs = made(4, 2, 8, 4, 3)
    ids = np.array([[3, 3, 3, 1, 1, 3, 3, 3], [0, 1, 2, 2, 2, 2, 2, 2]])
    starts = np.pad(ids[:, 1:] != ids[:, :-1], [(0, 0), (1, 0)])
    np.testing.assert_array_equal(scan({**inputs, "segment_ids": ids}), scan({**inputs, "starts": starts}))


@pytest.mark.parametrize("step", [None, 1e-4])
def test_long_sequences_lose_no_more_than_a_plain_loop(step):
    """At most twice the error of the same loop in float32; and for random steps of 1e-3 and above, little at all."""
    length, features, modes = 4099, 4, 4
    inputs = made(6, 1, length, features, modes, without=("D", "z", "dt_bias"))
    rng = np.random.default_rng(7)
    size = inputs["dt"].shape
    inputs["dt"] = np.full(size, step, np.float32) if step else np.exp(rng.uniform(np.log(1e-3), np.log(0.1), size)).astype("f")
    inputs["A"] = -np.tile(np.arange(1, modes + 1, dtype=np.float32), (features, 1))
    inputs["B"], inputs["C"] = inputs["B"][:, :, 0], inputs["C"][:, :, 0]
    inputs["h0"] = np.zeros_like(inputs["h0"])
    wide = {k: np.asarray(v, np.float64) for k, v in inputs.items()}

    def loop(values, dtype):
        h, y = np.zeros((1, modes, features), dtype), np.zeros(size, dtype)
        for t in range(length):
            delta, u, b, c = (np.asarray(values[k][:, t], dtype) for k in ("dt", "u", "B", "C"))
            h = np.exp(delta[:, None] * values["A"].T.astype(dtype)) * h + (delta * u)[:, None] * b[:, :, None]
            y[:, t] = (h * c[:, :, None]).sum(1)
        return y

    exact = loop(wide, np.float64)
    error = lambda y: np.abs(y - exact).max() / np.abs(exact).max()
    found = error(np.asarray(scan(inputs)))
    assert found <= 2 * error(loop(inputs, np.float32))
    if step is None:
        assert found <= 2e-6


def test_gradients_by_finite_differences():
    with jax.enable_x64(True):
        inputs = {k: jnp.asarray(v, jnp.float64) for k, v in made(8, 2, 5, 3, 2).items()}
        run = functools.partial(selective_scan, dt_softplus=True, return_state=True, chunk_size=2)
        check_grads(lambda inputs: run(**jax.tree.map(jnp.asarray, inputs)), (inputs,), order=1, modes=["rev"])


def test_bfloat16():
    inputs = made(9, 2, 33, 8, 4)
    y, *_ = expected(inputs, np.zeros(inputs["u"].shape), np.zeros(inputs["h0"].shape))
    narrow = {k: jnp.asarray(v, jnp.bfloat16) if k in ("u", "dt", "B", "C", "z") else v for k, v in inputs.items()}
    y, *_ = expected({k: np.asarray(v, np.float64) for k, v in narrow.items()}, np.zeros(y.shape), np.zeros(inputs["h0"].shape))
    found, state = scan(narrow, dt_softplus=True, return_state=True)
    assert found.dtype == jnp.bfloat16
    assert state.dtype == jnp.float32
    assert np.abs(np.asarray(found, np.float64) - y).max() <= 1e-2 * np.abs(y).max()


@pytest.mark.parametrize("changing", ["", "B", "C"])
def test_complex_modes_and_weights_of_no_token(changing):
    rng = np.random.default_rng(10)
    batch_size, length, features, modes = 2, 13, 3, 2
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    u, dt = normal(batch_size, length, features), np.abs(normal(batch_size, length, features))
    A = -np.exp(normal(features, modes)) + 1j * normal(features, modes)
    shape = {name: (batch_size, length, modes) if name in changing else (features, modes) for name in "BC"}
    weights = {name: normal(*shape[name]) + 1j * normal(*shape[name]) for name in "BC"}
    h, y = np.zeros((batch_size, features, modes), complex), np.zeros(u.shape)
    for t in range(length):
        b, c = (w[:, t, None] if name in changing else w for name, w in weights.items())
        h = np.exp(dt[:, t, :, None].astype(float) * A) * h + (dt * u)[:, t, :, None] * b
        y[:, t] = 2 * (c * h).sum(2).real
    pair = lambda a: Pair(jnp.asarray(a.real, jnp.float32), jnp.asarray(a.imag, jnp.float32))
    inputs = {"u": u, "dt": dt, "A": pair(A), "B": pair(weights["B"]), "C": pair(weights["C"])}
    found, state = scan(inputs, return_state=True)
    np.testing.assert_allclose(found, y, atol=2e-6 * np.abs(y).max())
    np.testing.assert_allclose(state.real + 1j * state.imag, h.swapaxes(1, 2), atol=2e-6 * np.abs(h).max())


def test_real_weights_of_no_token():
    inputs = made(11, 2, 9, 3, 2, without=("z", "D"))
    fixed = np.random.default_rng(12).normal(size=(3, 2)).astype(np.float32)
    repeated = np.broadcast_to(fixed[None, None], (2, 9, 3, 2))  # as many groups as features
    found = scan({**inputs, "B": fixed, "C": inputs["C"][:, :, 0]}, dt_softplus=True)
    apart = {**inputs, "B": repeated, "C": np.repeat(inputs["C"], 3, axis=2)}
    np.testing.assert_allclose(found, scan(apart, dt_softplus=True), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "palas_tpu"}, "palas_tpu"),
        ({"B": np.zeros((2, 4, 4, 2), np.float32)}, "4 groups do not divide 6 features"),
        ({"B": np.zeros((6, 2), np.float32), "implementation": "reference"}, "constant weights"),
    ],
)
def test_mistakes(change, message):
    inputs = made(13, 2, 4, 6, 2)
    inputs["C"] = inputs["C"][:, :, 0]
    with pytest.raises(ValueError, match=message):
        selective_scan(**{k: v if isinstance(v, str) else jnp.asarray(v) for k, v in {**inputs, **change}.items()})
