"""What a person watching a run sees: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

import jax

# Peak dense bfloat16 FLOP/s of one JAX device, by the start of its `device_kind`; the longest match counts.
# Vendors' data sheets; a v2 or v3 chip is two devices, later TPU chips one.
PEAK_FLOPS = {
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Peak bfloat16 FLOP/s of a device, None for one that is not in the table."""
    matches = [kind for kind in PEAK_FLOPS if device_kind.startswith(kind)]
    return PEAK_FLOPS[max(matches, key=len)] if matches else None


class Meter:
    """Speed of training: tokens per second and model FLOPs utilisation since the last reading.

    Args:
      tokens_per_step: tokens in a batch.
      flops_per_step: of the forward pass of a batch; None if not known. A training step costs three forward passes.
    """

    def __init__(self, tokens_per_step: int, flops_per_step: float | None) -> None:
        self._tokens, self._flops = tokens_per_step, flops_per_step
        self._peak = peak_flops(jax.devices()[0].device_kind)
        self._start: float | None = None
        self._steps = 0

    def step(self) -> None:
        """Count a finished step. The first only starts the clock: it was compiled."""
        if self._start is None:
            self._start = time.perf_counter()
        else:
            self._steps += 1

    def pause(self) -> None:
        """Forget the time since the last step, spent on something else; what was counted so far is dropped."""
        self._start, self._steps = None, 0

    def read(self) -> dict[str, float]:
        """`tokens_per_second` and `mfu` since the last reading; empty before there is a step to time."""
        if self._start is None or self._steps == 0:
            return {}
        now = time.perf_counter()
        rate = self._steps / (now - self._start)
        self._start, self._steps = now, 0
        speed = {"tokens_per_second": rate * self._tokens}
        if self._flops and self._peak:
            speed["mfu"] = 3.0 * self._flops * rate / (self._peak * jax.device_count())
        return speed


class Console:
    """Lines of text, with a progress bar under them where the stream is a terminal.

    Args:
      total: steps in the run.
      unit: of the loss.
      quiet: print nothing, on all processes but the first.
    """

    def __init__(self, total: int, unit: str = "nats", stream: TextIO | None = None, quiet: bool = False) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._total, self._unit, self._quiet = total, unit, quiet
        self._progress = self._task = None
        if not quiet and self._stream.isatty():
            self._start_bar()

    def _start_bar(self) -> None:
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[state]}"))
        self._progress = Progress(*columns, console=RichConsole(file=self._stream))
        self._task = self._progress.add_task("train", total=self._total, state="compiling")
        self._progress.start()

    def advance(self, step: int, record: dict[str, Any]) -> None:
        """Show a record of training: on the bar where there is one, else as a line."""
        if self._progress is None:
            self.line(f"step {step}/{self._total}  {self.describe(record)}")
        else:
            self._progress.update(self._task, completed=step, state=self.describe(record))

    def line(self, text: str) -> None:
        """Print a line that stays."""
        if self._quiet:
            return
        if self._progress is None:
            print(text, file=self._stream, flush=True)
        else:
            self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def describe(self, record: dict[str, Any]) -> str:
        """A record's measures in words: `loss 1.2345 bits/byte  accuracy 51.2%  12.3k tokens/s`."""
        return "  ".join(_words(name, record[name], self._unit) for name in record if isinstance(record[name], float))

    def close(self) -> None:
        """Take the bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _words(name: str, value: float, unit: str) -> str:
    if name == "loss":
        return f"loss {value:.4f} {unit}"
    if name in ("mae", "rmse"):
        return f"{name.upper()} {value:.4f}"
    if name in ("accuracy", "mfu"):
        return f"{name} {value:.1%}"
    if name == "tokens_per_second":
        return f"{_thousands(value)} tokens/s"
    return f"{name} {value:.3g}"


def _thousands(value: float) -> str:
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.1f}{letter}"
    return f"{value:.0f}"
