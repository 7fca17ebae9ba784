import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqjax.config import ConfigError
from seqjax.data.packing import STRATEGIES, pack_row, plan_packing

LENGTHS = st.lists(st.integers(0, 25), max_size=30)
BOS = 256


@settings(max_examples=60)
@given(LENGTHS, st.integers(1, 9), st.sampled_from(sorted(STRATEGIES)))
def test_every_token_is_in_the_plan_exactly_once(lengths, row_length, strategy):
    plan = plan_packing(lengths, row_length, strategy)
    covered = [np.zeros(length, int) for length in lengths]
    for row in range(plan.num_rows):
        pieces = plan.pieces(row)
        assert 1 <= sum(length for _, _, length in pieces) <= row_length
        for document, start, length in pieces:
            assert length >= 1 and start + length <= lengths[document]
            covered[document][start : start + length] += 1
    assert all((count == 1).all() for count in covered)


@given(LENGTHS, st.integers(1, 9))
def test_split_pads_the_last_row_only(lengths, row_length):
    plan = plan_packing(lengths, row_length, "split")
    assert plan.num_rows == -(-sum(lengths) // row_length)
    assert (plan.document[1:] >= plan.document[:-1]).all()


@given(LENGTHS, st.integers(1, 9))
def test_best_fit_cuts_no_document_that_fits_a_row(lengths, row_length):
    plan = plan_packing(lengths, row_length, "best_fit")
    for document, start, length in zip(plan.document, plan.start, plan.length):
        assert start % row_length == 0
        assert length == min(row_length, lengths[document] - start)
    # Two rows that would fit into one mean that a piece was not put where it had room.
    free = [row_length - sum(length for _, _, length in plan.pieces(row)) for row in range(plan.num_rows)]
    assert sum(room >= row_length / 2 for room in free if room) <= 1


def test_best_fit_takes_the_fullest_row_with_room():
    plan = plan_packing([6, 7, 3, 4], 10, "best_fit")
    rows = [{document for document, _, _ in plan.pieces(row)} for row in range(plan.num_rows)]
    assert rows == [{1, 2}, {0, 3}]


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_a_hundred_thousand_documents_are_planned_in_seconds(strategy):
    lengths = np.random.RandomState(0).randint(0, 3000, 100_000)
    start = time.process_time()
    plan = plan_packing(lengths, 1024, strategy)
    assert time.process_time() - start < 10
    assert plan.length.sum() == lengths.sum()


def test_packed_row_by_hand():
    tokens, offsets = np.arange(10, 17, dtype=np.uint8), np.array([0, 2, 7])
    plan = plan_packing(np.diff(offsets), 4, "split")
    first, last = (pack_row(plan, row, tokens, offsets, BOS) for row in range(2))
    assert first["inputs"].tolist() == [BOS, 10, BOS, 12]
    assert first["targets"].tolist() == [10, 11, 12, 13]
    assert first["segment_ids"].tolist() == [1, 1, 2, 2]
    assert last["inputs"].tolist() == [13, 14, 15, 0]
    assert last["targets"].tolist() == [14, 15, 16, 0]
    assert last["segment_ids"].tolist() == [1, 1, 1, 0]
    assert last["weights"].tolist() == [1, 1, 1, 0]


@settings(max_examples=40)
@given(LENGTHS, st.integers(1, 9), st.sampled_from(sorted(STRATEGIES)))
def test_each_token_is_predicted_from_the_one_before_it_in_its_document(lengths, row_length, strategy):
    offsets = np.cumsum([0, *lengths])
    tokens = np.arange(offsets[-1])  # each its own, so that a pair says where it came from
    plan = plan_packing(lengths, row_length, strategy)
    pairs = {}
    for row in range(plan.num_rows):
        example = pack_row(plan, row, tokens, offsets, BOS + 10**6)
        kept = example["weights"] > 0
        assert (kept == (example["segment_ids"] > 0)).all()
        pairs.update(zip(example["targets"][kept].tolist(), example["inputs"][kept].tolist()))
        ids = example["segment_ids"][kept]
        assert ids[0] == 1 and set(np.diff(ids)) <= {0, 1}
        document = np.searchsorted(offsets, example["targets"][kept], side="right")
        assert ((np.diff(document) != 0) == (np.diff(ids) != 0)).all()
    starts = {int(o) for o, length in zip(offsets, lengths) if length}
    assert pairs == {t: BOS + 10**6 if t in starts else t - 1 for t in tokens.tolist()}


@settings(max_examples=40)
@given(LENGTHS, st.integers(1, 4), st.sampled_from([1, 2, 3]), st.sampled_from(sorted(STRATEGIES)))
def test_aligned_documents(lengths, patches, alignment, strategy):
    offsets = np.cumsum([0, *lengths])
    tokens = np.arange(offsets[-1])
    plan = plan_packing(lengths, patches * alignment, strategy, alignment)
    rows = [pack_row(plan, row, tokens, offsets, BOS) for row in range(plan.num_rows)]
    predicted = [row["targets"][row["weights"] > 0] for row in rows]
    assert sorted(np.concatenate([*predicted, tokens[:0]]).tolist()) == tokens.tolist()
    for row in rows:
        starts = np.flatnonzero(np.diff(row["segment_ids"], prepend=0))
        assert (starts % alignment == 0).all()
        assert (row["targets"][row["weights"] == 0] == 0).all()


def test_aligned_row_by_hand():
    tokens, offsets = np.arange(10, 16, dtype=np.uint8), np.array([0, 3, 4, 6])
    plan = plan_packing(np.diff(offsets), 8, "split", 2)
    row = pack_row(plan, 0, tokens, offsets, BOS)
    assert row["inputs"].tolist() == [BOS, 10, 11, 0, BOS, 0, BOS, 14]
    assert row["targets"].tolist() == [10, 11, 12, 0, 13, 0, 14, 15]
    assert row["segment_ids"].tolist() == [1, 1, 1, 1, 2, 2, 3, 3]
    assert row["weights"].tolist() == [1, 1, 1, 0, 1, 0, 1, 1]


def test_bad_requests():
    with pytest.raises(ConfigError, match="segment_alignment=3"):
        plan_packing([1], 4, "split", 3)
    with pytest.raises(ConfigError, match="best_fit"):
        plan_packing([1], 4, "best")
    with pytest.raises(ValueError, match="row_length=0"):
        plan_packing([1], 0)
    with pytest.raises(ValueError):
        plan_packing([-1], 4)
