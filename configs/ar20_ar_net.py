"""A sparse autoregressive process of order 20, and AR-Net on it: the learned kernel is the process's coefficients."""

from seqjax import experiment_config

COEFFICIENTS = (0.2, 0.0, 0.3, 0.0, 0.0, 0.0, -0.4, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.3)


def get_config():
    return experiment_config(
        model={"name": "ar_net", "order": 20, "use_bias": False, "sparsity": 0.2},
        data={"name": "autoregressive", "coefficients": COEFFICIENTS, "batch_size": 32},
        optimizer={"name": "adam", "learning_rate": 2e-2, "schedule": "cosine", "final_fraction": 0.0},
        training={"num_steps": 400, "log_every": 50, "eval_every": 200, "checkpoint_every": 200},
    )
