"""Generated tasks of the Universal Transformer and of Learning to Execute: copy, double, reverse and add strings of digits."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from seqjax.config import ConfigError
from seqjax.data.recall import Draws, Generated
from seqjax.data.task import Example
from seqjax.registry import register_task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transduction(Generated):
    """A source string becomes a target string; short ones to learn from, long ones to test on (Dehghani et al. 2019,
    section 3.4).

    A row is `mark, source, mark, target` without its last symbol; the loss is on the target alone. What follows a short
    string is padding, segment 0. Lengths of training strings are uniform; all validation strings have the same length.

    Attributes:
      source_length: symbols of the longest source of the training split.
      min_length: of the shortest.
      validation_length: of every source of the validation split; None for `source_length`.
      num_tokens: different digits.
    """

    scores_rows: ClassVar[bool] = True
    growth: ClassVar[int] = 1
    """How many times the source's length a target has at most."""
    shortest: ClassVar[int] = 1
    """The shortest source there is."""

    source_length: int = 40
    min_length: int = 1
    validation_length: int | None = None
    num_tokens: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.shortest <= self.source_length:
            raise ConfigError(f"data.source_length={self.source_length} is too short; allowed: {self.shortest} and above.")
        if not 1 <= self.min_length <= self.source_length:
            raise ConfigError(f"data.min_length={self.min_length} is out of range; allowed: 1 to {self.source_length}.")
        if self.validation_length is not None and self.validation_length < self.shortest:
            raise ConfigError(
                f"data.validation_length={self.validation_length} is too short; allowed: None, or {self.shortest} and above."
            )

    @property
    def length(self) -> int:
        return max(self._row(self.source_length), self._row(self.tested_length))

    @property
    def tested_length(self) -> int:
        """Of the sources in the validation split."""
        return self.validation_length or self.source_length

    @property
    def vocab_size(self) -> int:
        return self.num_tokens + 1

    def examples(self, split: str) -> Draws:
        """The strings of a split, which depend on `seed`. Rows of the two splits differ in length where their strings do."""
        number = self.splits.index(self.check_split(split))
        stream = lambda index: np.random.RandomState([self.seed, number, index])
        if split == "validation":
            return Draws(self.num_validation, lambda index: self._row_of(stream(index), self.tested_length, self.tested_length))
        shortest = max(self.min_length, self.shortest)
        return Draws(self.num_sequences, lambda index: self._row_of(stream(index), shortest, self.source_length))

    def _row(self, source_length: int) -> int:
        """Length of the row that a source of this length may need."""
        return source_length * (1 + self.growth) + 1

    def _row_of(self, random: np.random.RandomState, shortest: int, longest: int) -> Example:
        source = self.source(random, random.randint(shortest, longest + 1))
        target, mark = self.target(source), [self.num_tokens]
        tokens = np.concatenate([mark, source, mark, target]).astype(np.int32)
        row, first, last = self._row(longest), len(source) + 1, len(tokens) - 1
        made = {
            "inputs": np.zeros(row, np.int32),
            "targets": np.zeros(row, np.int32),
            "weights": np.zeros(row, np.float32),
            "segment_ids": np.zeros(row, np.int32),
        }
        made["inputs"][:last], made["segment_ids"][:last] = tokens[:-1], 1
        made["targets"][first:last], made["weights"][first:last] = target, 1
        return made

    def source(self, random: np.random.RandomState, length: int) -> np.ndarray:
        """A random source string of this length."""
        return random.randint(self.num_tokens, size=length)

    def target(self, source: np.ndarray) -> np.ndarray:
        """What the source becomes."""
        raise NotImplementedError

    def baselines(self) -> dict[str, float]:
        return {"guessing": float(np.log(self.num_tokens))}


@register_task("copy")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Copy(Transduction):
    """The target is the source."""

    def target(self, source: np.ndarray) -> np.ndarray:
        return source


@register_task("double")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Double(Transduction):
    """The target is the source, twice (Zaremba and Sutskever 2014, section 5)."""

    growth = 2

    def target(self, source: np.ndarray) -> np.ndarray:
        return np.concatenate([source, source])


@register_task("reverse")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Reverse(Transduction):
    """The target is the source, last symbol first."""

    def target(self, source: np.ndarray) -> np.ndarray:
        return source[::-1]


@register_task("addition")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Addition(Transduction):
    """The source is two numbers to base `num_tokens` with a plus between, the target their sum.

    Numbers begin with their last digit. The sum has one digit more than the longer number, a 0 if need be.
    """

    shortest = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_tokens < 2:
            raise ConfigError(f"data.num_tokens={self.num_tokens} is not the base of numbers; allowed: 2 and above.")

    @property
    def vocab_size(self) -> int:
        return self.num_tokens + 2

    def source(self, random: np.random.RandomState, length: int) -> np.ndarray:
        digits = super().source(random, length)
        digits[random.randint(1, length - 1)] = self._plus
        return digits

    def target(self, source: np.ndarray) -> np.ndarray:
        (plus,) = np.flatnonzero(source == self._plus)
        first, second = source[:plus], source[plus + 1 :]
        total = np.zeros(max(len(first), len(second)) + 1, np.int64)
        total[: len(first)] += first
        total[: len(second)] += second
        for place in range(len(total) - 1):
            carry, total[place] = divmod(total[place], self.num_tokens)
            total[place + 1] += carry
        return total

    @property
    def _plus(self) -> int:
        return self.num_tokens + 1
