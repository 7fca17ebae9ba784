"""A picture of adaptive computation: how much each step counts at each position of one sequence, and where positions halt.

For example:
    python experiments/ponder_map.py --workdir=runs/reverse --index=0 --output=ponder.png
    python experiments/ponder_map.py --workdir=runs/reverse --set=validation_length=40
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from seqjax.config import ConfigError
from seqjax.training import command_line

_WORKDIR = command_line.define_workdir()
_SPLIT = flags.DEFINE_string("split", "validation", "Split of the task.")
_INDEX = flags.DEFINE_integer("index", 0, "Which example of the split.")
_SET = flags.DEFINE_multi_string("set", [], "An option of the task to change, KEY=VALUE, as for experiments/evaluate.py.")
_IMPORTS = command_line.define_imports()
_OUTPUT = flags.DEFINE_string("output", None, "File of the picture; default WORKDIR/ponder_map.png.")


def halting_weights(model: Any, variables: Any, example: dict[str, np.ndarray]) -> np.ndarray:
    """How much each step counts at each token of an example, padding left out: `[num_steps, L]`.

    Raises:
      ConfigError: the model takes a fixed number of steps.
    """
    ids = example.get("segment_ids")
    options = {} if ids is None else {"segment_ids": ids[None]}
    _, sown = model.apply(variables, example["inputs"][None], mutable=["intermediates"], **options)
    if "halting" not in sown.get("intermediates", {}):
        raise ConfigError("a map of halting needs model.name='universal_transformer' with model.halting='act'.")
    weights = np.asarray(sown["intermediates"]["halting"][0])[:, 0]
    return weights if ids is None else weights[:, ids != 0]


def draw(weights: np.ndarray, tokens: np.ndarray, path: Path) -> None:
    """Steps upwards, positions to the right; a line marks the step at which each position halts."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps, length = weights.shape
    figure = Figure(figsize=(min(16, max(7, length / 8)), 1.5 + 0.3 * steps), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    edges = (-0.5, length - 0.5, 0.5, steps + 0.5)
    image = axes.imshow(weights, origin="lower", aspect="auto", cmap="Blues", vmin=0, vmax=1, extent=edges)
    taken = steps - np.argmax(weights[::-1] > 0, axis=0)
    axes.step(np.arange(length), taken + 0.5, where="mid", color="tab:orange", linewidth=1, label="halts")
    if length <= 128:
        axes.set_xticks(np.arange(length), [str(token) for token in tokens], fontsize=7)
    axes.set(xlabel="token" if length <= 128 else "position", ylabel="step", yticks=np.arange(1, steps + 1))
    axes.set_title(f"{taken.mean():.2f} steps on average")
    axes.legend(loc="upper right")
    figure.colorbar(image, ax=axes, label="weight")
    figure.savefig(path, dpi=120)


def main() -> None:
    from seqjax.training.experiment import with_data
    from seqjax.training.restore import load_workdir
    from seqjax.training.trainer import make_task

    restored = load_workdir(_WORKDIR.value)
    task = make_task(with_data(restored.config, _SET.value))
    example = task.examples(task.check_split(_SPLIT.value))[_INDEX.value]
    weights = halting_weights(restored.model, restored.variables, example)
    tokens = example["inputs"] if "segment_ids" not in example else example["inputs"][example["segment_ids"] != 0]
    path = Path(_OUTPUT.value or Path(_WORKDIR.value) / "ponder_map.png").expanduser()
    draw(weights, tokens, path)
    print(path)


if __name__ == "__main__":
    sys.exit(command_line.run(main))
