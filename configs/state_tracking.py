"""Keep track of a state over 16 tokens, and be tested on 64: parity, or running products of permutations.

The argument names the mixer and the task: `--config=configs/state_tracking.py:lstm,parity` (the default), `para_lstm,a5`,
`transformer,s3`. Beyond the trained length, and only there:
`experiments/evaluate.py --set=sequence_length=64 --set=scored_from=16`.
"""

from seqjax import experiment_config

TASKS = {
    "parity": {"name": "parity"},
    "s3": {"name": "prefix_products", "group": "S3"},
    "a5": {"name": "prefix_products", "group": "A5"},
    "s5": {"name": "prefix_products", "group": "S5"},
}


def get_config(argument="lstm,parity"):
    mixer, task = argument.split(",")
    return experiment_config(
        model={"name": mixer, "embed_dim": 64, "num_layers": 2, "unroll": 0, "embed_init": 64**-0.5},
        data={**TASKS[task], "sequence_length": 16, "batch_size": 64},
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
