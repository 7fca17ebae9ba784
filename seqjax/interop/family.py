"""What tells a family of pretrained models: its config's keys, and which tensor is which parameter.

Both are tables, written once and read in both directions: `Key` rows turn a `config.json` into a model's options and back,
`Row` rows turn a file's tensors into parameters and back. A family is one file that fills in a `Family`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from seqjax.config import REQUIRED, ConfigError, allowed_values
from seqjax.interop import layout
from seqjax.models.sequence_model import SequenceModel

ACTIVATIONS = {
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu": "gelu_exact",
    "relu": "relu",
    "relu2": "relu_squared",
    "silu": "silu",
    "swish": "silu",
    "sigmoid": "sigmoid",
    "linear": "identity",
}
"""Names of activations in a `config.json`, and in a model; the first of several is the one written."""


@dataclasses.dataclass(frozen=True)
class Key:
    """One entry of `config.json` and the model option that says the same.

    Attributes:
      entry: its name in the file.
      option: the model's.
      default: of the entry, as its family defines it.
      read: the option's value of an entry's; raises ConfigError for one that no model has. None leaves the option to the
        caller: the entry is only written.
      write: the entry's value of an option's.
    """

    entry: str
    option: str
    default: Any = REQUIRED
    read: Callable[[Any], Any] | None = lambda value: value
    write: Callable[[Any], Any] = lambda value: value


def activation_key(entry: str, default: str) -> Key:
    """The key of an activation's name."""

    def read(value: Any) -> str:
        if value not in ACTIVATIONS:
            raise ConfigError(f"config.json: {entry}={value!r} is not served; {allowed_values(value, ACTIVATIONS)}")
        return ACTIVATIONS[value]

    def write(value: Any) -> str | None:
        return next((theirs for theirs, ours in ACTIVATIONS.items() if ours == value), None)

    return Key(entry, "activation", default, read, write)


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor of the file and the parameter, or parameters, that it holds.

    A row serves the models that have its parameters: biases and untied heads need no further condition.

    Attributes:
      tensor: name in the file; `{}` stands for the layer's number.
      parameters: path, `/` between its parts, or several whose tensors the file joins along `axis`. Of a layer: the path
        inside its block, where `norm_0` and `attention_0` belong to the block's first sub-layer.
      layout: see `seqjax.interop.layout`; of each parameter where there are several.
    """

    tensor: str
    parameters: str | tuple[str, ...]
    layout: str = ""
    axis: int = 0


@dataclasses.dataclass(frozen=True)
class Slot:
    """A row's tensor in one model: its name, the whole paths of its parameters, and the index on their layers axis."""

    tensor: str
    paths: tuple[str, ...]
    index: int | None
    row: Row

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """The tensor's shape in the file, of a model whose parameters have `shapes`."""
        parts = [layout.file_shape(self.row.layout, shape) for shape in self._part_shapes(shapes)]
        joined = list(parts[0])
        joined[self.row.axis] = sum(part[self.row.axis] for part in parts)
        return tuple(joined)

    def store(self, tensor: np.ndarray, parameters: Mapping[str, np.ndarray]) -> None:
        """Copy the file's `tensor` into the `parameters`, in their dtype."""
        shapes = self._part_shapes({path: parameters[path].shape for path in self.paths})
        widths = [layout.file_shape(self.row.layout, shape)[self.row.axis] for shape in shapes]
        parts = np.split(tensor, np.cumsum(widths)[:-1], axis=self.row.axis)
        for path, part, shape in zip(self.paths, parts, shapes):
            own = layout.from_file(self.row.layout, part, shape)
            parameters[path][... if self.index is None else self.index] = own

    def fetch(self, parameters: Mapping[str, np.ndarray]) -> np.ndarray:
        """The file's tensor, made of the `parameters`."""
        own = [parameters[path] if self.index is None else parameters[path][self.index] for path in self.paths]
        parts = [layout.to_file(self.row.layout, part) for part in own]
        return np.concatenate(parts, axis=self.row.axis) if len(parts) > 1 else parts[0]

    def _part_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[int, ...]]:
        return [shapes[path][0 if self.index is None else 1 :] for path in self.paths]


