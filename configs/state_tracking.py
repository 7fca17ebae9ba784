"""Keep track of a state over 16 tokens, and be tested on 64: parity, or running products of permutations.

The argument names the model and the task: `--config=configs/state_tracking.py:lstm,parity` (the default), `para_lstm,a5`,
`deltanet,s3`, `deltanet_positive,parity` (without negative eigenvalues). Beyond the trained length, and only there:
`experiments/evaluate.py --set=sequence_length=64 --set=scored_from=16`. `experiments/state_tracking.py` trains them all.
"""

from seqjax import ConfigError, experiment_config
from seqjax.config import choose

MODELS = {
    "lstm": {"name": "lstm"},
    "gru": {"name": "gru"},
    "slstm": {"name": "xlstm", "pattern": ("slstm",)},
    "para_lstm": {"name": "para_lstm", "recurrent_init": 1.0},
    "para_gru": {"name": "para_gru", "recurrent_init": 1.0},
    "deltanet": {"name": "deltanet", "negative_eigenvalues": True},
    "deltanet_positive": {"name": "deltanet"},
    "gla": {"name": "gla"},
    "mamba": {"name": "mamba"},
    "transformer": {"name": "transformer"},
}
TASKS = {
    "parity": {"name": "parity"},
    "s3": {"name": "prefix_products", "group": "S3"},
    "a5": {"name": "prefix_products", "group": "A5"},
    "s5": {"name": "prefix_products", "group": "S5"},
}


def get_config(which="lstm,parity"):
    model, comma, task = which.partition(",")
    if not comma:
        raise ConfigError(f"{which!r} is not of the form MODEL,TASK, such as lstm,parity.")
    chosen = choose(MODELS, model, "the config's model")
    return experiment_config(
        model={"embed_dim": 64, "num_layers": 2, "unroll": 0, "embed_init": 64**-0.5} | chosen,
        data={"sequence_length": 16, "batch_size": 64} | choose(TASKS, task, "the config's task"),
        optimizer={
            "name": "adamw",
            "learning_rate": 3e-3,
            "schedule": "cosine",
            "warmup_steps": 100,
            "final_fraction": 0.02,
            "beta2": 0.98,
            "clip_norm": 1.0,
        },
        training={"num_steps": 3000, "log_every": 100, "eval_every": 500, "checkpoint_every": 500},
    )
