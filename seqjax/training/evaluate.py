"""Scores of a model over a whole split, exact to the last example."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from seqjax.config import ConfigError
from seqjax.parallel.batches import place_batch, process_rows
from seqjax.parallel.mesh import make_mesh
from seqjax.parallel.rules import replicated, unboxed, use_mesh
from seqjax.training.losses import loss_of


def evaluate(
    model: nn.Module, variables: Any, task: Any, split: str = "validation", mesh: Mesh | None = None
) -> dict[str, float]:
    """Scores of `variables` (boxed or not) over every example of `split`.

    Args:
      mesh: where to compute; default a mesh of all devices.
    Returns:
      `loss` in the task's `loss_unit`, `accuracy` for integer targets, `mae` for floats, and whatever else the task's loss
      reports.
    Raises:
      ConfigError: a split that the task does not have, or one in which nothing counts.
    """
    return Evaluator(model, task, make_mesh() if mesh is None else mesh)(unboxed(variables), split)


class Evaluator:
    """`evaluate`, compiled once and called often."""

    def __init__(self, model: nn.Module, task: Any, mesh: Mesh) -> None:
        self.task, self.mesh = task, mesh
        loss = loss_of(task)

        def sums(variables: Any, batch: dict[str, jax.Array]) -> Any:
            outputs, _ = model.apply(variables, batch["inputs"], segment_ids=batch.get("segment_ids"), train=False)
            return loss(outputs, batch)

        self._sums = jax.jit(sums, out_shardings=replicated(mesh))

    def __call__(self, variables: Any, split: str = "validation") -> dict[str, float]:
        totals: dict[str, np.ndarray] = {}
        pending = None
        rows = process_rows(self.task.batch_size, self.mesh)
        with use_mesh(self.mesh):
            for batch in self.task.eval_batches(split, rows):
                sums = self._sums(variables, place_batch(batch, self.mesh, rows, self.task.batch_size))
                add_sums(totals, pending)  # reads the batch before, while the device works on this one
                pending = sums
        add_sums(totals, pending)
        if not totals or totals["loss"][1] <= 0:
            raise ConfigError(f"split {split!r} of this task has nothing to score: no example of it has weight.")
        return means(totals, self.task.loss_scale)


def means(totals: dict[str, np.ndarray], loss_scale: float) -> dict[str, float]:
    """`{name: sum / count}` of `{name: [sum, count]}`; losses in the task's unit, and the root of what is named `rmse`."""
    scales = {"loss": loss_scale, "auxiliary": loss_scale}
    names = sorted(totals, key=lambda name: (name != "loss", name))
    # 0 of 0 is told as 0.
    ratios = {name: float(totals[name][0] / (totals[name][1] or 1.0)) for name in names}
    return {name: math.sqrt(r) if name == "rmse" else r * scales.get(name, 1.0) for name, r in ratios.items()}


def add_sums(totals: dict[str, np.ndarray], sums: Any) -> None:
    """Add device sums to host totals, which are float64: a split may hold more than float32 counts exactly."""
    for name, pair in jax.device_get(sums or {}).items():
        totals[name] = totals.get(name, np.zeros(2)) + np.asarray(pair, np.float64)
