"""MNIST images pixel by pixel, by an Axial Transformer and by a Transformer with as many parameters that sees all pixels.

The argument names the model: `--config=configs/mnist_axial.py:axial_transformer` (the default) or `transformer`. Eight blocks
each: the axial one has two layers of a row block and a column block for the rows above, and four row blocks. The images come
through TFDS, or from a folder given with `--config.data.manual_dir=...`; `experiments/sample_images.py` draws new ones.
"""

from seqjax import experiment_config
from seqjax.config import choose

MODELS = {
    "axial_transformer": {"name": "axial_transformer", "shape": (28, 28), "outer_layers": 2, "inner_layers": 4},
    "transformer": {"name": "transformer", "num_layers": 8, "position": "learned", "max_length": 784, "unroll": 0},
}


def get_config(model="axial_transformer"):
    return experiment_config(
        model={"embed_dim": 64, "num_heads": 4, "embed_init": 64**-0.5, "tie_embeddings": False}
        | choose(MODELS, model, "the config's model"),
        data={"name": "sequential_images", "dataset": "mnist", "objective": "density", "batch_size": 16},
        optimizer={
            "name": "adamw",
            "learning_rate": 3e-3,
            "schedule": "cosine",
            "warmup_steps": 100,
            "final_fraction": 0.02,
            "weight_decay": 0.01,
            "beta2": 0.98,
            "clip_norm": 1.0,
        },
        training={"num_steps": 800, "log_every": 50, "eval_every": 0, "checkpoint_every": 200},
    )
