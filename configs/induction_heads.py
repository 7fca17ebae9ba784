"""Recall the token that followed a mark 2 to 255 positions ago; tested on sequences up to 65,536 tokens long.

In training more marks are near than far: they are learned first, and within a few hundred steps. The argument names the mixer:
`--config=configs/induction_heads.py:mamba` (the default). With marks anywhere, at another length:
`experiments/evaluate.py --set=distances=uniform --set=sequence_length=65536 --set=batch_size=1 --set=num_validation=100`.
"""

from seqjax import experiment_config


def get_config(mixer="mamba"):
    return experiment_config(
        model={"name": mixer, "embed_dim": 64, "num_layers": 2, "unroll": 0, "embed_init": 64**-0.5, "residual_init": 1.0},
        data={"name": "induction_heads", "sequence_length": 256, "distances": "log_uniform", "batch_size": 16},
        optimizer={
            "name": "adamw",
            "learning_rate": 3e-3,
            "schedule": "cosine",
            "warmup_steps": 100,
            "final_fraction": 0.3,
            "beta2": 0.98,
            "clip_norm": 1.0,
        },
        training={"num_steps": 3000, "log_every": 100, "eval_every": 500, "checkpoint_every": 500},
    )
