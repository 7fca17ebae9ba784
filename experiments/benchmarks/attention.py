"""Softmax attention beside JAX's own."""

from __future__ import annotations

import argparse
import functools
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.comparison import Rows, compared, forward_backward
from seqjax.ops.attention import flash_attention
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
