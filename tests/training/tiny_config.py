"""A config of the tiny experiment, as a user would write one."""

import tiny  # noqa: F401 (registers the model and the task)

import seqjax


def get_config():
    return seqjax.experiment_config(
        model={"name": "tiny"},
        data={"name": "tiny"},
        optimizer={"learning_rate": 0.01, "schedule": "constant"},
        training={"num_steps": 12, "log_every": 4, "eval_every": 6, "checkpoint_every": 4, "plot": False},
    )
