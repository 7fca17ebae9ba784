"""The selective scan beside what JAX and CUDA offer for it, alone and in a Mamba's training step."""

from __future__ import annotations

import argparse
import functools
import importlib.util
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
    """The selective scan against `lax.scan` and `lax.associative_scan` with their autodiff, and on a GPU against mamba_ssm's
    CUDA kernel where it is installed; its errors on an accelerator; and training steps of Mamba."""
    op.IMPLEMENTATIONS.update(COMPETITORS)
    rows, checks = [], {}
    if jax.default_backend() != "cpu":
        checks["errors"] = {"x".join(map(str, shape)): _errors(shape) for shape in CHECKED}
    for shape in args.shapes:
        label = {"B,L,E,N": "x".join(map(str, shape))}
        found, figures = _scans(shape, args.dtype, args.rounds)
        rows += [label | row for row in found]
        checks[label["B,L,E,N"]] = figures
    found, checks["training step"] = _training(args)
    return rows + found, checks


def _ours() -> str:
    """The implementation that this process's platform runs."""
    return {"gpu": "pallas_gpu", "tpu": "pallas_tpu"}.get(jax.default_backend(), "xla")


def _inputs(shape: tuple[int, ...], dtype: Any) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """`u, dt, A, B, C` and a cotangent of the output."""
    batch, length, width, modes = shape
    keys = jax.random.split(jax.random.key(0), 6)
    u, cotangent = (jax.random.normal(key, (batch, length, width), dtype) for key in keys[:2])
    dt = jax.nn.softplus(jax.random.normal(keys[2], (batch, length, width)) - 4).astype(dtype)
    A = -jnp.tile(jnp.arange(1.0, modes + 1), (width, 1))
    B, C = (jax.random.normal(key, (batch, length, modes), dtype) for key in keys[3:5])
    return (u, dt, A, B, C), cotangent


def _errors(shape: tuple[int, ...]) -> dict[str, float]:
    """Largest errors relative to the largest entry, of the output and of each gradient, against the loop in float64."""
    inputs, cotangent = _inputs(shape, jnp.float32)
    found = jax.jit(forward_backward(functools.partial(op.selective_scan, implementation=_ours()), cotangent))(*inputs)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(a), jnp.float64) for a in (*inputs, cotangent)]
        loop = functools.partial(op.selective_scan, implementation="reference")
        exact = jax.jit(forward_backward(loop, wide[-1]))(*wide[:-1])
    names = ("y", "u", "dt", "A", "B", "C")
    pairs = zip(names, jax.tree.leaves(found), jax.tree.leaves(exact))
    return {name: float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(b).max()) for name, a, b in pairs}


def _scans(shape: tuple[int, ...], dtype: str, rounds: int) -> tuple[Rows, dict[str, float]]:
    inputs, cotangent = _inputs(shape, dtype)
    updates, ours = int(np.prod(shape)), _ours()
    fits = MATERIALISED_UP_TO * (1 if ours == "xla" else 64)
    functions, outputs = {}, {}
    for name in dict.fromkeys((ours, "xla", *COMPETITORS)):
        run = functools.partial(op.selective_scan, implementation=name)
        functions[name, "forward"] = functools.partial(jax.jit(run), *inputs)
        if name != "lax.associative_scan" or updates <= fits:
            functions[name, "forward+backward"] = functools.partial(jax.jit(forward_backward(run, cotangent)), *inputs)
        outputs[name] = np.asarray(functions[name, "forward"]().astype(jnp.float32))
    if jax.default_backend() == "gpu" and importlib.util.find_spec("mamba_ssm"):
        functions |= _mamba_ssm(inputs, cotangent)
    timings = time_side_by_side(functions, rounds)
    rows = [
        {"function": name, "pass": kind} | {key: value for key, value in row.items() if key != "function"}
        for (name, kind), row in zip(timings, compared(timings, ("lax.scan", "forward"), updates))
    ]
    forward, both = timings[ours, "forward"], timings[ours, "forward+backward"]
    figures = {
        "implementation": ours,
        "updates_per_s": updates / forward.median,
        "forward_backward_over_forward": both.median / forward.median,
        "forward_over_associative_scan": forward.speedup(timings["lax.associative_scan", "forward"]),
        "forward_backward_over_lax_scan": both.speedup(timings["lax.scan", "forward+backward"]),
        "max_relative_difference": max(float(np.abs(y - outputs[ours]).max() / np.abs(y).max()) for y in outputs.values()),
    }
    return rows, figures


def _mamba_ssm(inputs: tuple[jax.Array, ...], cotangent: jax.Array) -> dict[tuple[str, str], Callable]:
    """The authors' CUDA kernel, in their layout `[B, E, L]`."""
    import torch
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    def tensor(a: jax.Array, *order: int) -> torch.Tensor:
        given = torch.tensor(np.asarray(a.astype(jnp.float32)).transpose(order)).contiguous().cuda()
        return given.to(getattr(torch, a.dtype.name)).requires_grad_()

    u, dt, A, B, C = inputs
    given = [tensor(a, 0, 2, 1) for a in (u, dt)] + [tensor(A, 0, 1)] + [tensor(a, 0, 2, 1) for a in (B, C)]
    d_y = tensor(cotangent, 0, 2, 1).detach()

    def forward() -> None:
        with torch.no_grad():
            selective_scan_fn(*given)
        torch.cuda.synchronize()

    def both() -> None:
        torch.autograd.grad(selective_scan_fn(*given), given, d_y)
        torch.cuda.synchronize()

    return {("mamba_ssm", "forward"): forward, ("mamba_ssm", "forward+backward"): both}


def _training(args: argparse.Namespace) -> tuple[Rows, dict[str, Any]]:
    """AdamW steps of one Mamba, its scan computed in three ways."""
    tokens = np.random.default_rng(0).integers(VOCAB, size=(args.batch, args.length + 1))
    batch = {"inputs": jnp.asarray(tokens[:, :-1], jnp.int32), "targets": jnp.asarray(tokens[:, 1:], jnp.int32)}
    sizes = {"vocab_size": VOCAB, "embed_dim": args.width, "num_layers": args.layers}
    steps, ours = {}, _ours()
    for name in (ours, *COMPETITORS):
        model = seqjax.build({"name": "mamba", "implementation": name, **sizes})
        variables = nn.unbox(jax.jit(model.init)(jax.random.key(0), batch["inputs"][:, :2]))
        steps[f"Mamba, {name}"] = train_step_of(model, variables, batch)
    losses = {name: float(step()) for name, step in steps.items()}
    timings = time_side_by_side(steps, args.rounds)
    speedups = {name: timings[f"Mamba, {ours}"].speedup(timing) for name, timing in timings.items()}
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
    "lax.scan": functools.partial(_plain, _loop),
    "lax.associative_scan": functools.partial(_plain, _materialised),
}
"""Implementations that only this benchmark registers."""

CHECKED = ((1, 7, 128, 16), (2, 1024, 256, 16), (1, 4099, 256, 4), (2, 512, 384, 64))
"""Shapes at which an accelerator's kernel is held against the loop."""
