"""Generated tasks of remembering the right tokens: selective copying and induction heads (Gu and Dao 2023, section 4.1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import numpy as np

from seqjax.config import ConfigError, choose
from seqjax.data.task import Example, Task
from seqjax.registry import register_task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generated(Task):
    """A task whose every example is drawn from its own seed when it is asked for; nothing is kept.

    Attributes:
      num_tokens: ordinary tokens, `0 .. num_tokens - 1`; special ones follow.
      num_sequences: different training sequences.
      num_validation: sequences of the validation split.
    """

    locations: ClassVar[frozenset[str]] = frozenset()

    num_tokens: int = 16
    num_sequences: int = 1 << 30
    num_validation: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("num_tokens", "num_sequences", "num_validation"):
            if getattr(self, key) < 1:
                raise ConfigError(f"data.{key}={getattr(self, key)} is not positive; allowed: 1 and above.")

    @property
    def content(self) -> str:
        return f"{type(self).__name__}:1"

    def examples(self, split: str) -> Draws:
        """The sequences of a split, which depend on `seed`."""
        number = self.splits.index(self.check_split(split))
        count = self.num_validation if split == "validation" else self.num_sequences
        return Draws(count, lambda index: self.draw(np.random.RandomState([self.seed, number, index])))

    def draw(self, random: np.random.RandomState) -> Example:
        """One example from a stream that NumPy has frozen."""
        raise NotImplementedError


class Draws:
    """As many examples as asked for, each a function of its index."""

    def __init__(self, count: int, draw: Callable[[int], Example]) -> None:
        self._count, self._draw = count, draw

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Example:
        return self._draw(int(index))


@register_task("selective_copying")
@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectiveCopying(Generated):
    """Repeat the tokens that stand scattered among blanks, in their order.

    `inputs` are `context` positions, of which `num_copied`, at random, hold ordinary tokens and the others a blank, and
    then `num_copied` times a mark; at each mark the target is the next of the tokens. The loss is on the marks alone.

    Attributes:
      context: positions before the marks.
      num_copied: tokens to remember.
    """

    context: int = 256
    num_copied: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.num_copied <= self.context:
            raise ConfigError(
                f"data.num_copied={self.num_copied} does not fit data.context={self.context}; allowed: 1 to {self.context}."
            )

    @property
    def length(self) -> int:
        return self.context + self.num_copied

    @property
    def vocab_size(self) -> int:
        return self.num_tokens + 2

    def draw(self, random: np.random.RandomState) -> Example:
        blank, mark = self.num_tokens, self.num_tokens + 1
        tokens = random.randint(self.num_tokens, size=self.num_copied)
        inputs = np.full(self.length, blank, np.int32)
        inputs[np.sort(random.choice(self.context, self.num_copied, replace=False))] = tokens
        inputs[self.context :] = mark
        targets, weights = np.zeros(self.length, np.int32), np.zeros(self.length, np.float32)
        targets[self.context :], weights[self.context :] = tokens, 1
        return {"inputs": inputs, "targets": targets, "weights": weights}

    def baselines(self) -> dict[str, float]:
        return {"guessing": float(np.log(self.num_tokens))}


@register_task("induction_heads")
@dataclasses.dataclass(frozen=True, kw_only=True)
class InductionHeads(Generated):
    """Recall the token that followed a mark: `... mark x ... mark`, and the target at the second mark is x.

    The other tokens are random; the first mark is anywhere, the second ends the sequence, and only it has a loss.

    Attributes:
      sequence_length: positions, 3 or more.
      distances: of the first mark from the second, "uniform" or "log_uniform": then more are short, which are learned
        first.
    """

    sequence_length: int = 256
    distances: str = "uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        choose(dict.fromkeys(("uniform", "log_uniform")), self.distances, "data.distances")
        if self.sequence_length < 3:
            raise ConfigError(f"data.sequence_length={self.sequence_length} is too small; allowed: 3 or more.")

    @property
    def length(self) -> int:
        return self.sequence_length

    @property
    def vocab_size(self) -> int:
        return self.num_tokens + 1

    def draw(self, random: np.random.RandomState) -> Example:
        mark = self.num_tokens
        inputs = random.randint(self.num_tokens, size=self.length).astype(np.int32)
        first = self.length - 1 - self._draw_distance(random)
        inputs[[first, -1]] = mark
        targets, weights = np.zeros(self.length, np.int32), np.zeros(self.length, np.float32)
        targets[-1], weights[-1] = inputs[first + 1], 1
        return {"inputs": inputs, "targets": targets, "weights": weights}

    def _draw_distance(self, random: np.random.RandomState) -> int:
        """From 2 to `length - 1`."""
        if self.distances == "uniform":
            return self.length - 1 - random.randint(self.length - 2)
        return min(int(np.exp(random.uniform(np.log(2), np.log(self.length)))), self.length - 1)

    def baselines(self) -> dict[str, float]:
        return {"guessing": float(np.log(self.num_tokens))}
