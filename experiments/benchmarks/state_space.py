"""The faces of the state-space mixers, timed against each other; and decoding, against the length of the context."""

from __future__ import annotations

import argparse
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

import seqjax
from benchmarks.comparison import Rows
from benchmarks.generation import extend
from seqjax import registry
from seqjax.scaling.timing import Timing, time_side_by_side

VOCAB = 65  # characters of tiny Shakespeare


def state_space(args: argparse.Namespace) -> tuple[Rows, dict[str, Any]]:
    """S4D and S4 forward: as a convolution, as a loop in one program, by default with its kernel kept, and a call per token."""
    rows, picks = [], {}
    for name in ("s4d", "s4"):
        for batch in args.batches:
            for length in args.lengths:
                timings, pick = _faces(name, batch, length, args)
                label = {"mixer": name, "batch": batch, "length": length}
                rows += [
                    label
                    | {"face": face, "median_s": t.median, "quartiles_s": " to ".join(f"{q:.4g}" for q in t.quartiles)}
                    | {"convolution_speedup": timings["convolution"].speedup(t)}
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
    ways = {how: jax.jit(make(implementation=how).apply) for how in ("convolution", "scan")}
    functions = {how: functools.partial(apply, variables, x) for how, apply in ways.items()}
    kept = {**variables, **jax.jit(functools.partial(make().apply, mutable=["derived"]))(variables, x)[1]}
    functions["kernel kept"] = functools.partial(jax.jit(make().apply), kept, x)
    step = jax.jit(make().apply)
    tokens = min(args.tokens, length)

    def by_token() -> jax.Array:
        state = make().init_state(batch, length)
        for _ in range(tokens):
            y, state = step(variables, x[:, :1], state)
        return y

    timings = time_side_by_side(functions | {"call per token": by_token}, args.rounds)
    measured = timings["call per token"].seconds
    timings["call per token"] = Timing(tuple(seconds * length / tokens for seconds in measured))
    default = jax.jit(make().apply).lower(variables, x).as_text()
    return timings, "convolution" if "fft" in default else "scan"


def decode(args: argparse.Namespace) -> tuple[Rows, dict[str, Any]]:
    """Time per generated token and bytes of state against the length of the context: carried states, a key-value cache,
    convolving again."""
    models = {name: _model(name, args) for name, carried in WAYS if carried}
    again = {name: (_build(name, args, implementation="convolution"), models[name][1]) for name in ("s4", "s4d")}
    rows = []
    for length in args.lengths:
        functions = {WAYS[name, True]: _carried(*model, length, args.tokens) for name, model in models.items()}
        functions |= {WAYS[name, False]: _again(*again[name], length, args.again) for name in ("s4", "s4d")}
        timings = time_side_by_side(functions, args.rounds)
        for (name, carried), way in WAYS.items():
            steps = args.tokens if carried else args.again
            per_token = Timing(tuple(s / steps for s in timings[way].seconds))
            quartiles = " to ".join(f"{q:.4g}" for q in per_token.quartiles)
            held = models[name][0].costs(length).state_bytes if carried else 0
            figures = {"s_per_token": per_token.median, "quartiles_s": quartiles, "state_bytes": held}
            rows.append({"way": way, "length": length, **figures})
    if args.out:
        _plot(rows, pathlib.Path(args.out).with_suffix(".png"))
    return rows, {f"{args.new_tokens} tokens by {name}": _long(name, *models[name], rows, args) for name in ("s4", "s4d")}


WAYS = {
    ("s4", True): "S4, carried state",
    ("s4d", True): "S4D, carried state",
    ("mamba", True): "Mamba, carried state",
    ("aaren", True): "Aaren, carried state",
    ("transformer", True): "Transformer, key-value cache",
    ("s4", False): "S4, convolved again",
    ("s4d", False): "S4D, convolved again",
}
"""What to call (architecture, whether its state is carried)."""


def _model(name: str, args: argparse.Namespace) -> tuple[Any, Any]:
    model = _build(name, args)
    return model, jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))


def _build(name: str, args: argparse.Namespace, **options: str) -> Any:
    heads = {"num_heads": args.heads}
    own = {"transformer": heads, "aaren": heads, "mamba": {}}.get(name, {"state_dim": args.state})
    sizes = {"vocab_size": VOCAB, "embed_dim": args.width, "num_layers": args.layers}
    return seqjax.build({"name": name, **sizes, **own, **options})


def _carried(model: Any, variables: Any, length: int, tokens: int) -> Any:
    """A function that makes the last `tokens` of `length` tokens, in one program."""
    state = model.init_state(1, length)
    for _ in range((length - tokens) // PREFILL):
        _, state = _prefill(model, variables, jnp.zeros((1, PREFILL), jnp.int32), state)
    return functools.partial(_decode, model, variables, state, tokens)


PREFILL = 64
"""Tokens of a chunk of the context."""

_prefill = functools.partial(jax.jit, static_argnames="model")(lambda model, *arguments: model.apply(*arguments))


@functools.partial(jax.jit, static_argnames=("model", "tokens"))
def _decode(model: Any, variables: Any, state: Any, tokens: int) -> jax.Array:
    variables = model.prepare(variables)

    def step(carry: tuple, _: None) -> tuple[tuple, jax.Array]:
        logits, state = model.apply(variables, carry[0], carry[1])
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return (token, state), token

    return jax.lax.scan(step, (jnp.zeros((1, 1), jnp.int32), state), length=tokens)[1]


def _again(model: Any, variables: Any, length: int, tokens: int) -> Any:
    """A function that makes the last `tokens` of `length` tokens, each by a convolution over all of them."""
    return functools.partial(extend, model, variables, jnp.zeros((1, length), jnp.int32), length - tokens, length)


def _long(name: str, model: Any, variables: Any, rows: Rows, args: argparse.Namespace) -> dict[str, float]:
    """Seconds to generate from the carried state, and by convolving again at the next measured length (a sum of `rows`)."""
    prompt = jnp.zeros((1, 1), jnp.int32)
    run = functools.partial(seqjax.generate, model, variables, prompt, args.new_tokens)
    carried = time_side_by_side({"carried": run}, args.rounds)["carried"].median
    again, before = 0.0, 0
    for row in rows:
        if row["way"] == WAYS[name, False] and before < args.new_tokens:
            again += (min(row["length"], args.new_tokens) - before) * row["s_per_token"]
            before = min(row["length"], args.new_tokens)
    return {"carried_s": carried, "convolved_again_s": again, "ratio": again / carried} if before == args.new_tokens else {}


def _plot(rows: Rows, path: pathlib.Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    times, bytes_held = figure.subplots(1, 2)
    for (_, carried), way in WAYS.items():
        found = [row for row in rows if row["way"] == way]
        lengths, line = [row["length"] for row in found], "o-" if carried else "o--"
        times.plot(lengths, [1e3 * row["s_per_token"] for row in found], line, markersize=4, label=way)
        if carried:
            bytes_held.plot(lengths, [row["state_bytes"] for row in found], line, markersize=4, label=way)
    for axes, label in ((times, "ms per token"), (bytes_held, "bytes of state of one sequence")):
        axes.set(yscale="log", xlabel="tokens of context", ylabel=label)
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
    times.legend(fontsize="small")
    figure.savefig(path, dpi=120)
