"""Llama (Touvron et al. 2023; Llama 3: Grattafiori et al. 2024), in the form of Hugging Face's `LlamaForCausalLM`.

Grouped heads, RMS norms, rotary positions in the half-split layout, a gated feed-forward. A `config.json` says its rotary
positions in `rope_theta` and `rope_scaling`, or, since transformers 5, in `rope_parameters`; the first form is written,
which all versions read.
"""

from __future__ import annotations

from typing import Any

from seqjax.config import ConfigError
from seqjax.interop.family import Family, Key, Row, activation_key

LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
"""Entries of a `rope_scaling` of type "llama3", in the order of the model's option `rope_llama3`."""


def normalize(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary positions as `rope_theta` and a `rope_scaling` with its `rope_type`, None where there is no scaling."""
    said = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    rope = config.get(said) or {}
    if not isinstance(rope, dict):
        raise ConfigError(f"config.json: {said}={rope!r} is not an object with a rope_type.")
    # An entry of the inner object holds before the same entry outside it.
    merged = {"rope_type": rope.get("type", "default"), **config} | rope
    merged.setdefault("original_max_position_embeddings", config.get("max_position_embeddings", 2048))
    merged["rope_scaling"] = None
    if merged["rope_type"] != "default":
        merged["rope_scaling"] = {entry: merged.get(entry) for entry in ("rope_type", *LLAMA3)}
    return merged


def read_rope_scaling(rope: dict[str, Any] | None) -> tuple | None:
    """The model's `rope_llama3` of a normalized `rope_scaling`."""
    if rope is None:
        return None
    if rope["rope_type"] != "llama3":
        raise ConfigError(f"config.json: rope_type={rope['rope_type']!r} is not served; allowed: default, llama3.")
    for entry in LLAMA3:
        if not isinstance(rope[entry], int | float):
            raise ConfigError(f"config.json: rope_type='llama3' needs {entry}, and {entry}={rope[entry]!r} is not a number.")
    return tuple(rope[entry] for entry in LLAMA3)


def write_rope_scaling(llama3: tuple | None) -> dict[str, Any] | None:
    return None if llama3 is None else {"rope_type": "llama3", **dict(zip(LLAMA3, llama3))}


LLAMA = Family(
    model_type="llama",
    model={"name": "transformer", "pattern": ("attention", "glu"), "position": "rope", "norm": "rms"},
    keys=(
        Key("vocab_size", "vocab_size"),
        Key("max_position_embeddings", "max_length", 2048),
        Key("hidden_size", "embed_dim"),
        Key("num_hidden_layers", "num_layers"),
        Key("num_attention_heads", "num_heads"),
        Key("num_key_value_heads", "num_kv_heads", None),
        Key("head_dim", "head_dim", None),
        Key("intermediate_size", "hidden_dim"),
        activation_key("hidden_act", "silu"),
        Key("rms_norm_eps", "norm_epsilon", 1e-6),
        Key("tie_word_embeddings", "tie_embeddings", False),
        Key("attention_bias", "qkv_bias", False),
        Key("attention_bias", "out_bias", False),
        Key("mlp_bias", "mlp_bias", False),
        Key("rope_theta", "rope_theta", 10000.0),
        Key("rope_scaling", "rope_llama3", None, read_rope_scaling, write_rope_scaling),
    ),
    fixed={"partial_rotary_factor": 1.0},
    written={"architectures": ["LlamaForCausalLM"], "attention_dropout": 0.0},
    prefix="model.",
    frame=(
        Row("model.embed_tokens.weight", "embedding/table"),
        Row("model.norm.weight", "norm/scale"),
        Row("lm_head.weight", "head/logits/kernel", "V D -> D V"),
    ),
    blocks=(
        (
            Row("model.layers.{}.input_layernorm.weight", "norm_0/scale"),
            Row("model.layers.{}.self_attn.q_proj.weight", "attention_0/query/kernel", "(H K) D -> D H K"),
            Row("model.layers.{}.self_attn.q_proj.bias", "attention_0/query/bias", "(H K) -> H K"),
            Row("model.layers.{}.self_attn.k_proj.weight", "attention_0/key/kernel", "(G K) D -> D G K"),
            Row("model.layers.{}.self_attn.k_proj.bias", "attention_0/key/bias", "(G K) -> G K"),
            Row("model.layers.{}.self_attn.v_proj.weight", "attention_0/value/kernel", "(G K) D -> D G K"),
            Row("model.layers.{}.self_attn.v_proj.bias", "attention_0/value/bias", "(G K) -> G K"),
            Row("model.layers.{}.self_attn.o_proj.weight", "attention_0/out/kernel", "D (H K) -> H K D"),
            Row("model.layers.{}.self_attn.o_proj.bias", "attention_0/out/bias"),
            Row("model.layers.{}.post_attention_layernorm.weight", "norm_1/scale"),
            Row("model.layers.{}.mlp.gate_proj.weight", "glu_1/gate/kernel", "F D -> D F"),
            Row("model.layers.{}.mlp.gate_proj.bias", "glu_1/gate/bias"),
            Row("model.layers.{}.mlp.up_proj.weight", "glu_1/up/kernel", "F D -> D F"),
            Row("model.layers.{}.mlp.up_proj.bias", "glu_1/up/bias"),
            Row("model.layers.{}.mlp.down_proj.weight", "glu_1/down/kernel", "D F -> F D"),
            Row("model.layers.{}.mlp.down_proj.bias", "glu_1/down/bias"),
        ),
    ),
    ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),  # kept as a buffer by older versions
    normalize=normalize,
)
