"""What the conformance suite cannot see: heads, training-time noise, batch statistics, scanning, and refusals."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqjax
from seqjax.config import ConfigError
from seqjax.scaling.flops import count_flops

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 12)), jnp.int32)


def build(**options):
    # Blocks that start as the identity would hide what their sub-layers do.
    return seqjax.build({**seqjax.example_config("transformer").to_dict(), "residual_init": 1.0, **options})


def test_unrolled_and_scanned_layers_agree():
    scanned, unrolled = build(num_layers=3), build(num_layers=3, unroll=0)
    variables = scanned.init(jax.random.key(0), TOKENS)
    assert "while" in jax.jit(scanned.apply).lower(variables, TOKENS).as_text()
    assert "while" not in jax.jit(unrolled.apply).lower(variables, TOKENS).as_text()
    np.testing.assert_allclose(scanned.apply(variables, TOKENS)[0], unrolled.apply(variables, TOKENS)[0], atol=1e-6)


@pytest.mark.parametrize("remat", ["full", "dots", "dots_no_batch"])
def test_rematerialisation_changes_nothing(remat):
    plain, other = build(), build(remat=remat)
    variables = nn.unbox(plain.init(jax.random.key(0), TOKENS))
    gradient = lambda model: jax.grad(lambda v: jnp.sum(model.apply(v, TOKENS)[0] ** 2))(variables)
    for a, b in zip(jax.tree.leaves(gradient(plain)), jax.tree.leaves(gradient(other))):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_classifier_pools_over_valid_tokens_alone():
    for pool in ("mean", "last"):
        model = build(head="classifier", num_classes=3, pool=pool, causal=False)
        variables = model.init(jax.random.key(0), TOKENS)
        ids = jnp.asarray([[1] * 12, [1] * 7 + [0] * 5])
        scores, state = model.apply(variables, TOKENS, segment_ids=ids)
        assert scores.shape == (2, 3) and state is None
        alone, _ = model.apply(variables, TOKENS[1:, :7])
        np.testing.assert_allclose(scores[1], alone[0], atol=1e-5)


def test_matching_sees_both_towers_alike():
    model = build(head="matching", num_classes=2, causal=False)
    pairs = jnp.stack([TOKENS, TOKENS[::-1]], axis=1)
    variables = model.init(jax.random.key(0), pairs)
    scores, _ = model.apply(variables, pairs)
    assert scores.shape == (2, 2)
    built = sum(a.size for a in jax.tree.leaves(nn.unbox(variables)))
    assert model.costs(12).parameters == built
    # The pair features are [u, v, u - v, u * v]: swapping the towers changes them, unless the towers are equal.
    assert not np.allclose(scores, model.apply(variables, pairs[:, ::-1])[0])
    same = jnp.stack([TOKENS, TOKENS], axis=1)
    np.testing.assert_allclose(model.apply(variables, same)[0], model.apply(variables, same[:, ::-1])[0], atol=1e-6)


def test_forecast_reads_the_last_valid_step():
    model = build(vocab_size=None, input_dim=3, head="forecast", output_dim=2, horizon=5)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 12, 3)), jnp.float32)
    variables = model.init(jax.random.key(0), x)
    ids = jnp.asarray([[1] * 12, [1] * 9 + [0] * 3])
    forecast, _ = model.apply(variables, x, segment_ids=ids)
    assert forecast.shape == (2, 5, 2)
    np.testing.assert_allclose(forecast[1], model.apply(variables, x[1:, :9])[0][0], atol=1e-5)
    assert model.costs(12).parameters == sum(a.size for a in jax.tree.leaves(nn.unbox(variables)))


@pytest.mark.parametrize("options", [{"dropout": 0.5}, {"stochastic_depth": 0.9}])
def test_dropout_and_stochastic_depth_act_in_training_only(options):
    model = build(num_layers=3, **options)
    variables = model.init(jax.random.key(0), TOKENS)
    train = lambda seed: model.apply(variables, TOKENS, train=True, rngs={"dropout": jax.random.key(seed)})[0]
    np.testing.assert_array_equal(train(0), train(0))
    assert not np.allclose(train(0), train(1))
    np.testing.assert_array_equal(model.apply(variables, TOKENS)[0], build(num_layers=3).apply(variables, TOKENS)[0])


def test_blocks_start_as_the_identity_by_default():
    config = seqjax.example_config("transformer")
    model = seqjax.build(config)
    deeper = seqjax.build({**config.to_dict(), "num_layers": 4})
    one = model.apply(model.init(jax.random.key(0), TOKENS), TOKENS)[0]
    assert np.allclose(one, deeper.apply(deeper.init(jax.random.key(0), TOKENS), TOKENS)[0])
    assert not np.allclose(one, build().apply(build().init(jax.random.key(0), TOKENS), TOKENS)[0])


def test_stochastic_depth_keeps_the_mean():
    model = build(stochastic_depth=0.4, num_layers=1)
    variables = model.init(jax.random.key(0), TOKENS)
    keys = jax.random.split(jax.random.key(1), 600)
    noisy = jax.jit(jax.vmap(lambda key: model.apply(variables, TOKENS, train=True, rngs={"dropout": key})[0]))(keys)
    drops = np.asarray(jnp.any(noisy != model.apply(variables, TOKENS)[0], axis=(2, 3))).mean()
    assert 0.9 < drops <= 1.0  # kept sub-layers are scaled, so a draw never equals the plain output
    assert len({np.asarray(row).tobytes() for row in noisy[:, 0]}) == 4  # two sub-layers, each kept or dropped


def test_batch_statistics_move_in_training_and_are_used_after():
    model = build(norm="batch", num_layers=1)
    variables = model.init(jax.random.key(0), TOKENS)
    assert set(variables) == {"params", "batch_stats"}
    _, moved = model.apply(variables, TOKENS, train=True, mutable=["batch_stats"])
    before, after = (jax.tree.leaves(v["batch_stats"]) for v in (variables, moved))
    assert all(not np.allclose(a, b) for a, b in zip(before, after))
    one, _ = model.apply({**variables, **moved}, TOKENS)
    alone, _ = model.apply({**variables, **moved}, TOKENS[:1])
    np.testing.assert_allclose(one[:1], alone, atol=1e-5)


def test_embeddings_are_scaled_and_normed_and_logits_bounded():
    plain, scaled = build(num_layers=1), build(num_layers=1, embed_scale=3.0, embed_norm="layer", logit_softcap=0.5)
    variables = nn.unbox(scaled.init(jax.random.key(0), TOKENS))
    logits, _ = scaled.apply(variables, TOKENS)
    assert np.abs(logits).max() < 0.5
    # A scale before a layer norm changes nothing but what epsilon does; without either, logits are those of the plain model.
    unscaled = scaled.clone(embed_scale=1.0, norm_epsilon=1e-5)
    np.testing.assert_allclose(unscaled.apply(variables, TOKENS)[0], logits, atol=0.02)
    params = {key: value for key, value in variables["params"].items() if key != "embed_norm"}
    unbounded, _ = plain.apply({"params": params}, TOKENS)
    bounded, _ = plain.clone(logit_softcap=0.5).apply({"params": params}, TOKENS)
    np.testing.assert_allclose(bounded, 0.5 * np.tanh(np.asarray(unbounded) / 0.5), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_norm": "layr"}, "model.embed_norm='layr'.*layer"),
        ({"logit_softcap": 0.0}, "model.logit_softcap=0.0"),
        ({"rope_fraction": 0.0}, "model.rope_fraction=0.0 is out of range"),
        (
            {"vocab_size": None, "input_dim": 3, "head": "regression", "output_dim": 1, "embed_scale": 2.0},
            "embed_scale=2.0 acts",
        ),
    ],
)
def test_bad_options_of_scales_and_bounds(options, message):
    with pytest.raises(ConfigError, match=message):
        build(**options)


def test_flop_counter_equals_xla_where_nothing_loops():
    model = build(num_layers=3, embed_dim=128, unroll=0)
    variables = nn.unbox(model.init(jax.random.key(0), TOKENS))
    forward = lambda v, x: model.apply(v, x)[0]
    xla = jax.jit(forward).lower(variables, TOKENS).compile().cost_analysis()["flops"]
    counted = count_flops(forward, variables, TOKENS)
    assert 0.97 < counted / xla < 1.03
    assert 0.9 < 2 * model.costs(12).flops / xla < 1.02  # costs are per row
    scanned = build(num_layers=3, embed_dim=128)
    assert 0.99 < count_flops(lambda v, x: scanned.apply(v, x)[0], variables, TOKENS) / counted < 1.01


@pytest.mark.parametrize(
    ("options", "inputs", "words"),
    [
        ({"position": "learned", "max_length": 8}, TOKENS, "12 tokens is longer than the position table, model.max_length=8"),
        ({}, TOKENS.astype(jnp.float32), "takes .B, L. tokens"),
        ({}, TOKENS[0], "takes .B, L. tokens"),
        ({"vocab_size": None, "input_dim": 3, "head": "regression", "output_dim": 1}, jnp.zeros((2, 5, 4)), "3 channels"),
    ],
)
def test_wrong_inputs_are_refused(options, inputs, words):
    with pytest.raises(ConfigError, match=words):
        build(**options).init(jax.random.key(0), inputs)


def test_states_are_refused_where_there_are_none():
    with pytest.raises(ConfigError, match="carries no state"):
        build(causal=False).init_state(1, 8)
    with pytest.raises(ConfigError, match="reads the whole sequence"):
        build(head="classifier", num_classes=2).init_state(1, 8)
    with pytest.raises(ConfigError, match="longer than the position table"):
        build(position="learned", max_length=8).init_state(1, 9)


def test_overrunning_the_cache_gives_nan_not_nonsense():
    model = build()
    variables = model.init(jax.random.key(0), TOKENS)
    logits, state = model.apply(variables, TOKENS[:, :8], model.init_state(2, 10))
    assert np.isfinite(logits).all()
    logits, _ = model.apply(variables, TOKENS[:, 8:], state)
    assert np.isnan(logits).all()
