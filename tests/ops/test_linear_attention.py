"""Linear attention with decay against a loop over tokens in NumPy float64, forward and back."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from seqjax.ops.linear_attention import linear_attention, linear_attention_flops
from seqjax.scaling.flops import count_flops

DATA = pathlib.Path(__file__).parent / "data"
GOLDEN = np.load(DATA / "mamba2_ssd.npz")
RULES = np.load(DATA / "linear_attention.npz")
HEADS, KEY, VALUE = 4, 3, 2
NAMES = ("q", "k", "v", "log_decay", "state")


FORMS = {"head": (False, False), "channel": (True, False), "delta": (False, True), "channel delta": (True, True)}
"""What a form has: decays per channel, the delta rule."""


def draw(length, groups=2, seed=0, decay=1.0, form="head"):
    rng = np.random.default_rng(seed)
    channels, delta = FORMS[form]
    made = {
        "q": rng.standard_normal((2, length, groups, KEY)),
        "k": rng.standard_normal((2, length, groups, KEY)),
        "v": rng.standard_normal((2, length, HEADS, VALUE)),
        "log_decay": -decay * rng.exponential(size=(2, length, HEADS, *[KEY] * channels)),
        "state": rng.standard_normal((2, HEADS, KEY, VALUE)),
    }
    if delta:  # lengths of 1 and below keep the recurrence bounded
        made["k"] /= np.linalg.norm(made["k"], axis=-1, keepdims=True)
        made["beta"] = rng.uniform(0, 2, (2, length, HEADS))
    return made


def write(a, b, t, h, k, decayed):
    """What is added to the state along k, and the error that it is made of."""
    if "beta" not in a:
        return a["v"][b, t, h], None
    error = a["v"][b, t, h] - decayed.T @ k
    return a["beta"][b, t, h] * error, error


def loop(a, starts=None, reverse=False):
    """Outputs and the last state, one row, head and token at a time; and the states before each step, for `loop_back`."""
    batch, length, groups, _ = a["q"].shape
    y, last, before = np.zeros_like(a["v"]), a["state"].copy(), {}
    for b in range(batch):
        for h in range(HEADS):
            group, state = h * groups // HEADS, a["state"][b, h]
            for t in reversed(range(length)) if reverse else range(length):
                edge = t + 1 if reverse else t
                if starts is not None and edge < length and starts[b, edge]:
                    state = np.zeros_like(state)
                before[b, h, t] = state
                k, decayed = a["k"][b, t, group], np.exp(a["log_decay"][b, t, h]).reshape(-1, 1) * state
                state = decayed + np.outer(k, write(a, b, t, h, k, decayed)[0])
                y[b, t, h] = state.T @ a["q"][b, t, group]
            last[b, h] = state
    return y, last, before


def loop_back(a, d_y, d_last, starts=None, reverse=False):
    """Gradients of `<y, d_y> + <last, d_last>`, by the chain rule backwards through the loop."""
    batch, length, groups, _ = a["q"].shape
    before, d = loop(a, starts, reverse)[2], {name: np.zeros_like(x) for name, x in a.items()}
    for b in range(batch):
        for h in range(HEADS):
            group, d_state = h * groups // HEADS, d_last[b, h]
            for t in range(length) if reverse else reversed(range(length)):
                q, k, decay = a["q"][b, t, group], a["k"][b, t, group], np.exp(a["log_decay"][b, t, h]).reshape(-1, 1)
                decayed = decay * before[b, h, t]
                written, error = write(a, b, t, h, k, decayed)
                d["q"][b, t, group] += (decayed + np.outer(k, written)) @ d_y[b, t, h]
                d_state = d_state + np.outer(q, d_y[b, t, h])
                d["k"][b, t, group] += d_state @ written
                d_written = d_state.T @ k
                if error is not None:
                    d["beta"][b, t, h] += d_written @ error
                    d_written = a["beta"][b, t, h] * d_written
                    d["k"][b, t, group] -= decayed @ d_written
                    d_state = d_state - np.outer(k, d_written)
                d["v"][b, t, h] += d_written
                through = d_state * decayed
                d["log_decay"][b, t, h] += through.sum(-1) if a["log_decay"].ndim == 4 else through.sum()
                d_state = decay * d_state
                edge = t + 1 if reverse else t
                if starts is not None and edge < length and starts[b, edge]:
                    d_state = np.zeros_like(d_state)
            d["state"][b, h] = d_state
    return d


@functools.cache
def compiled(**options):
    """Outputs, last state and gradients."""

    def both(a, d_y, d_last, starts):
        run = lambda a: linear_attention(*(a[name] for name in NAMES), beta=a.get("beta"), starts=starts, **options)
        found, pull = jax.vjp(run, a)
        return found, pull((d_y, d_last))[0]

    return jax.jit(both)


def assert_close(got, want, tolerance=1e-12):
    assert np.all(np.isfinite(got))
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1, np.abs(want).max()))


def check(a, starts, reverse, dtype=np.float64, tolerance=1e-12, **options):
    rng = np.random.default_rng(1)
    d_y, d_last = rng.standard_normal(a["v"].shape), rng.standard_normal(a["state"].shape)
    with jax.enable_x64(dtype == np.float64):
        cast = functools.partial(jax.tree.map, lambda x: jnp.asarray(x, dtype))
        traced = None if starts is None else jnp.asarray(starts)
        (y, last), d = compiled(reverse=reverse, **options)(cast(a), cast(d_y), cast(d_last), traced)
    # The loop takes the inputs as the op saw them: rounded.
    a, d_y, d_last = jax.tree.map(lambda x: x.astype(dtype).astype(np.float64), (a, d_y, d_last))
    want_y, want_last, _ = loop(a, starts, reverse)
    assert_close(y, want_y, tolerance)
    assert_close(last, want_last, tolerance)
    for name, want in loop_back(a, d_y, d_last, starts, reverse).items():
        assert_close(d[name], want, tolerance)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(
    ("length", "options"),
    [
        (1, {}),
        (13, {"chunk_size": 4}),
        (32, {"chunk_size": 16}),
        (45, {"chunk_size": 24}),
        (50, {"chunk_size": 50}),
        (67, {"chunk_size": 32}),
        (130, {}),
        (9, {"implementation": "reference"}),
    ],
)
@pytest.mark.parametrize("reverse", [False, True])
def test_equals_a_loop(length, groups, options, reverse):
    """Chunks of one block, of several of 16 and of 8, and lengths that are no multiple of any."""
    starts = np.random.default_rng(length).random((2, length)) < 0.1
    check(draw(length, groups), starts, reverse, **options)


@pytest.mark.parametrize("form", list(FORMS)[1:])
@pytest.mark.parametrize(
    ("length", "groups", "reverse", "options"),
    [
        (1, 4, False, {}),
        (13, 2, True, {"chunk_size": 4}),
        (45, 4, False, {"chunk_size": 24}),
        (67, 1, False, {}),
        (9, 2, True, {"implementation": "reference"}),
    ],
)
def test_other_forms_equal_a_loop(form, length, groups, reverse, options):
    """Decays per channel and the delta rule, with beta up to 2."""
    starts = np.random.default_rng(length).random((2, length)) < 0.1
    check(draw(length, groups, form=form), starts, reverse, tolerance=1e-11, **options)


@pytest.mark.parametrize("form", list(FORMS)[1:])
@pytest.mark.parametrize("decay", [1e-4, 0.1, 30.0])
def test_other_forms_keep_their_digits_in_float32(form, decay):
    """Also where the sum of a chunk's decays, or of one token's, is far below what an exponential can take back."""
    starts = np.random.default_rng(0).random((2, 200)) < 0.02
    check(draw(200, 4, decay=decay, form=form), starts, False, np.float32, 1e-5)


def test_channels_that_forget_stand_beside_channels_that_remember():
    a = draw(130, 4, form="channel delta")
    a["log_decay"] *= np.array([0.0, 1e-3, 60.0])
    check(a, None, False, np.float32, 1e-5)


@pytest.mark.parametrize("chunk_size", [1, 2, 8, 16, 40, 100])
def test_does_not_depend_on_the_chunk_size(chunk_size):
    check(draw(40), None, False, chunk_size=chunk_size)


@settings(max_examples=40, deadline=None)
@given(
    chunk_size=st.sampled_from([1, 3, 7, 100]),
    reverse=st.booleans(),
    starts=st.none() | st.lists(st.booleans(), min_size=14, max_size=14),
    seed=st.integers(0, 9),
)
def test_any_starts_and_any_chunks(chunk_size, reverse, starts, seed):
    starts = None if starts is None else np.array(starts).reshape(2, 7)
    check(draw(7, seed=seed), starts, reverse, chunk_size=chunk_size)


def test_gradients_equal_finite_differences():
    starts = jnp.asarray([[False, False, True, False, False], [True, False, False, False, True]])
    with jax.enable_x64(True):
        run = lambda *a: linear_attention(*map(jnp.asarray, a), starts=starts, chunk_size=2)
        check_grads(run, [draw(5)[name] for name in NAMES], order=1, modes=["rev"])


@pytest.mark.parametrize("decay", [1e-4, 0.1, 5.0])
def test_float32_keeps_its_digits(decay):
    """Also where running sums of the decay grow to hundreds, whose differences would be wrong in the fifth digit."""
    starts = np.random.default_rng(0).random((2, 200)) < 0.02
    check(draw(200, decay=decay), starts, False, np.float32, 2e-6, chunk_size=128)


def test_bfloat16_keeps_its_state_in_float32():
    a = {name: jnp.asarray(x, jnp.bfloat16) for name, x in draw(50).items()}
    y, last = linear_attention(*(a[name] for name in NAMES), chunk_size=16)
    assert y.dtype == jnp.bfloat16 and last.dtype == jnp.float32
    want_y, want_last, _ = loop({name: np.asarray(x, np.float64) for name, x in a.items()})
    assert_close(y.astype(np.float32), want_y, 2e-2)
    assert_close(last, want_last, 2e-2)


def test_no_decay_is_a_running_sum():
    a = draw(50)
    with jax.enable_x64(True):
        qkv = [jnp.asarray(a[name]) for name in "qkv"]
        y, last = jax.jit(functools.partial(linear_attention, chunk_size=16))(*qkv)
        shared, _ = jax.jit(linear_attention)(*qkv, -jnp.ones((1, 1, HEADS)))
    a |= {"log_decay": np.zeros((2, 50, HEADS)), "state": np.zeros_like(a["state"])}
    want_y, want_last, _ = loop(a)
    assert_close(y, want_y)
    assert_close(last, want_last)
    assert_close(shared, loop(a | {"log_decay": a["log_decay"] - 1})[0])


@pytest.mark.parametrize(("form", "chunk_size"), [("head", 1), *((form, size) for form in FORMS for size in (8, 40))])
@pytest.mark.parametrize("by", ["starts", "log_decay"])
def test_a_reset_is_exact(by, form, chunk_size):
    """Nothing is left of a state that any decay factor above zero would let through; nor in gradients."""
    a, at = draw(40, form=form), 21
    a["state"] *= 1e30
    a["log_decay"][:, :at] = -1e-3
    options = {"chunk_size": chunk_size}
    if by == "starts":
        options["starts"] = jnp.zeros((2, 40), bool).at[:, at].set(True)
    else:
        a["log_decay"][:, at] = -np.inf

    def after(a):
        y, last = linear_attention(*(a[name] for name in NAMES), beta=a.get("beta"), **options)
        return jnp.sum(y[:, at:] ** 2) + jnp.sum(last**2), (y, last)

    with jax.enable_x64(True):
        grads, (y, last) = jax.jit(jax.grad(after, has_aux=True))(a)
        alone = {name: x if name == "state" else x[:, at:].copy() for name, x in a.items()}
        alone["state"] = np.zeros_like(a["state"])
        alone["log_decay"][:, 0] = 0
        want_y, want_last, _ = loop(alone)
    assert_close(y[:, at:], want_y)
    assert_close(last, want_last)
    for name in ("q", "k", "v"):
        assert not np.any(grads[name][:, :at]) and np.all(np.isfinite(grads[name]))
    assert not np.any(grads["state"]) and np.all(np.isfinite(grads["log_decay"]))
    if by == "starts":
        assert not np.any(grads["log_decay"][:, at])


def normalized(a):
    """Values with a one beside them, by a loop; numerator over denominator."""
    ones = np.ones((*a["v"].shape[:-1], 1))
    y, last, _ = loop(a | {"v": np.concatenate([a["v"], ones], axis=-1)})
    return y[..., :-1] / (y[..., -1:] + 1e-6), last


def test_the_normalizer_is_a_running_sum_of_keys():
    a = draw(50, 4)
    a |= {name: np.abs(a[name]) for name in "qk"} | {
        "state": np.abs(np.random.default_rng(3).random((2, HEADS, KEY, VALUE + 1)))
    }
    with jax.enable_x64(True):
        run = functools.partial(linear_attention, normalize=True, chunk_size=16)
        y, last = jax.jit(run)(*(jnp.asarray(a[name]) for name in NAMES))
    want_y, want_last = normalized(a)
    assert_close(y, want_y)
    assert_close(last, want_last)


def test_chained_calls_equal_one():
    with jax.enable_x64(True):
        *sequences, state = (jnp.asarray(draw(40)[name]) for name in NAMES)
        call = jax.jit(functools.partial(linear_attention, chunk_size=12))
        y, last = call(*sequences, state)
        parts = []
        for part in (slice(0, 1), slice(1, 28), slice(28, 40)):
            out, state = call(*(a[:, part] for a in sequences), state)
            parts.append(out)
        assert_close(jnp.concatenate(parts, 1), y, 1e-13)
        assert_close(state, last, 1e-13)


def test_equals_the_authors():
    """The minimal SSD of Mamba-2's authors. Each of its heads has queries and keys of its own."""
    transposed = lambda a: np.swapaxes(a, -1, -2)
    x, dt = GOLDEN["X"], GOLDEN["dt"]
    with jax.enable_x64(True):
        state = jnp.asarray(transposed(GOLDEN["init_state"][:, 0]))
        inputs = (GOLDEN["C"], GOLDEN["B"], x * dt[..., None], GOLDEN["a"] * dt)
        y, last = linear_attention(*map(jnp.asarray, inputs), state, chunk_size=8)
    assert_close(y, GOLDEN["Y_init"], 1e-14)
    assert_close(last, transposed(GOLDEN["final_state_init"]), 1e-14)


