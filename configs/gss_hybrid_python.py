"""A byte-level GSS hybrid on Python's own standard library: three gated state-space blocks to one of local attention.

The quickstart's data and step budget, to compare with. Attention sees a window of 64 bytes; what is further back reaches it
through the state spaces alone.
"""

from seqjax import experiment_config


def get_config():
    return experiment_config(
        model={
            "name": "gss",
            "pattern": (("gss",), ("gss",), ("gss",), ({"name": "attention", "window": 64}, "mlp")),
            "embed_dim": 128,
            "state_dim": 32,
            "num_heads": 4,
            "num_layers": 4,
            "position": "rope",
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
            "groups": {"state_space": {"learning_rate": 1e-3, "weight_decay": 0.0}},
        },
        training={"num_steps": 2000, "log_every": 20, "eval_every": 1000, "checkpoint_every": 250, "sample_tokens": 300},
    )
