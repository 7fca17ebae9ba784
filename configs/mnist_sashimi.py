"""MNIST images pixel by pixel, the probability of each grey level given those before, by SaShiMi at three rates.

The images come through TFDS, or from a folder given with `--config.data.manual_dir=...`. Sizes suit two CPU cores. The Linear
Transformer's paper reports 0.644 bits/dim for eight layers 256 wide.
"""

from seqjax import experiment_config


def get_config():
    return experiment_config(
        model={
            "name": "sashimi",
            "embed_dim": 32,
            "pooling": (4, 4),
            "layers_per_tier": 1,
            "state_dim": 32,
            "embed_init": 32**-0.5,
        },
        data={"name": "sequential_images", "dataset": "mnist", "objective": "density", "batch_size": 20},
        optimizer={
            "name": "adamw",
            "learning_rate": 8e-3,
            "schedule": "cosine",
            "warmup_steps": 100,
            "final_fraction": 0.02,
            "weight_decay": 0.01,
            "beta2": 0.98,
            "clip_norm": 1.0,
            "groups": {"state_space": {"learning_rate": 2e-3, "weight_decay": 0.0}},
        },
        training={"num_steps": 1200, "log_every": 50, "eval_every": 0, "checkpoint_every": 300},
    )
