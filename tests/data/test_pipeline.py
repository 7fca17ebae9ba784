import gc
import threading
import time

import numpy as np
import pytest

from seqjax.data.pipeline import prefetch


class Counting:
    """The one method of a task that `prefetch` calls; batches take a varying time to make."""

    def __init__(self, fail_at=None):
        self.made, self.fail_at = [], fail_at

    def batch(self, step, rows=None):
        if step == self.fail_at:
            raise OSError("the disk is gone")
        time.sleep(0.001 * (step % 3))
        self.made.append(step)
        return {"inputs": np.arange(4)[rows or slice(None)] + step}


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def wait_until(condition):
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_steps_come_in_order_with_their_batches():
    with prefetch(Counting(), start_step=5, rows=slice(1, 3)) as batches:
        for expected in range(5, 25):
            step, batch = next(batches)
            assert step == expected
            assert batch["inputs"].tolist() == [step + 1, step + 2]


def test_works_ahead_by_no_more_than_depth():
    task = Counting()
    with prefetch(task, depth=2) as batches:
        wait_until(lambda: len(task.made) >= 3)  # two that wait and one in hand
        time.sleep(0.05)
        assert task.made == [0, 1, 2]
        next(batches)
        wait_until(lambda: len(task.made) == 4)


def test_error_comes_at_its_own_step_and_again():
    with prefetch(Counting(fail_at=2)) as batches:
        assert [next(batches)[0], next(batches)[0]] == [0, 1]
        for _ in range(2):
            with pytest.raises(OSError, match="the disk is gone"):
                next(batches)


def test_close_ends_the_thread_and_the_iteration():
    batches = prefetch(Counting())
    next(batches)
    assert threads()
    batches.close()
    batches.close()
    assert not threads()
    assert list(batches) == []


def test_dropped_iterator_ends_its_thread():
    batches = prefetch(Counting())
    next(batches)
    del batches
    gc.collect()
    wait_until(lambda: not threads())


def test_depth_must_be_positive():
    with pytest.raises(ValueError, match="depth=0"):
        prefetch(Counting(), depth=0)
