"""Where segments start, against a loop over tokens."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from seqjax.ops import SegmentState, segments


def by_hand(ids):
    """Row by row, token by token."""
    starts, runs, positions = [], [], []
    for row in ids:
        last, run, position = 0, 0, 0
        for token in row:
            start = token != last
            run, position = run + start, 0 if start else position
            starts.append(start), runs.append(run), positions.append(position)
            last, position = token, position + 1
    return (np.array(a).reshape(np.shape(ids)) for a in (starts, runs, positions))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=7, max_size=7), min_size=1, max_size=3), st.integers(1, 6))
def test_matches_a_loop_for_every_split(ids, cut):
    starts, runs, positions = by_hand(ids)
    ids = np.array(ids, np.int32)
    state = SegmentState.fresh(len(ids))
    first, state = segments(jnp.asarray(ids[:, :cut]), state, cut)
    second, state = segments(jnp.asarray(ids[:, cut:]), state, 7 - cut)
    np.testing.assert_array_equal(np.concatenate([first.starts, second.starts], 1), starts)
    np.testing.assert_array_equal(np.concatenate([first.runs, second.runs], 1), runs)
    np.testing.assert_array_equal(np.concatenate([first.positions, second.positions], 1), positions)
    np.testing.assert_array_equal(state.last_id, ids[:, -1])
    np.testing.assert_array_equal(state.position, positions[:, -1] + 1)


def test_without_ids_the_last_segment_goes_on():
    ids = jnp.array([[1, 2, 2]], jnp.int32)
    _, state = segments(ids, SegmentState.fresh(1), 3)
    found, after = segments(None, state, 4)
    assert not found.starts.any()
    np.testing.assert_array_equal(found.positions, [[2, 3, 4, 5]])
    np.testing.assert_array_equal(found.runs, [[2] * 4])
    np.testing.assert_array_equal(after.position, [6])
