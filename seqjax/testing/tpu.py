"""Compile for a TPU on a machine without one, and read the schedule that the chip would run.

loops = schedule("v5e", function, jax.ShapeDtypeStruct((8, 128), jnp.float32), kernel="my_kernel")
print(report(loops))

`libtpu` holds the compiler: `pip install "jax[tpu]"`. A TPU core issues one bundle of instructions per cycle, so the bundles of
a loop's body are its cycles, except waiting for memory outside the core. Figures hold for one version of libtpu.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

TOPOLOGIES = {
    "v5e": ("v5e:1x1", {"chips_per_host_bounds": (1, 1, 1)}),
    "v5p": ("v5p:2x2x1", {}),
    "v6e": ("v6e:1x1", {"chips_per_host_bounds": (1, 1, 1)}),
}
"""Chips that can be compiled for, and the smallest topology of each; v5p's has four."""

COMPILER = {"python": "3.12", "jax": "0.11.2", "libtpu": "0.0.48.1"}
"""What the targets for schedules are held against."""


class Loop(NamedTuple):
    """One loop of a kernel's final schedule."""

    depth: int
    """1 for the grid."""
    bundles: int
    """Cycles of the body, inner loops counted once."""
    slots: dict[str, int]
    """Instructions in the body by the compiler's name of the unit: MXU, XLU, VALU, EUP, VLOAD, VSTORE, SALU."""
    spills: int
    """Stores and loads of vector registers that did not fit."""


def libtpu_missing() -> str | None:
    """Why nothing can be compiled for TPU here, or None."""
    return None if importlib.util.find_spec("libtpu") else 'libtpu is not installed: pip install "jax[tpu]".'


def compiler_differs() -> str | None:
    """Why the schedule's figures cannot be held against those of the compiler in `COMPILER` here, or None."""
    if missing := libtpu_missing():
        return missing
    python = ".".join(map(str, sys.version_info[:2]))
    found = {"python": python} | {name: importlib.metadata.version(name) for name in COMPILER if name != "python"}
    return None if found == COMPILER else f"The schedule's figures are those of {COMPILER}; here are {found}."


def compile_for(chip: str, function: Callable, *arguments: jax.ShapeDtypeStruct) -> jax.stages.Compiled:
    """Compile `function` for one chip.

    Args:
      chip: a key of `TOPOLOGIES`.
      function: of arrays; it is jitted here.
      arguments: trees of shapes and dtypes.
    Raises:
      ImportError: libtpu is missing.
      ValueError: unknown chip.
    """
    sharding = NamedSharding(Mesh(np.array(devices(chip)[:1]), ("chip",)), PartitionSpec())
    placed = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arguments)
    return jax.jit(function).trace(*placed).lower(lowering_platforms=("tpu",)).compile()


def schedule(chip: str, function: Callable, *arguments: jax.ShapeDtypeStruct, kernel: str) -> list[Loop]:
    """The loops of a Pallas kernel in program order.

    Args:
      chip, function, arguments: as in `compile_for`.
      kernel: the `name` given to `pallas_call`; the first kernel of that name is read.
    Raises:
      ImportError: libtpu is missing.
      ValueError: unknown chip.
      RuntimeError: the compiler wrote no schedule: libtpu was loaded before this module could ask for it, or there is no such
        kernel.
    """
    devices(chip)
    folder = pathlib.Path(_dump_folder().name)
    for file in folder.iterdir():
        file.unlink()
    cached = jax.config.jax_compilation_cache_dir
    # A program from a cache is not scheduled: not from the one on disk, nor from jit's, which knows functions by identity.
    _use_cache(None)
    try:
        compile_for(chip, lambda *arguments: function(*arguments), *arguments)
    finally:
        _use_cache(cached)
    bundles, used = (
        sorted(file for file in folder.iterdir() if re.search(rf"-{kernel}(\.\d+)?-\d+-{listing}\.txt$", file.name))
        for listing in ("final_bundles", "final_hlo-static-per-bundle-utilization")
    )
    if not bundles or not used:
        raise RuntimeError(f"libtpu wrote no schedule of a kernel {kernel!r} to {folder}.")
    return _loops(bundles[0].read_text(errors="ignore"), used[0].read_text())


def report(loops: list[Loop]) -> str:
    """A table of loops, one line each."""
    lines = [f"{'depth':>5} {'bundles':>7} {'spills':>6}  slots"]
    for loop in loops:
        slots = ", ".join(f"{name} {count}" for name, count in loop.slots.items() if count)
        lines.append(f"{loop.depth:>5} {loop.bundles:>7} {loop.spills:>6}  {slots}")
    return "\n".join(lines)


@functools.cache
def _dump_folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="seqjax_tpu_")


@functools.cache
def devices(chip: str) -> list:
    """The chips of a topology, to compile programs for, sharded ones too; nothing runs on them.

    Raises:
      ImportError: libtpu is missing.
      ValueError: unknown chip.
    """
    if missing := libtpu_missing():
        raise ImportError(missing)
    if chip not in TOPOLOGIES:
        raise ValueError(f"chip={chip!r} is unknown; allowed: {', '.join(TOPOLOGIES)}.")
    # libtpu reads these once, when it is loaded.
    dump = f"--xla_jf_dump_to={_dump_folder().name} --xla_jf_dump_llo_text=true"
    os.environ.setdefault("LIBTPU_INIT_ARGS", dump)
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    name, options = TOPOLOGIES[chip]
    return topologies.get_topology_desc(name, platform="tpu", **options).devices


def _use_cache(folder: str | None) -> None:
    from jax.experimental.compilation_cache import compilation_cache

    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", folder)


def _loops(schedule: str, utilization: str) -> list[Loop]:
    names, units = [], []
    for line in utilization.splitlines():
        if line.startswith("MXU"):
            names = [name.strip() for name in line.split(",")]
        elif re.fullmatch(r"[\d ]+", line) and len(line.split()) == len(names):
            units.append([int(count) for count in line.split()])
    units = units[1:]  # the first row is the capacity
    bundles = re.findall(r"^ *(?:0x[0-9a-f]+|0) +([A-Z]*) *: *(>*) *\{", schedule, re.MULTILINE)
    depths = [len(marks) for _, marks in bundles]
    heads = [i for i, (label, _) in enumerate(bundles) if label == "LB"]
    loops = []
    for head in heads:
        end = min((i for i in heads if i > head and depths[i] <= depths[head]), default=len(bundles))
        last = max(i for i in range(head, end) if depths[i] >= depths[head])
        rows = units[head : last + 1]
        slots = {name: sum(row[column] for row in rows) for column, name in enumerate(names)}
        spills = slots.pop("VLOAD:FILL", 0) + slots.pop("VSTORE:SPILL", 0)
        loops.append(Loop(depths[head], last + 1 - head, slots, spills))
    return loops
