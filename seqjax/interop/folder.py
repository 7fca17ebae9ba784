"""A folder in Hugging Face's form: `config.json`, and tensors in `model.safetensors`, in shards with an index, or, in older
folders, in PyTorch's `pytorch_model.bin`."""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any

import ml_dtypes  # noqa: F401  teaches NumPy the dtype bfloat16, which safetensors asks it for by name
import numpy as np

from seqjax.config import ConfigError
from seqjax.interop.family import listed
from seqjax.interop.torch_file import TorchFile

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PICKLED = "pytorch_model.bin"
FLOATS = ("BF16", "F16", "F32", "F64")


class Tensors:
    """The named tensors of a folder, read one at a time."""

    def __init__(self, files: Mapping[str, Any]) -> None:
        self._files = dict(files)

    def names(self) -> Iterable[str]:
        return self._files.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        """The tensor, in the file's dtype.

        Raises:
          ConfigError: it does not hold floats (a quantised file, say).
        """
        kind = self._files[name].get_slice(name).get_dtype()
        if kind not in FLOATS:
            raise ConfigError(f"tensor {name} is of type {kind}; allowed: {', '.join(FLOATS)}.")
        return self._files[name].get_tensor(name)


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """The folder's `config.json`; a ConfigError if there is none, or it is no JSON object."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; give one with {CONFIG} and {SINGLE}.")
    return _read_json(folder / CONFIG)


@contextlib.contextmanager
def open_tensors(folder: pathlib.Path) -> Iterator[Tensors]:
    """The folder's tensors, while its files are open.

    Raises:
      ConfigError: no weights, a shard that is missing or lacks a tensor that the index puts there, or a damaged file.
    """
    opened: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:

        def open_file(name: str) -> Any:
            if name not in opened:
                opened[name] = stack.enter_context(_open(folder / name))
            return opened[name]

        if (folder / SINGLE).exists() or not (folder / INDEX).exists():
            pickled = not (folder / SINGLE).exists() and (folder / PICKLED).exists()
            file = stack.enter_context(TorchFile(folder / PICKLED)) if pickled else open_file(SINGLE)
            yield Tensors({tensor: file for tensor in file.keys()})  # noqa: SIM118  not a mapping
        else:
            homes = _read_json(folder / INDEX).get("weight_map")
            if not isinstance(homes, dict):
                raise ConfigError(f"{folder / INDEX} has no weight_map from tensors to files.")
            files = {tensor: open_file(name) for tensor, name in homes.items()}
            held = {name: set(file.keys()) for name, file in opened.items()}
            for name in held:
                absent = [tensor for tensor, home in homes.items() if home == name and tensor not in held[name]]
                if absent:
                    raise ConfigError(f"{folder / name} lacks tensors that {INDEX} puts there: {listed(absent)}.")
            yield Tensors(files)


def write_folder(folder: pathlib.Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], shard_bytes: int) -> None:
    """Write a folder that `read_config` and `open_tensors` read, in shards of at most `shard_bytes` (or one tensor)."""
    safetensors = _safetensors()
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob("model*.safetensors"), *folder.glob(INDEX)]:
        old.unlink()
    shards = _shards(tensors, shard_bytes)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    names = names if len(shards) > 1 else [SINGLE]
    for name, shard in zip(names, shards):
        # "pt" says that the layout is PyTorch's; transformers refuses files that do not say so.
        contiguous = {tensor: np.ascontiguousarray(tensors[tensor]) for tensor in shard}
        safetensors.numpy.save_file(contiguous, folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        homes = {tensor: name for name, shard in zip(names, shards) for tensor in shard}
        total = sum(array.nbytes for array in tensors.values())
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": homes})
    _write_json(folder / CONFIG, config)


def _shards(tensors: Mapping[str, np.ndarray], shard_bytes: int) -> list[list[str]]:
    """Names of the tensors of each shard, in order."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, array in tensors.items():
        if shards[-1] and filled + array.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += array.nbytes
    return shards


def _open(path: pathlib.Path) -> Any:
    safetensors = _safetensors()
    if not path.exists():
        raise ConfigError(
            f"{path} is missing; allowed: weights in {SINGLE}, in the shards that {INDEX} names, or in {PICKLED}."
        )
    try:
        return safetensors.safe_open(path, framework="numpy")
    except (safetensors.SafetensorError, OSError) as error:
        raise ConfigError(f"{path} is damaged or cut off, it reads as no safetensors file: {error}.") from error


def _safetensors() -> ModuleType:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ConfigError("pretrained weights need the package safetensors: pip install seqjax[interop].") from error
    return safetensors


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    if not path.exists():
        raise ConfigError(f"{path} is missing.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a JSON {type(content).__name__}, not an object.")
    return content


def _write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
