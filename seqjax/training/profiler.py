"""A profiler trace of a few steps, for TensorBoard or xprof."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

WARM = 2  # steps before the trace: the first is compiled, the second may still wait for the first batch


class Profiler:
    """Traces `count` steps from shortly after `start` into `workdir/profile`; with a count of 0 it does nothing."""

    def __init__(self, workdir: Path, start: int, count: int) -> None:
        self._folder = workdir / "profile"
        self._first = start + WARM if count else None
        self._last = start + WARM + count

    def after(self, step: int, metrics: Any) -> None:
        """Call once step number `step` is dispatched; `metrics` are what it returned."""
        if step == self._first:
            jax.block_until_ready(metrics)
            jax.profiler.start_trace(self._folder)
        elif self._first is not None and step == self._last:
            jax.block_until_ready(metrics)
            jax.profiler.stop_trace()
            self._first = None
