"""GPT-2 (Radford et al. 2019), in the form of Hugging Face's `GPT2LMHeadModel`.

Its linear maps are stored inputs first (`Conv1D`), unlike `torch.nn.Linear`. Rates of dropout are written but not read: a
model loads with the rate that it is given.
"""

from __future__ import annotations

from seqjax.interop.family import Family, Key, Row, activation_key

ATTENTION = ("attention_0/query/{}", "attention_0/key/{}", "attention_0/value/{}")

GPT2 = Family(
    model_type="gpt2",
    model={
        "name": "transformer",
        "pattern": ("attention", "mlp"),
        "position": "learned",
        "norm": "layer",
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
    },
    keys=(
        Key("vocab_size", "vocab_size"),
        Key("n_positions", "max_length", 1024),
        Key("n_embd", "embed_dim"),
        Key("n_layer", "num_layers"),
        Key("n_head", "num_heads"),
        Key("n_inner", "hidden_dim", None),
        activation_key("activation_function", "gelu_new"),
        Key("layer_norm_epsilon", "norm_epsilon", 1e-5),
        Key("tie_word_embeddings", "tie_embeddings", True),
        Key("embd_pdrop", "dropout", 0.1, read=None),
        Key("resid_pdrop", "dropout", 0.1, read=None),
    ),
    fixed={
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    written={"architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.0},
    prefix="transformer.",
    frame=(
        Row("transformer.wte.weight", "embedding/table"),
        Row("transformer.wpe.weight", "positions/table"),
        Row("transformer.ln_f.weight", "norm/scale"),
        Row("transformer.ln_f.bias", "norm/bias"),
        Row("lm_head.weight", "head/logits/kernel", "V D -> D V"),
    ),
    blocks=(
        (
            Row("transformer.h.{}.ln_1.weight", "norm_0/scale"),
            Row("transformer.h.{}.ln_1.bias", "norm_0/bias"),
            Row(
                "transformer.h.{}.attn.c_attn.weight",
                tuple(path.format("kernel") for path in ATTENTION),
                "D (H K) -> D H K",
                axis=1,
            ),
            Row("transformer.h.{}.attn.c_attn.bias", tuple(path.format("bias") for path in ATTENTION), "(H K) -> H K"),
            Row("transformer.h.{}.attn.c_proj.weight", "attention_0/out/kernel", "(H K) D -> H K D"),
            Row("transformer.h.{}.attn.c_proj.bias", "attention_0/out/bias"),
            Row("transformer.h.{}.ln_2.weight", "norm_1/scale"),
            Row("transformer.h.{}.ln_2.bias", "norm_1/bias"),
            Row("transformer.h.{}.mlp.c_fc.weight", "mlp_1/up/kernel"),
            Row("transformer.h.{}.mlp.c_fc.bias", "mlp_1/up/bias"),
            Row("transformer.h.{}.mlp.c_proj.weight", "mlp_1/down/kernel"),
            Row("transformer.h.{}.mlp.c_proj.bias", "mlp_1/down/bias"),
        ),
    ),
    ignored=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",),  # causal masks, kept as buffers by older versions
)
