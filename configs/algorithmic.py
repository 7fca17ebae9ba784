"""Strings of up to 40 digits to learn from, 400 to be tested on: what a block that is applied again and again generalises to.

The argument names the task and the model: `--config=configs/algorithmic.py:copy` (Universal Transformer),
`:reverse,act` (with adaptive computation time), `:addition,transformer`. Tasks: copy, double, reverse, addition.

The Transformer has as many layers as the others have steps, each with its own parameters, and as many parameters in all:
at half the width. `--config.model.embed_dim=64` gives it the same width. Positions start at random offsets, and anew where
the target begins, as in an encoder and a decoder.
"""

from seqjax import experiment_config
from seqjax.config import choose

DEPTH = 4
UNIVERSAL = {"embed_dim": 64, "num_steps": DEPTH}
MODELS = {
    "universal": UNIVERSAL,
    "act": UNIVERSAL | {"halting": "act", "num_steps": 2 * DEPTH},
    "transformer": {"embed_dim": 32, "num_steps": 1, "step_embedding": "none", "pattern": ("attention", "mlp") * DEPTH},
}
DIGITS = 10


def get_config(experiment="copy"):
    task, _, name = experiment.partition(",")
    model = choose(MODELS, name or "universal", "the config's model")
    return experiment_config(
        model={
            "name": "universal_transformer",
            "num_heads": 4,
            "unroll": 0,
            "embed_init": 1.0,
            "tie_embeddings": False,
            "position": "sinusoidal",
            "position_offset": 360,
            "position_restart": DIGITS,
            **model,
        },
        data={
            "name": task,
            "num_tokens": DIGITS,
            "source_length": 40,
            "validation_length": 400,
            "num_validation": 64,
            "batch_size": 16,
        },
        optimizer={
            "name": "adamw",
            "learning_rate": 3e-3,
            "schedule": "cosine",
            "warmup_steps": 50,
            "final_fraction": 0.02,
            "beta2": 0.98,
            "clip_norm": 1.0,
        },
        training={"num_steps": 2000, "log_every": 50, "eval_every": 250, "checkpoint_every": 250},
    )
