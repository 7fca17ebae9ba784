"""Generation from a carried state, against recomputing."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import seqjax
from benchmarks.comparison import Rows, compared
from benchmarks.gpt2 import VOCAB, gpt2_shaped
from seqjax.scaling.timing import time_side_by_side
from seqjax.training.restore import load_workdir


def generate(args: argparse.Namespace) -> tuple[Rows, dict[str, Any]]:
    """Greedy decoding from a carried state, against recomputing the prefix for every token."""
    total = args.prompt + args.new_tokens
    model, variables = gpt2_shaped(args, total)
    prompts = jax.random.randint(jax.random.key(1), (args.batch, args.prompt), 0, VOCAB, jnp.int32)
    buckets = range(args.prompt + args.bucket, total + args.bucket, args.bucket)
    functions = {
        f"recomputed, padded to {args.bucket}s": lambda: _recompute(
            model, variables, prompts, [min(stop, total) for stop in buckets]
        ),
        "carried state": lambda: seqjax.generate(model, variables, prompts, args.new_tokens),
    }
    outputs = {name: np.asarray(function()) for name, function in functions.items()}
    timings = time_side_by_side(functions, args.rounds, warmup=0)
    same = {name: float((output == outputs["carried state"]).mean()) for name, output in outputs.items()}
    return compared(timings, next(iter(functions)), args.batch * args.new_tokens), {"share_of_equal_tokens": same}


def generate_runs(args: argparse.Namespace) -> tuple[Rows, dict[str, Any]]:
    """Sampling from the models of finished runs, each from its carried state."""
    runs = {path: load_workdir(path) for path in args.workdirs}
    prompts = jnp.zeros((args.batch, 1), jnp.int32)
    sampling = {"temperature": 1.0, "key": jax.random.key(0)}
    functions = {
        name: functools.partial(seqjax.generate, run.model, run.variables, prompts, args.new_tokens, **sampling)
        for name, run in runs.items()
    }
    timings = time_side_by_side(functions, args.rounds)
    costs = {name: dataclasses.asdict(run.model.costs(args.new_tokens)) for name, run in runs.items()}
    return compared(timings, args.workdirs[-1], args.batch * args.new_tokens), {"costs": costs}


def generate_images(args: argparse.Namespace) -> tuple[Rows, dict[str, Any]]:
    """Images pixel by pixel: Linear and Axial Transformer from their states, a Transformer with keys kept and without."""
    sizes = {"vocab_size": GREYS, "embed_dim": args.width, "num_heads": args.heads}
    stack = {"num_layers": args.layers, "position": "none"}
    side = math.isqrt(args.pixels)
    blocks = {"shape": (side, side), "outer_layers": args.layers // 4, "inner_layers": args.layers // 2}  # as many in all
    functions, held, parameters = {}, {}, {}
    for name, way, options in (
        ("transformer", "Transformer, key-value cache", stack),
        ("linear_transformer", "Linear Transformer", stack),
        ("axial_transformer", "Axial Transformer", blocks),
    ):
        model = seqjax.build({"name": name, **sizes, **options})
        first = jnp.zeros((args.batch, 1), jnp.int32)
        variables = jax.jit(model.init)(jax.random.key(0), first)
        if name == "transformer":
            stops = [*range(args.bucket, args.pixels, args.bucket), args.pixels]
            functions["Transformer, recomputed"] = functools.partial(_recompute, model, variables, first, stops)
        functions[way] = functools.partial(seqjax.generate, model, variables, first, args.pixels - 1)
        costs = model.costs(args.pixels)
        held[way], parameters[way] = costs.state_bytes, costs.parameters
    timings = time_side_by_side(functions, args.rounds)
    rows = compared(timings, "Transformer, recomputed", args.batch)
    seconds = {name: t.median / args.batch for name, t in timings.items()}
    return rows, {"seconds_per_image": seconds, "state_bytes": held, "parameters": parameters}


GREYS = 256
"""Values of a pixel."""


def _recompute(model: Any, variables: Any, prompts: jax.Array, stops: list[int]) -> jax.Array:
    """Greedy tokens after the prompts; tokens before each of `stops` see a prefix padded to that length."""
    length = prompts.shape[1]
    tokens = jnp.pad(prompts, [(0, 0), (0, stops[-1] - length)])
    for start, stop in zip([length, *stops], stops):
        tokens = extend(model, variables, tokens, start, stop)
    return tokens[:, length:]


@functools.partial(jax.jit, static_argnames=("model", "stop"))
def extend(model: Any, variables: Any, tokens: jax.Array, start: int, stop: int) -> jax.Array:
    """Greedy tokens at positions `start` to `stop`, each from all of the first `stop` tokens anew."""

    def add(i: jax.Array, tokens: jax.Array) -> jax.Array:
        logits, _ = model.apply(variables, tokens[:, :stop])
        return tokens.at[:, i].set(jnp.argmax(logits[:, i - 1], axis=-1))

    return jax.lax.fori_loop(start, stop, add, tokens)
