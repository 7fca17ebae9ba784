"""The training loop: steps, logs, evaluations, checkpoints, and how a run stops."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from seqjax.config import digest, plain
from seqjax.data.pipeline import prefetch
from seqjax.parallel.rules import use_mesh
from seqjax.training.checkpoint import Checkpoints
from seqjax.training.errors import RunError
from seqjax.training.evaluate import add_sums, means
from seqjax.training.integrity import layouts
from seqjax.training.interrupts import Interrupts
from seqjax.training.plots import plot_losses
from seqjax.training.profiler import Profiler
from seqjax.training.progress import Console, Meter
from seqjax.training.sample import print_sample
from seqjax.training.step import TrainState
from seqjax.training.trainer import Trainer
from seqjax.training.workdir import claim
from seqjax.training.writers import MetricsFiles, Record, TensorBoard, Writer


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a call of `train` ended.

    Attributes:
      state: after the last step.
      step: number of updates made.
      finished: False if a signal stopped the run early; the same call continues it.
      scores: of the validation split at the end; empty if not finished.
    """

    state: TrainState
    step: int
    finished: bool
    scores: dict[str, float]


def train(config: ConfigDict, workdir: str | os.PathLike) -> TrainResult:
    """Train what `config` describes, in `workdir`; continue there if the run was begun before.

    Raises:
      ConfigError: a mistake in the config, or a workdir that cannot be used or holds another run; nothing is compiled
        or written before it is raised.
      RunError: a loss or gradient that is not finite, a checkpoint that cannot be written, or none that can be read.
    """
    trainer = Trainer(config)
    locations = [f"data.{key}" for key in getattr(trainer.task, "locations", ())]
    path = claim(workdir, trainer.config, trainer.task.digest, locations)
    run = _Run(trainer, path)
    # Where there are several processes, JAX's own coordination service turns SIGTERM into an answer all agree on.
    with run, use_mesh(trainer.mesh), Interrupts() as interrupts:
        return run.train(interrupts)


