"""Byte-level language models on Python's own standard library: the quickstart's data and step budget, to compare with.

The argument names the model, `--config=configs/python_bytes.py:mamba` (the default), any other architecture for tokens, or one
of these:

- `gss_hybrid`: three gated state-space blocks to one of attention (Mehta et al. 2022);
- `jamba`: three Mamba blocks to one of attention, each with a feed-forward, no positions (Lieber et al. 2024, without their
  mixtures of experts);
- `mamba2_hybrid`: as `jamba` with Mamba-2;
- `perceiver_ar`: 192 latents at most, windows that move by 64 bytes (Hawthorne et al. 2022);
- `combiner`: rows of 16 bytes, earlier ones through summaries (Ren et al. 2021); `logsparse` by the position's binary digits;
- `routing_transformer`: clusters behind a window of 32 bytes (Roy et al. 2021);
- `fnet_ar`: fixed waves in place of half of a Transformer's attention (Lou et al. 2021);
- `cross_layer`: a multi-query Transformer of which every second attention reads the keys and values of the one before
  (Brandon et al. 2024).

Attention in hybrids with recurrent blocks sees a window of 64 bytes; what is further back reaches it through those blocks
alone.
"""

from seqjax import experiment_config, registry
from seqjax.config import choose

LOCAL = {"name": "attention", "window": 64}
RECURRENT = {"position": "none", "norm": "rms"}
MODELS = {
    "mamba": {"name": "mamba", "num_layers": 6},
    "mamba2": {"name": "mamba2", "num_layers": 6, "state_dim": 64},
    "gss_hybrid": {
        "name": "gss",
        "pattern": (("gss",), ("gss",), ("gss",), (LOCAL, "mlp")),
        "state_dim": 32,
        "num_heads": 4,
        "position": "rope",
    },
    "jamba": {
        "name": "mamba",
        "pattern": (("mamba", "glu"), ("mamba", "glu"), (LOCAL | {"position": "none"}, "glu"), ("mamba", "glu")),
        "num_heads": 4,
        **RECURRENT,
    },
    "mamba2_hybrid": {
        "name": "mamba2",
        "pattern": (("mamba2", "glu"), ("mamba2", "glu"), (LOCAL | {"position": "none"}, "glu"), ("mamba2", "glu")),
        "num_heads": 4,
        "state_dim": 64,
        **RECURRENT,
    },
    "perceiver_ar": {"name": "perceiver_ar", "num_latents": 192, "stride": 64},
    "combiner": {"name": "combiner", "num_heads": 4, "span_length": 16},
    "logsparse": {"name": "combiner", "num_heads": 4, "factorization": "logsparse"},
    "routing_transformer": {
        "name": "routing_transformer",
        "pattern": ({"name": "attention", "window": 32}, "routing", "mlp"),
        "num_heads": 4,
    },
    "fnet_ar": {"name": "fnet_ar", "pattern": (("fourier", "mlp"), ("attention", "mlp")), "num_heads": 4, "position": "rope"},
    "cross_layer": {
        "name": "transformer",
        "pattern": (("attention", "mlp"), ({"name": "attention", "shares": True}, "mlp")),
        "num_heads": 4,
        "num_kv_heads": 1,
    },
}


def get_config(model="mamba"):
    registry.load_all()
    chosen = choose({name: {"name": name} for name in registry.ARCHITECTURES} | MODELS, model, "the config's model")
    sizes = {"embed_dim": 128, "num_layers": 4, "unroll": 0, "embed_init": 128**-0.5}
    options = registry.example_config(chosen["name"])  # not every architecture has layers to count, or to unroll
    return experiment_config(
        model={key: value for key, value in sizes.items() if key in options} | chosen,
        data={"name": "python_source", "batch_size": 8, "sequence_length": 256},
        optimizer={
            "name": "adamw",
            "learning_rate": 2.5e-3,
            "schedule": "cosine",
            "warmup_steps": 100,
            "final_fraction": 0.02,
            "weight_decay": 0.1,
            "beta2": 0.98,
            "clip_norm": 1.0,
            "groups": {"state_space": {"learning_rate": 1e-3, "weight_decay": 0.0}},
        },
        training={"num_steps": 2000, "log_every": 20, "eval_every": 1000, "checkpoint_every": 250, "sample_tokens": 300},
    )
