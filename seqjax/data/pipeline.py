"""The host's side of training input: batches made in a background thread while the device works."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Iterator

from seqjax.data.task import Batch, Task


def prefetch(task: Task, start_step: int = 0, rows: slice | None = None, depth: int = 2) -> Prefetch:
    """An endless iterator over `(step, task.batch(step, rows))` from `start_step`, made up to `depth` batches ahead.

    Use it as a context manager, or call `close()`. An error in making a batch is raised by the `next` that would have
    returned it.
    """
    return Prefetch(task, start_step, rows, depth)


class Prefetch(Iterator[tuple[int, Batch]]):
    """What `prefetch` returns. One thread makes the batches, so their order is that of the steps."""

    def __init__(self, task: Task, start_step: int, rows: slice | None, depth: int) -> None:
        if depth < 1:
            raise ValueError(f"depth={depth} must be 1 or more.")
        self._ready: queue.Queue = queue.Queue(depth)
        self._stop = threading.Event()
        self._failed: BaseException | None = None
        # The thread must not hold `self`: an iterator that is dropped without close() then stops its thread too.
        self._thread = threading.Thread(
            target=_produce, args=(task, start_step, rows, self._ready, self._stop), name="prefetch", daemon=True
        )
        self._drop = weakref.finalize(self, self._stop.set)
        self._thread.start()

    def __next__(self) -> tuple[int, Batch]:
        if self._failed is not None:
            raise self._failed
        if self._stop.is_set():
            raise StopIteration
        step, batch = self._ready.get()
        if isinstance(batch, BaseException):
            self._failed = batch
            raise batch
        return step, batch

    def close(self) -> None:
        """Stop the thread and wait for it; `next` then raises StopIteration. May be called again."""
        self._stop.set()
        self._thread.join()

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _produce(task: Task, step: int, rows: slice | None, ready: queue.Queue, stop: threading.Event) -> None:
    try:
        while not stop.is_set():
            _put(ready, (step, task.batch(step, rows)), stop)
            step += 1
    except BaseException as error:  # whatever it is, it belongs to the thread that asks for the batch
        _put(ready, (step, error), stop)


def _put(ready: queue.Queue, item: tuple, stop: threading.Event) -> None:
    """Wait for room, but not past `stop`."""
    while not stop.is_set():
        try:
            return ready.put(item, timeout=0.1)
        except queue.Full:
            continue
