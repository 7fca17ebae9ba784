import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqjax.config import ConfigError
from seqjax.data.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)


@given(TEXT)
def test_what_is_encoded_is_decoded(text):
    for tokenizer in (ByteTokenizer(), CharTokenizer.of_text(text)):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32
        assert ids.min() >= 0 and ids.max() < tokenizer.vocab_size
        assert tokenizer.decode(ids) == text
        assert Tokenizer.from_json(tokenizer.to_json()) == tokenizer


def test_bytes_leave_a_beginning_of_document_out():
    assert ByteTokenizer().encode("é").tolist() == [0xC3, 0xA9]
    assert ByteTokenizer().decode(np.array([256, 104, 105])) == "hi"
    assert ByteTokenizer().decode(np.array([0xC3])) == "�"


def test_characters_are_numbered_in_sorted_order():
    tokenizer = CharTokenizer.of_text("banana")
    assert tokenizer.characters == "abn"
    assert tokenizer.encode("ban").tolist() == [1, 0, 2]
    assert tokenizer.bos_id is None


@pytest.mark.parametrize("character", ["A", "c", "z", "\N{SNOWMAN}"])
def test_unknown_character_is_named(character):
    with pytest.raises(ConfigError, match=character):
        CharTokenizer.of_text("abn").encode("ba" + character)