class _Run:
    """One call of `train`: the places that records and checkpoints go to, and the metrics not read yet."""

    def __init__(self, trainer: Trainer, workdir: Path) -> None:
        self.trainer, self.task, self.options = trainer, trainer.task, trainer.training
        self.workdir = workdir
        self.console = Console(self.options.num_steps, self.task.loss_unit, quiet=jax.process_index() > 0)
        self.checkpoints = Checkpoints(workdir, self.options.keep_checkpoints, self.console.line)
        self.meter = Meter(*_work_per_step(trainer))
        self.writers: list[Writer] = []
        self.files: MetricsFiles | None = None
        self.totals: dict[str, np.ndarray] = {}
        self.pending: tuple[int, Any] | None = None

    def __enter__(self) -> _Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.console.close()
        self.checkpoints.close()
        for writer in self.writers:
            writer.close()

    def train(self, interrupts: Interrupts) -> TrainResult:
        """All steps that are left, and the end of the run."""
        state, step = self._start()
        self._open_writers(step)
        profiler = Profiler(self.workdir, step, self.options.profile_steps)
        with prefetch(self.task, step, self.trainer.rows) as batches:
            while step < self.options.num_steps:
                state, metrics = self.trainer.step(state, self.trainer.place(next(batches)[1]))
                self._drain()  # reads the step before, while the devices work on this one
                step, self.pending = step + 1, (step + 1, metrics)
                profiler.after(step, metrics)
                if (stopped := self._stopped(interrupts, step)) is not None:
                    self._save(step, state)
                    return self._stop(step, state, stopped)
                if step < self.options.num_steps:
                    self._on_the_way(step, state)
        return self._finish(step, state)

    def _start(self) -> tuple[TrainState, int]:
        restored = self.checkpoints.restore_latest(lambda record: self.trainer.target())
        parameters = sum(leaf.size for leaf in jax.tree.leaves(self.trainer.abstract_state.params))
        name = self.trainer.config.model.name
        axes = " ".join(f"{axis}={size}" for axis, size in self.trainer.mesh.shape.items() if size > 1)
        self.console.line(f"{name}: {parameters:,} parameters, on {jax.device_count()} device(s) {axes}".rstrip())
        if restored is None:
            return self.trainer.init(), 0
        state, record = restored
        self.console.line(f"Resuming from step {record['step']}.")
        return state, record["step"]

    def _open_writers(self, step: int) -> None:
        if jax.process_index() == 0:
            self.files = MetricsFiles(self.workdir, step)
            self.writers.append(self.files)
            if self.options.tensorboard:
                self.writers.append(TensorBoard(self.workdir, step))

    def _on_the_way(self, step: int, state: TrainState) -> None:
        if _due(step, self.options.eval_every):
            self._evaluate(step, state)
        if _due(step, self.options.checkpoint_every):
            self._save(step, state)

    def _stopped(self, interrupts: Interrupts, step: int) -> str | None:
        """What asks the run to stop after this step, on all processes alike."""
        if jax.process_count() > 1:
            return "preemption" if self.checkpoints.preempted(step) else None
        return interrupts.received

    def _drain(self) -> None:
        """Read the pending metrics; stop the run if they are not finite, log them if it is time."""
        if self.pending is None:
            return
        (step, metrics), self.pending = self.pending, None
        metrics = jax.device_get(metrics)
        scalars = {name: float(metrics.pop(name)) for name in ("grad_norm", "learning_rate")}
        self._check_finite(step, {"loss": float(metrics["loss"][0]), "grad_norm": scalars["grad_norm"]})
        add_sums(self.totals, metrics)
        self.meter.step()
        if _due(step, self.options.log_every) or step == self.options.num_steps:
            record = {**means(self.totals, self.task.loss_scale), **scalars, **self.meter.read()}
            self.totals = {}
            self._write({"step": step, "split": "train", **record})
            self.console.advance(step, record)

    def _check_finite(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            if not math.isfinite(value):
                self.checkpoints.wait()
                raise RunError(
                    f"step {step}: {name} is {value}, so training stopped; {self.checkpoints.last_good()}; "
                    "a lower optimizer.learning_rate or optimizer.clip_norm may help."
                )

    def _save(self, step: int, state: TrainState) -> None:
        """Checkpoint `state`, once it is known to be finite; the disk works in the background."""
        self._drain()
        trainer = self.trainer
        tokenizer = getattr(self.task, "tokenizer", None)
        record = {
            "config": plain(trainer.config),
            "config_digest": digest(trainer.config),
            "data_digest": self.task.digest,
            "tokenizer": tokenizer.to_json() if tokenizer is not None else None,
            "batch": layouts(trainer.batch_shapes),
        }
        self.checkpoints.save(step, state, record)
        self.meter.pause()

    def _evaluate(self, step: int, state: TrainState) -> dict[str, float]:
        self._drain()
        scores = self.trainer.evaluate(state)
        self._write({"step": step, "split": "validation", **scores})
        self.console.line(f"step {step}/{self.options.num_steps}  validation  {self.console.describe(scores)}")
        if self.options.plot and self.files is not None:
            self._plot()
        self.meter.pause()
        return scores

    def _plot(self) -> None:
        if not plot_losses(self.files.records, self.workdir / "loss.png", self.task.loss_unit, self.baselines):
            self.console.line("No loss.png: it needs matplotlib (pip install 'seqjax[plot]').")
            self.options = dataclasses.replace(self.options, plot=False)

    @functools.cached_property
    def baselines(self) -> dict[str, float]:
        """What no sequence model is needed for; worth computing once."""
        return self.task.baselines() if hasattr(self.task, "baselines") else {}

    def _write(self, record: Record) -> None:
        for writer in self.writers:
            writer.write(record)

    def _stop(self, step: int, state: TrainState, why: str) -> TrainResult:
        self.checkpoints.wait()
        self.console.line(
            f"Stopped by {why} at step {step}, which is saved; the same command continues it (--workdir={self.workdir})."
        )
        return TrainResult(state, step, finished=False, scores={})

    def _finish(self, step: int, state: TrainState) -> TrainResult:
        self._save(step, state)
        scores = self._evaluate(step, state)
        self.checkpoints.wait()
        self.console.close()
        unit = self.task.loss_unit
        for name, value in self.baselines.items():
            self.console.line(f"{name}: {value:.4f} {unit}, on the same held-out data")
        self.console.line(f"{unit}: {scores['loss']:.4f}")
        if self.options.sample_tokens:
            options = (self.options.sample_tokens, self.options.sample_temperature, self.options.seed)
            print_sample(self.trainer.model, state.model_variables(), self.task, *options, self.console.line)
        return TrainResult(state, step, finished=True, scores=scores)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _work_per_step(trainer: Trainer) -> tuple[int, float | None]:
    """Tokens in a batch, and FLOPs of its forward pass where the model tells them."""
    inputs = trainer.batch_shapes["inputs"]
    continuous = np.issubdtype(inputs.dtype, np.floating)
    tokens = math.prod(inputs.shape[:-1] if continuous else inputs.shape)
    if not hasattr(trainer.model, "costs"):
        return tokens, None
    return tokens, tokens / trainer.task.length * trainer.model.costs(trainer.task.length).flops
