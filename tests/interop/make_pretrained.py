"""Makes the small random models in `tests/interop/pretrained`, with the logits that transformers computes.

python tests/interop/make_pretrained.py           # needs torch, transformers and safetensors; see pretrained/README.md
python tests/interop/make_pretrained.py mamba     # one of them, or torch_file
"""

from __future__ import annotations

import json
import pathlib
import sys

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

SEED = 20260726
HERE = pathlib.Path(__file__).parent / "pretrained"
SIZES = {"vocab_size": 40, "bos_token_id": 0, "eos_token_id": 1}


def main() -> None:
    gpt2 = GPT2Config(n_embd=16, n_layer=2, n_head=4, n_positions=24, **SIZES)
    llama = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24, **SIZES}
    grouped = LlamaConfig(num_key_value_heads=2, head_dim=8, max_position_embeddings=64, rope_theta=5000.0, **llama)
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    # Of the four planes of a head this keeps one, has one on the ramp, and stretches two.
    rope = {**llama3, "original_max_position_embeddings": 32, "rope_theta": 100.0}
    stretched = LlamaConfig(
        max_position_embeddings=64, tie_word_embeddings=True, rope_parameters=rope, **(llama | {"num_attention_heads": 2})
    )
    recurrent = {"hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "tie_word_embeddings": True, **SIZES}
    rwkv = RwkvConfig(hidden_size=16, intermediate_size=40, num_hidden_layers=3, **SIZES)
    griffin = RecurrentGemmaConfig(
        hidden_size=16, lru_width=16, num_attention_heads=2, num_key_value_heads=1, head_dim=8, attention_window_size=6,
        intermediate_size=48, num_hidden_layers=4, **SIZES,
    )  # fmt: skip
    made = {
        "gpt2": lambda: GPT2LMHeadModel(gpt2),
        "llama_grouped": lambda: LlamaForCausalLM(grouped),
        "llama_rope3_tied": lambda: LlamaForCausalLM(stretched),
        "mamba": lambda: MambaForCausalLM(MambaConfig(time_step_rank=4, **recurrent)),
        "mamba2": lambda: Mamba2ForCausalLM(Mamba2Config(head_dim=16, num_heads=4, n_groups=1, chunk_size=8, **recurrent)),
        "recurrent_gemma": lambda: RecurrentGemmaForCausalLM(griffin),
        "rwkv": lambda: RwkvForCausalLM(rwkv),
    }
    for name in sys.argv[1:] or [*made, "torch_file"]:
        if name == "torch_file":
            write_torch_file()
        else:
            write(name, made[name](), length=64 if "mamba" in name else 20)


def write_torch_file() -> None:
    """A state dict of numbers that count up, in PyTorch's own form: every dtype, views, and one tensor under two names."""
    numbers = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tensors = {"whole": numbers, "again": numbers, "turned": numbers.T, "part": numbers[1:, 2:4], "one": numbers[2, 3]}
    tensors |= {str(kind).removeprefix("torch."): numbers.to(kind) for kind in (torch.bfloat16, torch.float16, torch.float64)}
    tensors["int64"] = torch.arange(5)
    tensors["parameter"] = torch.nn.Parameter(torch.ones(2, 3)).data
    torch.save(tensors, HERE / "torch_file.bin")
    # The authors' repositories of Mamba hold nothing but such a file.
    torch.save(load_file(HERE / "mamba" / "model.safetensors"), HERE / "mamba" / "pytorch_model.bin")


def write(name: str, model: PreTrainedModel, length: int) -> None:
    """Randomise every parameter, and save the model, some tokens, their logits and the loss."""
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            centre = 1.0 if "ln" in key or "norm" in key else 0.0
            if key.endswith("weight"):
                parameter.copy_(centre + 0.2 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    folder = HERE / name
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if name == "gpt2":
        as_on_the_hub(model, folder)
    tokens = torch.randint(SIZES["vocab_size"], (2, length), generator=generator)
    with torch.no_grad():
        found = model.eval()(tokens, labels=tokens)
    arrays = {"tokens": tokens.numpy().astype(np.int32), "logits": found.logits.numpy(), "loss": found.loss.numpy()}
    np.savez(folder / "logits.npz", **arrays)


def as_on_the_hub(model: GPT2LMHeadModel, folder: pathlib.Path) -> None:
    """GPT-2's file on the Hub has no prefix, holds the causal masks, and an older config."""
    length = model.config.n_positions
    mask = torch.tril(torch.ones(length, length, dtype=torch.uint8))[None, None]
    tensors = {f"h.{i}.attn.bias": mask.clone() for i in range(model.config.n_layer)}
    tensors |= {key: value.detach().clone() for key, value in model.transformer.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    for key in ("n_inner", "tie_word_embeddings", "dtype", "scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps(config | {"n_ctx": length}, indent=2) + "\n")


if __name__ == "__main__":
    main()
