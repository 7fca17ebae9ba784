"""Tokens to the host while a compiled loop makes them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
from jax.experimental import io_callback
from jaxtyping import Array

_STREAMS: dict[int, Callable[[np.ndarray], None]] = {}
_STREAM_IDS = itertools.count()


class streaming:
    """Give a callback a number that the compiled loop can carry, so that another callback compiles nothing."""

    def __init__(self, stream: Callable[[np.ndarray], None] | None) -> None:
        self.stream, self.id = stream, next(_STREAM_IDS)

    def __enter__(self) -> np.int32 | None:
        if self.stream is None:
            return None
        _STREAMS[self.id] = self.stream
        return np.int32(self.id)

    def __exit__(self, *error: Any) -> None:
        _STREAMS.pop(self.id, None)


def send(stream_id: Array | None, token: Array) -> None:
    """Within a compiled program: call the callback of this number with `token`, in order; none for None."""
    if stream_id is not None:
        io_callback(_call, None, stream_id, token, ordered=True)


def _call(stream_id: Array, token: Array) -> None:
    _STREAMS[int(stream_id)](np.asarray(token))
