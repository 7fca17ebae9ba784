"""Text corpora: documents on disk through TFDS, and end to end in one array to train from."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from seqjax.data.storage import prepare_once


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents end to end.

    Attributes:
      tokens: `[N]` integers (uint8 for bytes).
      offsets: `[D + 1]` int64; document `d` is `tokens[offsets[d]:offsets[d + 1]]`.
    """

    tokens: np.ndarray
    offsets: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def document(self, index: int) -> np.ndarray:
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


def hash_files(root: Path, files: Mapping[str, Iterable[Path]]) -> str:
    """A short hash of the files of each split: their paths relative to `root`, and their bytes."""
    total = hashlib.sha256()
    for split, paths in files.items():
        for path in paths:
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            total.update(f"{split}\0{path.relative_to(root).as_posix()}\0{content}\n".encode())
    return total.hexdigest()[:16]


def load_files(name: str, content: str, root: Path, files: Mapping[str, list[Path]], data_dir: str | None) -> dict[str, Corpus]:
    """The bytes of the files of each split, one document a file, prepared once on disk under `content`.

    All documents are read into memory at once: a byte of text costs a byte, and any window or packed row is then a slice.
    """

    def features() -> dict:
        import tensorflow_datasets as tfds

        return {"path": tfds.features.Text(), "content": tfds.features.Text()}

    def reader(paths: list[Path]) -> Callable[[], Iterable[dict]]:
        return lambda: ({"path": p.relative_to(root).as_posix(), "content": p.read_bytes()} for p in paths)

    splits = {split: reader(paths) for split, paths in files.items() if paths}
    sources = prepare_once(name, content, features, splits, data_dir)
    return {split: _join(source) for split, source in sources.items()}


def _join(source: Iterable[Mapping[str, bytes]]) -> Corpus:
    documents = [np.frombuffer(example["content"], np.uint8) for example in source]
    offsets = np.cumsum([0, *map(len, documents)], dtype=np.int64)
    return Corpus(np.concatenate(documents), offsets)
