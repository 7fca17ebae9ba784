"""Text to token ids and back: bytes, and the characters of one text."""

from __future__ import annotations

import abc
import dataclasses
import functools
import json

import numpy as np

from seqjax.config import ConfigError, choose


class Tokenizer(abc.ABC):
    """Turns text into token ids and back.

    Attributes:
      vocab_size: ids run from 0 to `vocab_size - 1`.
      bos_id: the id that begins a document, or None; it stands for no text.
    """

    vocab_size: int
    bos_id: int | None = None

    @abc.abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """`[N]` int32 ids of `text`, without a beginning-of-document id."""

    @abc.abstractmethod
    def decode(self, ids: np.ndarray) -> str:
        """The text of `[N]` ids."""

    def start(self) -> np.ndarray:
        """`[1]` int32: what text is generated from when there is no prompt: the beginning id, or the end of a line."""
        if self.bos_id is not None:
            return np.array([self.bos_id], np.int32)
        try:
            return self.encode("\n")
        except ConfigError:
            return np.zeros(1, np.int32)

    @abc.abstractmethod
    def to_json(self) -> str:
        """All of the tokenizer as JSON text, for checkpoints and exports."""

    @staticmethod
    def from_json(text: str) -> Tokenizer:
        """The tokenizer that `to_json` wrote."""
        fields = json.loads(text)
        return choose(_KINDS, fields.pop("kind"), "tokenizer.kind")(**fields)


@dataclasses.dataclass(frozen=True)
class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as ids 0-255, and 256 for the beginning of a document."""

    vocab_size = 257
    bos_id = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def decode(self, ids: np.ndarray) -> str:
        """The text of `[N]` ids; a beginning-of-document id is dropped and broken UTF-8 becomes U+FFFD."""
        ids = np.asarray(ids)
        return ids[ids < 256].astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def to_json(self) -> str:
        return json.dumps({"kind": "byte"})


@dataclasses.dataclass(frozen=True)
class CharTokenizer(Tokenizer):
    """Characters of a fixed alphabet; the id of a character is its place in the sorted alphabet."""

    characters: str

    @classmethod
    def of_text(cls, text: str) -> CharTokenizer:
        """The tokenizer of the characters that occur in `text`."""
        return cls("".join(sorted(set(text))))

    @property
    def vocab_size(self) -> int:
        return len(self.characters)

    @functools.cached_property
    def _code_points(self) -> np.ndarray:
        return _utf32(self.characters)

    def encode(self, text: str) -> np.ndarray:
        """`[N]` int32 ids.

        Raises:
          ConfigError: a character that is not in the alphabet.
        """
        points = _utf32(text)
        ids = np.searchsorted(self._code_points, points).clip(max=self.vocab_size - 1)
        unknown = np.flatnonzero(self._code_points[ids] != points)
        if unknown.size:
            raise ConfigError(f"{text[unknown[0]]!r} is not one of the {self.vocab_size} characters of the vocabulary.")
        return ids.astype(np.int32)

    def decode(self, ids: np.ndarray) -> str:
        return self._code_points[np.asarray(ids, np.int64)].tobytes().decode("utf-32-le", errors="replace")

    def to_json(self) -> str:
        return json.dumps({"kind": "char", "characters": self.characters})


_KINDS = {"byte": ByteTokenizer, "char": CharTokenizer}


def _utf32(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), "<u4")
