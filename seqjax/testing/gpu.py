"""What a Mosaic GPU kernel became: compiled for a Hopper GPU on any machine, none attached.

[kernel] = compile_kernels(f, jax.ShapeDtypeStruct((8, 128), "float32"))
assert kernel.spilled_bytes == 0
assert float32_operations(kernel.loops[0]) <= 65

Needs `pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt`, in JAX's own version; no driver and no CUDA.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, NamedSharding, PartitionSpec

PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")

H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  core_count: 132 fpus_per_core: 128 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 62914560 clock_rate_ghz: 1.98 device_memory_size: 150754820096
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H200"
"""
"""The machine to compile for, as XLA describes it."""


@dataclasses.dataclass(frozen=True)
class CompiledKernel:
    """One Mosaic GPU kernel for sm_90a.

    Attributes:
      registers: of a thread.
      spilled_bytes: that a thread stores to and loads from local memory because registers ran out.
      shared_bytes: shared memory of a block, without barriers.
      loops: for each innermost loop, in the order of the text, how often each PTX instruction stands in it.
    """

    registers: int
    spilled_bytes: int
    shared_bytes: int
    loops: tuple[collections.Counter[str], ...]


def available() -> bool:
    """Whether JAX's CUDA plugin is installed."""
    return importlib.util.find_spec("jax_plugins") is not None and any(map(importlib.util.find_spec, PLUGINS))


def compile_kernels(f: Callable[..., Any], *arguments: Any) -> list[CompiledKernel]:
    """Compile `f` for one H200 and read what ptxas reports on each Mosaic GPU kernel in it.

    Args:
      f: a function of arrays.
      arguments: trees of `jax.ShapeDtypeStruct`, or of arrays, of which only shapes and dtypes count.
    Returns:
      The kernels in the order in which they were compiled.
    Raises:
      RuntimeError: the CUDA plugin is missing, or JAX compiled an equal kernel before.
    """
    if not available():
        raise RuntimeError(
            "Compiling for NVIDIA GPUs needs JAX's CUDA plugin: pip install --no-deps "
            f"jax-cuda13-plugin=={jax.__version__} jax-cuda13-pjrt=={jax.__version__}"
        )
    topology = topologies.get_topology_desc(platform="cuda", target_config=H200, topology="1x1x1")
    whole = NamedSharding(Mesh(np.array(topology.devices[:1]), ("device",)), PartitionSpec())
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), arguments)
    with tempfile.TemporaryDirectory() as folder, _dumping(folder):
        jax.jit(f).lower(*abstract).compile()
        reports, resources, programs = (_numbered(folder, kind) for kind in ("ptxas", "resources.txt", "ptx"))
        if len(reports) < len(resources):
            raise RuntimeError(
                f"{len(resources)} kernels were lowered, and {len(reports)} compiled: the others equal kernels that this "
                "process compiled before, and of those JAX keeps no report."
            )
        return [_kernel(*files) for files in zip(reports, resources, programs)]


def float32_operations(instructions: collections.Counter[str]) -> int:
    """Additions, multiplications and fused pairs of them; a fused pair counts as one."""
    return sum(count for name, count in instructions.items() if re.fullmatch(r"(add|sub|mul|fma)(\.\w+)*\.f32", name))


@contextmanager
def _dumping(folder: str) -> Iterator[None]:
    """Mosaic GPU writes its reports to `folder`, and to stderr that it found no disassembler. What JAX has compiled or lowered
    before would leave no report: its caches are emptied, and that on disk is out of use."""
    variable, cache = os.environ.get("MOSAIC_GPU_DUMP_TO"), jax.config.jax_enable_compilation_cache
    os.environ["MOSAIC_GPU_DUMP_TO"] = folder
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    jax.clear_caches()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", cache)
        compilation_cache.reset_cache()
        if variable is None:
            del os.environ["MOSAIC_GPU_DUMP_TO"]
        else:
            os.environ["MOSAIC_GPU_DUMP_TO"] = variable


def _numbered(folder: str, kind: str) -> list[str]:
    """Texts of the files `name_1.kind`, ..., by number: JAX numbers what it lowers and what it compiles."""
    number = lambda path: int(re.search(r"_(\d+)\.", path.name)[1])
    return [path.read_text() for path in sorted(pathlib.Path(folder).glob(f"*.{kind}"), key=number)]


def _kernel(report: str, resources: str, program: str) -> CompiledKernel:
    return CompiledKernel(
        registers=int(re.search(r"Used (\d+) registers", report)[1]),
        spilled_bytes=sum(int(count) for count in re.findall(r"(\d+) bytes spill", report)),
        shared_bytes=int(re.search(r"smem_scratch_bytes=(\d+)", resources)[1]),
        loops=tuple(map(_instructions, _innermost_loops(program.splitlines()))),
    )


def _innermost_loops(lines: Sequence[str]) -> list[Sequence[str]]:
    """From a label to a branch back to it, if no other such stretch lies between."""
    labels, stretches = {}, []
    for number, line in enumerate(lines):
        if label := re.match(r"\s*(\$L\w+):", line):
            labels[label[1]] = number
        elif (branch := re.search(r"\bbra(?:\.uni)?\s+(\$L\w+);", line)) and branch[1] in labels:
            stretches.append((labels[branch[1]], number))
    inner = [a for a in stretches if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in stretches)]
    return [lines[first : last + 1] for first, last in inner]


def _instructions(lines: Sequence[str]) -> collections.Counter[str]:
    found = (re.match(r"\s*(?:@!?%p\d+\s+)?([a-z][\w.:]*)", line) for line in lines)
    return collections.Counter(name[1] for name in found if name)
