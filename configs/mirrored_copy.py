"""Repeat 64 to 65,536 random bytes in reverse: Perceiver AR's test of long context, its latents at the second half alone.

The argument is the length of the whole sequence: `--config=configs/mirrored_copy.py:128` (512 is the default).
"""

from seqjax import experiment_config


def get_config(length="512"):
    length = int(length)
    return experiment_config(
        model={
            "name": "perceiver_ar",
            "embed_dim": 128,
            "num_layers": 1,
            "num_heads": 4,
            "num_latents": length // 2,
            "min_context": None,
            "position": "learned",  # sinusoids are as good at 128 tokens, and had not begun to learn at 512 after 1500 steps
            "max_length": length,
            "embed_init": 128**-0.5,
            "unroll": 0,
        },
        data={"name": "mirrored_copy", "sequence_length": length, "batch_size": max(1, 4096 // length)},
        optimizer={
            "name": "adamw",
            "learning_rate": 2e-3,
            "schedule": "cosine",
            "warmup_steps": 100,
            "final_fraction": 0.02,
            "beta2": 0.98,
            "clip_norm": 1.0,
        },
        training={"num_steps": 1500, "log_every": 50, "eval_every": 500, "checkpoint_every": 500},
    )
