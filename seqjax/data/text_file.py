"""Language modelling on any text: a file, or all the text files of a folder, by byte or by character."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np

from seqjax.config import ConfigError, choose
from seqjax.data.baselines import gzip_bits_per_byte, ngram_bits_per_byte
from seqjax.data.corpora import Corpus, hash_files, load_files
from seqjax.data.task import NATS_TO_BITS, Example, Task
from seqjax.data.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer
from seqjax.registry import register_task

LOSS_UNITS = {"byte": ("bits/byte", NATS_TO_BITS), "char": ("nats/char", 1.0)}


@register_task("text_file")
@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFile(Task):
    """Next byte or character of one text, of which the last part is held out (as nanoGPT does).

    A training example is `sequence_length` + 1 tokens from any offset; an epoch takes every offset once. The validation
    split is laid out in windows side by side, so that every held-out token but the first is predicted exactly once.
    A window begins without context.

    Attributes:
      path: a file, or a folder: all files under it that are UTF-8 text, hidden ones aside, joined in order of their paths.
      tokens: "byte" (vocabulary of 257) or "char" (the characters that occur in the text).
      sequence_length: tokens of a window.
      validation_fraction: of the text's tokens, more than 0 and less than 1.
      data_dir: where the prepared text lies (default `$SEQJAX_DATA_DIR` or `~/.cache/seqjax`).
    """

    locations: ClassVar[frozenset[str]] = frozenset({"data_dir", "path"})

    path: str
    tokens: str = "byte"
    sequence_length: int = 256
    validation_fraction: float = 0.1
    data_dir: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        choose(LOSS_UNITS, self.tokens, "data.tokens")
        if self.sequence_length < 1:
            raise ConfigError(f"data.sequence_length={self.sequence_length} is too small; allowed: 1 or more.")
        if not 0 < self.validation_fraction < 1:
            raise ConfigError(
                f"data.validation_fraction={self.validation_fraction} is out of range; allowed: more than 0, less than 1."
            )
        if not any(path.stat().st_size for path in self._files):
            raise ConfigError(
                f"data.path={self.path!r} {self._what_is_wrong}; allowed: a text file, or a folder with text files in it."
            )

    @property
    def length(self) -> int:
        return self.sequence_length

    @property
    def loss_unit(self) -> str:
        return LOSS_UNITS[self.tokens][0]

    @property
    def loss_scale(self) -> float:
        return LOSS_UNITS[self.tokens][1]

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def _location(self) -> Path:
        return Path(self.path).expanduser()

    @property
    def _what_is_wrong(self) -> str:
        if not self._location.exists():
            return "does not exist"
        return "is empty" if self._location.is_file() else "holds no text"

    @functools.cached_property
    def _files(self) -> list[Path]:
        if not self._location.is_dir():
            return [self._location] if self._location.is_file() else []
        return list(text_files(self._location))

    @property
    def _folder(self) -> Path:
        return self._location if self._location.is_dir() else self._location.parent

    @functools.cached_property
    def content(self) -> str:
        return hash_files(self._folder, {"text": self._files})

    @functools.cached_property
    def _bytes(self) -> np.ndarray:
        """`[N]` uint8: the whole text in UTF-8."""
        files = {"text": self._files}
        return load_files("text_file", self.content, self._folder, files, self.data_dir)["text"].tokens

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return ByteTokenizer() if self.tokens == "byte" else CharTokenizer.of_text(self._characters())

    def _characters(self) -> str:
        try:
            return self._bytes.tobytes().decode("utf-8")
        except UnicodeDecodeError:
            raise ConfigError(f"data.path={self.path!r} is not UTF-8 text; allowed with it: data.tokens='byte'.") from None

    @functools.cached_property
    def _tokens(self) -> dict[str, np.ndarray]:
        """`[N]` integers of each split."""
        tokens = self._bytes if self.tokens == "byte" else self.tokenizer.encode(self._characters())
        train = int((1 - self.validation_fraction) * len(tokens))
        if train <= self.sequence_length or len(tokens) - train < 2:
            raise ConfigError(
                f"data.path={self.path!r} is too short: {len(tokens)} tokens leave {train} to train on and "
                f"{len(tokens) - train} held out; needed: more than data.sequence_length={self.sequence_length}, and 2."
            )
        return {"train": tokens[:train], "validation": tokens[train:]}

    def examples(self, split: str) -> Windows:
        """Windows of a split: of "train" at every offset, of "validation" side by side."""
        stride = 1 if self.check_split(split) == "train" else self.sequence_length
        return Windows(self._tokens[split], self.sequence_length, stride)

    def baselines(self) -> dict[str, float]:
        """For bytes: bits per held-out byte under `gzip -9`, and under counts of the training bytes."""
        if self.tokens != "byte":
            return {}
        train, held_out = (Corpus(t, np.array([0, len(t)])) for t in (self._tokens["train"], self._tokens["validation"]))
        return {"gzip -9": gzip_bits_per_byte(held_out.tokens), "order-3 bytes": ngram_bits_per_byte(train, held_out)}


class Windows:
    """Next-token examples from windows of one sequence: window `i` predicts the tokens from `i * stride + 1` on.

    With `stride` 1, as many as fit in whole; with `stride` `length`, so many that every token but the first is predicted
    once, the last window padded with weight 0.
    """

    def __init__(self, tokens: np.ndarray, length: int, stride: int) -> None:
        self._tokens, self._length, self._stride = tokens, length, stride
        self._count = len(tokens) - length if stride == 1 else -(-(len(tokens) - 1) // stride)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Example:
        start = index * self._stride
        window = self._tokens[start : start + self._length + 1].astype(np.int32)
        weights = (np.arange(self._length) < len(window) - 1).astype(np.float32)
        window = np.pad(window, (0, self._length + 1 - len(window)))
        return {"inputs": window[:-1], "targets": window[1:], "weights": weights}


def text_files(folder: Path) -> Iterator[Path]:
    """The files under a folder that are UTF-8 text without NUL characters, sorted by path, hidden ones left out."""
    for path in sorted(folder.rglob("*"), key=lambda p: p.relative_to(folder).as_posix()):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not hidden and path.is_file() and _is_text(path.read_bytes()):
            yield path


def _is_text(content: bytes) -> bool:
    try:
        return "\0" not in content.decode("utf-8")
    except UnicodeDecodeError:
        return False
