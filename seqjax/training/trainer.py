"""An experiment made ready to run: model, optimizer and mesh, and the compiled functions that tie them together."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from seqjax import registry
from seqjax.config import ConfigError
from seqjax.parallel.batches import place_batch, process_rows
from seqjax.parallel.mesh import make_mesh
from seqjax.parallel.rules import axis_names, batch_ways, is_boxed, partition_spec, replicated, shardings, unboxed
from seqjax.training.evaluate import Evaluator
from seqjax.training.experiment import complete, resolve, section_of
from seqjax.training.groups import parameter_path
from seqjax.training.losses import loss_of
from seqjax.training.optimizer import make_optimizer, make_schedule
from seqjax.training.step import Metrics, TrainState, init_state, init_variables, make_train_step


class Trainer:
    """Steps of an experiment on a mesh. Building it checks everything that a config can get wrong, and compiles nothing.

    Attributes:
      config: complete and resolved.
      task, model, mesh: what the config describes.
      abstract_state: shapes and dtypes of the state; state_shardings: where each array lies.
      rows: the rows of each batch that this process loads.
    """

    def __init__(self, config: ConfigDict, task: Any = None, mesh: Mesh | None = None) -> None:
        config = complete(config)
        self.task = make_task(config) if task is None else task
        self.config = resolve(config, self.task)
        self.training, self.optimizer = section_of(config, "training"), section_of(config, "optimizer")
        self.model = registry.build(self.config)
        self._align_segments()
        self.mesh = mesh or make_mesh(section_of(config, "mesh"))
        self._check_batch_size()
        self.rows = process_rows(self.task.batch_size, self.mesh)
        self.batch_shapes = self._batch_shapes()
        self._plan()

    def _align_segments(self) -> None:
        """Packed documents start where the model asks."""
        alignment = getattr(self.model, "segment_alignment", 1)
        if alignment > 1 and "segment_alignment" in self.config.data:
            self.task = self.task.aligned(alignment)
            self.config.data.segment_alignment = self.task.segment_alignment

    def _check_batch_size(self) -> None:
        ways, parts = batch_ways(self.mesh), self.training.microbatches
        if self.task.batch_size % (ways * parts):
            raise ConfigError(
                f"data.batch_size={self.task.batch_size} does not divide over mesh.data x mesh.fsdp = {ways} ways "
                f"and training.microbatches={parts}; allowed: multiples of {ways * parts}."
            )

    def _batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        row = self.task.batch(0, slice(self.rows.start, self.rows.start + 1))
        return {
            name: jax.ShapeDtypeStruct((self.task.batch_size, *array.shape[1:]), array.dtype) for name, array in row.items()
        }

    def _plan(self) -> None:
        """Shapes, shardings, optimizer and jitted functions."""
        training = self.training
        boxed = abstract_variables(self.model, self.batch_shapes)
        groups = self.model.optimizer_groups() if hasattr(self.model, "optimizer_groups") else ()
        optimizer = make_optimizer(self.optimizer, training.num_steps, boxed["params"], groups)
        ema = training.ema_decay is not None
        init = functools.partial(init_state, self.model, optimizer, training.seed, self.batch_shapes, ema)
        self.abstract_state = jax.eval_shape(init)
        self.state_shardings = _state_shardings(self.abstract_state, boxed, self.mesh)
        schedule = make_schedule(self.optimizer, training.num_steps)
        peak = self.optimizer.learning_rate
        step = make_train_step(
            self.model,
            optimizer,
            loss_of(self.task),
            learning_rate=lambda count: peak * schedule(count),
            seed=training.seed,
            microbatches=training.microbatches,
            ema_decay=training.ema_decay,
        )
        self._init = jax.jit(init, out_shardings=self.state_shardings)
        self._step = jax.jit(step, donate_argnums=0, out_shardings=(self.state_shardings, replicated(self.mesh)))
        self._evaluator = Evaluator(self.model, self.task, self.mesh)

    def init(self) -> TrainState:
        """The state before the first step, made where it will lie."""
        return self._init()

    def target(self) -> TrainState:
        """What a restored state must look like: shapes, dtypes and shardings."""
        return jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), self.abstract_state, self.state_shardings
        )

    def place(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """This process's `rows` of a batch, as global arrays on the mesh."""
        return place_batch(batch, self.mesh, self.rows, self.task.batch_size)

    def step(self, state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, Metrics]:
        """One update. Call it under `use_mesh(trainer.mesh)`; `state` is consumed."""
        return self._step(state, batch)

    def evaluate(self, state: TrainState, split: str = "validation") -> dict[str, float]:
        """Scores over a whole split, see `Evaluator`."""
        return self._evaluator(state.model_variables(), split)


def make_task(config: ConfigDict) -> Any:
    """The task that a complete config describes."""
    options = {key: value for key, value in config.data.items() if key != "name"}
    return registry.task(config.data.name)(**options)


def abstract_variables(model: Any, batch_shapes: dict[str, Any]) -> dict[str, Any]:
    """Shapes and logical axes of the model's variables, boxed; nothing is computed."""
    return jax.eval_shape(lambda: init_variables(model, jax.random.key(0), batch_shapes))


def _state_shardings(state: TrainState, boxed: dict[str, Any], mesh: Mesh) -> TrainState:
    """Shardings like `state`. Moments lie as their parameter does: they have its path's ending, and its shape."""
    params = shardings(boxed["params"], mesh)
    named = {
        parameter_path(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(boxed["params"], is_leaf=is_boxed)[0]
    }

    def moment(path: tuple, leaf: Any) -> NamedSharding:
        keys = [parameter_path((key,)) for key in path]
        for start in range(len(keys)):
            box = named.get("/".join(keys[start:]))
            if box is not None and unboxed(box).shape == leaf.shape:
                return NamedSharding(mesh, partition_spec(axis_names(box), leaf.shape, mesh))
        return replicated(mesh)  # counters, and adafactor's factored moments, which are vectors

    return TrainState(
        step=replicated(mesh),
        params=params,
        opt_state=jax.tree_util.tree_map_with_path(moment, state.opt_state),
        variables=shardings({name: tree for name, tree in boxed.items() if name != "params"}, mesh),
        ema=None if state.ema is None else params,
    )
