"""Names to things: mixers, architectures and tasks, found by importing the folders they live in."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from seqjax.config import ConfigError, Option, check_options, choose, options_of

MIXERS: dict[str, type] = {}
ARCHITECTURES: dict[str, Architecture] = {}
TASKS: dict[str, type] = {}

Options = Mapping[str, Option]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A model that `build` can make, and what it can do.

    Attributes:
      name: what `config.name` says.
      make: called with the checked options as keyword arguments, returns a Linen module.
      options: maps the options given so far to all keys that a config may set (a pattern decides which mixers' keys apply).
      example: options of a small valid model.
      inputs: kinds of input taken: "tokens" (`[B, L]` integers), "continuous" (`[B, L, C]` floats).
      causal: the values of the option `causal` that it supports.
      carries_state: continues from a state when causal, so that it decodes and streams.
      segments: honours `segment_ids`: packed documents do not see one another.
    """

    name: str
    make: Callable[..., Any]
    options: Callable[[Mapping[str, Any]], Options]
    example: Mapping[str, Any]
    inputs: tuple[str, ...] = ("tokens", "continuous")
    causal: tuple[bool, ...] = (True,)
    carries_state: bool = True
    segments: bool = True

    def can(self, **wanted: Any) -> bool:
        """Whether it has every ability in `wanted` (`inputs`, `causal`, `carries_state`, `segments`); None asks nothing."""
        for ability, value in wanted.items():
            offered = getattr(self, ability)
            if value is not None and value != offered and not (isinstance(offered, tuple) and value in offered):
                return False
        return True


def register_mixer(name: str) -> Callable[[type], type]:
    """Class decorator: makes a `Mixer` usable in patterns as `name`."""
    return functools.partial(_claim, MIXERS, name)


def register_task(name: str) -> Callable[[type], type]:
    """Class decorator: makes a `Task` usable in configs as `data.name`."""
    return functools.partial(_claim, TASKS, name)


def register_architecture(
    name: str,
    *,
    example: Mapping[str, Any],
    options: Callable[[Mapping[str, Any]], Options] | None = None,
    **abilities: Any,
) -> Callable[[Callable], Callable]:
    """Decorator for a Linen module class, or a function that returns one; its keyword parameters are the config's keys.

    `abilities` are the last four attributes of `Architecture`.
    """

    def register(make: Callable) -> Callable:
        keys = options or (lambda given: options_of(make))
        _claim(ARCHITECTURES, name, Architecture(name, make, keys, dict(example), **abilities))
        return make

    return register


def list_architectures(
    inputs: str | None = None,
    causal: bool | None = None,
    carries_state: bool | None = None,
    segments: bool | None = None,
) -> list[str]:
    """Names of the registered architectures that can do what is asked; None asks nothing.

    Args:
      inputs: "tokens" or "continuous".
      causal: True for those with a causal form, False for those with a bidirectional one.
      carries_state: whether it continues from a state (decodes, streams).
      segments: whether packed documents stay apart under `segment_ids`.
    """
    load_all()
    asked = {"inputs": inputs, "causal": causal, "carries_state": carries_state, "segments": segments}
    return sorted(name for name, entry in ARCHITECTURES.items() if entry.can(**asked))


def example_config(name: str) -> ConfigDict:
    """A small valid config of architecture `name`, with every option it takes and its default."""
    entry = architecture(name)
    return ConfigDict({"name": name, **check_options(entry.example, entry.options(entry.example), "model")})


def build(config: Mapping[str, Any] | ConfigDict) -> Any:
    """The Linen module that a config describes.

    Args:
      config: a model config (`name` and options), or an experiment config that has one under `model`.
    Raises:
      ConfigError: unknown name or option, wrong type, or values that contradict one another.
    """
    config = config.get("model", config)
    if "name" not in config:
        raise ConfigError("model.name is required and was not given.")
    given = {key: value for key, value in config.items() if key != "name"}
    entry = architecture(config["name"])
    return entry.make(**check_options(given, entry.options(given), "model"))


def architecture(name: str) -> Architecture:
    """The registered architecture `name`, or a ConfigError that names the nearest."""
    load_all()
    return choose(ARCHITECTURES, name, "model.name")


def mixer(name: str) -> type:
    """The registered mixer class `name`, or a ConfigError that names the nearest."""
    load_all()
    return choose(MIXERS, name, "model.pattern: mixer")


def task(name: str) -> type:
    """The registered task class `name`, or a ConfigError that names the nearest."""
    load_all("seqjax.data")
    return choose(TASKS, name, "data.name")


def load_all(*packages: str) -> None:
    """Import every module of the given packages (default: mixers and models), so that their registrations run."""
    for package in packages or ("seqjax.mixers", "seqjax.models"):
        for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
            importlib.import_module(f"{package}.{module.name}")


def _claim(table: dict[str, Any], name: str, thing: Any) -> Any:
    taken = table.get(name)
    if taken is not None and getattr(taken, "__qualname__", None) != getattr(thing, "__qualname__", ""):
        raise ConfigError(f"{name!r} is registered already, as {taken!r}; choose another name.")
    table[name] = thing
    return thing
