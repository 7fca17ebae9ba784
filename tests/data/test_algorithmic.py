"""Generated tasks of strings: what a row is, what each task asks for, and how rows are scored."""

import jax.numpy as jnp
import numpy as np
import pytest

from seqjax.config import ConfigError
from seqjax.data.algorithmic import Addition, Copy, Double, Reverse
from seqjax.training.losses import loss_of

KINDS = (Copy, Double, Reverse, Addition)


def strings(task, example):
    """Source and target of a row, told by the marks."""
    tokens = np.append(example["inputs"], 0)[: int(example["segment_ids"].sum()) + 1]
    first, second = np.flatnonzero(tokens == task.num_tokens)
    assert first == 0
    counted = example["weights"] == 1
    np.testing.assert_array_equal(np.flatnonzero(counted), np.arange(second, tokens.size - 1))
    target = example["targets"][counted]
    np.testing.assert_array_equal(target[:-1], tokens[second + 1 : -1])
    assert not example["inputs"][example["segment_ids"] == 0].any()
    return tokens[1:second], target


def number(digits, base):
    return sum(int(digit) * base**place for place, digit in enumerate(digits))


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("kind", KINDS)
def test_targets(kind, split):
    task = kind(source_length=9, validation_length=21, num_tokens=7)
    for index in range(40):
        example = task.examples(split)[index]
        source, target = strings(task, example)
        assert example["inputs"].max() < task.vocab_size
        if kind is Addition:
            (plus,) = np.flatnonzero(source == 8)
            first, second = source[:plus], source[plus + 1 :]
            assert len(first) and len(second) and target.max() < 7
            assert number(target, 7) == number(first, 7) + number(second, 7)
            assert len(target) == max(len(first), len(second)) + 1
        else:
            wanted = {Copy: source, Double: np.tile(source, 2), Reverse: source[::-1]}[kind]
            np.testing.assert_array_equal(target, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_short_strings_to_learn_from_and_long_ones_to_test_on(kind):
    task = kind(source_length=8, validation_length=20, min_length=4)
    lengths = {split: {len(strings(task, task.examples(split)[i])[0]) for i in range(100)} for split in task.splits}
    assert lengths == {"train": {4, 5, 6, 7, 8}, "validation": {20}}
    rows = {split: len(task.examples(split)[0]["inputs"]) for split in task.splits}
    assert rows["train"] < rows["validation"] == task.length
    assert len(kind(source_length=8).examples("validation")[0]["inputs"]) == rows["train"]


@pytest.mark.parametrize("kind", KINDS)
def test_examples_are_functions_of_seed_split_and_index(kind):
    read = lambda split, index, seed=0: kind(seed=seed, min_length=40).examples(split)[index]["inputs"]
    np.testing.assert_array_equal(read("train", 3), read("train", 3))
    for other in (read("train", 4), read("validation", 3), read("train", 3, seed=1)):
        assert (read("train", 3) != other).any()
    assert kind().baselines() == {"guessing": pytest.approx(np.log(10))}


def test_a_row_is_right_where_every_symbol_is():
    task = Copy(source_length=3, min_length=3, num_tokens=4)
    batch = {key: jnp.asarray(np.stack([task.examples("train")[i][key] for i in range(4)])) for key in ("targets", "weights")}
    logits = np.eye(5)[np.asarray(batch["targets"])]
    logits[0, :3] = 0  # outside the target
    logits[1, -1] = np.roll(logits[1, -1], 1)
    batch["weights"] = batch["weights"].at[3].set(0)  # padding of a batch
    sums = loss_of(task)(jnp.asarray(logits), batch)
    assert (float(sums["row_accuracy"][0]), float(sums["row_accuracy"][1])) == (2, 3)
    assert (float(sums["accuracy"][0]), float(sums["accuracy"][1])) == (8, 9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Copy(source_length=0), "data.source_length=0 is too short; allowed: 1"),
        (lambda: Addition(source_length=2), "data.source_length=2 is too short; allowed: 3"),
        (lambda: Addition(validation_length=2), "data.validation_length=2 is too short"),
        (lambda: Reverse(min_length=41), "data.min_length=41 is out of range; allowed: 1 to 40"),
        (lambda: Addition(num_tokens=1), "data.num_tokens=1 is not the base"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
