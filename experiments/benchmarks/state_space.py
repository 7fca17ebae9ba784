"""The faces of the state-space mixers, timed against each other; and decoding, against the length of the context."""

from __future__ import annotations

import argparse
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from benchmarks.comparison import Rows
from benchmarks.generation import extend

import seqjax
from seqjax import registry
from seqjax.scaling.timing import Timing, time_side_by_side

VOCAB = 65  # characters of tiny Shakespeare


def state_space(args: argparse.Namespace) -> tuple[Rows, dict[str, Any]]:
    """One S4D and one S4 mixer forward: as a convolution, as a loop in one program, and as a call per token."""
    rows, picks = [], {}
    for name in ("s4d", "s4"):
        for batch in args.batches:
            for length in args.lengths:
                timings, pick = _faces(name, batch, length, args)
                label = {"mixer": name, "batch": batch, "length": length}
                rows += [
                    label
                    | {"face": face, "median_s": t.median, "quartiles_s": " to ".join(f"{q:.4g}" for q in t.quartiles)}
                    | {"speed_of_convolution": timings["convolution"].speedup(t)}
                    for face, t in timings.items()
                ]
                fastest = min(("convolution", "scan"), key=lambda face: timings[face].median)
                picks[f"{name} batch {batch} length {length}"] = f"{pick}, fastest {fastest}"
    return rows, {"default": picks}


def _faces(name: str, batch: int, length: int, args: argparse.Namespace) -> tuple[dict[str, Timing], str]:
    """Seconds for the whole sequence by each way; and which of them the mixer takes by default."""
    make = functools.partial(registry.mixer(name), embed_dim=args.width, state_dim=args.state)
    x = jax.random.normal(jax.random.key(0), (batch, length, args.width))
    variables = jax.jit(make().init)(jax.random.key(1), x[:, :2])
    functions = {
        how: functools.partial(jax.jit(lambda v, x, m=make(implementation=how): m.apply(v, x)[0]), variables, x)
        for how in ("convolution", "scan")
    }
    step = jax.jit(make().apply)
    tokens = min(args.tokens, length)

    def by_token() -> jax.Array:
        state = make().init_state(batch, length)
        for _ in range(tokens):
            y, state = step(variables, x[:, :1], state)
        return y

    timings = time_side_by_side(functions | {f"call per token, {args.tokens} tokens": by_token}, args.rounds)
    token, measured = timings.popitem()
    whole = Timing(tuple(s * length / tokens for s in measured.seconds))
    default = jax.make_jaxpr(make().apply)(variables, x)
    return timings | {"call per token": whole}, "convolution" if " fft[" in str(default) else "scan"
