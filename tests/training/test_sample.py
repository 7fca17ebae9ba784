import jax
import jax.numpy as jnp
import pytest
import tiny

from seqjax import registry
from seqjax.data.tokenizers import CharTokenizer
from seqjax.training.sample import print_sample


class Speaking(tiny.TinyTask):
    tokenizer = CharTokenizer("abcdefghijklmnop")


@pytest.fixture(scope="module")
def model():
    options = {"name": "transformer", "embed_dim": 8, "num_layers": 1, "num_heads": 1, "vocab_size": 16}
    return registry.build(options)


def said_by(model, variables, task, temperature=0.8):
    lines = []
    print_sample(model, variables, task, 6, temperature, 0, lines.append)
    (line,) = lines
    return line


def test_a_language_model_says_as_many_tokens_as_asked(model):
    variables = model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    head, text = said_by(model, variables, Speaking()).split("\n")
    assert head == "Sample, temperature 0.8:" and len(text) == 6
    assert said_by(model, variables, Speaking()).endswith(text)  # a function of the seed


def test_tasks_and_models_that_cannot_say_why(model):
    class Classify(Speaking):
        head = "classifier"

    assert said_by(model, None, tiny.TinyTask()).startswith("No sample:")
    assert said_by(model, None, Classify()).startswith("No sample:")
    blind = registry.build(
        {"name": "transformer", "embed_dim": 8, "num_layers": 1, "num_heads": 1, "vocab_size": 16, "causal": False}
    )
    assert "causal=False" in said_by(blind, None, Speaking())
