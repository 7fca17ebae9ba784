"""Electricity transformer temperature, 336 hours to the next 96, by S4 and a direct forecast; ETTh2 by `data.dataset`.

Give the folder of ETTh1.csv with `--config.data.manual_dir=...`; `experiments/evaluate.py --split=test` gives the scores.
"""

from seqjax import experiment_config


def get_config():
    return experiment_config(
        model={
            "name": "s4",
            "embed_dim": 32,
            "num_layers": 1,
            "state_dim": 32,
            "dropout": 0.25,
            "channel_independent": True,
            "series_norm": "mean",
        },
        data={"name": "forecasting", "dataset": "ETTh1", "lookback": 336, "horizon": 96, "batch_size": 16},
        optimizer={
            "name": "adamw",
            "learning_rate": 2e-3,
            "schedule": "cosine",
            "warmup_steps": 50,
            "weight_decay": 1e-2,
            "groups": {"state_space": {"learning_rate": 1e-3}},
        },
        training={"num_steps": 500, "log_every": 50, "eval_every": 0, "checkpoint_every": 250},
    )
