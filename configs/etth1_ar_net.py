"""Electricity transformer temperature, 336 hours to the next 96: one linear map per forecast hour, shared by all channels.

Give the folder of ETTh1.csv with `--config.data.manual_dir=...`. Linear models of this form are published at a test MSE
of 0.37 to 0.40 (NLinear, Zeng et al. 2023: 0.374); `experiments/evaluate.py --split=test` gives this one's.
"""

from seqjax import experiment_config


def get_config():
    return experiment_config(
        model={"name": "ar_net", "order": 336, "series_norm": "last"},
        data={"name": "forecasting", "dataset": "ETTh1", "lookback": 336, "horizon": 96, "batch_size": 32},
        optimizer={"name": "adam", "learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 50},
        training={"num_steps": 1500, "log_every": 100, "eval_every": 500, "checkpoint_every": 500},
    )
