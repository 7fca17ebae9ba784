"""PyTorch's own file of weights, read without PyTorch: a zip archive of a pickle and one raw file per storage.

The pickle may name only what a state dict of plain tensors needs, so a file cannot run code.
"""

from __future__ import annotations

import collections
import pathlib
import pickle
import zipfile
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from seqjax.config import ConfigError

DTYPES = {
    "BFloat16Storage": ("BF16", ml_dtypes.bfloat16),
    "HalfStorage": ("F16", np.float16),
    "FloatStorage": ("F32", np.float32),
    "DoubleStorage": ("F64", np.float64),
    "LongStorage": ("I64", np.int64),
    "IntStorage": ("I32", np.int32),
    "BoolStorage": ("BOOL", np.bool_),
}
"""Of each class of storage, the name that safetensors gives its dtype, and NumPy's."""


class TorchFile:
    """The tensors of a file that `torch.save(state_dict)` wrote, with the methods of safetensors' `safe_open`.

    Raises:
      ConfigError: damaged, older than PyTorch 1.6, or with more in it than plain tensors.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        try:
            self._archive = zipfile.ZipFile(path)
            (index,) = (name for name in self._archive.namelist() if name.endswith("/data.pkl"))
            self._root = index.removesuffix("data.pkl")
            with self._archive.open(index) as file:
                found = _Unpickler(file).load()
        except (zipfile.BadZipFile, OSError, ValueError, EOFError) as error:
            raise ConfigError(
                f"{path} is damaged or older than PyTorch 1.6, it reads as no file of weights: {error}."
            ) from error
        except pickle.UnpicklingError as error:
            raise ConfigError(f"{path}: {error}; allowed: a state dict of plain tensors.") from error
        self._tensors = {name: tensor for name, tensor in found.items() if isinstance(tensor, _Tensor)}

    def __enter__(self) -> TorchFile:
        return self

    def __exit__(self, *_: Any) -> None:
        self._archive.close()

    def keys(self) -> list[str]:
        return list(self._tensors)

    def get_slice(self, name: str) -> _Tensor:
        return self._tensors[name]

    def get_tensor(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        raw = self._archive.read(f"{self._root}data/{tensor.storage.key}")
        stored = np.frombuffer(raw, DTYPES[tensor.storage.kind][1])[tensor.offset :]
        strides = [stride * stored.itemsize for stride in tensor.strides]
        return np.lib.stride_tricks.as_strided(stored, tensor.shape, strides, writeable=False).copy()


class _Storage(NamedTuple):
    kind: str
    key: str


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def get_shape(self) -> tuple[int, ...]:
        return self.shape

    def get_dtype(self) -> str:
        return DTYPES[self.storage.kind][0]


def _tensor(storage: _Storage, offset: int, shape: tuple, strides: tuple, *_: Any) -> _Tensor:
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if module == "torch" and name in DTYPES:
            return name
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, pid: tuple) -> _Storage:
        _, kind, key, *_ = pid
        return _Storage(kind, key)
