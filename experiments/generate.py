"""Text from a trained model: a prompt, and what the model makes of it.

python experiments/generate.py --workdir=runs/quickstart --prompt="def main(" --num_tokens=200 --temperature=0.7

A Universal Transformer can begin the next tokens before the last are done, with --inner_steps (see `DiffusionForcing`).
"""

from __future__ import annotations

import sys

from absl import flags

from seqjax.training import command_line

_WORKDIR = command_line.define_workdir()
_IMPORT = command_line.define_imports()
_PROMPT = flags.DEFINE_string("prompt", "", "Text to continue; empty begins a new document.")
_NUM_TOKENS = flags.DEFINE_integer("num_tokens", 300, "Tokens to add.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 takes the most likely token.", lower_bound=0.0)
_TOP_K = flags.DEFINE_integer("top_k", None, "Keep the k most likely tokens.", lower_bound=1)
_TOP_P = flags.DEFINE_float(
    "top_p", None, "Keep the fewest tokens that reach this probability.", lower_bound=0.0, upper_bound=1.0
)
_INNER_STEPS = flags.DEFINE_integer(
    "inner_steps", None, "Steps in depth per pass of diffusion forcing; None makes a token after the other.", lower_bound=1
)
_THRESHOLD = flags.DEFINE_float(
    "threshold", 0.0, "With --inner_steps, the relative change below which a position takes no more steps.", lower_bound=0.0
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the sampling.")


def main() -> None:
    from seqjax.config import ConfigError
    from seqjax.data.tokenizers import Tokenizer
    from seqjax.generation.diffusion_forcing import DiffusionForcing
    from seqjax.generation.text import continue_text
    from seqjax.training.restore import load_workdir

    restored = load_workdir(_WORKDIR.value)
    if restored.record["tokenizer"] is None:
        raise ConfigError(f"--workdir={_WORKDIR.value} holds a model of no text: its task has no tokenizer.")
    tokenizer = Tokenizer.from_json(restored.record["tokenizer"])
    options = {"temperature": _TEMPERATURE.value, "top_k": _TOP_K.value, "top_p": _TOP_P.value, "seed": _SEED.value}
    passes = []
    if _INNER_STEPS.value is not None:
        options["parallel"] = DiffusionForcing(_INNER_STEPS.value, _THRESHOLD.value, passes.extend)
    write = lambda text: print(text, end="", flush=True)
    write(_PROMPT.value)
    continue_text(restored.model, restored.variables, tokenizer, _PROMPT.value, _NUM_TOKENS.value, stream=write, **options)
    print()
    if passes:
        print(f"{passes[0] / _NUM_TOKENS.value:.2f} passes of {_INNER_STEPS.value} steps per token", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(command_line.run(main))
