"""Linear attention and the delta rule: chunks beside recurrences, and the memory of a backward pass against the length."""

from __future__ import annotations

import argparse
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.comparison import Rows, compared, forward_backward
from seqjax import ops
from seqjax.ops.recurrence import recurrence
from seqjax.scaling.timing import time_side_by_side

FORMS = {
    "decay per head": (False, False),
    "decay per channel": (True, False),
    "delta rule, decay per head": (False, True),
    "delta rule, decay per channel": (True, True),
}
"""What a form has: decays per channel, the delta rule."""

Sizes = tuple[int, int, int]  # H, K, W


def linear_attention(args: argparse.Namespace) -> tuple[Rows, dict[str, Any]]:
    """Matrix states in chunks, against the recurrence differentiated by JAX, and one that keeps states of chunks only."""
    sizes = (args.heads, args.key, args.value)
    rows, checks = [], {}
    for form in FORMS:
        found, checks[form] = _compare(form, args.batch, args.length, sizes, args.rounds)
        rows += [{"form": form} | row for row in found]
    memory = {form: {name: _memory(run, form, sizes, args.lengths) for name, run in COMPETITORS.items()} for form in FORMS}
    if args.out:
        _plot(memory, args.lengths, pathlib.Path(args.out).with_suffix(".png"))
    return rows, checks | {"bytes of the backward pass": {"lengths": list(args.lengths)} | memory}


def _inputs(form: str, batch: int, length: int, sizes: Sizes) -> dict[str, jax.Array]:
    """Keys of length 1, decays around those that models start with, and beta from 0 to 1."""
    heads, key_dim, value_dim = sizes
    channels, delta = FORMS[form]
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = ((heads, key_dim), (heads, key_dim), (heads, value_dim), (heads, key_dim) if channels else (heads,), (heads,))
    q, k, v, decay, beta = (jax.random.normal(key, (batch, length, *shape)) for key, shape in zip(keys, shapes))
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    inputs = {"q": q, "k": k, "v": v, "log_decay": jax.nn.log_sigmoid(decay) / 16}
    return inputs | {"beta": jax.nn.sigmoid(beta)} if delta else inputs


def _compare(form: str, batch: int, length: int, sizes: Sizes, rounds: int) -> tuple[Rows, dict[str, float]]:
    inputs = _inputs(form, batch, length, sizes)
    cotangent = jax.random.normal(jax.random.key(1), inputs["v"].shape)
    functions = {}
    for name, run in COMPETITORS.items():
        functions[name, "forward"] = functools.partial(jax.jit(run), inputs)
        functions[name, "forward+backward"] = functools.partial(jax.jit(forward_backward(run, cotangent)), inputs)
    outputs = {name: np.asarray(functions[name, "forward"]()) for name in COMPETITORS}
    timings = time_side_by_side(functions, rounds)
    rows = [
        {"function": name, "pass": kind} | {key: value for key, value in row.items() if key != "function"}
        for (name, kind), row in zip(timings, compared(timings, ("lax.scan", "forward"), batch * length))
    ]
    both = {name: timings[name, "forward+backward"] for name in COMPETITORS}
    ours = outputs["seqjax"]
    return rows, {
        "forward_over_lax_scan": timings["seqjax", "forward"].speedup(timings["lax.scan", "forward"]),
        "forward_backward_over_lax_scan": both["seqjax"].speedup(both["lax.scan"]),
        "forward_backward_over_recurrence": both["seqjax"].speedup(both["recurrence"]),
        "max_relative_difference": max(float(np.abs(y - ours).max() / np.abs(y).max()) for y in outputs.values()),
    }


def _memory(run: Callable, form: str, sizes: Sizes, lengths: list[int]) -> list[int]:
    """Bytes that the compiled gradient holds beside its inputs and outputs."""
    gradient = jax.jit(jax.grad(lambda inputs: jnp.sum(run(inputs) ** 2)))
    shapes = [jax.eval_shape(functools.partial(_inputs, form, 1, length, sizes)) for length in lengths]
    return [gradient.lower(inputs).compile().memory_analysis().temp_size_in_bytes for inputs in shapes]


def _step(constants: tuple, state: jax.Array, now: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    decay, written = jnp.exp(now["log_decay"]), now["v"]
    state = decay.reshape(*decay.shape[:2], -1, 1) * state
    if "beta" in now:
        written = now["beta"][..., None] * (written - jnp.einsum("bhk,bhkw->bhw", now["k"], state))
    state = state + now["k"][..., None] * written[:, :, None]
    return state, jnp.einsum("bhk,bhkw->bhw", now["q"], state)


def _zeros(inputs: dict[str, jax.Array]) -> jax.Array:
    batch, _, heads, key_dim = inputs["k"].shape
    return jnp.zeros((batch, heads, key_dim, inputs["v"].shape[-1]))


def _chunks(inputs: dict[str, jax.Array]) -> jax.Array:
    return ops.linear_attention(*(inputs[name] for name in ("q", "k", "v", "log_decay")), beta=inputs.get("beta"))[0]


def _loop(inputs: dict[str, jax.Array]) -> jax.Array:
    """The recurrence, differentiated by JAX."""
    tokens = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), inputs)
    return jnp.swapaxes(jax.lax.scan(functools.partial(_step, ()), _zeros(inputs), tokens)[1], 0, 1)


def _recurrence(inputs: dict[str, jax.Array]) -> jax.Array:
    """The recurrence, with a backward pass that keeps states of chunks only."""
    return recurrence(_step, (), _zeros(inputs), inputs)[0]


COMPETITORS = {"seqjax": _chunks, "lax.scan": _loop, "recurrence": _recurrence}


def _plot(memory: dict[str, dict[str, list[int]]], lengths: list[int], path: pathlib.Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for form, taken in memory.items():
        axes.plot(lengths, [2.0**-20 * b for b in taken["seqjax"]], "o-", markersize=4, label=f"seqjax, {form}")
    for name in ("lax.scan", "recurrence"):
        taken = memory["decay per head"][name]
        axes.plot(lengths, [2.0**-20 * b for b in taken], "o--", markersize=4, label=f"{name}, decay per head")
    axes.set(yscale="log", xlabel="tokens", ylabel="MiB of a backward pass")
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
