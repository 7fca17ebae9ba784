"""Repeat 16 tokens that stand scattered among 256 positions: a recurrence must choose what it takes in.

The argument names the mixer: `--config=configs/selective_copying.py:mamba` (the default), `s4`, or any other causal one.
"""

from seqjax import experiment_config


def get_config(mixer="mamba"):
    return experiment_config(
        model={"name": mixer, "embed_dim": 64, "num_layers": 2, "unroll": 0, "embed_init": 64**-0.5},
        data={"name": "selective_copying", "context": 256, "num_copied": 16, "batch_size": 16},
        optimizer={
            "name": "adamw",
            "learning_rate": 5e-3,
            "schedule": "cosine",
            "warmup_steps": 100,
            "final_fraction": 0.02,
            "beta2": 0.98,
            "clip_norm": 1.0,
        },
        training={"num_steps": 7000, "log_every": 100, "eval_every": 1000, "checkpoint_every": 1000},
    )
