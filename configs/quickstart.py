"""A byte-level Transformer on Python's own standard library: real text on every machine, nothing to download.

About a million parameters; under four minutes on two CPU cores.
"""

from seqjax import experiment_config


def get_config():
    return experiment_config(
        model={
            "name": "transformer",
            "embed_dim": 128,
            "num_heads": 4,
            "num_layers": 4,
            "norm": "rms",
            "position": "rope",
            "window": 256,
            "unroll": 0,
            "embed_init": 128**-0.5,
        },
        data={"name": "python_source", "batch_size": 8, "sequence_length": 256},
        optimizer={
            "name": "adamw",
            "learning_rate": 2.5e-3,
            "schedule": "cosine",
            "warmup_steps": 100,
            "final_fraction": 0.02,
            "weight_decay": 0.1,
            "beta2": 0.98,
            "clip_norm": 1.0,
        },
        training={"num_steps": 2000, "log_every": 20, "eval_every": 1000, "checkpoint_every": 250, "sample_tokens": 300},
    )