def rule(name, *keys):
    """Arrays of `name`, and a run of the op on its queries, scaled, its keys and its values."""
    get = lambda key: RULES[f"{name}.{key}"]
    q, k, v = (get(key) for key in "qkv")

    def run(log_decay=None, beta=None, scale=k.shape[-1] ** -0.5, phi=lambda x: x, **options):
        call = lambda q, k, v, log_decay, beta: linear_attention(q, k, v, log_decay, beta=beta, chunk_size=16, **options)
        with jax.enable_x64(True):
            return jax.jit(call)(phi(q) * scale, phi(k), v, log_decay, beta)

    return run, *(get(key) for key in keys)


def test_equals_published_linear_attention():
    run, y, state, normalizer = rule("linear_attention", "y_causal", "final_S", "final_z")
    got, last = run(scale=1.0, phi=lambda x: np.where(x > 0, x + 1, np.exp(x)), normalize=True)
    assert_close(got, y, 1e-13)
    assert_close(last, np.concatenate([state, normalizer[..., None]], axis=-1), 1e-13)


def test_equals_published_retention():
    run, gamma, y = rule("retention", "gamma", "y_norot")
    assert_close(run(np.log(gamma)[None, None])[0], y, 1e-13)


def test_equals_published_gated_linear_attention():
    run, mild, y, state, strong, y_strong = rule("gla", "log_alpha", "y", "final_S", "log_alpha_strong", "y_strong")
    got, last = run(mild)
    assert_close(got, y, 1e-13)
    assert_close(last, state, 1e-13)
    assert_close(run(strong)[0], y_strong, 1e-13)


