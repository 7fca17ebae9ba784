"""What a config may say: options and their types, errors that teach, and what makes two configs the same.

Every configurable thing (an architecture, a task, an optimizer) is a callable or a dataclass with annotated keyword
parameters. Its signature *is* its schema: nothing is declared twice.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import inspect
import json
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

REQUIRED = inspect.Parameter.empty


class ConfigError(ValueError):
    """A mistake in a config or on the command line, told in one sentence."""


@dataclasses.dataclass(frozen=True)
class Option:
    """One key that a config may set: its type annotation and its default (`REQUIRED` when there is none)."""

    annotation: Any
    default: Any = REQUIRED


def options_of(target: Callable[..., Any], exclude: Iterable[str] = ()) -> dict[str, Option]:
    """The keyword options of a function or class, read from its signature, without those in `exclude`."""
    skipped = {"self", "parent", "name", *exclude}
    return {
        key: Option(_annotation(target, key), parameter.default)
        for key, parameter in inspect.signature(target).parameters.items()
        if key not in skipped and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }


def _annotation(target: Callable[..., Any], key: str) -> Any:
    """The type annotation of one option, evaluated where it was written (a base class may live in another module)."""
    for owner in inspect.getmro(target) if inspect.isclass(target) else (target,):
        annotation = inspect.get_annotations(owner).get(key)
        if isinstance(annotation, str):
            return eval(annotation, vars(sys.modules[owner.__module__]))
        if annotation is not None:
            return annotation
    return Any


def check_options(given: Mapping[str, Any], allowed: Mapping[str, Option], where: str) -> dict[str, Any]:
    """Check keys and types of `given` against `allowed` and return them with defaults filled in.

    Raises:
      ConfigError: unknown key, missing required key, or a value of another type; the message starts with `where`.
    """
    for key in given:
        if key not in allowed:
            raise ConfigError(f"{where}.{key} is not an option; " + allowed_values(key, allowed))
    checked = {}
    for key, option in allowed.items():
        if key not in given and option.default is REQUIRED:
            raise ConfigError(f"{where}.{key} is required and was not given.")
        value = given.get(key, option.default)
        checked[key] = _check_type(value, option.annotation, f"{where}.{key}") if key in given else value
    return checked


def choose(table: Mapping[str, Any], name: Any, where: str) -> Any:
    """`table[name]`, or a ConfigError that names `where`, what is allowed and the nearest valid name."""
    if not isinstance(name, str) or name not in table:
        raise ConfigError(f"{where}={name!r} is unknown; " + allowed_values(name, table))
    return table[name]


def allowed_values(given: Any, allowed: Iterable[str]) -> str:
    """The second half of an error sentence: the nearest valid name and all that are allowed."""
    names = sorted(str(a) for a in allowed)
    near = difflib.get_close_matches(str(given), names, n=1)
    hint = f"did you mean {near[0]!r}? Allowed" if near else "allowed"
    return f"{hint}: {', '.join(names) or 'none'}."


def _check_type(value: Any, annotation: Any, where: str) -> Any:
    if annotation is Any:
        return value
    kinds = _kinds(annotation)
    if value is None and type(None) in kinds:
        return None
    if isinstance(value, list):
        value = tuple(value)
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        return value if int in kinds else float(value)
    plain = tuple(k for k in kinds if isinstance(k, type))
    if isinstance(value, bool) and bool not in plain and int in plain:
        raise ConfigError(f"{where}={value!r} is a bool; allowed: {_describe(kinds)}.")
    if plain and not isinstance(value, plain):
        raise ConfigError(f"{where}={value!r} is of type {type(value).__name__}; allowed: {_describe(kinds)}.")
    return value


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """The run-time types an annotation admits: unions opened, generics reduced to their origin."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return tuple(k for part in typing.get_args(annotation) for k in _kinds(part))
    if origin is typing.Literal:
        return tuple({type(v) for v in typing.get_args(annotation)})
    return (origin or annotation,)


def _describe(kinds: tuple[Any, ...]) -> str:
    return " or ".join("None" if k is type(None) else getattr(k, "__name__", str(k)) for k in kinds)


def plain(config: Any) -> Any:
    """A ConfigDict (or any nested mapping) as plain, JSON-ready Python values; tuples become lists."""
    if isinstance(config, ConfigDict | Mapping):
        return {key: plain(value) for key, value in config.items()}
    if isinstance(config, tuple | list):
        return [plain(value) for value in config]
    return config


def digest(config: Any) -> str:
    """A short hash of a config's content, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(plain(config), sort_keys=True, default=str).encode()).hexdigest()[:16]


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """`{"model.embed_dim": 64, ...}`: every leaf of a config under its dotted key."""
    flat: dict[str, Any] = {}
    for key, value in plain(config).items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def differing_keys(a: Any, b: Any) -> list[str]:
    """Dotted keys whose values differ between two configs, sorted."""
    left, right = flatten(a), flatten(b)
    absent = object()
    return sorted(k for k in left.keys() | right.keys() if left.get(k, absent) != right.get(k, absent))
