"""One choice for all ops: which implementation of the same function runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

PLATFORM_KERNELS = {"pallas_tpu": "tpu", "pallas_gpu": "cuda"}
"""Implementations that exist for one platform only, and `lax.platform_dependent`'s name of that platform."""


def dispatch(implementation: str | None, available: Mapping[str, Callable[..., Any]], *args: Any) -> Any:
    """Call the chosen implementation on `args`.

    Args:
      implementation: a key of `available`; None lets each platform take its kernel, and "xla" elsewhere, so that one
        jitted program lowers for CPU, TPU and GPU.
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
    kernels = {PLATFORM_KERNELS[name]: f for name, f in available.items() if name in PLATFORM_KERNELS}
    if not kernels:
        return available["xla"](*args)
    return jax.lax.platform_dependent(*args, **kernels, default=available["xla"])
