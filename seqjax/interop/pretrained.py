"""Pretrained weights in and out, in Hugging Face's form."""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from seqjax.config import ConfigError, allowed_values, choose, differing_keys, options_of
from seqjax.interop.family import Family, Slot, listed
from seqjax.interop.folder import Tensors, open_tensors, read_config, write_folder
from seqjax.interop.gpt2 import GPT2
from seqjax.interop.llama import LLAMA
from seqjax.interop.mamba import MAMBA, MAMBA2, from_authors
from seqjax.interop.recurrent_gemma import RECURRENT_GEMMA
from seqjax.interop.rwkv import RWKV
from seqjax.models.base import DTYPES
from seqjax.models.sequence_model import Frame, SequenceModel
from seqjax.registry import build

FAMILIES: dict[str, Family] = {family.model_type: family for family in (GPT2, LLAMA, MAMBA, MAMBA2, RECURRENT_GEMMA, RWKV)}
"""Families by `model_type`; add one to load another's weights."""

CHOSEN = ("dropout", "stochastic_depth", "dtype", "param_dtype", "remat", "unroll", "implementation", "chunk_size")
"""Options that pretrained weights leave open."""

DERIVED = {
    "head_dim": ("key_dim", "head_width"),
    "num_kv_heads": ("kv_heads",),
    "hidden_dim": ("width",),
    "dt_rank": ("rank",),
    "inner_dim": ("width", "inner"),
}
"""Options that may be None, and the property, of the first name that the mixer has, that says what they then are."""

UNUSED = ("pattern", "residual_init", "embed_init", "mlp_ratio", "pool", "horizon", "num_classes", "output_dim")
UNUSED += ("dt_min", "dt_max", "depth", *CHOSEN)
"""Options that say nothing further of a language model's function, beside `DERIVED` ones and the pattern's names."""


def load_pretrained(path: str | os.PathLike, *, sharding: Any = None, **options: Any) -> tuple[SequenceModel, dict[str, Any]]:
    """The model and the weights of a folder in Hugging Face's form.

    Args:
      path: folder with `config.json`, and `model.safetensors` or shards with `model.safetensors.index.json`; the
        `model_type` is a key of `FAMILIES`.
      sharding: where the parameters go: what `jax.device_put` takes for `{"params": ...}`, None for the default device.
      options: of the model, where the weights leave them open (`CHOSEN`); parameters are cast to `param_dtype`, by default
        float32 whatever the file's dtype.
    Returns:
      The model, and its unboxed variables `{"params": ...}`.
    Raises:
      ConfigError: a file that is missing or damaged, a `config.json` that this model cannot follow, or tensors that are
        missing, unexpected or of another shape.
    """
    for key in options:
        if key not in CHOSEN:
            raise ConfigError(f"load_pretrained: {key} is decided by the weights; {allowed_values(key, CHOSEN)}")
    folder = pathlib.Path(path)
    config = from_authors(read_config(folder))
    family = choose(FAMILIES, config.get("model_type"), f"{folder / 'config.json'}: model_type")
    model = build(family.read_config(config) | options)
    shapes = _parameter_shapes(model)
    parameters = {key: np.empty(shape, DTYPES[model.param_dtype]) for key, shape in shapes.items()}
    with open_tensors(folder) as tensors:
        names = _names_in_file(family, tensors)
        slots = family.slots(model, shapes)
        _check_tensors(family, model, slots, shapes, tensors, names)
        for slot in slots:
            slot.store(tensors.read(names[slot.tensor]), parameters)
    return model, jax.device_put({"params": unflatten_dict(parameters, sep="/")}, sharding)


