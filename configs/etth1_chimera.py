"""Electricity transformer temperature, 336 hours to the next 96, by Chimera, which scans time and channels together.

Give the folder of ETTh1.csv with `--config.data.manual_dir=...`; ETTh2 by `--config.data.dataset=ETTh2`.
`experiments/evaluate.py --split=test` gives the test error.
"""

from seqjax import experiment_config


def get_config():
    return experiment_config(
        model={
            "name": "chimera",
            "embed_dim": 16,
            "expand": 1,
            "norm": "none",
            "num_layers": 1,
            "state_dim": 4,
            "series_norm": "last",
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
        training={"num_steps": 400, "log_every": 50, "eval_every": 400, "checkpoint_every": 400},
    )
