"""Electricity transformer temperature, 336 hours to the next 96, by SpaceTime's closed loop; ETTh2 by `data.dataset`.

Give the folder of ETTh1.csv with `--config.data.manual_dir=...`; `experiments/evaluate.py --split=test` gives the scores to
compare: iTransformer 0.386 (from 96 hours), Autoformer 0.449.
"""

from seqjax import experiment_config


def get_config():
    return experiment_config(
        model={
            "name": "spacetime",
            "embed_dim": 64,
            "num_layers": 1,
            "state_dim": 16,
            "mlp_ratio": 1.0,
            "head": "closed_loop",
            "dropout": 0.25,
            "channel_independent": True,
            "series_norm": "mean",
        },
        data={"name": "forecasting", "dataset": "ETTh1", "lookback": 336, "horizon": 96, "batch_size": 16},
        optimizer={"name": "adamw", "learning_rate": 2e-3, "schedule": "cosine", "warmup_steps": 50, "weight_decay": 1e-4},
        training={"num_steps": 500, "log_every": 50, "eval_every": 0, "checkpoint_every": 250},
    )
