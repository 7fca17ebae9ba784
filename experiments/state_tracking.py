"""Who can keep track of a state? Parity and products of permutations, trained on 16 tokens and tested beyond, up to 64.

python experiments/state_tracking.py --out=docs/results/state_tracking.json
python experiments/state_tracking.py --tasks parity s3 --models lstm mamba --seeds 1

Models and recipe are those of `configs/state_tracking.py`. All seeds and learning rates of a model train in one program, on
sequences that are drawn as they are needed; each seed's score is that of the best rate of the model on the trained length.
The record grows by a model at a time: called again with the same settings, the command trains only what is missing.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import runpy
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import seqjax
from seqjax.data.state_tracking import GROUPS, product_table
from seqjax.scaling.record import provenance, table, write_record
from seqjax.training.experiment import section_of
from seqjax.training.optimizer import make_schedule

CONFIG = runpy.run_path(str(pathlib.Path(__file__).parent.parent / "configs" / "state_tracking.py"))


def make_trainer(model: str, task: str, args: argparse.Namespace) -> Any:
    """A jitted function `(rates, keys) -> [rates, seeds, 2]`: accuracies on the trained length, and beyond it."""
    config = CONFIG["get_config"](f"{model},{task}")
    group = config.data.get("group") or "S2"
    products = jnp.asarray(product_table(*GROUPS[group]))
    order, trained = len(products), config.data.sequence_length
    net = seqjax.build({**config.model.to_dict(), "vocab_size": order})
    recipe = section_of(config, "optimizer")
    schedule = make_schedule(recipe, args.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(recipe.clip_norm), optax.scale_by_adam(recipe.beta1, recipe.beta2))

    def draw(key: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
        tokens = jax.random.randint(key, (config.data.batch_size, length), 0, order)
        follow = lambda product, element: (products[element, product],) * 2
        return tokens, jax.lax.scan(follow, jnp.zeros(len(tokens), tokens.dtype), tokens.T)[1].T

    def loss(params: Any, key: jax.Array) -> jax.Array:
        tokens, targets = draw(key, trained)
        return optax.softmax_cross_entropy_with_integer_labels(net.apply(params, tokens)[0], targets).mean()

    def right(params: Any, key: jax.Array) -> jax.Array:
        tokens, targets = draw(key, args.length)
        return (jnp.argmax(net.apply(params, tokens)[0], axis=-1) == targets).mean(axis=0)

    def train(rate: jax.Array, key: jax.Array) -> jax.Array:
        key, init_key, test_key = jax.random.split(key, 3)
        params = net.init(init_key, jnp.zeros((1, trained), jnp.int32))

        def step(carry: tuple, inputs: tuple) -> tuple[tuple, None]:
            params, moments = carry
            count, key = inputs
            updates, moments = optimizer.update(jax.grad(loss)(params, key), moments)
            size = rate * schedule(count)
            return (jax.tree.map(lambda p, u: p - size * u, params, updates), moments), None

        steps = (jnp.arange(args.steps), jax.random.split(key, args.steps))
        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), steps)
        by_position = jax.lax.map(lambda key: right(params, key), jax.random.split(test_key, args.batches)).mean(axis=0)
        return jnp.stack([by_position[:trained].mean(), by_position[trained:].mean()])

    over_seeds = jax.vmap(train, in_axes=(None, 0))
    return jax.jit(jax.vmap(over_seeds, in_axes=(0, None)))


def train_all(args: argparse.Namespace, found: dict[str, dict[str, Any]]) -> Iterator[None]:
    """Fill `found`, `{task: {model: {"seconds", "accuracies": [rates][seeds][2]}}}`, with what it lacks, one at a time."""
    rates, keys = jnp.array(args.rates), jax.random.split(jax.random.key(0), args.seeds)
    for task in args.tasks:
        for model in args.models:
            if model not in found.setdefault(task, {}):
                start = time.perf_counter()
                scores = np.asarray(make_trainer(model, task, args)(rates, keys), np.float64)
                found[task][model] = {"seconds": time.perf_counter() - start, "accuracies": scores.tolist()}
                yield


def summary(found: dict[str, dict[str, Any]], rates: list[float]) -> list[dict[str, Any]]:
    """One row per task and model, of the rate that is best on the trained length."""
    rows = []
    for task, models in found.items():
        for model, result in models.items():
            scores = np.array(result["accuracies"])
            best = int(np.argmax(scores[:, :, 0].mean(axis=1)))
            within, beyond = scores[best].T
            row = {"task": task, "model": model, "rate": rates[best], "to_16": float(within.mean())}
            row |= {"beyond": float(beyond.mean()), "worst_seed": float(beyond.min()), "best_seed": float(beyond.max())}
            rows.append(row | {"seconds": result["seconds"]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, help="file for the JSON record")
    parser.add_argument("--tasks", nargs="+", choices=CONFIG["TASKS"], default=["parity", "s3", "a5"])
    parser.add_argument("--models", nargs="+", choices=CONFIG["MODELS"], default=list(CONFIG["MODELS"]))
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 3e-3])
    sizes = {"steps": 2000, "seeds": 3, "length": 64, "batches": 16}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    args = parser.parse_args()
    origin, found = provenance(), {}
    settings = {name: getattr(args, name) for name in (*sizes, "rates")}
    if args.out and args.out.exists():
        record = json.loads(args.out.read_text())
        if record["settings"] != settings:
            sys.exit(f"{args.out} was made with {record['settings']}, not {settings}; give another --out, or delete it.")
        found = record["found"]
    floors = {task: 1 / len(product_table(*GROUPS[CONFIG["TASKS"][task].get("group", "S2")])) for task in CONFIG["TASKS"]}
    for _ in train_all(args, found):
        rows = summary(found, args.rates)
        print(rows[-1], flush=True)
        if args.out:
            write_record(args.out, origin, rows, settings=settings, guessing=floors, found=found)
    print(table(summary(found, args.rates)))


if __name__ == "__main__":
    main()
