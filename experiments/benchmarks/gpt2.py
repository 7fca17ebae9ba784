"""A model of GPT-2's architecture, for the benchmarks of training and of generation."""

from __future__ import annotations

import argparse
from typing import Any

import jax
import jax.numpy as jnp

import seqjax

VOCAB = 65  # characters of tiny Shakespeare


def gpt2_shaped(args: argparse.Namespace, max_length: int) -> tuple[Any, Any]:
    """A float32 model of GPT-2's architecture, and random variables for it."""
    sizes = {"vocab_size": VOCAB, "embed_dim": args.width, "num_layers": args.layers, "num_heads": args.heads}
    options = {"position": "learned", "max_length": max_length, "qkv_bias": True, "out_bias": True, "unroll": 0}
    model = seqjax.build({"name": "transformer", **sizes, **options})
    return model, jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
