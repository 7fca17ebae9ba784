"""Electricity transformer temperature, 96 hours to the next 96, by tokens that are hours: Aaren, or a causal Transformer.

The argument names the model: `--config=configs/etth1_aaren.py:aaren` (the default) or `transformer`; nothing else differs. Give
the folder of ETTh1.csv with `--config.data.manual_dir=...`; ETTh2 by `--config.data.dataset=ETTh2`.
`experiments/evaluate.py --split=test` gives the test error.
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
            "dropout": 0.1,
            "pool": "last",
            "series_norm": "standard",
        },
        data={"name": "forecasting", "dataset": "ETTh1", "lookback": 96, "horizon": 96, "batch_size": 32},
        optimizer={
            "name": "adamw",
            "learning_rate": 1e-3,
            "schedule": "cosine",
            "warmup_steps": 50,
            "weight_decay": 1e-2,
        },
        training={"num_steps": 800, "log_every": 50, "eval_every": 200, "checkpoint_every": 200},
    )
