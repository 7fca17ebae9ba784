"""Images in patches, classified by a causal stack that reads them row by row and answers at the last one.

The argument names the mixer and the data, `--config=configs/vision.py:vir,mnist` (the default): `vir` is a Vision Retention
Network (Hatamizadeh et al. 2023), retention without rotation or gate under LayerNorms, which needs no quadratic attention at a
high resolution. `lightnet` (Qin et al. 2024) sees the whole image at once, by MD-TPE behind the embedding and MD-LRPE in every
layer; `lightnet_causal` is the same in reading order. `mamba`, `transformer` and `hydra` (which sees both sides) to compare
with. Patches of 4 x 4 pixels; the images come through TFDS, or from a folder given with `--config.data.manual_dir=...`.
"""

from seqjax import ConfigError, experiment_config
from seqjax.config import choose

# All blocks are written out, since the first alone has the encoding in front: for more layers, a longer pattern.
LIGHTNET = {"name": "lightnet", "pattern": (("tpe", "lightnet", "glu"), *[("lightnet", "glu")] * 3), "position": "none"}
MODELS = {
    "vir": {"name": "retnet", "rope_theta": None, "output_gate": None, "head_norm": "layer", "pattern": ("retnet", "mlp")},
    "lightnet": LIGHTNET | {"causal": False, "pool": "mean"},
    "lightnet_causal": LIGHTNET,
    "mamba": {"name": "mamba", "state_dim": 8},
    "hydra": {"name": "hydra", "state_dim": 16, "head_dim": 16, "causal": False, "pool": "mean"},
    "transformer": {"name": "transformer"},
}
DATA = {"mnist": {"dataset": "mnist"}, "cifar10": {"dataset": "cifar10"}}
PATCHES = {"mnist": (7, 7), "cifar10": (8, 8)}
"""Rows and columns of patches in an image."""


def get_config(which="vir,mnist"):
    mixer, comma, data = which.partition(",")
    if not comma:
        raise ConfigError(f"{which!r} is not of the form MIXER,DATA, such as vir,mnist.")
    stack = {"embed_dim": 64, "num_layers": 4, "norm": "layer", "position": "learned", "max_length": 64, "pool": "last"}
    model = stack | choose(MODELS, mixer, "the config's mixer")
    images = {"name": "sequential_images", "patch_size": 4, "batch_size": 50} | choose(DATA, data, "the config's data")
    return experiment_config(
        model=model | ({"shape": PATCHES[data]} if model["name"] == "lightnet" else {}),
        data=images,
        optimizer={
            "name": "adamw",
            "learning_rate": 3e-3,
            "schedule": "cosine",
            "warmup_steps": 100,
            "final_fraction": 0.02,
            "weight_decay": 0.05,
            "beta2": 0.98,
            "clip_norm": 1.0,
        },
        training={"num_steps": 1000, "log_every": 50, "eval_every": 0, "checkpoint_every": 250},
    )
