"""The architectures that are residual stacks: one line each."""

from __future__ import annotations

from functools import partial

from seqjax.models.sequence_model import register_stack

TINY = {"vocab_size": 64, "embed_dim": 32, "num_layers": 2, "max_length": 64}

register_stack("transformer", pattern=("attention", "mlp"), example=TINY | {"num_heads": 4}, causal=(True, False))

SEQUENCE = {"position": "none"}  # recurrent mixers know where they are

register_stack("s4d", pattern=("s4d",), defaults=SEQUENCE, example=TINY | {"state_dim": 8}, causal=(True, False))
register_stack("s4", pattern=("s4",), defaults=SEQUENCE, example=TINY | {"state_dim": 8}, causal=(True, False))
register_stack("dss", pattern=("dss",), defaults=SEQUENCE, example=TINY | {"state_dim": 4}, causal=(True, False))
register_stack("lssl", pattern=("lssl",), defaults=SEQUENCE, example=TINY | {"state_dim": 4}, causal=(True, False))
register_stack("s5", pattern=("s5",), defaults=SEQUENCE, example=TINY | {"state_dim": 8}, causal=(True, False))
register_stack("gss", pattern=("gss",), defaults=SEQUENCE, example=TINY | {"state_dim": 4})
register_stack("lmu", pattern=("lmu", "mlp"), defaults=SEQUENCE, example=TINY | {"state_dim": 4, "theta": 8.0})
register_stack(
    "spacetime", pattern=("spacetime", "mlp"), defaults=SEQUENCE, example=TINY | {"state_dim": 4}, causal=(True, False)
)
register_stack("gru", pattern=("gru",), defaults=SEQUENCE, example=TINY)
register_stack("lstm", pattern=("lstm",), defaults=SEQUENCE, example=TINY)

RMS = SEQUENCE | {"norm": "rms"}

register_stack("mamba", pattern=("mamba",), defaults=RMS, example=TINY | {"state_dim": 8}, causal=(True, False))
register_stack("mamba2", pattern=("mamba2",), defaults=RMS, example=TINY | {"state_dim": 8, "head_dim": 16})
register_stack(
    "hydra",
    pattern=("hydra",),
    defaults=RMS | {"causal": False},
    example=TINY | {"state_dim": 8, "head_dim": 16},
    causal=(False,),
    carries_state=False,
)
register_stack("para_gru", pattern=("para_gru", "glu"), defaults=RMS, example=TINY)
register_stack("para_lstm", pattern=("para_lstm", "glu"), defaults=RMS, example=TINY)
register_stack("min_gru", pattern=("min_gru", "mlp"), defaults=RMS, example=TINY)

HEADS = TINY | {"num_heads": 4}
# A norm of a head's outputs magnifies bfloat16's rounding where its few queries and keys nearly cancel: one such norm.
NORMED = HEADS | {"num_layers": 1}
SWIGLU = RMS | {"mlp_ratio": 8 / 3, "mlp_bias": False}

register_stack("linear_transformer", pattern=("linear_transformer", "mlp"), defaults={"position": "sinusoidal"}, example=HEADS)
register_stack("aaren", pattern=("aaren", "mlp"), defaults={"position": "sinusoidal"}, example=HEADS)
# Values and gate are twice as wide as a Transformer's, and the MLP half.
register_stack("retnet", pattern=("retnet", "glu"), defaults=SWIGLU | {"mlp_ratio": 4 / 3}, example=NORMED)
register_stack("gla", pattern=("gla", "glu"), defaults=SWIGLU, example=HEADS)
register_stack("deltanet", pattern=("deltanet", "glu"), defaults=SWIGLU, example=NORMED)
register_stack("gated_deltanet", pattern=("gated_deltanet", "glu"), defaults=SWIGLU, example=NORMED)

# Attention of one key head sees the last tokens alone; MLPs are gated and three times as wide.
register_stack(
    "griffin",
    pattern=(("rg_lru", "glu"), ("rg_lru", "glu"), ({"name": "attention", "num_kv_heads": 1, "position": "rope"}, "glu")),
    defaults=RMS | {"activation": "gelu", "mlp_ratio": 3.0, "window": 1024},
    example=TINY | {"num_heads": 4, "num_layers": 3, "window": 8},
)

register_stack(
    "rwkv4",
    pattern=("rwkv_time_mix", "rwkv_channel_mix"),
    defaults=SEQUENCE | {"tie_embeddings": False, "embed_norm": "layer"},
    example=TINY,
)

register_stack(
    "xlstm",
    pattern=(("mlstm",), ("slstm", "glu")),
    defaults=SEQUENCE | {"mlp_ratio": 4 / 3, "mlp_bias": False, "activation": "gelu_exact"},
    example=NORMED | {"num_layers": 2},
)
register_stack("lightnet", pattern=("lightnet", "glu"), defaults=SWIGLU, example=NORMED, causal=(True, False))
register_stack("combiner", pattern=("combiner", "mlp"), defaults={"position": "sinusoidal"}, example=HEADS | {"span_length": 4})
register_stack("fnet_ar", pattern=("fourier", "mlp"), defaults=SEQUENCE, example=TINY)
register_stack(
    "routing_transformer",
    pattern=({"name": "attention", "window": 256}, "routing", "mlp"),
    example=HEADS | {"num_clusters": 3, "num_layers": 1},
)

# Forecasting by tokens that are channels: LayerNorms after each sub-layer, windows at mean 0 and variance 1.
VARIATES = SEQUENCE | {"causal": False, "head": "variates", "norm_position": "post", "series_norm": "standard"}
FORECAST = {"input_dim": 5, "output_dim": 5, "horizon": 14, "embed_dim": 16, "num_layers": 2}
variates = partial(register_stack, inputs=("continuous",), causal=(False,), carries_state=False, segments=False)

variates("itransformer", pattern=("attention", "mlp"), defaults=VARIATES, example=FORECAST | {"num_heads": 2})
variates(
    "s_mamba",
    pattern=("mamba", "mlp"),
    defaults=VARIATES | {"expand": 1, "conv_width": 2, "shared_maps": False},
    example=FORECAST | {"state_dim": 4},
)
