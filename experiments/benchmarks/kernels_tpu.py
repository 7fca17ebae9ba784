"""What a TPU's compiler makes of the kernels: cycles of their inner loops, read from the schedule. No TPU is needed."""

from __future__ import annotations

import argparse
import functools
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.comparison import Rows
from seqjax.ops.attention_mask import AttentionMask, AttentionSpec
from seqjax.ops.kernels import attention_tpu, selective_scan_tpu
from seqjax.ops.kernels.selective_scan import Inputs
from seqjax.testing.tpu import TOPOLOGIES, Loop, libtpu_missing, schedule


def kernels_tpu(args: argparse.Namespace) -> tuple[Rows, dict[str, Any]]:
    """Cycles and spills of the selective scan per 1024 updates, and of attention per 1024 x 1024 pairs of queries and keys
    of width 128 in bfloat16, for each chip that libtpu can compile for."""
    if (missing := libtpu_missing()) is not None:
        raise SystemExit(missing)
    rows = []
    for chip in TOPOLOGIES:
        for name, per, loops, units in (*_scan(chip, args), *_attention(chip, args)):
            cycles, spills = (sum(value) / units for value in zip(*((loop.bundles, loop.spills) for loop in loops)))
            rows.append({"chip": chip, "kernel": name, "per": per, "cycles": cycles, "spills": spills})
    return rows, {}


def _scan(chip: str, args: argparse.Namespace) -> list[tuple[str, str, list[Loop], int]]:
    """Passes with softplus, skip and gate: the loops, and how many exponentials of 1024 lanes one turn of each has."""
    R, L, E, N, chunk = 8, args.length, args.features, args.modes, 128
    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    tokens, modes, state = f32(R, L, E), f32(R, L, N), f32(R, N, E)
    x = Inputs(tokens, tokens, f32(1, N, E), modes, modes, f32(1, E), tokens, f32(1, E), state, None)
    how = {"softplus": True, "reverse": False, "chunk_size": chunk}
    forward = functools.partial(selective_scan_tpu.forward, **how, keep_states=True)
    loops = schedule(chip, forward, x, kernel="forward_kernel")
    step = max((loop for loop in loops if loop.depth == 2), key=lambda loop: loop.slots["EUP"])
    backward = functools.partial(selective_scan_tpu.backward, **how)
    loops = schedule(chip, backward, x, f32(R, L // chunk, N, E), tokens, state, kernel="backward_kernel")
    recompute, back = (loop for loop in loops if loop.depth == 3 and loop.slots["EUP"])
    per, updates = "1024 updates", back.slots["EUP"]
    # Both loops of a backward pass go over all updates; a turn of one may hold more of them than a turn of the other.
    scaled = recompute._replace(bundles=recompute.bundles * updates / recompute.slots["EUP"])
    return [
        ("selective scan, forward", per, [step], step.slots["EUP"]),
        ("selective scan, backward", per, [scaled, back], updates),
    ]


def _attention(chip: str, args: argparse.Namespace) -> list[tuple[str, str, list[Loop], float]]:
    """Passes without a mask: the loop over chunks of keys, and the part of 1024 keys that one turn of it has."""
    length = args.length
    head = jax.ShapeDtypeStruct((1, length, 1, 128), jnp.bfloat16)
    operands, outputs = (head, head, head, None), (head, jax.ShapeDtypeStruct((1, length, 1), jnp.float32))
    spec, mask = AttentionSpec(False, None, 0, 0.1, None), AttentionMask(None, None, None, None)
    passes = {
        "forward": lambda operands, outputs: attention_tpu.forward(spec, mask, *operands),
        "backward": lambda operands, outputs: attention_tpu.backward(spec, mask, operands, outputs, outputs),
    }
    found = []
    for name, run in passes.items():
        loops = schedule(chip, run, operands, outputs, kernel=f"{name}_kernel")
        chunk = max((loop for loop in loops if loop.depth == 2), key=lambda loop: loop.slots["EUP"])
        found.append((f"attention, {name}", "1024 x 1024 pairs", [chunk], attention_tpu.CHUNK / attention_tpu.BLOCK))
    return found
