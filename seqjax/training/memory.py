"""Host memory of a training process on CPU."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # glibc's malloc.h


def keep_freed_memory() -> bool:
    """Have glibc keep what is freed instead of returning it to the system; whether that could be set.

    XLA's CPU client allocates its temporaries anew for every step and frees them after. Large ones would go back to the
    kernel, and be mapped and zeroed page by page again a moment later: a fifth of the time of a small model's step. For
    entry points, before much is allocated; a library has no business setting it.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # a C library without it
        return False
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1, M_ARENA_MAX: 1}
    return all(mallopt(name, value) for name, value in settings.items())
