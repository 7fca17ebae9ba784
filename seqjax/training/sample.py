"""A sample of what a trained language model says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from seqjax.config import ConfigError


def print_sample(
    model: Any, variables: Any, task: Any, tokens: int, temperature: float, seed: int, line: Callable[[str], None]
) -> None:
    """Print `tokens` tokens of text from an empty prompt, or one sentence on why there is no sample."""
    from seqjax.generation.text import continue_text

    if task.head != "language_model" or getattr(task, "tokenizer", None) is None:
        return line("No sample: this task has no language-model head or no tokenizer.")
    try:
        text = continue_text(model, variables, task.tokenizer, "", tokens, temperature=temperature, seed=seed)
    except ConfigError as error:
        return line(f"No sample: {error}")
    return line(f"Sample, temperature {temperature:g}:\n{text}")
