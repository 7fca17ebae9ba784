"""Next values of autoregressive processes by one linear state-space layer: does it reach the noise floor?

python experiments/autoregressive.py --out=docs/results/autoregressive.json

SpaceTime's companion system beside S4D's with as many states, S4D also with step sizes that reach the processes' frequencies.
All learning rates and seeds of a model train in one program. Errors are those on held-out sequences, divided by the noise's.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import seqjax
from seqjax.data.autoregressive import draw
from seqjax.scaling.record import provenance, table, write_record

RATES = (0.01, 0.03, 0.1, 0.3)
WITHIN = 0.02
"""What counts as the noise floor: so much above it."""


def from_roots(*roots: tuple[float, float]) -> tuple[float, ...]:
    """Coefficients of the process with the conjugate pairs of roots `radius exp(+-i angle)`."""
    polynomials = ([1.0, -2 * radius * np.cos(angle), radius**2] for radius, angle in roots)
    return tuple(-functools.reduce(np.convolve, polynomials)[1:])


PROCESSES = {
    "AR(4)": from_roots((0.98, 0.3), (0.95, 1.2)),
    "AR(6)": from_roots((0.98, 0.3), (0.95, 1.2), (0.97, 2.2)),
}
MODELS = {
    "SpaceTime": {"name": "spacetime"},
    "S4D": {"name": "s4d"},
    "S4D, steps 0.1 to 1": {"name": "s4d", "dt_min": 0.1, "dt_max": 1.0},
}


def build(options: dict[str, Any], width: int, state_dim: int) -> Any:
    """A linear model: one layer of systems between linear maps."""
    name = options["name"]
    linear = {"pattern": (name,), "norm": "none", "num_layers": 1, "activation": "identity", "output": "linear"}
    series = {"head": "regression", "input_dim": 1, "output_dim": 1, "embed_dim": width, "state_dim": state_dim}
    return seqjax.build({**linear, **series, **options})


def make_trainer(model: Any, args: argparse.Namespace) -> Any:
    """A jitted function `(train, held_out) -> [rates, seeds]` errors of the trained models, all in one program."""
    schedule = optax.cosine_decay_schedule(1.0, args.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.scale_by_schedule(schedule))

    def error(variables: Any, series: jax.Array) -> jax.Array:
        predictions, _ = model.apply(variables, series[:, :-1])
        return jnp.mean(jnp.square(predictions - series[:, 1:])[:, args.skipped :])

    def train(rate: jax.Array, key: jax.Array, series: jax.Array, held_out: jax.Array) -> jax.Array:
        key, init_key = jax.random.split(key)
        variables = model.init(init_key, series[:1, :-1])

        def step(carry: tuple, key: jax.Array) -> tuple[tuple, None]:
            variables, moments = carry
            rows = jax.random.randint(key, (args.batch,), 0, series.shape[0])
            updates, moments = optimizer.update(jax.grad(error)(variables, series[rows]), moments)
            return (jax.tree.map(lambda v, u: v - rate * u, variables, updates), moments), None

        (variables, _), _ = jax.lax.scan(step, (variables, optimizer.init(variables)), jax.random.split(key, args.steps))
        return error(variables, held_out)

    over_seeds = jax.vmap(train, in_axes=(None, 0, None, None))
    return jax.jit(jax.vmap(over_seeds, in_axes=(0, None, None, None)))


def compare(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One row per process and model, and all errors `{process: {model: [rates][seeds]}}`, relative to the noise floor."""
    rows, errors = [], {name: {} for name in PROCESSES}
    rates, keys = jnp.array(RATES), jax.random.split(jax.random.key(0), args.seeds)
    for label, options in MODELS.items():
        model = build(options, args.width, args.state_dim)
        trained = make_trainer(model, args)
        for process, coefficients in PROCESSES.items():
            random = np.random.RandomState(0)
            train, held_out = (draw(coefficients, 1.0, args.sequences, args.length + 1, random)[..., None] for _ in range(2))
            past = np.lib.stride_tricks.sliding_window_view(held_out[..., 0], len(coefficients), axis=1)[:, :-1, ::-1]
            noise = held_out[:, len(coefficients) :, 0] - past @ np.array(coefficients)
            floor = np.mean(np.square(noise[:, args.skipped + 1 - len(coefficients) :]))
            scale = train.std()  # a model sees values of variance 1
            start = time.perf_counter()
            found = trained(rates, keys, jnp.asarray(train / scale, jnp.float32), jnp.asarray(held_out / scale, jnp.float32))
            found = np.asarray(found, np.float64) * scale**2 / floor
            errors[process][label] = found.tolist()
            best = int(np.argmin(np.where(np.isfinite(found), found, np.inf).mean(axis=1)))
            rows.append(
                {
                    "process": process,
                    "model": label,
                    "parameters": model.costs(args.length).parameters,
                    "best_rate": RATES[best],
                    "mean": float(found[best].mean()),
                    "best_seed": float(found[best].min()),
                    "worst_seed": float(found[best].max()),
                    "at_the_floor": f"{int((found[best] < 1 + WITHIN).sum())} of {args.seeds}",
                    "seconds": time.perf_counter() - start,
                }
            )
    return rows, errors


def plot(errors: dict[str, Any], path: pathlib.Path) -> None:
    """Errors above the floor by learning rate: every seed a point, a line through the medians."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(errors), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(errors), sharey=True, squeeze=False)[0]
    for axes, (process, by_model) in zip(panels, errors.items()):
        for model, (label, found) in enumerate(by_model.items()):
            above = np.maximum(np.array(found) - 1, 1e-4)
            axes.plot(RATES, np.median(above, axis=1), label=label, color=f"C{model}")
            for seed in above.T:
                axes.plot(RATES, seed, "o", markersize=3, alpha=0.7, color=f"C{model}")
        axes.axhline(WITHIN, linestyle="--", linewidth=1, color="gray")
        axes.set(title=process, xlabel="learning rate", xscale="log", yscale="log")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("MSE / noise variance - 1")
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, help="file for the JSON record; the picture lies beside it")
    sizes = {"width": 1, "state_dim": 8, "steps": 3000, "seeds": 5, "sequences": 512, "length": 96, "batch": 16, "skipped": 8}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    args = parser.parse_args()
    origin = provenance()
    rows, errors = compare(args)
    print(table(rows))
    if args.out:
        settings = {name: getattr(args, name) for name in sizes} | {"rates": RATES, "processes": PROCESSES}
        write_record(args.out, origin, rows, settings=settings, errors=errors)
        plot(errors, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
