"""MNIST images of a wished class, grey level by grey level, by a Mamba whose first token is the class.

Class-conditional Mamba over image tokens in raster order, as AiM (Li et al. 2024), without its tokenizer and its adaptive
norms: pixels are few here. The images come through TFDS, or from a folder given with `--config.data.manual_dir=...`.
"""

from seqjax import experiment_config


def get_config():
    return experiment_config(
        model={"name": "mamba", "embed_dim": 64, "num_layers": 3, "embed_init": 64**-0.5, "tie_embeddings": False},
        data={
            "name": "sequential_images",
            "dataset": "mnist",
            "objective": "density",
            "class_conditional": True,
            "batch_size": 16,
        },
        optimizer={
            "name": "adamw",
            "learning_rate": 4e-3,
            "schedule": "cosine",
            "warmup_steps": 100,
            "final_fraction": 0.02,
            "weight_decay": 0.01,
            "beta2": 0.98,
            "clip_norm": 1.0,
        },
        training={"num_steps": 1200, "log_every": 50, "eval_every": 0, "checkpoint_every": 300},
    )
