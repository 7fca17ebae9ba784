"""Generated tasks of recall: what an example is, and that it depends on its index alone."""

import numpy as np
import pytest

from seqjax.config import ConfigError
from seqjax.data.recall import InductionHeads, SelectiveCopying


@pytest.mark.parametrize("index", [0, 1, 2**29])
def test_selective_copying_asks_for_the_tokens_in_order(index):
    task = SelectiveCopying(context=20, num_copied=5, num_tokens=7)
    example = task.examples("train")[index]
    assert example["inputs"].shape == (task.length,) == (25,)
    context, marks = np.split(example["inputs"], [20])
    np.testing.assert_array_equal(context[context < 7], example["targets"][20:])
    assert (context == 7).sum() == 15
    assert (marks == 8).all()
    np.testing.assert_array_equal(example["weights"], np.arange(25) >= 20)
    assert example["inputs"].max() < task.vocab_size == 9


def test_induction_heads_ask_for_what_followed_the_mark():
    task = InductionHeads(sequence_length=12, num_tokens=5)
    firsts = set()
    for index in range(200):
        example = task.examples("validation")[index]
        first, last = np.flatnonzero(example["inputs"] == 5)
        assert last == 11
        assert example["targets"][-1] == example["inputs"][first + 1] < 5
        np.testing.assert_array_equal(example["weights"], np.arange(12) == 11)
        firsts.add(first)
    assert firsts == set(range(10))


def test_marks_may_stand_near_more_often():
    task = InductionHeads(sequence_length=256, num_tokens=5, distances="log_uniform")
    marks = [np.flatnonzero(task.examples("train")[i]["inputs"] == 5) for i in range(400)]
    distances = np.array([last - first for first, last in marks])
    assert distances.min() == 2 and 128 < distances.max() <= 255
    # As many between 2 and 16 as between 16 and 128.
    assert np.log2(np.median(distances)) == pytest.approx(4.5, abs=0.5)


@pytest.mark.parametrize("kind", [SelectiveCopying, InductionHeads])
def test_examples_are_functions_of_seed_split_and_index(kind):
    read = lambda split, index, seed=0: kind(seed=seed).examples(split)[index]["inputs"]
    np.testing.assert_array_equal(read("train", 3), read("train", 3))
    for other in (read("train", 4), read("validation", 3), read("train", 3, seed=1)):
        assert (read("train", 3) != other).any()
    assert len(kind().examples("validation")) == 1000
    assert kind().baselines() == {"guessing": pytest.approx(np.log(16))}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SelectiveCopying(context=4, num_copied=5), "data.num_copied=5 does not fit data.context=4"),
        (lambda: InductionHeads(sequence_length=2), "data.sequence_length=2 is too small"),
        (lambda: InductionHeads(num_tokens=0), "data.num_tokens=0"),
        (lambda: InductionHeads(distances="log"), "data.distances='log'.*log_uniform"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
