"""The Universal Transformer against its equations in NumPy, ordinary layers, and what halting promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqjax
from seqjax.config import ConfigError
from seqjax.models.universal_transformer import last_origins
from seqjax.ops.segments import SegmentState, segments
from seqjax.parallel.rules import unboxed
from seqjax.testing.faces import relative_error

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 7)), jnp.int32)
ACT = {"halting": "act", "num_steps": 5}
SOURCE = {"position_restart": int(TOKENS[0, 3]), "bidirectional_source": True}


def build(**options):
    return seqjax.build({**seqjax.example_config("universal_transformer").to_dict(), "norm_epsilon": 1e-6, **options})


def variables_of(model, inputs=TOKENS):
    """Random ones: initial values would leave the block the identity, and all positions alike."""
    rng = np.random.default_rng(1)
    initial = unboxed(jax.jit(model.init)(jax.random.key(0), inputs))
    return jax.tree.map(lambda a: a + jnp.asarray(0.4 * rng.standard_normal(a.shape), a.dtype), initial)


def run(model, variables, tokens=TOKENS, ids=None, **options):
    return jax.jit(functools.partial(model.apply, **options))(variables, tokens, segment_ids=ids)


def layer_norm(x, p):
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return y * p["scale"] + p["bias"]


def attend(x, p, seen):
    q, k, v = (np.einsum("bld,dhk->blhk", x, p[name]["kernel"]) for name in ("query", "key", "value"))
    logits = np.einsum("bqhk,bshk->bhqs", q, k) / np.sqrt(q.shape[-1])
    logits = np.where(seen[:, None], logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhqs,bshk,hkd->bqd", weights, v, p["out"]["kernel"])


def feed_forward(x, p):
    hidden = np.maximum(x @ p["up"]["kernel"] + p["up"]["bias"], 0)
    return hidden @ p["down"]["kernel"] + p["down"]["bias"]


def coordinates(count, width):
    """Sines, then cosines of 0, 1, ... at the paper's frequencies."""
    angles = np.arange(count)[:, None] / 10000 ** (2 * np.arange(width // 2) / width)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)


def places_and_mask(model, tokens):
    """Where each token stands, and which others it sees."""
    length = tokens.shape[1]
    at = np.tile(np.arange(length), (len(tokens), 1))
    seen = np.ones((len(tokens), length, length), bool)
    seen = np.tril(seen) if model.causal else seen
    for row, places, pairs in zip(np.asarray(tokens), at, seen):
        marks = [i for i in range(length) if row[i] == model.position_restart]
        for mark in marks:
            places[mark:] = np.arange(length - mark)
        if model.bidirectional_source:
            end = next((mark for mark in marks if mark > 0), length)
            pairs[:end, :end] = True
    return at, seen


def reference(model, variables, tokens):
    """Equations 4 to 7 of Dehghani et al. 2019, and the loop of appendix C: logits, and ponder time per position."""
    p = jax.tree.map(np.asarray, variables["params"])
    block, table = p["step"]["block"], p["embedding"]["table"]
    x = table[np.asarray(tokens)]
    at, seen = places_and_mask(model, tokens)
    places, steps = coordinates(x.shape[1], x.shape[2])[at], coordinates(model.num_steps, x.shape[2])
    total, remainder, taken, outcome = (np.zeros((*x.shape[:2], 1)) for _ in range(4))
    for t in range(model.num_steps):
        old, running = x, total < 1
        x = x + places + steps[t]
        if model.halting == "act":
            prob = 1 / (1 + np.exp(-(x @ p["step"]["halting"]["kernel"] + p["step"]["halting"]["bias"])))
            halts = running & ((total + prob > 1 - model.halting_epsilon) | (t == model.num_steps - 1))
            weight = np.where(halts, 1 - total, prob) * running
            remainder += halts * (1 - total)
            total = np.where(halts, 1, total + weight)
            taken += running
        if model.norm_position == "pre":
            x = x + attend(layer_norm(x, block["norm_0"]), block["attention_0"], seen)
            x = x + feed_forward(layer_norm(x, block["norm_1"]), block["mlp_1"])
        else:
            x = layer_norm(x + attend(x, block["attention_0"], seen), block["norm_0"])
            x = layer_norm(x + feed_forward(x, block["mlp_1"]), block["norm_1"])
        if model.halting == "act":
            outcome = outcome + weight * x
            x = np.where(running, x, old) if model.halted == "copy" else x
    y = outcome if model.halting == "act" else x
    y = layer_norm(y, p["norm"]) if "norm" in p else y
    return y @ table.T, (taken + remainder)[..., 0]


@pytest.mark.parametrize("mask", [{}, {"causal": False}, SOURCE])
@pytest.mark.parametrize("norm_position", ["pre", "post"])
@pytest.mark.parametrize("options", [{}, ACT, ACT | {"halted": "copy"}])
def test_the_equations(options, norm_position, mask):
    with jax.enable_x64(True):
        types = {"dtype": "float64", "param_dtype": "float64", "activation": "relu"}
        model = build(norm_position=norm_position, **mask, **options, **types)
        variables = variables_of(model)
        outputs = run(model, variables, train=True, mutable=["losses", "intermediates"])
    (logits, _), sown = jax.tree.map(np.asarray, outputs)
    wanted, ponder = reference(model, variables, TOKENS)
    assert relative_error(logits, wanted) < 1e-9
    if model.adaptive:
        assert len(set(np.round(ponder, 9).ravel())) > 2  # positions differ
        np.testing.assert_allclose(sown["losses"]["ponder"][0], model.ponder_weight * ponder.mean(), rtol=1e-9)
        np.testing.assert_allclose(sown["intermediates"]["halting"][0].sum(0), 1, rtol=1e-9)


def test_the_ponder_cost_is_a_mean_over_real_tokens():
    model = build(**ACT)
    variables = variables_of(model)
    ids = jnp.array([[1, 1, 1, 2, 2, 0, 0], [0, 0, 3, 3, 3, 3, 3]])
    cost = lambda tokens, ids: run(model, variables, tokens, ids, train=True, mutable=["losses"])[1]["losses"]
    pieces = [(TOKENS[:1, :3], 3), (TOKENS[:1, 3:5], 2), (TOKENS[1:, 2:], 5)]
    apart = sum(cost(piece, None)["ponder"][0] * count for piece, count in pieces) / 10
    np.testing.assert_allclose(cost(TOKENS, ids)["ponder"][0], apart, rtol=1e-5)
    assert cost(TOKENS, jnp.zeros_like(ids))["ponder"][0] == 0
    assert not run(model, variables, mutable=["losses"])[1]


def test_depth_costs_no_parameters():
    shapes = lambda **options: jax.tree.map(jnp.shape, variables_of(build(**options)))
    assert shapes(num_steps=2) == shapes(num_steps=7)
    assert build(num_steps=7).costs(10).parameters == build(num_steps=2).costs(10).parameters
    assert build(num_steps=7, step_embedding="learned").costs(10).parameters == build().costs(10).parameters + 7 * 32


def test_steps_without_vectors_are_layers_with_tied_weights():
    options = {"position": "rope", "mlp_ratio": 2.0}
    model = build(num_steps=3, step_embedding="none", **options)
    variables = variables_of(model)
    example = seqjax.example_config("transformer").to_dict()
    layers = seqjax.build({**example, "num_layers": 3, "norm_epsilon": 1e-6, **options})
    params = dict(variables["params"])
    block = params.pop("step")["block"]
    params["repeats"] = jax.tree.map(lambda a: jnp.stack([a] * 3), block)
    wanted = run(layers, {"params": params})[0]
    np.testing.assert_allclose(run(model, variables)[0], wanted, rtol=1e-4, atol=1e-4)


def test_a_threshold_below_every_probability_is_one_step():
    one, many = build(num_steps=1), build(halting="act", halting_epsilon=1 - 1e-6, num_steps=4)
    variables = variables_of(many)
    logits, _ = run(many, variables)
    params = {**variables["params"], "step": {"block": variables["params"]["step"]["block"]}}
    np.testing.assert_allclose(logits, run(one, {"params": params})[0], rtol=1e-4, atol=1e-4)


def test_a_new_model_takes_two_steps():
    model = build(**ACT)
    variables = unboxed(jax.jit(model.init)(jax.random.key(0), TOKENS))
    variables["params"]["step"]["halting"]["kernel"] = jnp.zeros((32, 1))
    _, sown = run(model, variables, mutable=["intermediates"])
    weights = sown["intermediates"]["halting"][0]
    np.testing.assert_allclose(weights[:, 0, 0], [0.7310586, 0.2689414, 0, 0, 0], atol=1e-6)


@pytest.mark.parametrize("name", ["universal_transformer", "transformer"])
def test_positions_are_shifted_in_training_alone(name):
    example = seqjax.example_config(name).to_dict() | {"position": "sinusoidal"}
    model, plain = seqjax.build({**example, "position_offset": 20}), seqjax.build(example)
    tokens = jnp.full((64, 4), 3)
    variables = unboxed(jax.jit(plain.init)(jax.random.key(0), tokens))  # the blocks are the identity: logits show positions
    longer, _ = run(plain, variables, jnp.full((1, 24), 3))
    np.testing.assert_allclose(run(model, variables, tokens)[0][0], longer[0, :4], atol=1e-5)
    rows, _ = run(model, variables, tokens, train=True, rngs={"dropout": jax.random.key(1)})
    offsets = [next(o for o in range(21) if np.allclose(row, longer[0, o : o + 4], atol=1e-4)) for row in np.asarray(rows)]
    assert len(set(offsets)) > 10 and max(offsets) > 15


def test_positions_count_anew_from_a_token():
    tokens = np.array([[9, 1, 2, 9, 3, 4, 5, 6], [1, 9, 2, 3, 9, 9, 1, 2]])
    ids = np.array([[1] * 8, [1, 1, 1, 2, 2, 2, 3, 3]])
    wanted = [[0, 1, 2, 0, 1, 2, 3, 4], [0, 0, 1, 0, 0, 0, 0, 1]]
    found, _ = segments(jnp.asarray(ids), SegmentState.fresh(2), 8)
    origins = last_origins(jnp.asarray(tokens == 9), found, None)
    np.testing.assert_array_equal(found.positions - origins, wanted)


def test_a_source_may_follow_another_and_a_target_a_carried_source():
    mark = SOURCE["position_restart"]
    model, rows = build(**SOURCE), jnp.array([[mark, 1, 2, 3, mark, 4, 5], [mark, 6, 7, 8, mark, 9, 1]])
    variables, call = variables_of(model), jax.jit(model.apply)
    whole, _ = call(variables, rows)
    packed, _ = call(variables, rows.reshape(1, 14), segment_ids=jnp.repeat(jnp.array([[1, 2]]), 7, axis=1))
    np.testing.assert_allclose(packed.reshape(whole.shape), whole, rtol=1e-4, atol=1e-4)
    outputs, state = call(variables, rows[:, :5], model.init_state(2, 8))
    parts = [outputs]
    for i in (5, 6):
        outputs, state = call(variables, rows[:, i : i + 1], state)
        parts.append(outputs)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=1e-4, atol=1e-4)


def test_constants_of_the_mixers_are_kept_for_decoding():
    small = {"vocab_size": 64, "embed_dim": 8, "num_steps": 2, "pattern": ("dss",), "state_dim": 4}
    model = seqjax.build({"name": "universal_transformer", **small})
    variables = variables_of(model)
    prepared = jax.jit(model.prepare)(variables)
    assert jax.tree.leaves(prepared["derived"])
    step = lambda v: jax.jit(model.apply)(v, TOKENS[:, :1], model.init_state(2, 4))[0]
    np.testing.assert_allclose(step(prepared), step(variables), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"halting": "atc"}, "model.halting='atc' is unknown; did you mean 'act'"),
        ({"halted": "freeze"}, "model.halted='freeze'"),
        ({"step_embedding": "rope"}, "model.step_embedding='rope'"),
        ({"norm": "batch"}, "model.norm='batch'"),
        ({"num_steps": 0}, "model.num_steps=0 is not positive"),
        ({"halting_epsilon": 0.0}, "model.halting_epsilon=0.0 is out of range"),
        ({"ponder_weight": -1.0}, "model.ponder_weight=-1.0 is negative"),
        ({"pattern": (("attention",), ("mlp",))}, "is not one block"),
        ({"position": "rope", "position_offset": 3}, "model.position_offset=3 with model.position='rope'"),
        ({"position": "rope", "position_restart": 3}, "model.position_restart=3 with model.position='rope'"),
        ({"position_restart": 64}, "model.position_restart=64 is not a token of model.vocab_size=64"),
        ({"bidirectional_source": True}, "model.position_restart=None and model.causal=True has no source"),
        ({**SOURCE, "causal": False}, "and model.causal=False has no source"),
        ({**SOURCE, "window": 3}, "model.bidirectional_source=True does not fit attention in model.pattern"),
        ({"num_heads": 5}, "model.num_heads=5 does not divide"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ConfigError, match=words):
        build(**options)
