"""Generation in text: a prompt in, its continuation out, as it comes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from seqjax.generation.diffusion_forcing import DiffusionForcing
from seqjax.generation.generate import generate


def continue_text(
    model: Any,
    variables: Any,
    tokenizer: Any,
    prompt: str,
    num_tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stream: Callable[[str], None] | None = None,
    parallel: DiffusionForcing | None = None,
) -> str:
    """What the model makes of `prompt`, without the prompt.

    Args:
      tokenizer: with `encode`, `decode`, `start` and `bos_id`, see `seqjax.data.tokenizers.Tokenizer`.
      prompt: a vocabulary with a beginning id has it put in front; empty starts from `tokenizer.start()`.
      temperature, top_k, top_p: see `Sampler`; seed: of the sampling.
      stream: called with each piece of text as soon as its characters are whole.
      parallel: as `generate`.
    Raises:
      ConfigError: as `generate`, or a character that the vocabulary does not have.
    """
    tokens = tokenizer.encode(prompt)
    if tokenizer.bos_id is not None or not tokens.size:
        tokens = np.concatenate([tokenizer.start(), tokens])
    writer = None if stream is None else _Writer(tokenizer, stream)
    key = jax.random.key(seed)
    options = {"key": key, "stream": writer, "parallel": parallel}
    new = generate(model, variables, tokens[None], num_tokens, temperature, top_k, top_p, **options)
    text = tokenizer.decode(np.asarray(new)[0])
    if writer is not None:
        stream(text[writer.written :])
    return text


class _Writer:
    """Turns tokens into text piece by piece; a character whose bytes are not all there yet waits for them."""

    def __init__(self, tokenizer: Any, stream: Callable[[str], None]) -> None:
        self.tokenizer, self.stream = tokenizer, stream
        self.ids: list[int] = []
        self.written = 0

    def __call__(self, token: np.ndarray) -> None:
        self.ids.append(int(token[0]))
        whole = self.tokenizer.decode(np.asarray(self.ids)).rstrip("\N{REPLACEMENT CHARACTER}")
        if len(whole) > self.written:
            self.stream(whole[self.written :])
            self.written = len(whole)
