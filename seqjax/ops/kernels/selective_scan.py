"""What the selective-scan kernels of all platforms take."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array


class Inputs(NamedTuple):
    """Rows are pairs of a batch element and a group, R = batch size times G; row r uses the parameters of group `r % G`.

    Attributes:
      u, dt, z: `[R, L, E]`, float32 or bfloat16.
      A: `[G, N, E]` float32, negative.
      B, C: `[R, L, N]`.
      D, dt_bias: `[G, E]` float32.
      h0: `[R, N, E]` float32.
      starts: `[R, L]` bool.
    """

    u: Array
    dt: Array
    A: Array
    B: Array
    C: Array
    D: Array | None
    z: Array | None
    dt_bias: Array | None
    h0: Array
    starts: Array | None