@dataclasses.dataclass(frozen=True)
class Family:
    """Pretrained models of one `model_type`, all of them residual stacks of one pattern.

    Attributes:
      model_type: as `config.json` says it.
      model: options that all its models share; `name` and `pattern` among them.
      keys: entries of `config.json` that say a model's options.
      fixed: entries of which one value is served.
      written: further entries for other programs' use, not read.
      frame: tensors outside the layers.
      blocks: tensors of the layers, one table per block of the pattern.
      prefix: of tensor names; files saved without the head lack it.
      ignored: regular expressions on the whole names of tensors that hold no parameters.
      aliases: other names of tensors that files use, and the tables' own.
      head: the tensor that repeats the embedding where the two are tied.
      derive: adds entries that follow from others to a `config.json` that is written.
      normalize: rewrites older or newer forms of a `config.json` to the one that `keys` and `fixed` read.
    """

    model_type: str
    model: Mapping[str, Any]
    keys: tuple[Key, ...]
    frame: tuple[Row, ...]
    blocks: tuple[tuple[Row, ...], ...]
    prefix: str
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    written: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    head: str = "lm_head.weight"
    derive: Callable[[dict[str, Any]], dict[str, Any]] = dict
    normalize: Callable[[dict[str, Any]], dict[str, Any]] = dict

    def read_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The model config that a `config.json` describes.

        Raises:
          ConfigError: an entry is missing, or has a value that is not served.
        """
        config = self.normalize(dict(config))
        for entry, served in ({"quantization_config": None} | dict(self.fixed)).items():
            if config.get(entry, served) != served:
                raise ConfigError(f"config.json: {entry}={config[entry]!r} is not served; allowed: {served!r}.")
        options = dict(self.model)
        for key in self.keys:
            value = config.get(key.entry, key.default)
            if value is REQUIRED:
                raise ConfigError(f"config.json: {key.entry} is required and was not given.")
            if key.read is not None:
                options[key.option] = key.read(value)
        return options

    def write_config(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The `config.json` of a model with these options; it reads back the same only if the model is of the family."""
        said = {key.entry: key.write(options.get(key.option)) for key in self.keys}
        return self.derive({"model_type": self.model_type, **self.written, **self.fixed, **said})

    def slots(self, model: SequenceModel, paths: Iterable[str]) -> list[Slot]:
        """Every tensor that holds a parameter of `model`, whose parameters have these `paths`.

        Raises:
          ConfigError: the tables leave a parameter out.
        """
        paths = set(paths)
        slots = [slot for slot in self._all_slots(model) if paths.issuperset(slot.paths)]
        left = paths.difference(*(slot.paths for slot in slots))
        if left:
            raise ConfigError(f"{self.model_type} files have no tensor for the parameters {listed(left)}.")
        return slots

    def _all_slots(self, model: SequenceModel) -> Iterator[Slot]:
        for row in self.frame:
            yield Slot(row.tensor, _tuple(row.parameters), None, row)
        for layer in range(model.num_layers):
            repeat, block = divmod(layer, len(model.pattern))
            stacked = repeat < model.repeats
            root = "repeats" if stacked else "remainder"
            before = sum(len(sublayers) for sublayers in model.pattern[:block])
            for row in self.blocks[block]:
                paths = tuple(f"{root}/{_shifted(path, before)}" for path in _tuple(row.parameters))
                yield Slot(row.tensor.format(layer), paths, repeat if stacked else None, row)


def listed(names: Iterable[str], limit: int = 8) -> str:
    """Names in a sentence: the first few of them, sorted."""
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _shifted(path: str, by: int) -> str:
    """A block's own path inside its unit, whose sub-layers are numbered through: `norm_0/scale` becomes `norm_2/scale`."""
    return re.sub(r"_(\d+)", lambda number: f"_{int(number[1]) + by}", path, count=1)


def _tuple(paths: str | tuple[str, ...]) -> tuple[str, ...]:
    return (paths,) if isinstance(paths, str) else paths
