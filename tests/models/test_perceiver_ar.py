"""Perceiver AR: the authors' numbers, a plain computation of every window, training in one window, decoding."""

import functools
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import seqjax
from seqjax.config import ConfigError
from seqjax.models.base import Window
from seqjax.scaling.flops import count_flops
from seqjax.testing import tpu
from seqjax.training import step
from seqjax.training.losses import by_targets, in_window

DATA = pathlib.Path(__file__).parent / "data"
EPSILON = 1e-5


# --- the paper's equations in NumPy, float64 ---


def reference(p, x, positions, last, turn):
    """Features of latents at the positions `last` of one sequence of inputs `x [L, E]`, in one window.

    `turn` rotates queries and keys `[T, H, K]` by their positions; `p` holds matrices `(in, out)`.
    """
    z = affine(p["latents"], x[last])
    cross = p["cross"]
    seen = np.arange(len(x)) <= np.asarray(last)[:, None]
    mixed = attend(cross, norm(cross["norm_q"], z), norm(cross["norm_kv"], x), positions[last], positions, seen, turn)
    z = z + mixed
    z = z + mlp(cross, z)
    for layer in p["layers"]:
        inner = norm(layer["norm"], z)
        z = z + attend(layer, inner, inner, positions[last], positions[last], np.tri(len(last), dtype=bool), turn)
        z = z + mlp(layer, z)
    return norm(p["norm"], z)


def attend(p, to, of, q_positions, k_positions, seen, turn):
    split = lambda a: a.reshape(len(a), p["heads"], -1)
    q, k = turn(split(affine(p["q"], to)), q_positions), turn(split(affine(p["k"], of)), k_positions)
    v = split(affine(p["v"], of))
    scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True)) * seen
    mixed = np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), v)
    return affine(p["out"], mixed.reshape(len(to), -1))


def mlp(p, z):
    return affine(p["down"], np.maximum(affine(p["up"], norm(p["norm_mlp"], z)), 0) ** 2)


def affine(p, x):
    return x @ p[0] + p[1]


def norm(p, x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPSILON) * p[0] + p[1]


def still(a, positions):
    return a


def half_split(a, positions):
    """Rotary positions as the model has them: plane i is features i and i + K/2, frequencies `10000^(-2i/K)`."""
    half = a.shape[-1] // 2
    angles = positions[:, None, None] * 10000.0 ** (-np.arange(half) / half)
    left, right = a[..., :half], a[..., half:]
    return np.concatenate(
        [left * np.cos(angles) - right * np.sin(angles), right * np.cos(angles) + left * np.sin(angles)], axis=-1
    )


