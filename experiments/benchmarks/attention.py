"""Softmax attention beside JAX's own."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.comparison import Rows, compared, forward_backward
from seqjax.ops.attention import HOPPER, attended_pairs, flash_attention
from seqjax.scaling.timing import time_side_by_side


def attention(args: argparse.Namespace) -> tuple[Rows, dict[str, Any]]:
    """Causal attention, against `jax.nn.dot_product_attention`: forward, and forward with backward."""
    rows, differences = [], {}
    for shape in args.shapes:
        keys = jax.random.split(jax.random.key(0), 4)
        q, k, v, cotangent = (jax.random.normal(key, shape) for key in keys)
        competitors = {
            "jax.nn.dot_product_attention": functools.partial(
                jax.nn.dot_product_attention, is_causal=True, implementation="xla"
            ),
            "seqjax.ops.flash_attention": functools.partial(flash_attention, causal=True, implementation="xla"),
        }
        for kind in ("forward", "forward+backward"):
            wrap = functools.partial(forward_backward, cotangent=cotangent) if kind != "forward" else lambda function: function
            jitted = {name: jax.jit(wrap(function)) for name, function in competitors.items()}
            functions = {name: functools.partial(function, q, k, v) for name, function in jitted.items()}
            ours, theirs = (jax.tree.leaves(function()) for function in functions.values())
            differences[f"{kind} {shape}"] = max(float(jnp.abs(a - b).max()) for a, b in zip(ours, theirs))
            timings = time_side_by_side(functions, args.rounds)
            label = {"shape": "x".join(map(str, shape)), "pass": kind}
            rows += [label | row for row in compared(timings, "jax.nn.dot_product_attention")]
    return rows, {"max_abs_difference": differences}


def attention_gpu(args: argparse.Namespace) -> tuple[Rows, dict[str, Any]]:
    """The Hopper kernel against cuDNN, forward and backward apart, in bfloat16: first its errors, then the TFLOP/s of the pairs
    that attend (needs an H100 or H200)."""
    gpus = jax.devices() if jax.default_backend() == "gpu" else []
    if not gpus or gpus[0].compute_capability != "{}.{}".format(*HOPPER):
        raise SystemExit(f"attention_gpu times a kernel for NVIDIA's Hopper, and this process runs on {jax.devices()[0]}.")
    errors = {name: _errors(**case) for name, case in CHECKED.items()}
    rows = [row for name, case in TIMED.items() for row in _timed(name, *case, args.rounds, args.calls)]
    return rows, {"relative_errors": errors}


CHECKED = {
    "causal, grouped heads": dict(shape=(2, 1000, 8, 128), groups=2),
    "not causal": dict(shape=(2, 1000, 4, 64), groups=4, causal=False),
    "window, segments": dict(shape=(2, 1500, 4, 128), groups=2, window=300, segments=4),
    "offsets": dict(shape=(2, 500, 4, 64), groups=4, q_offset=(700, 100)),
    "wide heads": dict(shape=(2, 700, 4, 256), groups=2, segments=3),
}
"""Calls whose kernels are held against all pairs in float32: `[B, T, H, K]` of queries and options."""
TIMED = {
    "4k": ((4, 4096, 16, 128), 1),
    "16k": ((1, 16384, 16, 128), 1),
    "narrow heads": ((4, 4096, 32, 64), 1),
    "wide heads": ((4, 4096, 8, 256), 1),
    "packed": ((1, 16384, 16, 128), 8),
}
"""Causal calls to time: `[B, T, H, K]`, and how many segments lie in a row."""
ALLOWED_ERROR = 2.0**-6
"""Of the largest entry: two units of the last place in bfloat16."""


def _operands(shape: tuple[int, ...], groups: int, num_keys: int) -> list[jax.Array]:
    """Queries, keys, values and a cotangent of the output."""
    batch, _, _, width = shape
    shapes = (shape, (batch, num_keys, groups, width), (batch, num_keys, groups, width), shape)
    return [jax.random.normal(key, size, jnp.bfloat16) for key, size in zip(jax.random.split(jax.random.key(0), 4), shapes)]


def _packed(batch: int, length: int, segments: int) -> jax.Array:
    """Ids `[B, T]` of segments of unequal lengths."""
    cuts = np.random.default_rng(0).choice(np.arange(1, length), segments - 1, replace=False)
    return jnp.asarray(np.broadcast_to(np.searchsorted(np.sort(cuts), np.arange(length), side="right"), (batch, length)))


def _errors(
    shape: tuple[int, ...], groups: int, segments: int = 1, q_offset: tuple[int, ...] = (), **options: Any
) -> dict[str, float]:
    """Largest errors, relative to the largest entry, of the outputs and of each gradient."""
    batch, length, *_ = shape
    *operands, d_out = _operands(shape, groups, length + max(q_offset, default=0))
    d_lse = jax.random.normal(jax.random.key(1), shape[:3])
    ids = _packed(batch, length, segments) if segments > 1 else None
    options |= {"segment_ids": None if ids is None else (ids, ids), "q_offset": jnp.asarray(q_offset) if q_offset else 0}

    def results(implementation: str, dtype: Any) -> list[jax.Array]:
        attend = functools.partial(flash_attention, **options, return_lse=True, implementation=implementation)
        run = jax.jit(forward_backward(attend, (d_out.astype(dtype), d_lse)))
        return jax.tree.leaves(run(*(a.astype(dtype) for a in operands)))

    with jax.default_matmul_precision("highest"):
        exact = results("reference", jnp.float32)
    pairs = zip(("out", "lse", "dq", "dk", "dv"), results("pallas_gpu", jnp.bfloat16), exact)
    errors = {name: float(jnp.abs(found - want).max() / jnp.abs(want).max()) for name, found, want in pairs}
    if not max(errors.values()) <= ALLOWED_ERROR:
        raise SystemExit(f"The kernel is wrong: {errors} at {shape}; allowed: {ALLOWED_ERROR}.")
    return errors


def _timed(name: str, shape: tuple[int, ...], segments: int, rounds: int, calls: int) -> Rows:
    """One row for each implementation and pass; cuDNN, which takes no segments here, is timed on one."""
    batch, length, heads, width = shape
    *operands, d_out = _operands(shape, heads, length)
    ids = _packed(batch, length, segments)
    lengths = np.bincount(np.asarray(ids[0]))
    packed = {"segment_ids": (ids, ids)} if segments > 1 else {}
    ways = {
        "pallas_gpu": (packed, sum(attended_pairs(int(n), causal=True, window=None) for n in lengths)),
        "cudnn": ({}, attended_pairs(length, causal=True, window=None)),
    }
    functions, products = {}, {}
    for way, (options, pairs) in ways.items():
        attend = functools.partial(flash_attention, **options, implementation=way)
        _, pull = jax.jit(functools.partial(jax.vjp, attend))(*operands)
        functions[way, "forward"] = _repeated(attend, calls, *operands)
        functions[way, "backward"] = _repeated(lambda d, pull: pull(d), calls, d_out, pull)
        for kind, matrices in (("forward", 2), ("backward", 5)):
            products[way, kind] = 2 * matrices * pairs * batch * heads * width
    timings = time_side_by_side(functions, rounds)
    return [
        {"call": name, "pass": kind, "implementation": way, "median_ms": 1e3 * timing.median / calls}
        | {"TFLOP/s": products[way, kind] * calls / timing.median / 1e12}
        for (way, kind), timing in timings.items()
    ]


def _repeated(function: Callable, calls: int, first: jax.Array, *others: Any) -> Callable[[], Any]:
    """`function(first, *others)` so often in one program that its start does not count."""

    def run(first: jax.Array, *others: Any) -> Any:
        def again(_: jax.Array, carry: tuple) -> tuple:
            return jax.lax.optimization_barrier((carry[0], function(carry[0], *others)))

        return jax.lax.fori_loop(1, calls, again, (first, function(first, *others)))[1]

    return functools.partial(jax.jit(run), first, *others)