@pytest.mark.parametrize("name", ["delta_rule", "gated_delta_rule"])
def test_equals_published_delta_rules(name):
    run, beta, y, state = rule(name, "beta", "y", "final_S")
    gate = RULES["gated_delta_rule.log_alpha"] if name == "gated_delta_rule" else None
    got, last = run(gate, beta=beta)
    assert_close(got, y, 1e-13)
    assert_close(last, state, 1e-13)
    if gate is None:
        doubled, last = run(beta=2 * beta)
        assert_close(doubled, RULES["delta_rule.y_beta2"], 1e-13)
        assert_close(last, RULES["delta_rule.final_S_beta2"], 1e-13)


def test_reflections_keep_parity_of_long_sequences_in_float32():
    """beta = 2 and a fixed key multiply by -1: 4096 equal keys, whose products a sum of powers could not tell."""
    bits = np.random.default_rng(0).integers(2, size=4096)
    key = np.zeros((1, 4096, 1, 2), np.float32) + np.array([1, 0], np.float32)
    start = jnp.zeros((1, 1, 2, 1)).at[:, :, 0].set(1)
    beta = jnp.asarray(2.0 * bits, jnp.float32)[None, :, None]
    y, _ = jax.jit(linear_attention)(key, key, jnp.zeros((1, 4096, 1, 1)), None, start, beta=beta)
    np.testing.assert_array_equal(np.round(y[0, :, 0, 0], 3), (-1.0) ** np.cumsum(bits))


