"""Timing functions side by side, so that a machine whose speed drifts slows all of them alike."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of every round of one function."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third."""
        return tuple(float(q) for q in np.percentile(self.seconds, (25, 75)))

    def speedup(self, other: Timing) -> float:
        """How many times quicker this is than `other`: the ratio of their medians."""
        return other.median / self.median

    def speedup_quartiles(self, other: Timing) -> tuple[float, float]:
        """Quartiles of the ratio within each round, in which both met the same weather."""
        ratios = np.asarray(other.seconds) / np.asarray(self.seconds)
        return tuple(float(q) for q in np.percentile(ratios, (25, 75)))


def time_side_by_side(functions: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 1) -> dict[str, Timing]:
    """Time each function once per round, in turns: A B C, C B A, A B C, ...

    Args:
      functions: by name; what a function returns is waited for (`jax.block_until_ready`).
      rounds: timed calls of each, at least 1.
      warmup: calls of each before the first round: compilation, caches.
    """
    for function in functions.values():
        for _ in range(warmup):
            jax.block_until_ready(function())
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds):
        # Turning the order around cancels a drift that is steady, and what one function leaves behind for the next.
        for name in list(functions) if number % 2 == 0 else reversed(functions):
            start = time.perf_counter()
            jax.block_until_ready(functions[name]())
            seconds[name].append(time.perf_counter() - start)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}
