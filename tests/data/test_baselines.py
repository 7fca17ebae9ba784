import gzip

import numpy as np
import pytest

from seqjax.data.baselines import gzip_bits_per_byte, ngram_bits_per_byte
from seqjax.data.corpora import Corpus


def corpus(*documents):
    tokens = np.frombuffer(b"".join(documents), np.uint8)
    return Corpus(tokens, np.cumsum([0, *map(len, documents)]))


def witten_bell(train, history, byte, order):
    """The formula of the docstring, one probability at a time."""
    if order < 0:
        return 1 / 256
    context = history[len(history) - order :]
    after = [d[i] for d in train for i in range(len(d)) if (b"\0" * 3 + d[:i])[3 + i - order :] == context]
    below = witten_bell(train, history, byte, order - 1)
    if not after:
        return below
    kinds = len(set(after))
    return (after.count(byte) + kinds * below) / (len(after) + kinds)


@pytest.mark.parametrize("order", range(4))
def test_counts_agree_with_the_formula(order):
    rng = np.random.default_rng(0)
    train = [bytes(rng.integers(97, 100, n).tolist()) for n in (1, 9, 30)]
    held_out = [b"abcabcaz", b"c", b"aab"]
    expected = [-np.log2(witten_bell(train, (b"\0" * 3 + d)[: 3 + i], d[i], order)) for d in held_out for i in range(len(d))]
    assert ngram_bits_per_byte(corpus(*train), corpus(*held_out), order) == pytest.approx(np.mean(expected))


def test_gzip():
    text = b"sequence " * 100
    assert gzip_bits_per_byte(np.frombuffer(text, np.uint8)) == 8 * len(gzip.compress(text, 9)) / len(text)