def shapes(length, groups=1, heads=4, key_dim=32, value_dim=16):
    struct = lambda *shape: jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    keys = struct(length, groups, key_dim)
    return keys, keys, struct(length, heads, value_dim), struct(length, heads)


def form_shapes(form, length, groups=4, heads=4, key_dim=32, value_dim=16):
    """Inputs as `shapes`, with beta or None as the last."""
    channels, delta = FORMS[form]
    *inputs, heads_decay = shapes(length, groups, heads, key_dim, value_dim)
    channel_decay = jax.ShapeDtypeStruct((*heads_decay.shape, key_dim), jnp.float32)
    return *inputs, channel_decay if channels else heads_decay, heads_decay if delta else None


def call(q, k, v, log_decay, beta, **options):
    return linear_attention(q, k, v, log_decay, beta=beta, **options)


@pytest.mark.parametrize("form", FORMS)
def test_the_backward_pass_keeps_the_states_of_chunks_only(form):
    """Memory grows with the length, not with its square, and far less than with a state for each token."""

    def temporaries(length):
        loss = lambda a: jnp.sum(call(*a, chunk_size=64)[0] ** 2)
        compiled = jax.jit(jax.grad(loss)).lower(form_shapes(form, length, 4, 4, 64, 64)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporaries(2048), temporaries(8192)
    assert long < 4.5 * short
    assert long < 0.25 * 4 * 8192 * 4 * 64 * 64  # states of all tokens


def test_decoding_runs_neither_chunks_nor_a_loop():
    program = str(jax.make_jaxpr(linear_attention)(*shapes(1)))
    assert "dot_general" not in program and "scan" not in program and "cumsum" not in program


@pytest.mark.parametrize(("length", "chunk_size"), [(1, None), (50, None), (256, 64), (250, 128)])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("form", FORMS)
def test_declares_its_operations(form, length, groups, chunk_size):
    counted = count_flops(lambda a: call(*a, chunk_size=chunk_size), form_shapes(form, length, groups, 4, 64, 64))
    channels, delta = FORMS[form]
    declared = linear_attention_flops(length, 4, groups, 64, 64, chunk_size, channel_decay=channels, delta_rule=delta)
    assert 0.9 < declared / counted < 1.05


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("form", FORMS)
def test_lowers_for_accelerators(platform, form):
    loss = lambda a: jnp.sum(call(*a, starts=jnp.zeros((1, 100), bool))[0])
    lowered = jax.jit(jax.grad(loss)).trace(form_shapes(form, 100)).lower(lowering_platforms=(platform,))
    assert "stablehlo" in lowered.as_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"groups": 3}, "4 heads are not a multiple of 3 groups"),
        ({"chunk_size": 0}, "chunk_size=0 is not positive"),
        ({"implementation": "cudnn"}, "implementation='cudnn' does not serve this call; allowed here: None, reference, xla"),
    ],
)
def test_mistakes_are_told(options, words):
    a = draw(4, options.pop("groups", 2))
    with pytest.raises(ValueError, match=words):
        linear_attention(*(jnp.asarray(a[name], jnp.float32) for name in NAMES), **options)
