"""Diagonal recurrences: state updates per second, and what their gradients cost."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.comparison import Rows, compared, forward_backward
from seqjax.ops.complex_pairs import Pair, exponential, product, real_product, to_complex
from seqjax.ops.recurrence import recurrence, sum_modes
from seqjax.ops.state_space import DiagonalSystem
from seqjax.scaling.timing import time_side_by_side

MATERIALISED_UP_TO = 1 << 25
"""States of the largest recurrence whose backward pass through an associative scan fits a small machine's memory."""


def scan(args: argparse.Namespace) -> tuple[Rows, dict[str, Any]]:
    """Diagonal recurrences `h_t = a h_(t-1) + u_t`, `y_t = Re sum c h_t`, against JAX's scans and their autodiff."""
    rows, checks = [], {}
    for shape in args.shapes:
        for kind, competitors in {"real": _real(*shape), "complex": _complex(*shape)}.items():
            label = {"modes": kind, "B,L,D,N": "x".join(map(str, shape))}
            found, figures = _compare(competitors, shape, args.rounds)
            rows += [label | row for row in found]
            checks[" ".join(label.values())] = figures
    return rows, checks


def _compare(competitors: dict[str, Callable], shape: tuple[int, ...], rounds: int) -> tuple[Rows, dict[str, float]]:
    """Each `(constants, u) -> y`, forward and with its backward pass, all in turns."""
    batch, length, width, modes = shape
    keys = jax.random.split(jax.random.key(0), 2)
    u, cotangent = (jax.random.normal(key, (batch, length, width)) for key in keys)
    functions, outputs = {}, {}
    for name, (run, constants) in competitors.items():
        jitted = {"forward": jax.jit(run)}
        if name != "lax.associative_scan" or batch * length * width * modes <= MATERIALISED_UP_TO:
            jitted["forward+backward"] = jax.jit(forward_backward(run, cotangent))
        functions |= {(name, kind): functools.partial(function, constants, u) for kind, function in jitted.items()}
        outputs[name] = np.asarray(jitted["forward"](constants, u))
    timings = time_side_by_side(functions, rounds)
    rows = [
        {"function": name, "pass": kind} | {key: value for key, value in row.items() if key != "function"}
        for (name, kind), row in zip(timings, compared(timings, ("lax.scan", "forward"), batch * length * width * modes))
    ]
    ours = timings["seqjax", "forward"]
    figures = {
        "updates_per_s": batch * length * width * modes / ours.median,
        "forward_backward_over_forward": timings["seqjax", "forward+backward"].median / ours.median,
        "forward_over_associative_scan": ours.speedup(timings["lax.associative_scan", "forward"]),
        "forward_backward_over_lax_scan": timings["seqjax", "forward+backward"].speedup(
            timings["lax.scan", "forward+backward"]
        ),
        "max_relative_difference": max(float(np.abs(y - outputs["seqjax"]).max() / np.abs(y).max()) for y in outputs.values()),
    }
    return rows, figures


def _real(batch: int, length: int, width: int, modes: int) -> dict[str, tuple[Callable, Any]]:
    keys = jax.random.split(jax.random.key(1), 2)
    constants = (jax.random.uniform(keys[0], (modes, width), minval=0.8), jax.random.normal(keys[1], (modes, width)))
    zeros = jnp.zeros((batch, modes, width))

    def materialised(constants: tuple, u: jax.Array) -> jax.Array:
        a, c = constants
        shape = (batch, length, modes, width)
        elements = jnp.broadcast_to(a, shape), jnp.broadcast_to(u[:, :, None], shape)
        _, h = jax.lax.associative_scan(lambda e, f: (e[0] * f[0], f[0] * e[1] + f[1]), elements, axis=1)
        return (c * h).sum(2)

    return {
        "seqjax": (lambda c, u: recurrence(_real_step, c, zeros, u, elementwise=True)[0], constants),
        "lax.scan": (lambda c, u: _loop(_real_step, c, zeros, u), constants),
        "lax.associative_scan": (materialised, constants),
    }


def _real_step(constants: tuple, h: jax.Array, u: jax.Array) -> tuple[jax.Array, jax.Array]:
    a, c = constants
    h = a * h + u[:, None]
    return h, sum_modes(c * h)


def _complex(batch: int, length: int, width: int, modes: int) -> dict[str, tuple[Callable, Any]]:
    keys = jax.random.split(jax.random.key(1), 4)
    normal = functools.partial(jax.random.normal, shape=(modes, width))
    log_decay = Pair(jnp.log(jax.random.uniform(keys[0], (modes, width), minval=0.8)), normal(keys[1]))
    system = DiagonalSystem(log_decay, Pair(normal(keys[2])[None], normal(keys[3])[None]))
    zeros = jnp.zeros((batch, modes, width))

    def materialised(system: DiagonalSystem, u: jax.Array) -> jax.Array:
        a, c = to_complex(exponential(system.log_decay)), to_complex(system.outputs)[0]
        shape = (batch, length, modes, width)
        elements = jnp.broadcast_to(a, shape), jnp.broadcast_to(u[:, :, None], shape).astype(a.dtype)
        _, h = jax.lax.associative_scan(lambda e, f: (e[0] * f[0], f[0] * e[1] + f[1]), elements, axis=1)
        return (c * h).sum(2).real

    def loop(system: DiagonalSystem, u: jax.Array) -> jax.Array:
        constants = exponential(system.log_decay), Pair(system.outputs.real[0], system.outputs.imag[0])
        return _loop(_complex_step, constants, Pair(zeros, zeros), u)

    return {
        "seqjax": (lambda system, u: system.scan(u, system.init_state(batch))[0][:, :, 0], system),
        "lax.scan": (loop, system),
        "lax.associative_scan": (materialised, system),
    }


def _complex_step(constants: tuple, h: Pair, u: jax.Array) -> tuple[Pair, jax.Array]:
    a, c = constants
    h = product(a, h)
    h = Pair(h.real + u[:, None], h.imag)
    return h, sum_modes(real_product(c, h))


def _loop(step: Callable, constants: Any, state: Any, u: jax.Array) -> jax.Array:
    """The same steps, differentiated by JAX."""
    _, y = jax.lax.scan(functools.partial(step, constants), state, jnp.swapaxes(u, 0, 1))
    return jnp.swapaxes(y, 0, 1)
