"""loss.png: training and validation loss over steps."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from seqjax.training.writers import Record


def plot_losses(
    records: Sequence[Record] | Mapping[str, Sequence[Record]],
    path: Path,
    unit: str = "loss",
    baselines: dict[str, float] | None = None,
) -> bool:
    """Draw the records' losses; False if matplotlib is not installed.

    Args:
      records: of one run, or of several by name.
      unit: of the losses, for the axis.
      baselines: losses to draw as horizontal lines, by name.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    # A Figure of its own, not pyplot: a notebook's backend and open figures stay as they are.
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shown: list[tuple[int, float]] = []
    for name, run in (records if isinstance(records, Mapping) else {"": records}).items():
        for split, style in (("train", {"alpha": 0.7}), ("validation", {"marker": "o", "markersize": 3})):
            points = [(r["step"], r["loss"]) for r in run if r["split"] == split and r.get("loss") is not None]
            if points:
                axes.plot(*zip(*points), label=f"{name} {split}".strip(), **style)
                shown += points
    for name, value in (baselines or {}).items():
        axes.axhline(value, linestyle="--", linewidth=1, color="gray")
        axes.annotate(name, (1.0, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
    _skip_the_fall(axes, shown, list((baselines or {}).values()))
    axes.set(xlabel="step", ylabel=unit)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    partial = path.with_name(f"{path.stem}.partial{path.suffix}")
    figure.savefig(partial, dpi=120)
    os.replace(partial, path)
    return True


def _skip_the_fall(axes: Any, points: list[tuple[int, float]], levels: list[float]) -> None:
    """Leave the first twentieth of the steps out of the scale: its steep fall would flatten all that follows."""
    last = max((step for step, _ in points), default=0)
    shown = [loss for step, loss in points if step >= last / 20 and math.isfinite(loss)] + levels
    if shown:
        margin = 0.05 * (max(shown) - min(shown)) or 0.1
        axes.set_ylim(min(shown) - margin, max(shown) + margin)
