"""Text in, text out: the pieces that stream are the text that returns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqjax
from seqjax.config import ConfigError
from seqjax.data.tokenizers import ByteTokenizer, CharTokenizer
from seqjax.generation.text import _Writer, continue_text


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), CharTokenizer.of_text("abc\n")])
@pytest.mark.parametrize("prompt", ["", "abc"])
def test_streamed_pieces_add_up(tokenizer, prompt):
    config = seqjax.example_config("transformer")
    config.vocab_size = tokenizer.vocab_size
    model = seqjax.build(config)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    pieces = []
    text = continue_text(model, variables, tokenizer, prompt, 20, temperature=1.0, stream=pieces.append)
    assert text and "".join(pieces) == text
    assert text == continue_text(model, variables, tokenizer, prompt, 20, temperature=1.0)


def test_half_a_character_waits_for_the_other_half():
    pieces = []
    writer = _Writer(ByteTokenizer(), pieces.append)
    for byte in "aé€b".encode():
        writer(np.array([byte]))
    assert pieces == ["a", "é", "€", "b"]


def test_a_character_outside_the_vocabulary_is_named():
    with pytest.raises(ConfigError, match="'x' is not one of the 3 characters"):
        continue_text(None, None, CharTokenizer.of_text("abc"), "abx", 2)
