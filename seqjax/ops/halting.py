"""Adaptive computation time: how long each position computes, and how much each of its steps counts."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class Halting(NamedTuple):
    """What each position has spent so far.

    Attributes:
      total: sum of its halting probabilities; 1 once it has halted.
      remainder: weight of the step at which it halted; 0 until then.
      steps: how many steps it has taken.
    """

    total: Float[Array, "B L"]
    remainder: Float[Array, "B L"]
    steps: Float[Array, "B L"]

    @classmethod
    def fresh(cls, shape: tuple[int, int], dtype=jnp.float32) -> Halting:
        return cls(*(jnp.zeros(shape, dtype) for _ in range(3)))

    @property
    def running(self) -> Bool[Array, "B L"]:
        """Which positions take the next step."""
        return self.total < 1

    @property
    def ponder_time(self) -> Float[Array, "B L"]:
        """Steps and remainder, what the ponder cost is a mean of. Only the remainder has a gradient."""
        return self.steps + self.remainder


def halt(
    probability: Float[Array, "B L"], before: Halting, epsilon: float, last: Bool[Array, ""] | bool = False
) -> tuple[Float[Array, "B L"], Halting]:
    """One step of adaptive computation time (Graves 2016, section 2; per position as Dehghani et al. 2019, appendix C).

    A position halts at the step that takes its total above `1 - epsilon`; that step weighs what is left of 1. The weights
    of a position's steps sum to 1: at the `last` step what is left is spent, where the authors' code drops it.

    Args:
      probability: of halting at this step, in `(0, 1)`.
      before: after the previous step (`Halting.fresh` for none).
      epsilon: in `(0, 1)`; below every probability of 1 step, so that a first step is always taken.
      last: whether no step follows.
    Returns:
      How much this step's outcome counts, 0 for halted positions; and what is spent after it.
    """
    running = before.running
    halts = running & ((before.total + probability > 1 - epsilon) | last)
    left = jnp.where(halts, 1 - before.total, 0)
    weight = jnp.where(halts, left, jnp.where(running, probability, 0))
    after = Halting(
        total=jnp.where(halts, 1, before.total + weight),
        remainder=before.remainder + left,
        steps=before.steps + running.astype(before.steps.dtype),
    )
    return weight, after
