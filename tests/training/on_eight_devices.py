"""Trains the tiny experiment on several meshes and prints, as JSON, what came of it. Needs eight devices.

python on_eight_devices.py WORKDIR
"""

import json
import sys

import jax
import numpy as np
import tiny_config

from seqjax.parallel.mesh import MeshConfig, make_mesh
from seqjax.parallel.rules import use_mesh
from seqjax.training.checkpoint import Checkpoints
from seqjax.training.evaluate import evaluate
from seqjax.training.integrity import layouts, summarize
from seqjax.training.restore import load_workdir
from seqjax.training.trainer import Trainer
from seqjax.training.workdir import claim

MESHES = {
    "one": MeshConfig(),
    "data": MeshConfig(data=8),
    "mixed": MeshConfig(data=2, fsdp=2, tensor=2),
    "sequence": MeshConfig(data=2, fsdp=1, tensor=2, sequence=2),
}
CHANGES = {
    "model.dropout": 0.1,
    "model.balance": 0.1,
    "training.ema_decay": 0.5,
    "optimizer.weight_decay": 0.1,
    "optimizer.groups": {"state_space": {"learning_rate": 1e-3}},
}


def trainer_on(name, **changes):
    config = tiny_config.get_config()
    config.update_from_flattened_dict({**CHANGES, **changes})
    devices = jax.devices()[:1] if name == "one" else jax.devices()
    return Trainer(config, mesh=make_mesh(MESHES[name], devices))


def run(trainer, steps=5):
    losses, state = [], trainer.init()
    with use_mesh(trainer.mesh):
        for step in range(steps):
            state, metrics = trainer.step(state, trainer.place(trainer.task.batch(step)))
            losses.append(float(metrics["loss"][0]))
    return state, losses


def shards(array):
    return sorted({shard.data.shape for shard in array.addressable_shards})


def main(workdir):
    result = {"losses": {}, "scores": {}, "shards": {}}
    for name in ("one", "mixed", "sequence"):
        trainer = trainer_on(name)
        state, losses = run(trainer)
        result["losses"][name] = losses
        result["scores"][name] = trainer.evaluate(state)["loss"]
        moments = state.opt_state[1][0].mu
        result["shards"][name] = [shards(tree["stack"]) for tree in (state.params, moments, state.ema)]
        result["compiled"] = trainer._step._cache_size()
        if name == "mixed":
            result |= save_here_and_restore_elsewhere(trainer, state, workdir)
    plain = {"model.dropout": 0.0, "model.balance": 0.0}
    result["losses"]["microbatches"] = run(trainer_on("mixed", **plain, **{"training.microbatches": 2}))[1]
    result["losses"]["whole"] = run(trainer_on("one", **plain))[1]
    result["factored"] = run(trainer_on("mixed", **{"optimizer.name": "adafactor"}))[1]
    print(json.dumps(result))


def save_here_and_restore_elsewhere(trainer, state, workdir):
    path = claim(workdir, trainer.config, trainer.task.digest)
    checkpoints = Checkpoints(path)
    checkpoints.save(5, state, {"batch": layouts(trainer.batch_shapes)})
    checkpoints.wait()
    before = {name: array["checksum"] for name, array in summarize(state).items()}
    after = {}
    for name in ("one", "data"):
        other = trainer_on(name)
        restored, _ = checkpoints.restore_latest(lambda record, other=other: other.target())
        after[name] = {path: array["checksum"] for path, array in summarize(restored).items()}
        same = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), jax.device_get(restored), jax.device_get(state))
        assert all(jax.tree.leaves(same))
    checkpoints.close()
    alone = load_workdir(path)
    score = evaluate(alone.model, alone.variables, trainer.task, mesh=make_mesh(devices=jax.devices()[:1]))["loss"]
    return {"checksums": [before, after["one"], after["data"]], "restored_score": score}


if __name__ == "__main__":
    main(sys.argv[1])
