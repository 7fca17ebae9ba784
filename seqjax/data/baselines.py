"""What a byte of text costs without a sequence model: the floors that a language model's score is read against."""

from __future__ import annotations

import gzip

import numpy as np

from seqjax.data.corpora import Corpus


def gzip_bits_per_byte(text: np.ndarray) -> float:
    """Bits per byte of `[N]` uint8 compressed by `gzip -9`, its header of 18 bytes included."""
    return 8 * len(gzip.compress(text.tobytes(), 9, mtime=0)) / len(text)


def ngram_bits_per_byte(train: Corpus, held_out: Corpus, order: int = 3) -> float:
    """Bits per byte of held-out documents under counts of the training documents: the previous `order` bytes predict.

    The estimate after context `c`, with `n` training bytes of `d` distinct kinds seen after it, is interpolated with the
    one after the context shorter by a byte (Witten and Bell 1991, method C; Chen and Goodman 1999, section 2.6):

        p(b | c) = (count(c, b) + d p(b | shorter c)) / (n + d),

    down to the uniform 1/256 below the empty context. Before a document's first byte stand `order` NUL bytes.

    Args:
      train: counted; uint8 tokens.
      held_out: predicted, every byte of it.
      order: bytes of context, 0 to 3.
    """
    seen, asked = _grams(train, order), _grams(held_out, order)
    probability = np.full(len(asked), 1 / 256)
    for context in range(order + 1):
        mask = np.uint32(0xFFFFFFFF >> 8 * (3 - context))
        grams, counts = np.unique(seen & mask, return_counts=True)
        contexts, first = np.unique(grams >> 8, return_index=True)
        kinds = np.diff(first, append=len(grams))
        total = np.add.reduceat(counts, first)
        n, d = _look_up(contexts, (asked & mask) >> 8, total, kinds)
        (count,) = _look_up(grams, asked & mask, counts)
        # After an unseen context there is nothing to interpolate with: the shorter one decides alone.
        probability = np.where(n > 0, (count + d * probability) / np.maximum(n + d, 1), probability)
    return float(-np.log2(probability).mean())


def _grams(corpus: Corpus, order: int) -> np.ndarray:
    """`[N]` uint32: each byte in the lowest eight bits, and the bytes before it in its document above."""
    place = np.arange(len(corpus.tokens)) - np.repeat(corpus.offsets[:-1], corpus.lengths)
    grams = corpus.tokens.astype(np.uint32)
    for back in range(1, order + 1):
        earlier = np.where(place >= back, np.roll(corpus.tokens, back), 0).astype(np.uint32)
        grams |= earlier << np.uint32(8 * back)
    return grams


def _look_up(keys: np.ndarray, wanted: np.ndarray, *values: np.ndarray) -> list[np.ndarray]:
    """For each of `values`, its entries at `wanted` among the sorted `keys`; 0 where there is none."""
    place = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return [np.where(keys[place] == wanted, value[place], 0) for value in values]
