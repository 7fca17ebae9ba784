"""Byte-level language modelling on the Python standard library: real text that every machine has already."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np

from seqjax.config import ConfigError, choose
from seqjax.data.baselines import gzip_bits_per_byte, ngram_bits_per_byte
from seqjax.data.corpora import Corpus, hash_files, load_files
from seqjax.data.packing import STRATEGIES, PackingPlan, check_alignment, pack_row, plan_packing
from seqjax.data.task import NATS_TO_BITS, Example, Task
from seqjax.data.tokenizers import ByteTokenizer
from seqjax.registry import register_task

NOT_SOURCE = frozenset({"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"})  # or tables
TESTS_AND_TOOLS = frozenset({"test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo"})
BUILD_RECORDS = ("config-", "_sysconfigdata")  # how this very interpreter was built
HELD_OUT_PERCENT = 8


def library_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """`(split, path)` of the source files under the standard library's folder, sorted by path; empty files are left out.

    A hash of a file's relative path decides its split, so another version of Python keeps most files where they were.
    """
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [f for f in folders if f not in NOT_SOURCE | TESTS_AND_TOOLS and not f.startswith(BUILD_RECORDS)]
        found += [Path(parent, n) for n in names if n.endswith(".py") and not n.startswith(BUILD_RECORDS)]
    for path in sorted(found, key=lambda p: p.relative_to(folder).as_posix()):
        if path.is_file() and path.stat().st_size:
            draw = int(hashlib.sha256(path.relative_to(folder).as_posix().encode()).hexdigest()[:8], 16) % 100
            yield "validation" if draw < HELD_OUT_PERCENT else "train", path


@register_task("python_source")
@dataclasses.dataclass(frozen=True, kw_only=True)
class PythonSource(Task):
    """Next byte of the source of the running Python's standard library; about one file in twelve is held out.

    A document is a file. Documents are packed into rows with `segment_ids`; every held-out byte is predicted exactly
    once, the first of a file after the beginning-of-document id, so the loss is bits per byte of the held-out files. A
    document cut at a row end starts again with one byte of context: the loss depends a little on `sequence_length`.

    The text differs between versions of Python; `digest` says whether two runs saw the same.

    Attributes:
      sequence_length: bytes in a row.
      packing: "split" or "best_fit", of `plan_packing`; training documents are put in an order drawn from `seed` first.
      segment_alignment: documents start at multiples of it in their row; training sets it to what the model asks.
      data_dir: where the prepared corpus lies (default `$SEQJAX_DATA_DIR` or `~/.cache/seqjax`).
    """

    source_dir: ClassVar[Path | None] = None  # None: the installed standard library
    loss_unit: ClassVar[str] = "bits/byte"
    loss_scale: ClassVar[float] = NATS_TO_BITS
    tokenizer: ClassVar[ByteTokenizer] = ByteTokenizer()
    vocab_size: ClassVar[int] = ByteTokenizer.vocab_size

    sequence_length: int = 1024
    packing: str = "split"
    segment_alignment: int = 1
    data_dir: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sequence_length < 1:
            raise ConfigError(f"data.sequence_length={self.sequence_length} is too small; allowed: 1 or more.")
        choose(STRATEGIES, self.packing, "data.packing")
        check_alignment(self.sequence_length, self.segment_alignment)
        for split in self.splits:
            if not self._files[split]:
                raise ConfigError(
                    f"data.name='python_source' finds no *.py files for its {split} split in {self._folder}; "
                    "give text with data.name='text_file'."
                )

    @property
    def length(self) -> int:
        return self.sequence_length

    @property
    def _folder(self) -> Path:
        return self.source_dir or Path(sysconfig.get_paths()["stdlib"])

    @functools.cached_property
    def _files(self) -> dict[str, list[Path]]:
        files: dict[str, list[Path]] = {split: [] for split in self.splits}
        for split, path in library_files(self._folder):
            files[split].append(path)
        return files

    @functools.cached_property
    def content(self) -> str:
        return hash_files(self._folder, self._files)

    @functools.cached_property
    def corpora(self) -> dict[str, Corpus]:
        """The documents of each split."""
        return load_files("python_source", self.content, self._folder, self._files, self.data_dir)

    @functools.cached_property
    def _rows(self) -> dict[str, PackedRows]:
        train, validation = self.corpora["train"], self.corpora["validation"]
        # RandomState's stream is frozen by NumPy: the same order for ever.
        order = np.random.RandomState(self.seed).permutation(len(train.lengths))
        how = (self.sequence_length, self.packing, self.segment_alignment)
        return {
            "train": PackedRows(train, order, *how),
            "validation": PackedRows(validation, np.arange(len(validation.lengths)), *how),
        }

    def examples(self, split: str) -> PackedRows:
        return self._rows[self.check_split(split)]

    def baselines(self) -> dict[str, float]:
        """Bits per byte of the held-out files under `gzip -9`, and under counts of the training files' bytes."""
        train, held_out = self.corpora["train"], self.corpora["validation"]
        return {"gzip -9": gzip_bits_per_byte(held_out.tokens), "order-3 bytes": ngram_bits_per_byte(train, held_out)}


class PackedRows:
    """The documents of a corpus, taken in the given order and packed: one example a row."""

    def __init__(self, corpus: Corpus, order: np.ndarray, row_length: int, strategy: str, alignment: int) -> None:
        self._corpus, self._order = corpus, order
        plan = plan_packing(corpus.lengths[order], row_length, strategy, alignment)
        self.plan: PackingPlan = dataclasses.replace(plan, document=order[plan.document])

    def __len__(self) -> int:
        return self.plan.num_rows

    def __getitem__(self, row: int) -> Example:
        return pack_row(self.plan, row, self._corpus.tokens, self._corpus.offsets, ByteTokenizer.bos_id)
