"""Push a mass to the origin, from episodes of mixed quality, by the return asked for: a Decision Transformer, or Aaren in it.

The argument names the model: `--config=configs/control.py:aaren` (the default) or `transformer`; nothing else differs.
`experiments/control.py` trains them both and acts by them.
"""

from seqjax import experiment_config
from seqjax.config import choose

MODELS = ("aaren", "transformer")


def get_config(model="aaren"):
    choose(dict.fromkeys(MODELS), model, "the config's model")
    return experiment_config(
        model={
            "name": model,
            "embed_dim": 64,
            "num_layers": 2,
            "num_heads": 4,
            "position": "sinusoidal",
            "embed_norm": "layer",
            "unroll": 0,
        },
        data={"name": "control", "episode_length": 20, "num_episodes": 2000, "batch_size": 64},
        optimizer={
            "name": "adamw",
            "learning_rate": 1e-3,
            "schedule": "cosine",
            "warmup_steps": 50,
            "final_fraction": 0.02,
            "weight_decay": 1e-2,
        },
        training={"num_steps": 1000, "log_every": 50, "eval_every": 250, "checkpoint_every": 250},
    )
