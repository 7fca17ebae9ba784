"""What every benchmark hands to the command line: rows of figures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from seqjax.scaling.timing import Timing

Rows = list[dict[str, Any]]


def compared(timings: dict[str, Timing], baseline: str, per_second: float = 1.0) -> Rows:
    """One row per function: seconds, rate, and speed relative to the baseline's."""
    return [
        {
            "function": name,
            "median_s": timing.median,
            "quartiles_s": " to ".join(f"{q:.4g}" for q in timing.quartiles),
            "per_s": per_second / timing.median,
            "speedup": timing.speedup(timings[baseline]),
            "speedup_quartiles": " to ".join(f"{q:.3g}" for q in timing.speedup_quartiles(timings[baseline])),
        }
        for name, timing in timings.items()
    ]


def forward_backward(function: Callable, cotangent: Any) -> Callable:
    """The function with its backward pass: `(output, gradients)`."""

    def both(*inputs: Any) -> Any:
        output, pull = jax.vjp(function, *inputs)
        return output, pull(cotangent)

    return both