def save_pretrained(
    model: SequenceModel,
    variables: Mapping[str, Any],
    path: str | os.PathLike,
    *,
    config: Mapping[str, Any] | None = None,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a folder that `load_pretrained`, and Hugging Face's transformers, read.

    Args:
      model: one that a family of `FAMILIES` can describe, whichever way it was made.
      variables: its variables, boxed or not; they are written in their own dtype.
      path: folder, made if need be; weights that it holds already are replaced.
      config: further entries of `config.json`, such as `{"eos_token_id": 2}`.
      shard_bytes: size above which the weights are divided over several files.
    Raises:
      ConfigError: no family can describe the model, or the variables are not its own.
    """
    family, entries = _family_of(model)
    parameters = flatten_dict(nn.unbox(variables).get("params", {}), sep="/")
    shapes = _parameter_shapes(model)
    found = {key: tuple(np.shape(value)) for key, value in parameters.items()}
    if found != shapes:
        wrong = differing_keys(found, shapes)
        raise ConfigError(f"save_pretrained: the variables are not this model's; they differ in {listed(wrong)}.")
    parameters = {key: np.asarray(value) for key, value in parameters.items()}
    entries |= {"torch_dtype": str(jnp.result_type(*parameters.values())), **(config or {})}
    tensors = {slot.tensor: slot.fetch(parameters) for slot in family.slots(model, shapes)}
    write_folder(pathlib.Path(path), entries, tensors, shard_bytes)


def _parameter_shapes(model: SequenceModel) -> dict[str, tuple[int, ...]]:
    """Shapes of a model's parameters by path, computed without making any."""
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    return {key: value.shape for key, value in flatten_dict(nn.unbox(variables)["params"], sep="/").items()}


def _names_in_file(family: Family, tensors: Tensors) -> dict[str, str]:
    """Tensors' names as the family's tables give them, and as the file does: without a prefix, or as an alias."""
    prefixed = any(name.startswith(family.prefix) for name in tensors.names())
    own = {name if prefixed or name == family.head else family.prefix + name: name for name in tensors.names()}
    return {family.aliases.get(name, name): given for name, given in own.items()}


def _check_tensors(
    family: Family,
    model: SequenceModel,
    slots: list[Slot],
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Tensors,
    names: Mapping[str, str],
) -> None:
    """Raise a ConfigError that names the tensors which are missing, unexpected, or of a shape that the config denies."""
    needed = {slot.tensor: slot.shape(shapes) for slot in slots}
    known = {name for name in names if any(re.fullmatch(pattern, name) for pattern in family.ignored)}
    if model.tied and family.head in names:
        known.add(family.head)
        _check_tied(family, slots, tensors, names)
    wrong = [
        f"{name} {list(tensors.shape(names[name]))}, not {list(shape)}"
        for name, shape in needed.items()
        if name in names and tensors.shape(names[name]) != shape
    ]
    faults = {
        "missing": needed.keys() - names.keys(),
        "unexpected": names.keys() - needed.keys() - known,
        "of another shape": wrong,
    }
    if any(faults.values()):
        told = "; ".join(f"{fault}: {listed(which)}" for fault, which in faults.items() if which)
        raise ConfigError(f"the tensors are not those of the {family.model_type} in config.json: {told}.")


def _check_tied(family: Family, slots: list[Slot], tensors: Tensors, names: Mapping[str, str]) -> None:
    """A tied head's copy in the file must be one, or the model would not be the one that was trained."""
    table = next(slot.tensor for slot in slots if slot.paths == ("embedding/table",))
    if table in names and not np.array_equal(tensors.read(names[table]), tensors.read(names[family.head])):
        raise ConfigError(
            f"config.json: tie_word_embeddings=True, but {family.head} and {table} differ; allowed for them: False."
        )


def _family_of(model: SequenceModel) -> tuple[Family, dict[str, Any]]:
    """The family whose config describes `model`: reading it back gives the same model. And that config."""
    if not isinstance(model, SequenceModel):
        raise ConfigError(f"save_pretrained: {type(model).__name__} is no residual stack; allowed: {listed(FAMILIES)}.")
    said = _described(model)
    options = {key.rsplit(".", 1)[-1]: value for key, value in said.items()} | {"dropout": model.dropout}
    differing = {}
    for family in FAMILIES.values():
        config = family.write_config(options)
        try:
            read = _described(build(family.read_config(config)))
        except ConfigError:
            continue  # the model lacks what this family's config must say
        differing[family.model_type] = differing_keys(said, read)
        if not differing[family.model_type]:
            return family, config
    nearest = min(differing, key=lambda name: len(differing[name]), default=None)
    told = f"the nearest, {nearest}, differs in {listed(differing[nearest])}" if nearest else f"not {listed(FAMILIES)}"
    raise ConfigError(f"save_pretrained: no family of pretrained models has this model; {told}.")


def _described(model: SequenceModel) -> dict[str, Any]:
    """Every option that decides what a model computes, a mixer's own under its sub-layer's name."""
    said = {key: getattr(model, key) for key in options_of(SequenceModel) if key not in UNUSED}
    said["pattern"] = [[sublayer.name for sublayer in block] for block in model.pattern]
    for i, sublayer in enumerate(model.unit):
        mixer = sublayer.make(model.frame, parent=None)
        for key in options_of(type(mixer), exclude=(*Frame._fields, *UNUSED)):
            name = next(name for name in (*DERIVED.get(key, ()), key) if hasattr(mixer, name))
            value = getattr(mixer, name)
            said[f"{sublayer.name}_{i}.{key}"] = value
    return said