def interleaved(a, positions):
    """The authors' rotary positions: half of the features, in pairs, with wavelengths from 1 to 16."""
    width = a.shape[-1] // 4 * 2
    lengths = 16.0 ** (2 / width * np.linspace(0, width / 2, width // 2))
    angles = positions[:, None, None] / lengths
    even, odd = a[..., 0:width:2], a[..., 1:width:2]
    out = a.copy()
    out[..., 0:width:2] = even * np.cos(angles) - odd * np.sin(angles)
    out[..., 1:width:2] = odd * np.cos(angles) + even * np.sin(angles)
    return out


@pytest.mark.parametrize(("kind", "heads", "turn"), [("absolute", (2, 4), still), ("rotary", (1, 2), interleaved)])
def test_the_reference_is_the_authors_model(kind, heads, turn):
    stored = np.load(DATA / f"perceiver_ar_{kind}.npz")
    w = lambda path: np.asarray(stored[f"w/perceiver_ar/{path}"], np.float64)
    pair = lambda path, names: tuple(w(f"{path}/{name}") for name in names)
    linear, scale = (lambda path: pair(path, "wb")), (lambda path: pair(path, ("scale", "offset")))

    def block(path, heads):
        maps = {"q": "linear", "k": "linear_1", "v": "linear_2", "out": "linear_3"}
        attention = {key: linear(f"{path}/attention/{name}") for key, name in maps.items()}
        return attention | {"up": linear(f"{path}/dense/linear"), "down": linear(f"{path}/dense/linear_1"), "heads": heads}

    norms = lambda path, *names: {name: scale(f"{path}/layer_norm{'_' * bool(i)}{i or ''}") for i, name in enumerate(names)}
    layers = [f"~/self_attention{suffix}" for suffix in ("", "_1")]
    cross = "~/cross_attention"
    p = {
        "latents": linear("~/linear"),
        "cross": block(cross, heads[0]) | norms(cross, "norm_q", "norm_kv", "norm_mlp"),
        "layers": [block(path, heads[1]) | norms(path, "norm", "norm_mlp") for path in layers],
        "norm": scale("layer_norm"),
    }
    for ids, steps, wanted, length in zip(stored["inputs"], stored["latent_last_steps"], stored["logits"], stored["lengths"]):
        x, positions = w("~/embed/embeddings")[ids[:length]], np.arange(1, length + 1)
        if kind == "absolute":
            x = x + w("~/embed_1/embeddings")[positions]
        valid = steps >= 0
        got = affine(linear("~/logits"), reference(p, x, positions, steps[valid], turn))
        np.testing.assert_allclose(got, wanted[valid], atol=1e-5)


# --- the model against it ---


def build(**options):
    base = {"num_latents": 4, "stride": 2, "residual_init": 1.0, "qkv_bias": True, "out_bias": True}
    return seqjax.build({**seqjax.example_config("perceiver_ar").to_dict(), **base, **options})


def noisy(model, inputs, dtype=np.float32):
    """Variables away from zeros and ones."""
    rng = np.random.default_rng(0)
    noise = lambda a: jnp.asarray((a + 0.2 * rng.standard_normal(a.shape)).astype(dtype))
    return jax.tree.map(noise, jax.tree.map(np.asarray, nn.unbox(jax.jit(model.init)(jax.random.key(0), inputs))))


def ported(params):
    """The model's parameters as the reference takes them."""
    scale = lambda p: (p["scale"], p["bias"])

    def dense(p, out=False):
        width = p["kernel"].shape[-1] if out else p["bias"].size
        return p["kernel"].reshape(-1, width), p["bias"].reshape(-1)

    def block(attention, mlp, norm_mlp):
        maps = {"q": "query", "k": "key", "v": "value"}
        p = {key: dense(attention[name]) for key, name in maps.items()} | {"out": dense(attention["out"], out=True)}
        return p | {"up": dense(mlp["up"]), "down": dense(mlp["down"]), "norm_mlp": scale(norm_mlp), "heads": 4}

    reader, repeats = params["reader"], params["latents"]["repeats"]
    cross = block(reader["attention"], reader["mlp"]["mlp_0"], reader["mlp"]["norm_0"])
    count = repeats["norm_0"]["scale"].shape[0]
    layers = [jax.tree.map(lambda a, i=i: a[i], repeats) for i in range(count)]
    return {
        "latents": dense(reader["latents"]),
        "cross": cross | {"norm_q": scale(reader["norm_latents"]), "norm_kv": scale(reader["norm_inputs"])},
        "layers": [block(p["attention_0"], p["mlp_1"], p["norm_1"]) | {"norm": scale(p["norm_0"])} for p in layers],
        "norm": scale(params["norm"]),
    }


def expected(params, ids, last, position):
    """Logits at the positions `last` of one sequence, all in one window."""
    table = params["embedding"]["table"]
    positions, x = np.arange(len(ids)), table[ids]
    if position == "sinusoidal":
        half = x.shape[1] // 2
        angles = positions[:, None] * 10000.0 ** (-np.arange(half) / half)
        x = x + np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    turn = half_split if position == "rope" else still
    return reference(ported(params), x, positions, np.asarray(last), turn) @ table.T


def every_window(params, ids, position, size=4, stride=2):
    """Logits at all positions: each the last of its own window."""
    rows = []
    for t in range(len(ids)):
        start = 0
        while start + size <= t:
            start += stride
        rows.append(expected(params, ids, np.arange(start, t + 1), position)[-1])
    return np.array(rows)


@pytest.mark.parametrize("position", ["rope", "sinusoidal"])
def test_a_plain_computation_of_every_window(position):
    with jax.enable_x64(True):
        model = build(position=position, num_layers=2, dtype="float64", param_dtype="float64")
        tokens = np.random.default_rng(1).integers(0, 64, (2, 13)).astype(np.int32)
        variables = noisy(model, tokens, np.float64)
        whole = jax.jit(model.apply)(variables, tokens)[0]
        wanted = [every_window(variables["params"], row, position) for row in tokens]
        np.testing.assert_allclose(whole, wanted, rtol=1e-9, atol=1e-9)
        lengths = ([5, 1, 7], [4, 9])
        ids = jnp.stack([jnp.repeat(jnp.arange(len(row)) % 2, np.array(row), total_repeat_length=13) for row in lengths])
        packed = jax.jit(model.apply)(variables, tokens, segment_ids=ids)[0]
        for row, sizes, got in zip(tokens, lengths, packed):
            pieces = [every_window(variables["params"], p, position) for p in np.split(row, np.cumsum(sizes)[:-1])]
            np.testing.assert_allclose(got, np.concatenate(pieces), rtol=1e-9, atol=1e-9)


@pytest.fixture(scope="module")
def trained():
    model = build()
    tokens = np.random.default_rng(1).integers(0, 64, (2, 13)).astype(np.int32)
    return model, noisy(model, tokens), tokens


@functools.partial(jax.jit, static_argnums=0)
def window_of(model, variables, tokens, seed=0, segment_ids=None):
    key = {"dropout": jax.random.key(seed)}
    return model.apply(variables, tokens, train=True, rngs=key, segment_ids=segment_ids)[0]


APPLY = jax.jit(lambda model, *arguments: model.apply(*arguments), static_argnums=0)


def test_training_has_one_window_at_a_random_place(trained):
    model, variables, tokens = trained
    starts = set()
    for seed in range(40):
        window = window_of(model, variables, tokens, seed)
        start = int(window.start)
        starts.add(start)
        assert isinstance(window, Window) and window.outputs.shape == (2, 4, 64)
        if seed < 3:
            wanted = [expected(variables["params"], row, np.arange(start, start + 4), "rope") for row in tokens]
            np.testing.assert_allclose(window.outputs, wanted, atol=2e-4)
    assert starts == set(range(10))


@pytest.mark.parametrize(("min_context", "starts"), [(None, {9}), (11, {7, 8, 9}), (99, {9})])
def test_where_windows_end(trained, min_context, starts):
    model, variables, tokens = trained
    model = model.clone(min_context=min_context)
    assert {int(window_of(model, variables, tokens, seed).start) for seed in range(20)} == starts


def test_segments_in_the_training_window(trained):
    model, variables, tokens = trained
    ids = jnp.asarray(np.repeat([[1, 2]], [7, 6], axis=1).repeat(2, axis=0))
    window = window_of(model.clone(min_context=8, num_latents=8), variables, tokens, segment_ids=ids)
    start = int(window.start)
    for row, got in zip(tokens, window.outputs):
        first = expected(variables["params"], row[:7], np.arange(start, 7), "rope")
        second = expected(variables["params"], row[7:], np.arange(0, start + 1), "rope")
        np.testing.assert_allclose(got, np.concatenate([first, second]), atol=2e-4)


def test_a_sequence_within_one_window_has_all_outputs(trained):
    model, variables, tokens = trained
    outputs = window_of(model, variables, tokens[:, :4])
    np.testing.assert_allclose(outputs, APPLY(model, variables, tokens[:, :4])[0], atol=1e-6)


def test_losses_take_the_targets_of_the_window(trained):
    model, variables, tokens = trained
    batch = {"inputs": tokens, "targets": tokens ^ 1, "weights": np.ones((2, 13), np.float32), "label": np.zeros((2,))}
    window = window_of(model, variables, tokens)
    at = slice(int(window.start), int(window.start) + 4)
    outputs, part = in_window(window, batch)
    np.testing.assert_array_equal(part["targets"], batch["targets"][:, at])
    assert part["label"].shape == (2,)
    total, count = by_targets(outputs, part)["loss"]
    chosen = np.take_along_axis(np.asarray(jax.nn.log_softmax(window.outputs)), (tokens ^ 1)[:, at, None], axis=2)
    np.testing.assert_allclose(total, -chosen.sum(), rtol=1e-5)
    assert count == 8
    same, whole = in_window(outputs, batch)
    assert same is outputs and whole is batch


def test_input_dropout_hides_inputs_but_a_latents_own():
    values = {"vocab_size": None, "input_dim": 3, "head": "regression", "output_dim": 2}
    model = build(num_latents=1, stride=1, input_dropout=0.5, min_context=None, **values)
    x = np.random.default_rng(2).standard_normal((8, 21, 3)).astype(np.float32)
    variables = noisy(model, x)

    @jax.jit
    def influence(seed):
        return jax.grad(lambda x: jnp.sum(window_of(model, variables, x, seed).outputs))(jnp.asarray(x))

    seen = np.any(np.asarray(influence(0)) != 0, axis=-1)
    assert seen[:, -1].all() and 0.35 < seen[:, :-1].mean() < 0.65
    assert (seen != seen[:1]).any() and (seen != np.any(np.asarray(influence(1)) != 0, axis=-1)).any()
    evaluated = jax.jit(jax.grad(lambda x: jnp.sum(model.apply(variables, x)[0][:, -1])))(jnp.asarray(x))
    assert np.any(np.asarray(evaluated) != 0, axis=-1).all()


# --- decoding ---


def test_a_long_prompt_and_then_token_by_token(trained):
    model, variables, _ = trained
    tokens = np.random.default_rng(3).integers(0, 64, (2, 31)).astype(np.int32)
    ids = np.where(np.arange(31) < np.array([[0], [5]]), 0, 1).astype(np.int32)
    call = jax.jit(model.apply)
    whole, _ = call(variables, tokens, segment_ids=ids)
    y, state = call(variables, tokens[:, :19], model.init_state(2, 31), segment_ids=ids[:, :19])
    outputs = [y]
    for t in range(19, 31):
        y, state = call(variables, tokens[:, t : t + 1], state)
        outputs.append(y)
    np.testing.assert_allclose(np.concatenate(outputs, axis=1), whole, atol=2e-4)


def test_a_state_for_less_than_a_window(trained):
    model, variables, tokens = trained
    model = model.clone(num_latents=16)
    whole, _ = APPLY(model, variables, tokens)
    y, _ = APPLY(model, variables, tokens, model.init_state(2, 13))
    np.testing.assert_allclose(y, whole, atol=2e-4)


def test_generated_tokens_are_those_of_recomputed_prefixes(trained):
    model, variables, _ = trained
    prompts = [[3, 14, 15, 9, 2], [6, 5, 3], [58]]
    new = np.asarray(seqjax.generate(model, variables, prompts, 13))
    call = jax.jit(model.apply)
    for prompt, tokens in zip(prompts, new):
        row = np.zeros((1, 18), np.int32)  # what follows a prefix changes nothing
        row[0, : len(prompt) + 13] = [*prompt, *tokens]
        logits, _ = call(variables, row)
        np.testing.assert_array_equal(tokens, np.argmax(logits[0, len(prompt) - 1 : len(prompt) + 12], axis=-1))


# --- accounts, heads, refusals ---


def test_the_authors_parameter_count():
    """Of their copy task of length 32: its position table is counted as parameters there, and its logits have a bias."""
    sizes = {"vocab_size": 259, "embed_dim": 1024, "num_heads": 16, "num_layers": 1, "num_latents": 16}
    model = build(**sizes, tie_embeddings=False, position="sinusoidal")
    assert model.costs(32).parameters + 33 * 1024 + 259 == 26_810_627


LONG = {"vocab_size": 256, "embed_dim": 256, "num_heads": 2, "num_layers": 36, "dtype": "bfloat16", "remat": "full"}


def long_step(model=None):
    """A training step on one sequence of 131,072 tokens, by default of Perceiver AR with 1,024 latents, and its shapes."""
    model = model or seqjax.build({"name": "perceiver_ar", "num_latents": 1024, **LONG})
    batch = {key: jax.ShapeDtypeStruct((1, 131072), jnp.int32) for key in ("inputs", "targets")}
    optimizer = optax.adam(1e-3)
    state = jax.eval_shape(lambda: step.init_state(model, optimizer, 0, batch, False))
    return step.make_train_step(model, optimizer, by_targets, learning_rate=lambda at: jnp.float32(1e-3)), state, batch


def test_a_long_training_step_takes_a_tenth_of_a_transformers_flops():
    transformer = seqjax.build({"name": "transformer", **LONG})
    # Forward, and twice that back; what is rematerialised would come on top.
    assert 10 * count_flops(*long_step()) <= 3 * transformer.costs(131072).flops


@pytest.mark.exhaustive
@pytest.mark.skipif(tpu.libtpu_missing() is not None, reason=str(tpu.libtpu_missing()))
def test_a_long_training_step_fits_a_tpu():
    memory = tpu.compile_for("v5e", *long_step()).memory_analysis()
    assert memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes < 16e9
    transformer = seqjax.build({"name": "transformer", **LONG})
    beside = tpu.compile_for("v5e", *long_step(model=transformer)).memory_analysis()
    assert 4 * memory.temp_size_in_bytes <= beside.temp_size_in_bytes


@pytest.mark.parametrize(("head", "shape"), [("classifier", (2, 3)), ("matching", (1, 3)), ("forecast", (2, 4, 1))])
def test_heads_that_read_whole_sequences_read_the_last_window(head, shape):
    model = build(head=head, num_classes=3, output_dim=1, horizon=4)
    tokens = jnp.zeros((1, 2, 9) if head == "matching" else (2, 9), jnp.int32)
    (outputs, state), variables = jax.eval_shape(model.init_with_output, jax.random.key(0), tokens)
    assert outputs.shape == shape and state is None
    assert model.costs(9).parameters == sum(a.size for a in jax.tree.leaves(variables))
    assert model.costs(9).state_bytes == 0
    assert model.costs(90).flops < build(head="regression", output_dim=1).costs(90).flops / 1.5
    with pytest.raises(ConfigError, match="carries no state"):
        model.init_state(2, 9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_latents": 0}, r"model\.num_latents=0 is not positive"),
        ({"stride": 5}, r"model\.stride=5 does not fit model\.num_latents=4; allowed: None, 1 to 4"),
        ({"min_context": -1}, r"model\.min_context=-1 is negative"),
        ({"input_dropout": 1.0}, r"model\.input_dropout=1\.0 is not a rate"),
        ({"causal": False}, r"model\.causal=False: perceiver_ar reads from left to right"),
        ({"num_heads": 5}, r"model\.num_heads=5 does not divide"),
        ({"series_norm": "mean"}, r"model\.series_norm is not an option"),
        ({"num_latent": 4}, r"model\.num_latent is not an option; did you mean 'num_latents'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        build(**options)


def test_options_reach_the_cross_attention_and_the_stack():
    model = build(pattern=("mamba", "mlp"), state_dim=4, num_heads=2, activation="gelu", window=None)
    cross, feed_forward = (dict(s.options) for s in model.read)
    assert cross["num_heads"] == 2 and feed_forward["activation"] == "gelu"
    model = build(window=3)
    assert dict(model.read[0].options)["window"] is None and dict(model.unit[0].options)["window"] == 3
