"""Mirrored copying: what an example is."""

import numpy as np
import pytest

from seqjax.config import ConfigError
from seqjax.data.mirrored_copy import MirroredCopy


@pytest.mark.parametrize("length", [2, 12, 131072])
def test_the_second_half_mirrors_the_first(length):
    task = MirroredCopy(sequence_length=length, num_tokens=7)
    example = task.examples("train")[3]
    inputs, targets, weights = example["inputs"], example["targets"], example["weights"]
    assert inputs.shape == targets.shape == weights.shape == (task.length,) == (length,)
    assert inputs[0] == 7 == task.vocab_size - 1
    np.testing.assert_array_equal(inputs[1:], targets[:-1])
    np.testing.assert_array_equal(targets, targets[::-1])
    np.testing.assert_array_equal(weights, np.repeat([0, 1], length // 2))
    assert targets.min() >= 0 and targets.max() < 7


def test_examples_are_functions_of_seed_split_and_index():
    read = lambda split, index, seed=0: MirroredCopy(seed=seed).examples(split)[index]["inputs"]
    np.testing.assert_array_equal(read("train", 3), read("train", 3))
    for other in (read("train", 4), read("validation", 3), read("train", 3, seed=1)):
        assert (read("train", 3) != other).any()
    assert MirroredCopy().baselines() == {"guessing": pytest.approx(np.log(256))}


@pytest.mark.parametrize("length", [0, 7])
def test_bad_options(length):
    with pytest.raises(ConfigError, match=f"data.sequence_length={length} has no two halves; allowed: even numbers"):
        MirroredCopy(sequence_length=length)
