"""Score a trained model on a whole split of its task.

For example:
    python experiments/evaluate.py --workdir=runs/quickstart --split=validation
    python experiments/evaluate.py --workdir=runs/induction --set=sequence_length=4096 --output=at_4096.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from absl import flags

from seqjax.training import command_line

_WORKDIR = command_line.define_workdir()
_SPLIT = flags.DEFINE_string("split", "validation", "Split of the task.")
_SET = flags.DEFINE_multi_string("set", [], "An option of the task to change, KEY=VALUE; longer sequences, say.")
_IMPORTS = command_line.define_imports()
_OUTPUT = flags.DEFINE_string("output", None, "File for the scores; default WORKDIR/evaluation_SPLIT.json.")


def main() -> None:
    from seqjax.parallel.mesh import make_mesh
    from seqjax.training.evaluate import evaluate
    from seqjax.training.experiment import with_data
    from seqjax.training.progress import Console
    from seqjax.training.restore import load_workdir
    from seqjax.training.trainer import make_task
    from seqjax.training.workdir import write_atomically

    mesh = make_mesh()
    restored = load_workdir(_WORKDIR.value, mesh)
    task = make_task(with_data(restored.config, _SET.value))
    scores = evaluate(restored.model, restored.variables, task, _SPLIT.value, mesh)
    result = {"step": restored.record["step"], "split": _SPLIT.value, **scores, "loss_unit": task.loss_unit}
    path = Path(_OUTPUT.value or Path(_WORKDIR.value) / f"evaluation_{_SPLIT.value}.json").expanduser()
    write_atomically(path, json.dumps(result) + "\n")
    console = Console(0, task.loss_unit)
    console.line(f"{_SPLIT.value} at step {restored.record['step']}: {console.describe(scores)}  -> {path}")


if __name__ == "__main__":
    sys.exit(command_line.run(main))
