"""Images pixel by pixel, classified by a small recurrent model, or a Transformer: sMNIST, pMNIST, sCIFAR.

The argument names the mixer and the data, `--config=configs/sequential_images.py:s4d,smnist` (the default). The images come
through TFDS, or from a folder given with `--config.data.manual_dir=...`. Sizes suit two CPU cores: an epoch and a half of
MNIST in about ten minutes; the papers train larger models for a hundred epochs.
"""

from seqjax import ConfigError, experiment_config
from seqjax.config import choose

MODELS = {
    "aaren": {"num_heads": 4},
    "dss": {"state_dim": 16},
    "gss": {"state_dim": 16, "inner_dim": 32},
    "hydra": {"state_dim": 16, "head_dim": 16, "causal": False},
    "lmu": {"state_dim": 64, "theta": 784.0, "num_layers": 1, "embed_dim": 128},
    "lssl": {"state_dim": 32},
    "mamba": {"state_dim": 8},
    "mamba2": {"state_dim": 16, "head_dim": 16},
    "s4": {"state_dim": 32},
    "s4d": {"state_dim": 32},
    "s5": {"state_dim": 64},
    "spacetime": {"state_dim": 32},
    "transformer": {"num_heads": 4, "position": "sinusoidal"},
}
DATA = {
    "smnist": {"dataset": "mnist"},
    "pmnist": {"dataset": "mnist", "permuted": True},
    "scifar": {"dataset": "cifar10", "grayscale": True},
}


def get_config(which="s4d,smnist"):
    mixer, comma, data = which.partition(",")
    if not comma:
        raise ConfigError(f"{which!r} is not of the form MIXER,DATA, such as s4d,smnist.")
    return experiment_config(
        model={"name": mixer, "embed_dim": 64, "num_layers": 2, "norm": "layer", "unroll": 0}
        | choose(MODELS, mixer, "the config's mixer"),
        data={"name": "sequential_images", "batch_size": 50} | choose(DATA, data, "the config's data"),
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
        training={"num_steps": 1800, "log_every": 50, "eval_every": 0, "checkpoint_every": 300},
    )
