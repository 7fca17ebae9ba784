"""Mamba (Gu and Dao 2023) and Mamba-2 (Dao and Gu 2024), in the form of Hugging Face's `MambaForCausalLM` and
`Mamba2ForCausalLM`, and in that of the authors' own checkpoints (`state-spaces/mamba-*`, `state-spaces/mamba2-*`).

The authors' form has another `config.json`, without a `model_type`, and another name for the embedding; it is read, and
written in Hugging Face's form.
"""

from __future__ import annotations

import math
from typing import Any

from seqjax.config import ConfigError
from seqjax.interop.family import Family, Key, Row

LAYER = "backbone.layers.{}.mixer."
NO_LIMIT = (0.0, math.inf)
"""Of Mamba-2's steps, which a softplus keeps positive."""


def from_authors(config: dict[str, Any]) -> dict[str, Any]:
    """A `config.json` of the authors' as Hugging Face's; any other as it is."""
    if "model_type" in config or "ssm_cfg" not in config:
        return config
    own = dict(config["ssm_cfg"] or {})
    kind = own.pop("layer", "Mamba1")
    if kind not in ("Mamba1", "Mamba2") or config.get("attn_cfg") or config.get("d_intermediate"):
        raise ConfigError(
            "config.json: of the authors' models, stacks of Mamba1 or Mamba2 layers alone are served, without attention or "
            f"feed-forward layers; this one has layer={kind!r}."
        )
    second = kind == "Mamba2"
    multiple = config.get("pad_vocab_size_multiple", 8)
    theirs = {"d_state": "state_size", "d_conv": "conv_kernel", "expand": "expand", "headdim": "head_dim"}
    theirs |= {"ngroups": "n_groups", "chunk_size": "chunk_size", "dt_rank": "time_step_rank"}
    for entry in own:
        if entry not in theirs:
            raise ConfigError(f"config.json: ssm_cfg.{entry}={own[entry]!r} is not served; allowed: {', '.join(theirs)}.")
    made = {
        "model_type": "mamba2" if second else "mamba",
        "vocab_size": multiple * math.ceil(config["vocab_size"] / multiple),
        "hidden_size": config["d_model"],
        "num_hidden_layers": config["n_layer"],
        "tie_word_embeddings": config.get("tie_embeddings", True),
        "state_size": 128 if second else 16,
        **({"head_dim": 64, "n_groups": 1} if second else {}),
    } | {theirs[entry]: value for entry, value in own.items()}
    if second:
        made["num_heads"] = made.get("expand", 2) * made["hidden_size"] // made["head_dim"]
    return made


def _read_rank(value: Any) -> int | None:
    return None if value == "auto" else value


def _read_limit(limit: Any) -> tuple | None:
    # Newer transformers write infinity as an object, older ones as a word that JSON does not have.
    least, largest = (float(end["__float__"]) if isinstance(end, dict) else float(end) for end in limit)
    return None if (least, largest) == NO_LIMIT else (least, largest)


def _inner_width(config: dict[str, Any]) -> dict[str, Any]:
    return config | {"intermediate_size": (config["expand"] or 0) * config["hidden_size"]}


def _number_of_heads(config: dict[str, Any]) -> dict[str, Any]:
    return config | {"num_heads": (config["expand"] or 0) * config["hidden_size"] // (config["head_dim"] or 1)}


SHARED_KEYS = (
    Key("hidden_size", "embed_dim"),
    Key("layer_norm_epsilon", "norm_epsilon", 1e-5),
    Key("expand", "expand", 2),
    Key("conv_kernel", "conv_width", 4),
    Key("use_bias", "use_bias", False),
    Key("use_conv_bias", "conv_bias", True),
)

ALIASES = {"backbone.embedding.weight": "backbone.embeddings.weight"}  # as the authors' files have it

FRAME = (
    Row("backbone.embeddings.weight", "embedding/table"),
    Row("backbone.norm_f.weight", "norm/scale"),
    Row("lm_head.weight", "head/logits/kernel", "V D -> D V"),
)


def _rows(name: str, *own: Row) -> tuple[Row, ...]:
    """Tensors of a layer: those of both, and its own."""
    return (
        Row("backbone.layers.{}.norm.weight", "norm_0/scale"),
        Row(LAYER + "conv1d.weight", f"{name}/conv/kernel", "E 1 W -> W E"),
        Row(LAYER + "conv1d.bias", f"{name}/conv/bias"),
        Row(LAYER + "dt_bias" if name == "mamba2_0" else LAYER + "dt_proj.bias", f"{name}/dt_bias"),
        Row(LAYER + "D", f"{name}/skip"),
        Row(LAYER + "out_proj.weight", f"{name}/out/kernel", "D E -> E D"),
        Row(LAYER + "out_proj.bias", f"{name}/out/bias"),
        *own,
    )


MAMBA = Family(
    model_type="mamba",
    model={"name": "mamba", "norm": "rms", "position": "none"},
    keys=(
        Key("vocab_size", "vocab_size", 50280),
        Key("num_hidden_layers", "num_layers", 32),
        Key("state_size", "state_dim", 16),
        Key("time_step_rank", "dt_rank", "auto", read=_read_rank),
        Key("tie_word_embeddings", "tie_embeddings", True),
        *SHARED_KEYS,
    ),
    fixed={"hidden_act": "silu"},
    written={"architectures": ["MambaForCausalLM"]},
    derive=_inner_width,
    prefix="backbone.",
    aliases=ALIASES,
    frame=FRAME,
    blocks=(
        _rows(
            "mamba_0",
            Row(LAYER + "in_proj.weight", ("mamba_0/in/kernel", "mamba_0/gate/kernel"), "E D -> D E"),
            Row(LAYER + "in_proj.bias", ("mamba_0/in/bias", "mamba_0/gate/bias")),
            Row(
                LAYER + "x_proj.weight",
                ("mamba_0/dt_down/kernel", "mamba_0/b/kernel", "mamba_0/c/kernel"),
                "N E -> E N",
            ),
            Row(LAYER + "dt_proj.weight", "mamba_0/dt_up/kernel", "E R -> R E"),
            Row(LAYER + "A_log", "mamba_0/a_log", "E N -> N E"),
        ),
    ),
)

MAMBA2 = Family(
    model_type="mamba2",
    model={"name": "mamba2", "norm": "rms", "position": "none"},
    keys=(
        Key("vocab_size", "vocab_size", 32768),
        Key("num_hidden_layers", "num_layers", 64),
        Key("state_size", "state_dim", 128),
        Key("head_dim", "head_dim", 64),
        Key("n_groups", "num_groups", 8),
        Key("chunk_size", "chunk_size", 256, read=None, write=lambda size: size or 256),
        Key("time_step_limit", "dt_limit", NO_LIMIT, _read_limit, lambda limit: list(limit or NO_LIMIT)),
        Key("tie_word_embeddings", "tie_embeddings", False),
        *SHARED_KEYS,
    ),
    fixed={"hidden_act": "silu", "rms_norm": True},
    written={"architectures": ["Mamba2ForCausalLM"]},
    derive=_number_of_heads,
    prefix="backbone.",
    aliases=ALIASES,
    frame=FRAME,
    blocks=(
        _rows(
            "mamba2_0",
            Row(LAYER + "in_proj.weight", "mamba2_0/in/kernel", "E D -> D E"),
            Row(LAYER + "in_proj.bias", "mamba2_0/in/bias"),
            Row(LAYER + "A_log", "mamba2_0/a_log"),
            Row(LAYER + "norm.weight", "mamba2_0/norm/scale"),
        ),
    ),
)
