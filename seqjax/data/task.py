"""The contract of a task: for any step and any slice of rows the same examples, for ever."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Iterator
from typing import ClassVar, Protocol

import numpy as np

from seqjax.config import ConfigError, choose, digest
from seqjax.data.tokenizers import Tokenizer

Example = dict[str, np.ndarray]
Batch = dict[str, np.ndarray]

NATS_TO_BITS = 1.0 / float(np.log(2.0))


class Examples(Protocol):
    """Random access to the examples of one split: what Grain calls a data source."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(abc.ABC):
    """Examples to learn from, and how a loss on them is read.

    A subclass is a frozen dataclass, its fields are the `data.*` keys of a config. It supplies `examples`, `length` and
    `content`, and says in the attributes below what a model must take. An example is a batch without its first axis:

    - `inputs`: `[L]` int32 tokens or `[L, C]` float32 channels;
    - `targets`: `[L]` int32 tokens, `[]` int32 label, or float32: `[L, O]` a value per token, `[T, O]` a forecast, `[L, 2]`
      the time to the next event and its mark;
    - `weights`: float32 in the shape of `targets`, `[L]` of events; 0 = not counted;
    - `segment_ids`, where documents are packed: `[L]` int32; 0 = padding, documents count from 1 within a row.

    Attributes:
      head: the model head it needs, "language_model", "classifier", "regression", "forecast" or "point_process".
      splits: what `examples` and `eval_batches` accept.
      locations: options that say where data lies, not what it is; they stay out of `digest`.
      vocab_size: number of token ids in `inputs` and, for a language model, of output classes; None for continuous inputs.
      input_dim: channels C of continuous inputs; None for tokens.
      num_classes: number of labels of a classification task.
      output_dim: channels O of targets that are values, or how many marks events have; horizon: steps T of a forecast.
      tokenizer: what turns text into `inputs` and back; None where there is no text.
      loss_unit, loss_scale: a mean loss (in nats, or squared error), times `loss_scale`, is in `loss_unit`.
    """

    head: ClassVar[str] = "language_model"
    splits: ClassVar[tuple[str, ...]] = ("train", "validation")
    locations: ClassVar[frozenset[str]] = frozenset({"data_dir"})
    vocab_size: ClassVar[int | None] = None
    input_dim: ClassVar[int | None] = None
    num_classes: ClassVar[int | None] = None
    output_dim: ClassVar[int | None] = None
    horizon: ClassVar[int | None] = None
    tokenizer: ClassVar[Tokenizer | None] = None
    loss_unit: ClassVar[str] = "nats"
    loss_scale: ClassVar[float] = 1.0

    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"data.batch_size={self.batch_size} is too small; allowed: 1 or more.")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"data.seed={self.seed} is out of range; allowed: 0 to 2**32 - 1.")

    @property
    @abc.abstractmethod
    def length(self) -> int:
        """The sequence length L that a model must take."""

    @property
    @abc.abstractmethod
    def content(self) -> str:
        """Identifies the data itself: a hash of its source, or the name and version of a generator."""

    @abc.abstractmethod
    def examples(self, split: str) -> Examples:
        """The examples of a split, in a fixed order. At most 2**31 of them: Grain shuffles 32-bit indices."""

    def aligned(self, alignment: int) -> Task:
        """This task with documents that start at multiples of `alignment` in their row: what a model's `segment_alignment`
        asks of a task with an option of that name."""
        return self if self.segment_alignment % alignment == 0 else dataclasses.replace(self, segment_alignment=alignment)

    def baselines(self) -> dict[str, float]:
        """Losses on the validation split, in `loss_unit`, that no sequence model is needed for, by name."""
        return {}

    @functools.cached_property
    def digest(self) -> str:
        """A short hash of all that decides the batches: the data's content and every option but the locations."""
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in self.locations}
        return digest({"task": type(self).__name__, "content": self.content, "options": options})

    def batch(self, step: int, rows: slice | None = None) -> Batch:
        """The training batch of a step: a function of the task's options and the step alone.

        Each epoch visits every training example once, in an order of its own; batches run on across epochs.

        Args:
          step: any integer from 0; costs the same for 10**9 as for 0.
          rows: the rows of the batch to make, such as those of one process; None makes all `batch_size` of them.
        Returns:
          The whole batch's arrays, `array[rows]` of each.
        Raises:
          ValueError: a negative step, or no rows.
        """
        if step < 0:
            raise ValueError(f"step={step} is negative.")
        first = step * self.batch_size
        return _stack([self._shuffled[first + row] for row in _row_numbers(self.batch_size, rows)])

    def eval_batches(self, split: str = "validation", rows: slice | None = None) -> Iterator[Batch]:
        """A whole split once, in its fixed order, in batches of one shape; the last is padded by rows of weight 0.

        Args:
          split: one of `splits`.
          rows: as in `batch`; every slice gets the same number of batches.
        """
        examples = self.examples(self.check_split(split))
        return self._eval_batches(examples, _row_numbers(self.batch_size, rows))

    def _eval_batches(self, examples: Examples, rows: range) -> Iterator[Batch]:
        padding = {key: np.zeros_like(value) for key, value in examples[0].items()} if len(examples) else {}
        for first in range(0, len(examples), self.batch_size):
            numbers = [first + row for row in rows]
            yield _stack([examples[n] if n < len(examples) else padding for n in numbers])

    def check_split(self, split: str) -> str:
        """`split`, or a ConfigError that names those the task has."""
        choose(dict.fromkeys(self.splits), split, "split")
        return split

    @functools.cached_property
    def _shuffled(self) -> Examples:
        """The training examples in the order of training: a random-access, endless sequence that reshuffles each epoch."""
        import grain  # takes a second: paid by those who train

        return grain.MapDataset.source(self.examples("train")).seed(self.seed).shuffle().repeat()


def _row_numbers(batch_size: int, rows: slice | None) -> range:
    numbers = range(batch_size)[rows or slice(None)]
    if not numbers:
        raise ValueError(f"rows={rows} selects nothing of a batch of {batch_size}.")
    return numbers


def _stack(examples: list[Example]) -> Batch:
    return {key: np.stack([example[key] for example in examples]) for key in examples[0]}
