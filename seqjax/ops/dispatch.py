"""One choice for all ops: which implementation of the same function runs."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any

import jax

PLATFORM_KERNELS = {"pallas_tpu": ("tpu", "tpu"), "cudnn": ("gpu", "cuda"), "pallas_gpu": ("gpu", "cuda")}
"""Implementations that exist for one platform only, the preferred first: JAX's name of the backend, and
`lax.platform_dependent`'s."""


def dispatch(implementation: str | None, available: Mapping[str, Callable[..., Any]], *args: Any) -> Any:
    """Call the chosen implementation on `args`.

    Args:
      implementation: a key of `available`; None takes the kernel of the platform that this process runs on, where there is
        one, and "xla" on any other. A program that is compiled for another platform names the kernel: to trace kernels
        that will not run takes seconds a call.
      available: implementations that support this call; "xla" is always one of them.
    Raises:
      ValueError: the implementation is unknown, or does not support this call.
    """
    if implementation is not None:
        if implementation not in available:
            raise ValueError(
                f"implementation={implementation!r} does not serve this call; allowed here: None, "
                f"{', '.join(sorted(available))}."
            )
        return available[implementation](*args)
    kernel = platform_kernel(available)
    if kernel is not None:
        _, platform = PLATFORM_KERNELS[kernel]
        return jax.lax.platform_dependent(*args, **{platform: available[kernel]}, default=available["xla"])
    return available["xla"](*args)


def platform_kernel(available: Container[str] = tuple(PLATFORM_KERNELS)) -> str | None:
    """The first of the kernels on the platform that this process runs on; None where `available` has none."""
    backend = jax.default_backend()
    names = (name for name, (wanted, _) in PLATFORM_KERNELS.items() if wanted == backend and name in available)
    return next(names, None)


def undivided_mesh() -> bool:
    """Whether no array here is divided over devices: kernels take whole arrays, or each device's part in a `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return all(size == 1 or axis in mesh.manual_axes for axis, size in mesh.shape.items())
