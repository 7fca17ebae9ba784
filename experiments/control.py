"""Ask for a return and act: Aaren and a Transformer as Decision Transformers, beside their data and the best controller.

python experiments/control.py --out=docs/results/control.json
python experiments/control.py --models aaren --seeds 2 --steps 300

Models, data and recipe are those of `configs/control.py`. All seeds of a model train in one program; then each acts in the
environment, asked for the median and the best return of its data, and for the best controller's. Seeds are of parameters and
batches; data and episodes are the same for all. Returns are means over episodes and seeds, errors standard errors over seeds.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import runpy
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import seqjax
from seqjax.data.control import Control
from seqjax.generation.control import roll_out
from seqjax.scaling.record import provenance, table, write_record
from seqjax.training.experiment import resolve, section_of
from seqjax.training.losses import by_targets
from seqjax.training.optimizer import make_optimizer, make_schedule
from seqjax.training.step import init_state, make_train_step
from seqjax.training.trainer import abstract_variables, make_task

CONFIG = runpy.run_path(str(pathlib.Path(__file__).parent.parent / "configs" / "control.py"))


def make_trainer(config: Any, task: Control, steps: int) -> tuple[Any, Any]:
    """The model, and a function `seed -> (variables, validation loss)`."""
    model = seqjax.build(resolve(config, task).model)
    splits = {split: _stacked(task.examples(split)) for split in task.splits}
    recipe = section_of(config, "optimizer")
    schedule = make_schedule(recipe, steps)
    rate = lambda count: recipe.learning_rate * schedule(count)
    first = {name: array[: task.batch_size] for name, array in splits["train"].items()}
    optimizer = make_optimizer(recipe, steps, abstract_variables(model, first)["params"], ())

    def train(seed: jax.Array) -> tuple[Any, jax.Array]:
        update = make_train_step(model, optimizer, by_targets, learning_rate=rate, seed=seed)

        def step(state: Any, key: jax.Array) -> tuple[Any, None]:
            rows = jax.random.randint(key, (task.batch_size,), 0, task.num_episodes)
            return update(state, {name: array[rows] for name, array in splits["train"].items()})[0], None

        start = init_state(model, optimizer, seed, first, ema=False)
        state, _ = jax.lax.scan(step, start, jax.random.split(jax.random.fold_in(jax.random.key(0), seed), steps))
        outputs, _ = model.apply(state.model_variables(), splits["validation"]["inputs"])
        total, count = by_targets(outputs, splits["validation"])["loss"]
        return state.model_variables(), total / count

    return model, train


def _stacked(examples: list[dict[str, np.ndarray]]) -> dict[str, jax.Array]:
    return {name: jnp.asarray(np.stack([example[name] for example in examples])) for name in examples[0]}


def returns_of_data(task: Control) -> dict[str, float]:
    """What the models' returns are read against: the training episodes', and the best controller's."""
    returns = task.returns("train")
    found = {"data_mean": returns.mean(), "data_median": np.median(returns), "data_best": returns.max()}
    return {name: float(value) for name, value in found.items()} | {"best_controller": task.optimal_return}


def compare(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, float], dict[str, Any]]:
    """One row per model and return asked for, the data's returns, and each seed's `{model: {asked: [seeds]}}`."""
    rows, found = [], {}
    for name in args.models:
        start = time.perf_counter()
        config = CONFIG["get_config"](name)
        task = make_task(config)
        beside = returns_of_data(task)
        model, train = make_trainer(config, task, args.steps)
        variables, losses = jax.jit(jax.vmap(train))(jnp.arange(args.seeds))
        found[name] = {}
        for asked in ("data_median", "data_best", "best_controller"):
            act = functools.partial(roll_out, model, task=task, wanted=beside[asked], num_episodes=args.episodes)
            returns = jax.vmap(lambda v, act=act: act(v, key=jax.random.key(1))["rewards"].sum(-1).mean())(variables)
            found[name][asked] = np.asarray(returns, np.float64).tolist()
            row = {"model": name, "asked_for": asked, "asked": beside[asked], "return": float(returns.mean())}
            rows.append(row | {"error": _standard_error(returns), "validation_mse": float(losses.mean())})
        print(*rows[-3:], f"{time.perf_counter() - start:.0f} s", sep="\n", flush=True)
    return rows, beside, found


def _standard_error(values: jax.Array) -> float | None:
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, help="file for the JSON record")
    parser.add_argument("--models", nargs="+", choices=CONFIG["MODELS"], default=list(CONFIG["MODELS"]))
    sizes = {"steps": 1000, "seeds": 5, "episodes": 256}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    args = parser.parse_args()
    origin = provenance()
    rows, beside, returns = compare(args)
    print(table(rows), *(f"{name}: {value:.3f}" for name, value in beside.items()), sep="\n")
    if args.out:
        write_record(
            args.out, origin, rows, settings={name: getattr(args, name) for name in sizes}, beside=beside, returns=returns
        )


if __name__ == "__main__":
    main()
