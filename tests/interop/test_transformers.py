"""Parity with transformers itself, in both directions."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqjax
from seqjax.interop.pretrained import save_pretrained

if not all(importlib.util.find_spec(name) for name in ("torch", "transformers", "safetensors")):
    pytest.skip("torch, transformers and safetensors are not all installed", allow_module_level=True)

import torch
import transformers

TOKENS = jnp.arange(36).reshape(2, 18) * 7 % 31
SIZES = {"vocab_size": 31, "bos_token_id": 0, "eos_token_id": 1}
LLAMA = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 20, **SIZES}
ROPE3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 500.0}


def gpt2(**options):
    config = {"n_embd": 24, "n_layer": 3, "n_head": 3, "n_positions": 20, **SIZES, **options}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**config))


def llama(**options):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(LLAMA | options)))


MODELS = {
    "gpt2": gpt2,
    "gpt2_untied": lambda: gpt2(tie_word_embeddings=False, n_inner=40, activation_function="gelu", layer_norm_epsilon=1e-3),
    "llama": llama,
    "llama_biases": lambda: llama(attention_bias=True, mlp_bias=True, num_key_value_heads=2, rms_norm_eps=1e-3),
    "llama_multi_query": lambda: llama(num_key_value_heads=1, head_dim=10, tie_word_embeddings=True, hidden_act="relu"),
    "llama_rope3": lambda: llama(rope_parameters={**ROPE3, "original_max_position_embeddings": 32}),
}


@pytest.fixture(params=MODELS)
def theirs(request):
    torch.manual_seed(0)
    model = MODELS[request.param]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def logits_of(model):
    with torch.no_grad():
        return model.eval()(torch.tensor(np.asarray(TOKENS))).logits.numpy()


@pytest.mark.parametrize("shard", ["5GB", "4KB"])
def test_their_weights_in_our_model(theirs, shard, tmp_path):
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    model, variables = seqjax.load_pretrained(tmp_path)
    np.testing.assert_allclose(jax.jit(model.apply)(variables, TOKENS)[0], logits_of(theirs), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shard_bytes", [10**9, 4000])
def test_our_weights_in_their_model(theirs, shard_bytes, tmp_path):
    theirs.save_pretrained(tmp_path / "theirs")
    model, variables = seqjax.load_pretrained(tmp_path / "theirs")
    save_pretrained(model, variables, tmp_path / "ours", shard_bytes=shard_bytes)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(again) is type(theirs) and again.dtype == torch.float32
    np.testing.assert_array_equal(logits_of(again), logits_of(theirs))


def test_generation_agrees(tmp_path):
    torch.manual_seed(1)
    theirs = llama(num_key_value_heads=2).eval()
    theirs.save_pretrained(tmp_path)
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    prompt = torch.tensor(np.asarray(TOKENS[:, :5]))
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[:, 5:]
    model, variables = seqjax.load_pretrained(tmp_path)
    np.testing.assert_array_equal(seqjax.generate(model, variables, TOKENS[:, :5], 10), expected)
