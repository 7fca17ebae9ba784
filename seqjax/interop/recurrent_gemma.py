"""RecurrentGemma (Botev et al. 2024), the released Griffin, in the form of Hugging Face's `RecurrentGemmaForCausalLM`.

Two recurrent blocks to one of local attention, norms whose scales are stored as offsets from 1, logits within a soft cap.
Embeddings are multiplied by the square root of their width, rounded to bfloat16 there and so here.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp

from seqjax.interop.family import Family, Key, Row, activation_key

LAYER = "model.layers.{}."


BLOCK_TYPES = ["recurrent", "recurrent", "attention"]


def normalize(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary positions as entries of their own, the kinds of blocks by their newer name, and the factor of the embedding."""
    rope = config.get("rope_parameters") or {}
    blocks = {"block_types": config.get("_block_types", BLOCK_TYPES)}
    merged = {"partial_rotary_factor": 0.5, "rope_theta": 10000.0} | blocks | config | rope
    return merged | {"embedding_factor": float(jnp.bfloat16(math.sqrt(config.get("hidden_size", 2560))))}


def derive(config: dict[str, Any]) -> dict[str, Any]:
    """Without the factor of the embedding, which follows from its width."""
    return {key: value for key, value in config.items() if key != "embedding_factor"}


def _linear(theirs: str, ours: str, axes: str = "E D -> D E") -> tuple[Row, Row]:
    return Row(f"{LAYER}{theirs}.weight", f"{ours}/kernel", axes), Row(f"{LAYER}{theirs}.bias", f"{ours}/bias")


AROUND = (
    Row(LAYER + "temporal_pre_norm.weight", "norm_0/scale"),
    Row(LAYER + "channel_pre_norm.weight", "norm_1/scale"),
    *_linear("mlp_block.gate_proj", "glu_1/gate"),
    *_linear("mlp_block.up_proj", "glu_1/up"),
    *_linear("mlp_block.down_proj", "glu_1/down"),
)
RECURRENT_BLOCK = (
    *_linear("temporal_block.linear_y", "rg_lru_0/gate"),
    *_linear("temporal_block.linear_x", "rg_lru_0/in"),
    *_linear("temporal_block.linear_out", "rg_lru_0/out"),
    Row(LAYER + "temporal_block.conv_1d.weight", "rg_lru_0/conv/kernel", "E 1 W -> W E"),
    Row(LAYER + "temporal_block.conv_1d.bias", "rg_lru_0/conv/bias"),
    Row(LAYER + "temporal_block.rg_lru.recurrent_param", "rg_lru_0/decay"),
    Row(LAYER + "temporal_block.rg_lru.recurrent_gate_weight", "rg_lru_0/recurrence_gate_kernel"),
    Row(LAYER + "temporal_block.rg_lru.recurrent_gate_bias", "rg_lru_0/recurrence_gate_bias"),
    Row(LAYER + "temporal_block.rg_lru.input_gate_weight", "rg_lru_0/input_gate_kernel"),
    Row(LAYER + "temporal_block.rg_lru.input_gate_bias", "rg_lru_0/input_gate_bias"),
)
LOCAL_BLOCK = (
    Row(LAYER + "temporal_block.q_proj.weight", "attention_0/query/kernel", "(H K) D -> D H K"),
    Row(LAYER + "temporal_block.k_proj.weight", "attention_0/key/kernel", "(G K) D -> D G K"),
    Row(LAYER + "temporal_block.v_proj.weight", "attention_0/value/kernel", "(G K) D -> D G K"),
    Row(LAYER + "temporal_block.o_proj.weight", "attention_0/out/kernel", "D (H K) -> H K D"),
    Row(LAYER + "temporal_block.o_proj.bias", "attention_0/out/bias"),
)

RECURRENT_GEMMA = Family(
    model_type="recurrent_gemma",
    model={"name": "griffin", "norm": "rms_offset", "position": "rope", "out_bias": True, "qkv_bias": False},
    keys=(
        Key("vocab_size", "vocab_size", 256000),
        Key("hidden_size", "embed_dim", 2560),
        Key("num_hidden_layers", "num_layers", 26),
        Key("num_attention_heads", "num_heads", 10),
        Key("num_key_value_heads", "num_kv_heads", None),
        Key("head_dim", "head_dim", None),
        Key("lru_width", "inner_dim", None),
        Key("attention_window_size", "window", 2048),
        Key("conv1d_width", "conv_width", 4),
        Key("intermediate_size", "hidden_dim", 7680 * 2, lambda width: width // 2, lambda width: 2 * (width or 0)),
        activation_key("hidden_activation", "gelu_pytorch_tanh"),
        Key("rms_norm_eps", "norm_epsilon", 1e-6),
        Key("logits_soft_cap", "logit_softcap", 30.0),
        Key("tie_word_embeddings", "tie_embeddings", True),
        Key("partial_rotary_factor", "rope_fraction", 0.5),
        Key("rope_theta", "rope_theta", 10000.0),
        Key("embedding_factor", "embed_scale"),
    ),
    fixed={"attention_bias": False, "block_types": BLOCK_TYPES},
    written={"architectures": ["RecurrentGemmaForCausalLM"]},
    prefix="model.",
    frame=(
        Row("model.embed_tokens.weight", "embedding/table"),
        Row("model.final_norm.weight", "norm/scale"),
        Row("lm_head.weight", "head/logits/kernel", "V D -> D V"),
    ),
    blocks=(RECURRENT_BLOCK + AROUND, RECURRENT_BLOCK + AROUND, LOCAL_BLOCK + AROUND),
    derive=derive,
    normalize=normalize,
)
