"""Generation against recomputing the whole prefix for every token."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqjax
from seqjax import registry
from seqjax.config import ConfigError
from seqjax.generation import generate as generate_module
from seqjax.generation.sampling import Sampler

PROMPTS = [[5, 6, 7, 8], [9], [10, 11]]
STACKS = ("transformer", "mamba", "xlstm")
"""Of the architectures that are stacks of mixers, and so generate by the same code."""


def ours() -> list[str]:
    """Token models of this package, for other tests register architectures of their own: all but most of the stacks."""
    able = seqjax.list_architectures(inputs="tokens", causal=True, carries_state=True)
    made = {name: registry.architecture(name).make.__module__ for name in able}
    kept = [name for name in able if made[name] != "seqjax.models.sequence_model" or name in STACKS]
    return [name for name in kept if made[name].startswith("seqjax.")]


def build(name="transformer", **options):
    model = seqjax.build({**seqjax.example_config(name).to_dict(), **options})
    variables = nn.unbox(model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32)))
    # Far from the initial values, where every block is the identity and the most likely token is the last one again.
    rng = np.random.default_rng(0)
    return model, jax.tree.map(lambda a: a + 0.3 * rng.standard_normal(a.shape).astype(a.dtype), variables)


def greedy_by_recomputation(model, variables, prompt, num_tokens):
    tokens = list(prompt)
    for _ in range(num_tokens):
        logits, _ = model.apply(variables, jnp.asarray([tokens]))
        tokens.append(int(jnp.argmax(logits[0, -1])))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("name", ours())
def test_greedy_equals_recomputation_for_ragged_prompts(name):
    model, variables = build(name)
    new = seqjax.generate(model, variables, PROMPTS, 4)
    assert new.shape == (3, 4) and new.dtype == jnp.int32
    for prompt, row in zip(PROMPTS, new):
        assert greedy_by_recomputation(model, variables, prompt, 4) == list(row)


def test_eos_ends_a_row_and_is_repeated():
    model, variables = build()
    plain = np.asarray(seqjax.generate(model, variables, PROMPTS, 6))
    eos = int(plain[0, 2])
    ended = np.asarray(seqjax.generate(model, variables, PROMPTS, 6, eos=eos))
    for row, free in zip(ended, plain):
        if eos in free:
            end = list(free).index(eos)
            np.testing.assert_array_equal(row[: end + 1], free[: end + 1])
            assert (row[end:] == eos).all()
        else:
            np.testing.assert_array_equal(row, free)


def test_one_program_serves_other_strengths_keys_and_streams():
    model, variables = build()
    prompts = np.ones((2, 3), np.int32)
    generate_module._generate.clear_cache()
    for temperature, top_k, top_p, seed in ((0.7, 5, 0.9, 0), (1.3, 20, 0.5, 1)):
        stream = []
        key = jax.random.key(seed)
        new = seqjax.generate(model, variables, prompts, 5, temperature, top_k, top_p, None, key, stream=stream.append)
        np.testing.assert_array_equal(np.stack(stream, axis=1), new)
    assert generate_module._generate._cache_size() == 1


def test_sampling_follows_the_key():
    model, variables = build()
    draw = lambda seed: np.asarray(seqjax.generate(model, variables, PROMPTS, 8, 2.0, key=jax.random.key(seed)))
    np.testing.assert_array_equal(draw(0), draw(0))
    assert (draw(0) != draw(1)).any()


def test_filters_keep_what_numpy_keeps():
    logits = jnp.log(jnp.asarray([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]]))

    def kept(top_k, top_p):
        return np.isfinite(Sampler.create(1.0, top_k, top_p).filter(logits)).tolist()

    assert kept(None, None) == [[True] * 4] * 2
    assert kept(2, None) == [[True, True, False, False], [False, False, True, True]]
    assert kept(None, 0.65) == [[True, True, False, False], [False, False, True, True]]
    assert kept(None, 0.75) == [[True, True, True, False], [False, True, True, True]]
    # After top_k = 2 the first token has 4/7 of what is left, which reaches 0.5.
    assert kept(2, 0.5) == [[True, False, False, False], [False, False, False, True]]


def test_samples_follow_the_distribution():
    probabilities = np.array([0.5, 0.3, 0.2])
    logits = jnp.broadcast_to(jnp.log(probabilities), (4000, 3))
    counts = np.bincount(Sampler.create(1.0, None, None).sample(logits, jax.random.key(0)), minlength=3)
    np.testing.assert_allclose(counts / 4000, probabilities, atol=0.03)
    assert set(np.asarray(Sampler.create(1.0, 1, None).sample(logits, jax.random.key(0)))) == {0}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": [[1], []]}, "prompt 1 has shape"),
        ({"prompts": [[1, 64]]}, "allowed: 0..63"),
        ({"prompts": np.array([[0.5]])}, "allowed:"),
        ({"num_tokens": 0}, "num_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": 1.0}, "needs key="),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p=1.5"),
    ],
)
def test_bad_calls_are_refused(change, words):
    model, variables = build()
    with pytest.raises(ConfigError, match=words):
        seqjax.generate(model, variables, **{"prompts": [[1]], "num_tokens": 2, **change})


def test_a_model_without_state_and_a_short_table_are_refused():
    model, variables = build(causal=False)
    with pytest.raises(ConfigError, match="carries no state"):
        seqjax.generate(model, variables, [[1]], 2)
    model, variables = build(position="learned", max_length=8)
    with pytest.raises(ConfigError, match="longer than the position table"):
        seqjax.generate(model, variables, [[1]], 8)
