"""SaShiMi against a loop over tokens and groups, the authors' outputs and their parameter counts."""

import pathlib
from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqjax
from seqjax import testing
from seqjax.config import ConfigError
from seqjax.mixers.base import Costs, Mixer
from seqjax.models.sashimi import Sashimi, find_groups
from seqjax.models.sequence_model import SubLayer
from seqjax.ops.recurrence import recurrence
from seqjax.ops.segments import SegmentState, segments
from seqjax.testing.faces import relative_error

DATA = pathlib.Path(__file__).parent / "data" / "sashimi.npz"
DECAY = 0.8
CALLS = []


class LeakState(NamedTuple):
    sums: jax.Array
    segment: SegmentState


class Leak(Mixer):
    """`h_t = DECAY h_(t-1) + x_t w`: the least that mixes along the sequence, and cheap to compile."""

    count: bool = False

    @nn.compact
    def __call__(self, x, state=None, *, segment_ids=None, train=False):
        if self.count:
            jax.debug.callback(lambda: CALLS.append(self.embed_dim))
        scale = self.param(
            "scale", nn.with_logical_partitioning(nn.initializers.ones, ("embed",)), x.shape[-1:], self.param_dtype
        )
        old = self.init_state(x.shape[0], 0) if state is None else state
        found, segment = segments(segment_ids, old.segment, x.shape[1])
        y, sums = recurrence(leak, scale, old.sums, x.astype(scale.dtype), starts=found.starts)
        return y.astype(self.dtype), None if state is None else LeakState(sums, segment)

    @nn.nowrap
    def init_state(self, batch_size, max_length):
        return LeakState(jnp.zeros((batch_size, self.embed_dim), self.param_dtype), SegmentState.fresh(batch_size))

    @nn.nowrap
    def costs(self, length):
        return Costs(self.embed_dim, 3 * length * self.embed_dim, 4 * self.embed_dim + 12)


def leak(scale, h, x):
    h = DECAY * h + x * scale
    return h, h


LEAK, MLP = SubLayer("leak", Leak), SubLayer("mlp", seqjax.registry.mixer("mlp"), (("activation", "relu"), ("mlp_ratio", 2.0)))


def leaky(**options):
    base = {
        "layer": (LEAK, MLP),
        "vocab_size": 16,
        "embed_dim": 4,
        "pooling": (2, 3),
        "layers_per_tier": 2,
        "residual_init": 1.0,
    }
    return Sashimi(**{**base, **options})


def build(**options):
    return seqjax.build({**seqjax.example_config("sashimi").to_dict(), "pooling": (2, 2), "residual_init": 1.0, **options})


def noisy(model, inputs, dtype=np.float32):
    """Variables away from zeros and ones."""
    rng = np.random.default_rng(0)
    noise = lambda a: (a + 0.3 * rng.standard_normal(a.shape)).astype(dtype)
    return jax.tree.map(noise, jax.tree.map(np.asarray, nn.unbox(jax.jit(model.init)(jax.random.key(0), inputs))))


# --- a plain loop over tokens and groups ---


