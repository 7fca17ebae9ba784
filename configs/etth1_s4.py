"""Electricity transformer temperature, 336 hours to the next 96, by S4 and a direct forecast, one model for every channel.

Give the folder of ETTh1.csv with `--config.data.manual_dir=...`; ETTh2 by `--config.data.dataset=ETTh2`.
`experiments/evaluate.py --split=test` gives the test error.
"""

from seqjax import experiment_config


def get_config():
    return experiment_config(
        model={
            "name": "s4",
            "embed_dim": 32,
            "norm": "none",
            "num_layers": 1,
            "state_dim": 32,
            "series_norm": "last",
            "channel_independent": True,
        },
        data={"name": "forecasting", "dataset": "ETTh1", "lookback": 336, "horizon": 96, "batch_size": 8},
        optimizer={
            "name": "adamw",
            "learning_rate": 1e-2,
            "schedule": "cosine",
            "warmup_steps": 50,
            "weight_decay": 1e-2,
            "groups": {"state_space": {"learning_rate": 1e-3}},
        },
        training={"num_steps": 800, "log_every": 50, "eval_every": 200, "checkpoint_every": 200},
    )
