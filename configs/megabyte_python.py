"""MEGABYTE on the bytes of Python's own standard library, and a Transformer of equal training FLOPs to compare with.

The argument names the model, `--config=configs/megabyte_python.py:megabyte` (the default) or `:transformer`: 2.69 million FLOPs
a byte forward, 7.5 and 0.8 million parameters. The quickstart's number of bytes, in rows of 1024.
"""

from seqjax import experiment_config
from seqjax.config import choose

MODELS = {
    "megabyte": {
        "name": "megabyte",
        "patch_size": 8,
        "embed_dim": 128,
        "global_dim": 384,
        "global_layers": 4,
        "local_layers": 2,
        "position": "rope",
    },
    "transformer": {"name": "transformer", "embed_dim": 128, "num_layers": 4, "position": "rope"},
}


def get_config(which="megabyte"):
    model = choose(MODELS, which, "the config's model")
    return experiment_config(
        model={"num_heads": 4, "norm": "rms", "unroll": 0, "embed_init": model["embed_dim"] ** -0.5, **model},
        data={"name": "python_source", "batch_size": 2, "sequence_length": 1024},
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
        training={"num_steps": 2000, "log_every": 20, "eval_every": 500, "checkpoint_every": 250, "sample_tokens": 300},
    )