def loop(params, x, pooling, unet):
    """The body on one segment `[L, D]`, token after token and group after group."""
    y, kept = np.array(x), [np.array(x)]
    if pooling and unet:
        for layer in layers(params["down_layers"]):
            for sublayer in (leak_loop, mlp_loop):
                y = y + sublayer(layer, y)
                kept.append(y)
    if pooling:
        p, width = pooling[0], x.shape[1]
        groups = [
            [y[g * p + i, c] for c in range(width) for i in range(p)]  # channel by channel
            for g in range(len(y) // p)
        ]
        skip = y.copy()
        if groups:
            slow = loop(params["coarse"], affine(params["down"], np.array(groups)), pooling[1:], unet)
            told = affine(params["up"], slow).reshape(-1, width, p)
            for t in range(p, len(y)):  # nothing is known in the first group
                skip[t] += told[t // p - 1, :, t % p]
        y = skip
    before = y
    for layer in layers(params["layers"]):
        for sublayer in (leak_loop, mlp_loop):
            y = y + sublayer(layer, y)
            if pooling and unet:
                kept.pop()
                y = y + kept[-1]
    return y if pooling and unet else y + before


def layers(stacked):
    layer = lambda i: jax.tree.map(lambda a: a[i], stacked)
    return [layer(0), layer(1)]


def affine(dense, x):
    return x @ dense["kernel"] + dense["bias"]


def norm_loop(norm, x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * norm["scale"] + norm["bias"]


def leak_loop(layer, x):
    x, h, out = norm_loop(layer["leak"]["norm_0"], x), 0, []
    for row in x:
        h = DECAY * h + row * layer["leak"]["leak_0"]["scale"]
        out.append(h)
    return np.array(out)


def mlp_loop(layer, x):
    mlp = layer["mlp"]["mlp_0"]
    return affine(mlp["down"], np.maximum(affine(mlp["up"], norm_loop(layer["mlp"]["norm_0"], x)), 0))


@pytest.mark.parametrize(("unet", "pooling", "expand"), [(False, (2, 3), 2), (True, (3, 2), 1)])
def test_a_loop_over_tokens_and_groups(unet, pooling, expand):
    with jax.enable_x64(True):
        model = leaky(unet=unet, pooling=pooling, expand=expand, head="regression", output_dim=3, input_dim=3, vocab_size=None)
        model = model.clone(dtype="float64", param_dtype="float64")
        x = np.random.default_rng(1).standard_normal((2, 23, 3))
        variables = noisy(model, x, np.float64)
        params = variables["params"]

        def expected(x):
            body = loop(params["tiers"], affine(params["embedding"], x), pooling, unet)
            return affine(params["head"]["values"], norm_loop(params["norm"], body))

        whole = jax.jit(model.apply)(variables, x)[0]
        np.testing.assert_allclose(whole, [expected(row) for row in x], rtol=1e-10, atol=1e-10)
        # Segments that end inside groups, one shorter than a group, and one that a new segment follows under its own id.
        lengths = ([8, 1, 14], [5, 12, 6])
        ids = jnp.asarray([np.repeat([4, 0, 4], row) for row in lengths])
        packed = jax.jit(model.apply)(variables, x, segment_ids=ids)[0]
        for row, sizes, got in zip(x, lengths, packed):
            pieces = np.split(row, np.cumsum(sizes)[:-1])
            np.testing.assert_allclose(got, np.concatenate([expected(p) for p in pieces]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [{"unet": True}, {"pooling": (3, 2), "layers_per_tier": 1, "expand": 3}])
def test_variants_keep_the_contract(options):
    testing.check_model(leaky(**options))


def test_any_length_down_to_one_token():
    model = leaky(pooling=(4, 4))
    tokens = np.random.default_rng(0).integers(0, 16, (2, 17)).astype(np.int32)
    variables, call = noisy(model, tokens[:, :1]), jax.jit(model.apply)
    whole, _ = call(variables, tokens)
    for length in (3, 5):
        for ids in (None, jnp.ones((2, length), jnp.int32)):
            got, _ = call(variables, tokens[:, :length], segment_ids=ids)
            np.testing.assert_allclose(got, whole[:, :length], atol=1e-5)


def test_groups_are_counted_from_the_start_of_each_run():
    runs = jnp.asarray([[0, 0, 0, 1, 1, 1, 1, 2]])
    positions = jnp.asarray([[0, 1, 2, 0, 1, 2, 3, 0]])
    groups = find_groups(runs, positions, 2)
    assert groups.tokens[0, :3].tolist() == [[0, 1], [3, 4], [5, 6]]
    assert groups.runs.tolist() == [[0, 1, 1, 3]]  # the last is not used: a run of its own
    assert groups.positions.tolist() == [[0, 0, 1, 0]]
    assert groups.sources.tolist() == [[-1, -1, 0, -1, -1, 2, 3, -1]]


def test_no_output_sees_a_later_token():
    model = leaky(pooling=(2, 2), layers_per_tier=1)
    length = 16
    tokens = np.random.default_rng(0).integers(0, 16, length)
    rows = np.tile(tokens, (length + 1, 1)).astype(np.int32)
    rows[np.arange(length), np.arange(length)] ^= 1  # row t differs in token t
    outputs = np.asarray(jax.jit(model.apply)(noisy(model, rows[:1]), rows)[0])
    for t in range(length):
        changed = np.any(outputs[t] != outputs[-1], axis=-1)
        assert not changed[:t].any() and changed[t:].all(), f"token {t}"


@pytest.fixture(scope="module")
def decoder():
    model = build()
    return model, noisy(model, np.zeros((1, 8), np.int32))


def test_decoding_after_a_prompt_of_odd_length(decoder):
    model, variables = decoder
    tokens = np.random.default_rng(3).integers(0, 64, (2, 19)).astype(np.int32)
    call = jax.jit(model.apply)
    whole, _ = call(variables, tokens)
    y, state = call(variables, tokens[:, :7], model.init_state(2, 19))
    outputs = [y]
    for t in range(7, 19):  # three groups of the slowest rate
        y, state = call(variables, tokens[:, t : t + 1], state)
        outputs.append(y)
    np.testing.assert_allclose(np.concatenate(outputs, axis=1), whole, atol=1e-4)


def test_generated_tokens_are_those_of_recomputed_prefixes(decoder):
    model, variables = decoder
    prompts = [[3, 14, 15, 9, 2], [6, 5, 3], [58]]
    new = np.asarray(seqjax.generate(model, variables, prompts, 13))
    assert len(np.unique(new)) > 3
    for prompt, tokens in zip(prompts, new):
        row = np.zeros((1, 18), np.int32)  # what follows a prefix changes nothing
        for t in range(len(prompt), len(prompt) + 13):
            row[0, :t] = [*prompt, *tokens][:t]
            logits, _ = APPLY(model, variables, row)
            assert tokens[t - len(prompt)] == np.argmax(logits[0, t - 1])


APPLY = jax.jit(lambda model, variables, row: model.apply(variables, row), static_argnums=0)


def test_slower_rates_run_only_when_a_group_is_whole():
    model = leaky(layer=(SubLayer("leak", Leak, (("count", True),)),), pooling=(2, 2), layers_per_tier=1, embed_dim=8)
    tokens = np.zeros((1, 1), np.int32)
    variables = jax.jit(model.init)(jax.random.key(0), tokens)
    jax.effects_barrier()
    CALLS.clear()
    call, state = jax.jit(model.apply), model.init_state(1, 9)
    for _ in range(9):
        _, state = call(variables, tokens, state)
    jax.effects_barrier()
    assert [CALLS.count(width) for width in (8, 16, 32)] == [9, 4, 2]


def test_dropout_is_on_in_training_alone():
    model = leaky(dropout=0.5, pooling=(2,), layers_per_tier=1)
    tokens = jnp.arange(14).reshape(2, 7)
    variables = noisy(model, tokens)
    apply = jax.jit(model.apply, static_argnames="train")

    def call(train, state=None, seed=1):
        return apply(variables, tokens, state, train=train, rngs={"dropout": jax.random.key(seed)})[0]

    state = model.init_state(2, 7)
    np.testing.assert_allclose(call(False), call(False, state), atol=1e-5)
    for given in (None, state):
        assert not np.allclose(call(True, given), call(False, given))
        assert not np.allclose(call(True, given), call(True, given, seed=2))


@pytest.mark.parametrize(("head", "shape"), [("classifier", (2, 3)), ("matching", (1, 3)), ("forecast", (2, 4, 1))])
def test_heads_that_read_whole_sequences(head, shape):
    model = leaky(head=head, num_classes=3, output_dim=1, horizon=4)
    tokens = jnp.zeros((1, 2, 9) if head == "matching" else (2, 9), jnp.int32)
    (outputs, state), variables = jax.eval_shape(model.init_with_output, jax.random.key(0), tokens)
    assert outputs.shape == shape and state is None
    assert model.costs(9).parameters == sum(a.size for a in jax.tree.leaves(variables))
    assert model.costs(9).state_bytes == 0
    with pytest.raises(ConfigError, match="carries no state"):
        model.init_state(2, 9)


# --- the authors' numbers ---


@pytest.mark.parametrize(
    ("options", "count"),
    [({}, 5_414_656), ({"num_systems": 1}, 4_731_136), ({"num_systems": 1, "unet": True}, 5_832_448)],
)
def test_the_authors_parameter_counts(options, count):
    model = seqjax.build({"name": "sashimi", "vocab_size": 256, "embed_dim": 64, **options})
    assert model.costs(16000).parameters - model.frame_costs(16000).parameters == count
    if options == {"num_systems": 1}:
        variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64), jnp.int32))
        assert sum(a.size for a in jax.tree.leaves(variables)) - 256 * 64 == count


def ported(stored):
    """Parameters of the authors' backbone, between an embedding and a head that change nothing, in float64."""
    weight = lambda name: np.asarray(stored[f"w.{name}"], np.float64)
    linear = lambda name: {"kernel": weight(f"{name}.weight").squeeze().T, "bias": weight(f"{name}.bias")}
    norm = lambda name: {"scale": weight(f"{name}.weight"), "bias": weight(f"{name}.bias")}

    def s4(name):
        kernel = lambda key: weight(f"{name}.layer.kernel.{key}")
        pair = lambda key: kernel(key) @ [1, 1j]
        eigenvalues = -np.exp(kernel("A_real")) - 1j * kernel("A_imag")
        b, p, dt = pair("B"), pair("P"), np.exp(kernel("inv_dt")[:, 0])
        c = untruncated(pair("C")[0], eigenvalues, p[0], dt, int(stored[f"w.{name}.layer.kernel.l_kernel"]))[None]
        parts = lambda key, a: {f"{key}_real": np.swapaxes(a.real, -1, -2), f"{key}_imag": np.swapaxes(a.imag, -1, -2)}
        out, gate = np.split(weight(f"{name}.output_linear.0.weight"), 2)
        out_bias, gate_bias = np.split(weight(f"{name}.output_linear.0.bias"), 2)
        return {
            "a_log": kernel("A_real").T,
            "a_imag": kernel("A_imag").T,
            **parts("b", b[0]),
            **parts("p", p),
            **parts("c", c),
            "log_dt": np.log(dt),
            "skip": weight(f"{name}.layer.D"),
            "out": {"kernel": out.T, "bias": out_bias},
            "gate": {"kernel": gate.T, "bias": gate_bias},
        }

    def layer(mixer, feed_forward):
        mlp = {"up": linear(f"{feed_forward}.layer.ff.0.0"), "down": linear(f"{feed_forward}.layer.ff.2")}
        return {
            "s4": {"norm_0": norm(f"{mixer}.norm"), "s4_0": s4(f"{mixer}.layer")},
            "mlp": {"norm_0": norm(f"{feed_forward}.norm"), "mlp_0": mlp},
        }

    def tier(index, coarse):
        up = f"u_layers.{1 - index}"
        pools = {"down": linear(f"d_layers.{index}.linear"), "up": linear(f"{up}.0.linear")}
        return {"layers": layer(f"{up}.1", f"{up}.2"), "coarse": coarse, **pools}

    tiers = tier(0, tier(1, {"layers": layer("c_layers.0", "c_layers.1")}))
    identity = {"kernel": np.eye(4), "bias": np.zeros(4)}
    return {"params": {"embedding": identity, "tiers": tiers, "norm": norm("norm"), "head": {"values": identity}}}


def untruncated(c, eigenvalues, p, dt, length):
    """C of `C (I - A^length)`, feature by feature, by dense matrices of all modes and their conjugates."""
    both = lambda a: np.concatenate([a, a.conj()])
    solved = []
    for h in range(len(c)):
        a = np.diag(both(eigenvalues[h])) - np.outer(both(p[h]), both(p[h]).conj())
        unit = np.eye(len(a))
        discrete = np.linalg.solve(unit - dt[h] / 2 * a, unit + dt[h] / 2 * a)
        rest = unit - np.linalg.matrix_power(discrete, length)
        solved.append(np.linalg.solve(rest.T, both(c[h]))[: c.shape[1]])
    return np.array(solved)


def test_the_authors_outputs():
    stored = np.load(DATA)
    with jax.enable_x64(True):
        options = {"vocab_size": None, "input_dim": 4, "head": "regression", "output_dim": 4, "embed_dim": 4}
        model = build(state_dim=64, dtype="float64", param_dtype="float64", **options)
        variables, x = ported(stored), jnp.asarray(stored["x"], jnp.float64)
        shapes = jax.eval_shape(model.init, jax.random.key(0), x)
        chex.assert_trees_all_equal_shapes(variables, nn.unbox(shapes))
        outputs, _ = jax.jit(model.apply)(variables, x)
    assert relative_error(outputs, stored["y"]) < 2e-6


# --- refusals ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": (4, 1)}, r"model\.pooling=\(4, 1\) pools nothing; allowed: integers of 2 and above"),
        ({"pooling": ()}, r"model\.pooling=\(\) pools nothing"),
        ({"pooling": (2.0,)}, r"model\.pooling=\(2\.0,\) pools nothing"),
        ({"pooling": 4}, r"model\.pooling=4 is of type int; allowed: tuple"),
        ({"causal": False}, r"model\.causal=False: sashimi"),
        ({"expand": 0}, r"model\.expand=0 is not positive"),
        ({"layers_per_tier": 0}, r"model\.layers_per_tier=0 is not positive"),
        ({"mixer": "s44"}, r"'s44' is unknown; did you mean 's4'"),
        ({"state_dim": 3}, r"model\.state_dim=3 does not fit"),
        ({"num_systems": 16}, r"model\.num_systems=16 does not divide model\.embed_dim=8"),
        ({"num_layers": 2}, r"model\.num_layers is not an option"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        build(**options)


def test_a_state_that_rows_share_is_refused():
    with pytest.raises(ConfigError, match=r"model\.mixer='attention' has no state of each row's own"):
        seqjax.build({"name": "sashimi", "vocab_size": 64, "embed_dim": 8, "mixer": "attention", "num_heads": 2})


def test_options_reach_both_mixers():
    mixer, feed_forward = (dict(s.options) for s in build(activation="silu", state_dim=8).layer)
    assert mixer["state_dim"] == 8 and mixer["activation"] == feed_forward["activation"] == "silu"
    mixer, feed_forward = (dict(s.options) for s in build().layer)
    assert feed_forward["activation"] == "gelu_exact" and feed_forward["mlp_ratio"] == 2.0
