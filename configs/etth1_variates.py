"""Electricity transformer temperature, 96 hours to the next 96, by tokens that are channels.

The argument names the model: `--config=configs/etth1_variates.py:itransformer` (the default) or `s_mamba`. The window and the
test windows are those of the models' papers. Give the folder of ETTh1.csv with `--config.data.manual_dir=...`.
`experiments/evaluate.py --split=test` gives the test error.
"""

from seqjax import experiment_config
from seqjax.config import choose

MODELS = {
    "itransformer": {"num_heads": 8, "mlp_ratio": 1.0},
    "s_mamba": {"state_dim": 2, "mlp_ratio": 1.0},
}


def get_config(model="itransformer"):
    return experiment_config(
        model={"name": model, "embed_dim": 256, "num_layers": 2, "dropout": 0.1} | choose(MODELS, model, "the config's model"),
        data={"name": "forecasting", "dataset": "ETTh1", "lookback": 96, "horizon": 96, "batch_size": 32},
        optimizer={
            "name": "adamw",
            "learning_rate": 2e-4,
            "schedule": "cosine",
            "warmup_steps": 50,
            "weight_decay": 1e-2,
        },
        training={"num_steps": 1000, "log_every": 50, "eval_every": 250, "checkpoint_every": 250},
    )
