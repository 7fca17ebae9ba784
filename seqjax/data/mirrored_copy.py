"""Mirrored copying, Perceiver AR's test of long context: random tokens, then the same in reverse."""

from __future__ import annotations

import dataclasses

import numpy as np

from seqjax.config import ConfigError
from seqjax.data.recall import Generated
from seqjax.data.task import Example
from seqjax.registry import register_task


@register_task("mirrored_copy")
@dataclasses.dataclass(frozen=True, kw_only=True)
class MirroredCopy(Generated):
    """Repeat the first half of a sequence, last token first (Hawthorne et al. 2022, section 4.1).

    `targets` are `sequence_length / 2` random tokens and then the same from the last to the first; `inputs` are a start mark
    and all targets but the last. The loss is on the second half alone: the first cannot be told. The middle needs to look
    back by one token, the end by all of the sequence.

    Attributes:
      num_tokens: 256 are the paper's bytes.
      sequence_length: positions, an even number; the paper's are 32 to 131,072.
    """

    num_tokens: int = 256
    sequence_length: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sequence_length < 2 or self.sequence_length % 2:
            raise ConfigError(
                f"data.sequence_length={self.sequence_length} has no two halves; allowed: even numbers, 2 and above."
            )

    @property
    def length(self) -> int:
        return self.sequence_length

    @property
    def vocab_size(self) -> int:
        return self.num_tokens + 1

    def draw(self, random: np.random.RandomState) -> Example:
        half = self.length // 2
        tokens = random.randint(self.num_tokens, size=half).astype(np.int32)
        targets = np.concatenate([tokens, tokens[::-1]])
        inputs = np.concatenate([[self.num_tokens], targets[:-1]]).astype(np.int32)
        return {"inputs": inputs, "targets": targets, "weights": (np.arange(self.length) >= half).astype(np.float32)}

    def baselines(self) -> dict[str, float]:
        return {"guessing": float(np.log(self.num_tokens))}
