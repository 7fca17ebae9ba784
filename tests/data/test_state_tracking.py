"""Products of permutations against reference tables, and what an example of them is."""

import pathlib

import numpy as np
import pytest

from seqjax.config import ConfigError
from seqjax.data.state_tracking import GROUPS, Parity, PrefixProducts, permutations, product_table

GOLDEN = np.load(pathlib.Path(__file__).parent / "data" / "state_tracking.npz")


@pytest.mark.parametrize("group", ["S3", "A5"])
def test_groups_equal_reference_tables(group):
    found, known = permutations(*GROUPS[group]), GOLDEN[f"{group}_perms"]
    number = {tuple(p): i for i, p in enumerate(found.tolist())}
    ours = np.array([number[tuple(p)] for p in known.tolist()])  # the reference's element i is ours of this number
    assert sorted(ours) == list(range(len(found)))
    np.testing.assert_array_equal(product_table(*GROUPS[group])[np.ix_(ours, ours)], ours[GOLDEN[f"{group}_table"]])
    table, products = product_table(*GROUPS[group]), []
    for element in ours[GOLDEN[f"{group}_tokens"]].T:
        products.append(element if not products else table[element, products[-1]])
    np.testing.assert_array_equal(np.stack(products, axis=1), ours[GOLDEN[f"{group}_states"]])


@pytest.mark.parametrize("group", GROUPS)
def test_targets_are_permutations_applied_one_after_another(group):
    task = PrefixProducts(group=group, sequence_length=12)
    elements = permutations(*GROUPS[group])
    assert task.vocab_size == task.num_tokens == len(elements)
    example = task.examples("train")[3]
    points = np.arange(elements.shape[1])
    for token, target, weight in zip(example["inputs"], example["targets"], example["weights"]):
        points = elements[token][points]
        np.testing.assert_array_equal(elements[target], points)
        assert weight == 1


def test_parity_counts_ones():
    example = Parity(sequence_length=40, scored_from=16).examples("validation")[0]
    np.testing.assert_array_equal(example["targets"], example["inputs"].cumsum() % 2)
    np.testing.assert_array_equal(example["weights"], np.arange(40) >= 16)
    np.testing.assert_array_equal(GOLDEN["parity_labels"], GOLDEN["parity_tokens"].cumsum(axis=1) % 2)


def test_examples_are_functions_of_seed_split_and_index():
    read = lambda split, index, seed=0: PrefixProducts(seed=seed).examples(split)[index]["inputs"]
    np.testing.assert_array_equal(read("train", 3), read("train", 3))
    for other in (read("train", 4), read("validation", 3), read("train", 3, seed=1)):
        assert (read("train", 3) != other).any()
    assert PrefixProducts().baselines() == {"guessing": pytest.approx(np.log(6))}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group": "S33"}, "data.group='S33'.*S3"),
        ({"sequence_length": 0}, "data.sequence_length=0"),
        ({"scored_from": 16}, "data.scored_from=16 is no position of data.sequence_length=16; allowed: 0 to 15"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        PrefixProducts(**options)
