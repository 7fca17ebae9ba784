"""The selective scan beside what JAX offers for it, alone and in a Mamba's training step."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import seqjax
from benchmarks.comparison import Rows, compared, forward_backward
from benchmarks.scan import MATERIALISED_UP_TO
from benchmarks.training import train_step_of
from seqjax.ops import selective_scan as op
from seqjax.ops.kernels.selective_scan import Inputs
from seqjax.scaling.timing import time_side_by_side

VOCAB = 256  # bytes


def selective_scan(args: argparse.Namespace) -> tuple[Rows, dict[str, Any]]:
    """The selective scan against `lax.scan` and `lax.associative_scan` with their autodiff; and training steps of Mamba."""
    op.IMPLEMENTATIONS.update({name: run for name, run in COMPETITORS.items() if name != "xla"})
    rows, checks = [], {}
    for shape in args.shapes:
        label = {"B,L,E,N": "x".join(map(str, shape))}
        found, figures = _scans(shape, args.rounds)
        rows += [label | row for row in found]
        checks[label["B,L,E,N"]] = figures
    found, checks["training step"] = _training(args)
    return rows + found, checks


def _scans(shape: tuple[int, ...], rounds: int) -> tuple[Rows, dict[str, float]]:
    batch, length, width, modes = shape
    keys = jax.random.split(jax.random.key(0), 6)
    u, cotangent = (jax.random.normal(key, (batch, length, width)) for key in keys[:2])
    dt = jax.nn.softplus(jax.random.normal(keys[2], (batch, length, width)) - 4)
    A = -jnp.tile(jnp.arange(1.0, modes + 1), (width, 1))
    B, C = (jax.random.normal(key, (batch, length, modes)) for key in keys[3:5])
    functions, outputs = {}, {}
    for name in COMPETITORS:
        run = functools.partial(op.selective_scan, implementation=name)
        functions[name, "forward"] = functools.partial(jax.jit(run), u, dt, A, B, C)
        if name != "lax.associative_scan" or batch * length * width * modes <= MATERIALISED_UP_TO:
            both = jax.jit(forward_backward(run, cotangent))
            functions[name, "forward+backward"] = functools.partial(both, u, dt, A, B, C)
        outputs[name] = np.asarray(functions[name, "forward"]())
    timings = time_side_by_side(functions, rounds)
    updates = batch * length * width * modes
    rows = [
        {"function": name, "pass": kind} | {key: value for key, value in row.items() if key != "function"}
        for (name, kind), row in zip(timings, compared(timings, ("lax.scan", "forward"), updates))
    ]
    ours = timings["xla", "forward"]
    figures = {
        "updates_per_s": updates / ours.median,
        "forward_backward_over_forward": timings["xla", "forward+backward"].median / ours.median,
        "forward_over_associative_scan": ours.speedup(timings["lax.associative_scan", "forward"]),
        "forward_backward_over_lax_scan": timings["xla", "forward+backward"].speedup(timings["lax.scan", "forward+backward"]),
        "max_relative_difference": max(float(np.abs(y - outputs["xla"]).max() / np.abs(y).max()) for y in outputs.values()),
    }
    return rows, figures


def _training(args: argparse.Namespace) -> tuple[Rows, dict[str, Any]]:
    """AdamW steps of one Mamba, its scan computed in three ways."""
    tokens = np.random.default_rng(0).integers(VOCAB, size=(args.batch, args.length + 1))
    batch = {"inputs": jnp.asarray(tokens[:, :-1], jnp.int32), "targets": jnp.asarray(tokens[:, 1:], jnp.int32)}
    sizes = {"vocab_size": VOCAB, "embed_dim": args.width, "num_layers": args.layers}
    steps = {}
    for name in COMPETITORS:
        model = seqjax.build({"name": "mamba", "implementation": name, **sizes})
        variables = nn.unbox(jax.jit(model.init)(jax.random.key(0), batch["inputs"][:, :2]))
        steps[f"Mamba, {name}"] = train_step_of(model, variables, batch)
    losses = {name: float(step()) for name, step in steps.items()}
    timings = time_side_by_side(steps, args.rounds)
    speedups = {name: timings["Mamba, xla"].speedup(timing) for name, timing in timings.items()}
    rows = [{"pass": "training step"} | row for row in compared(timings, "Mamba, lax.scan", batch["inputs"].size)]
    return rows, {"first_loss": losses, "speedup_over": speedups}


def _plain(scan: Callable, inputs: Inputs, *, softplus: bool, reverse: bool, chunk_size: int | None) -> tuple:
    """A whole implementation around a scan of `h_t = a_t h_(t-1) + b_t`, for one group and no segments."""
    assert inputs.starts is None
    assert not reverse
    delta = op.step_sizes(inputs.dt, inputs.dt_bias, softplus)
    y, last = scan(delta, inputs)
    return op.finished(y, inputs), last


def _loop(delta: jax.Array, inputs: Inputs) -> tuple:
    """`lax.scan`, differentiated by JAX."""

    def step(h: jax.Array, now: tuple) -> tuple:
        delta, u, b, c = now
        h = jnp.exp(delta[:, None] * inputs.A[0]) * h + (delta * u)[:, None] * b[:, :, None]
        return h, (h * c[:, :, None]).sum(1)

    tokens = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), (delta, inputs.u, inputs.B, inputs.C))
    last, y = jax.lax.scan(step, inputs.h0, tokens)
    return jnp.swapaxes(y, 0, 1), last


def _materialised(delta: jax.Array, inputs: Inputs) -> tuple:
    """`lax.associative_scan` over all states, differentiated by JAX."""
    a = jnp.exp(delta[:, :, None] * inputs.A[0])
    b = (delta * inputs.u)[:, :, None] * inputs.B[..., None]
    b = b.at[:, 0].add(a[:, 0] * inputs.h0)
    _, h = jax.lax.associative_scan(lambda e, f: (e[0] * f[0], f[0] * e[1] + f[1]), (a, b), axis=1)
    return (h * inputs.C[..., None]).sum(2), h[:, -1]


COMPETITORS = {
    "xla": None,
    "lax.scan": functools.partial(_plain, _loop),
    "lax.associative_scan": functools.partial(_plain, _materialised),
}
