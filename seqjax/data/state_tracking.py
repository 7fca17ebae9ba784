"""Generated tasks of keeping track of a state: parity, and running products in groups of permutations."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import numpy as np

from seqjax.config import ConfigError, choose
from seqjax.data.recall import Generated
from seqjax.data.task import Example
from seqjax.registry import register_task


@functools.lru_cache(maxsize=8)
def permutations(degree: int, even: bool = False) -> np.ndarray:
    """The permutations of `range(degree)`, or the even ones among them, in lexicographic order: `[order, degree]`."""
    found = np.array(list(itertools.permutations(range(degree))))
    inversions = sum(found[:, i] > found[:, j] for i, j in itertools.combinations(range(degree), 2))
    return found[inversions % 2 == 0] if even else found


@functools.lru_cache(maxsize=8)
def product_table(degree: int, even: bool = False) -> np.ndarray:
    """Numbers of the products `a b`, b first: `(a b)(i) = a(b(i))`, as `[order, order]`."""
    elements = permutations(degree, even)
    number = {tuple(element): i for i, element in enumerate(elements)}
    return np.array([[number[tuple(a[b])] for b in elements] for a in elements])


GROUPS = {"S2": (2, False), "S3": (3, False), "S4": (4, False), "S5": (5, False), "A4": (4, True), "A5": (5, True)}
"""Symmetric and alternating groups: degree, and whether permutations are even. A5 and S5 are not solvable, so that no
constant number of layers whose transitions commute computes their products for every length (Merrill et al. 2024)."""


@register_task("prefix_products")
@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixProducts(Generated):
    """The product of all elements so far: target t is `g_t ... g_2 g_1`, the first token acting first.

    Tokens are elements of the group, uniform, numbered in lexicographic order; the identity is 0.

    Attributes:
      group: a key of `GROUPS`.
      sequence_length: positions.
      scored_from: the first position that has a loss: to test, on longer sequences, only what lies beyond those of
        training.
    """

    num_tokens: int = dataclasses.field(default=0, init=False)  # as many as the group has elements
    group: str = "S3"
    sequence_length: int = 16
    scored_from: int = 0

    def __post_init__(self) -> None:
        choose(GROUPS, self.group, "data.group")
        object.__setattr__(self, "num_tokens", self.vocab_size)
        super().__post_init__()
        if self.sequence_length < 1:
            raise ConfigError(f"data.sequence_length={self.sequence_length} is not positive; allowed: 1 and above.")
        if not 0 <= self.scored_from < self.sequence_length:
            raise ConfigError(
                f"data.scored_from={self.scored_from} is no position of data.sequence_length={self.sequence_length}; "
                f"allowed: 0 to {self.sequence_length - 1}."
            )

    @property
    def length(self) -> int:
        return self.sequence_length

    @property
    def vocab_size(self) -> int:
        return len(permutations(*GROUPS[self.group]))

    def draw(self, random: np.random.RandomState) -> Example:
        table = product_table(*GROUPS[self.group])
        inputs = random.randint(self.vocab_size, size=self.length).astype(np.int32)
        products = itertools.accumulate(inputs, lambda product, element: table[element, product])
        targets = np.fromiter(products, np.int32, self.length)
        weights = (np.arange(self.length) >= self.scored_from).astype(np.float32)
        return {"inputs": inputs, "targets": targets, "weights": weights}

    def baselines(self) -> dict[str, float]:
        return {"guessing": float(np.log(self.vocab_size))}


@register_task("parity")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Parity(PrefixProducts):
    """Whether the number of ones so far is odd, for random bits: the products of the group of two elements."""

    group: str = dataclasses.field(default="S2", init=False)
