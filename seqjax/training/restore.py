"""A trained model from its workdir alone, without its data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from seqjax import registry
from seqjax.config import ConfigError
from seqjax.parallel.mesh import make_mesh
from seqjax.parallel.rules import shardings, unboxed
from seqjax.training.checkpoint import Checkpoints
from seqjax.training.experiment import complete
from seqjax.training.trainer import abstract_variables
from seqjax.training.workdir import read_identity


class Restored(NamedTuple):
    """What a workdir holds.

    Attributes:
      config: complete, with what the task decided filled in.
      model: a Linen module.
      variables: `params` (their moving average, where one was kept) and the model's other collections, without boxes.
      record: of the checkpoint: `step`, `config_digest`, `data_digest`, `tokenizer` (its JSON), `arrays`.
    """

    config: ConfigDict
    model: nn.Module
    variables: dict[str, Any]
    record: dict[str, Any]


def load_workdir(workdir: str | os.PathLike, mesh: Mesh | None = None) -> Restored:
    """The newest intact checkpoint of a run, verified, on `mesh` (default: one device). Nothing is changed on disk.

    Raises:
      ConfigError: no run in `workdir`, or none that was saved.
      RunError: no checkpoint of it is intact.
    """
    path = Path(workdir).expanduser().absolute()
    identity = read_identity(path)
    if identity is None:
        raise ConfigError(f"--workdir={path} holds no run: there is no config.json.")
    config = complete(identity["config"])
    model = registry.build(config)
    mesh = mesh or make_mesh(devices=jax.devices()[:1])

    def target(record: dict[str, Any]) -> dict[str, Any]:
        batch = {name: jax.ShapeDtypeStruct(a["shape"], a["dtype"]) for name, a in record["batch"].items()}
        boxed = abstract_variables(model, batch)
        placed = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), unboxed(boxed), shardings(boxed, mesh)
        )
        averaged = any(name.startswith("ema/") for name in record["arrays"])
        return {"ema" if averaged else "params": placed.pop("params"), "variables": placed}

    checkpoints = Checkpoints(path, create=False)
    try:
        restored = checkpoints.restore_latest(target)
    finally:
        checkpoints.close()
    if restored is None:
        raise ConfigError(f"--workdir={path} holds a run without checkpoints; train it first.")
    state, record = restored
    params = state["ema"] if "ema" in state else state["params"]
    return Restored(config, model, {"params": params, **state["variables"]}, record)
