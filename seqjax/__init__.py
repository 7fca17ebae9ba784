"""seqjax: sequence architectures as pure functions with three faces, to train, to decode and to shard.

    import jax, seqjax

    config = seqjax.example_config("transformer")
    model = seqjax.build(config)                                   # a Flax Linen module
    variables = model.init(jax.random.key(0), tokens)
    logits, _ = model.apply(variables, tokens)                     # parallel: the whole sequence
    state = model.init_state(batch_size=8, max_length=512)
    logits, state = model.apply(variables, tokens[:, :1], state)   # carried: any chunk, one token included
    text = seqjax.generate(model, variables, prompts, num_tokens=100, temperature=0.8)

Names resolve on first use, so importing this package loads neither data pipelines nor checkpointing nor plotting.

Dimension letters in array annotations: `B` batch, `L` length, `D` width, `H` heads, `G` key-value heads, `K` head width,
`W` value width, `N` state size, `V` vocabulary, `C` channels or classes, `T` queries or horizon, `S` keys or cache slots,
`O` output width.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "ConfigError": "seqjax.config",
    "DiffusionForcing": "seqjax.generation.diffusion_forcing",
    "as_nnx": "seqjax.interop.nnx",
    "build": "seqjax.registry",
    "example_config": "seqjax.registry",
    "experiment_config": "seqjax.training.experiment",
    "generate": "seqjax.generation.generate",
    "list_architectures": "seqjax.registry",
    "load_pretrained": "seqjax.interop.pretrained",
    "register_architecture": "seqjax.registry",
    "register_mixer": "seqjax.registry",
    "register_stack": "seqjax.models.sequence_model",
    "register_task": "seqjax.registry",
    "save_pretrained": "seqjax.interop.pretrained",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Import a public name from its home on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'seqjax' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
