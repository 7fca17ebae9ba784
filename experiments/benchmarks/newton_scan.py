"""Nonlinear recurrences: Newton's method over all steps against a loop, and what a TPU's compiler counts of each."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.comparison import Rows, compared, forward_backward
from seqjax.ops.cells import para_gru_cell, para_lstm_cell
from seqjax.ops.newton_scan import newton_scan
from seqjax.scaling.timing import time_side_by_side
from seqjax.testing.tpu import compile_for, libtpu_missing

CELLS = {"gru": para_gru_cell, "lstm": para_lstm_cell}
GATES = 3


def newton(args: argparse.Namespace) -> tuple[Rows, dict[str, Any]]:
    """ParaGRU's and ParaLSTM's cells, solved for all steps at once and step by step."""
    rows, checks = [], {}
    for cell in CELLS:
        for length in args.lengths:
            found, checks[f"{cell} {length}"] = _compare(cell, args.batch, length, args.width, args.rounds)
            rows += [{"cell": cell, "length": length} | row for row in found]
    return rows, checks


def _compare(name: str, batch: int, length: int, width: int, rounds: int) -> tuple[Rows, dict[str, Any]]:
    weights, state, inputs = _arguments(name, batch, length, width)
    cotangent = jax.random.normal(jax.random.key(1), (batch, length, width))
    functions, outputs = {}, {}
    for way, run in _ways(name).items():
        functions[way, "forward"] = functools.partial(jax.jit(run), weights, state, inputs)
        functions[way, "forward+backward"] = functools.partial(
            jax.jit(forward_backward(run, cotangent)), weights, state, inputs
        )
        outputs[way] = functions[way, "forward+backward"]()
    timings = time_side_by_side(functions, rounds)
    rows = [
        {"function": way, "pass": kind} | {key: value for key, value in row.items() if key != "function"}
        for (way, kind), row in zip(timings, compared(timings, ("lax.scan", "forward"), batch * length))
    ]
    solution = jax.jit(functools.partial(newton_scan, CELLS[name], implementation="newton"))(weights, state, inputs)
    ours, loop = (jax.tree.leaves(outputs[way]) for way in ("newton", "lax.scan"))
    figures = {
        "iterations": int(solution.iterations),
        "converged": bool(solution.converged),
        "max_abs_difference_of_states": float(np.abs(ours[0] - loop[0]).max()),
        "max_relative_difference_of_gradients": max(
            float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(ours[1:], loop[1:])
        ),
    }
    return rows, figures


def _arguments(name: str, batch: int, length: int, width: int) -> tuple[Any, Any, jax.Array]:
    """Recurrent weights, the state before the first step, and inputs."""
    keys = jax.random.split(jax.random.key(0), 3)
    weights, peepholes = (jax.random.normal(key, (count, width)) / 2 for key, count in zip(keys, (GATES, 2)))
    state, inputs = jnp.zeros((batch, width)), jax.random.normal(keys[2], (batch, length, GATES, width))
    return (weights, state, inputs) if name == "gru" else ((weights, peepholes), (state, state), inputs)


def _ways(name: str) -> dict[str, Callable]:
    """Functions of (weights, state, inputs) to the states that the next layer sees, `[B, L, D]`."""
    cell = CELLS[name]

    def solved(implementation: str, *arguments: Any) -> jax.Array:
        return jax.tree.leaves(newton_scan(cell, *arguments, implementation=implementation).states)[-1]

    def loop(weights: Any, state: Any, inputs: jax.Array) -> jax.Array:
        """Differentiated by JAX."""

        def step(state: Any, x: jax.Array) -> tuple[Any, jax.Array]:
            state = cell(weights, state, x)
            return state, jax.tree.leaves(state)[-1]

        return jnp.swapaxes(jax.lax.scan(step, state, jnp.swapaxes(inputs, 0, 1))[1], 0, 1)

    ways = {way: functools.partial(solved, way) for way in ("newton", "sequential")}
    return ways | {"lax.scan": loop}


def newton_tpu(args: argparse.Namespace) -> tuple[Rows, dict[str, Any]]:
    """What a v5e's compiler counts of one Newton step over the whole sequence, and of one step of the loop (needs libtpu)."""
    if (missing := libtpu_missing()) is not None:
        raise SystemExit(missing)
    rows = []
    for cell in CELLS:
        for length in args.lengths:
            shapes = jax.eval_shape(lambda cell=cell, length=length: _arguments(cell, args.batch, length, args.width))
            for way, counted in (("newton", "one Newton step"), ("lax.scan", "one token's step, and transposes")):
                compiled = compile_for("v5e", _ways(cell)[way], *shapes)
                costs, memory = compiled.cost_analysis(), compiled.memory_analysis()  # a loop's body counts once
                figures = {"flops": costs["flops"], "bytes_accessed": costs["bytes accessed"]}
                figures |= {"s_at_819_GB_per_s": costs["bytes accessed"] / 819e9, "temporaries": memory.temp_size_in_bytes}
                rows.append({"cell": cell, "length": length, "function": way, "counted": counted} | figures)
    return rows, {}
