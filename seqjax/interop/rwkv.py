"""RWKV-4 (Peng et al. 2023), in the form of Hugging Face's `RwkvForCausalLM`.

There every few layers' weights and activations are halved at inference, `rescale_every`; that keeps float16 in range, changes
nothing else, and is left out here.
"""

from __future__ import annotations

from seqjax.interop.family import Family, Key, Row

BLOCK = "rwkv.blocks.{}."


def _mix(theirs: str, ours: str, *names: str) -> tuple[Row, ...]:
    """Maps and what they mix of a token and the one before it."""
    return tuple(
        row
        for name in names
        for row in (
            Row(f"{BLOCK}{theirs}.{name}.weight", f"{ours}/{name}/kernel", "E D -> D E"),
            Row(f"{BLOCK}{theirs}.time_mix_{name}", f"{ours}/{name}_mix", "1 1 D -> D"),
        )
    )


RWKV = Family(
    model_type="rwkv",
    model={"name": "rwkv4", "norm": "layer", "embed_norm": "layer", "position": "none"},
    keys=(
        Key("vocab_size", "vocab_size", 50277),
        Key("hidden_size", "embed_dim", 4096),
        Key("num_hidden_layers", "num_layers", 32),
        Key("attention_hidden_size", "inner_dim", None),
        Key("intermediate_size", "hidden_dim", None),
        Key("layer_norm_epsilon", "norm_epsilon", 1e-5),
        Key("tie_word_embeddings", "tie_embeddings", False),
    ),
    written={"architectures": ["RwkvForCausalLM"], "rescale_every": 0},
    prefix="rwkv.",
    frame=(
        Row("rwkv.embeddings.weight", "embedding/table"),
        Row("rwkv.blocks.0.pre_ln.weight", "embed_norm/scale"),
        Row("rwkv.blocks.0.pre_ln.bias", "embed_norm/bias"),
        Row("rwkv.ln_out.weight", "norm/scale"),
        Row("rwkv.ln_out.bias", "norm/bias"),
        Row("head.weight", "head/logits/kernel", "V D -> D V"),
    ),
    head="head.weight",
    blocks=(
        (
            Row(BLOCK + "ln1.weight", "norm_0/scale"),
            Row(BLOCK + "ln1.bias", "norm_0/bias"),
            Row(BLOCK + "attention.time_decay", "rwkv_time_mix_0/decay"),
            Row(BLOCK + "attention.time_first", "rwkv_time_mix_0/bonus"),
            *_mix("attention", "rwkv_time_mix_0", "key", "value", "receptance"),
            Row(BLOCK + "attention.output.weight", "rwkv_time_mix_0/out/kernel", "D E -> E D"),
            Row(BLOCK + "ln2.weight", "norm_1/scale"),
            Row(BLOCK + "ln2.bias", "norm_1/bias"),
            *_mix("feed_forward", "rwkv_channel_mix_1", "key", "receptance"),
            Row(BLOCK + "feed_forward.value.weight", "rwkv_channel_mix_1/value/kernel", "D E -> E D"),
        ),
    ),
)
