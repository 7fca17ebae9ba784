"""How a run ends badly, other than by a mistake in its config."""

from __future__ import annotations


class RunError(RuntimeError):
    """A run cannot go on; the message is one sentence that says what happened and what to do."""
