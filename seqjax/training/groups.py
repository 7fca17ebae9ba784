"""Optimizer groups: which parameters have a learning rate and a weight decay of their own.

A parameter's path is its keys joined by "/", `repeats/0/mixer/A_log` say. Models declare groups for parameters that are
known to train apart (state-space matrices); a config sets what a group means and can move parameters by path.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax

from seqjax.config import ConfigError, Option, allowed_values, check_options
from seqjax.parallel.rules import axis_names, is_boxed

# What a group means when the config does not say. State-space parameters set time scales, which decay would move.
GROUPS: dict[str, dict[str, Any]] = {"state_space": {"weight_decay": 0.0}, "no_decay": {"weight_decay": 0.0}}
GROUP_OPTIONS = {"learning_rate": Option(float | None, None), "weight_decay": Option(float | None, None)}


@dataclasses.dataclass(frozen=True)
class LeafSettings:
    """How one parameter trains: peak learning rate and weight decay. A leaf of a tree like the parameters."""

    learning_rate: float
    weight_decay: float


def check_groups(groups: Mapping[str, Any] | None) -> None:
    """Raise a ConfigError for a group whose options are not a learning rate and a weight decay."""
    for name, options in (groups or {}).items():
        if not isinstance(options, Mapping):
            raise ConfigError(f"optimizer.groups.{name}={options!r} is not a mapping; allowed keys: {[*GROUP_OPTIONS]}.")
        check_options(options, GROUP_OPTIONS, f"optimizer.groups.{name}")


def check_rules(rules: Any, groups: Mapping[str, Any] | None) -> None:
    """Raise a ConfigError for rules that are not pairs of a valid regular expression and a known group."""
    for rule in rules:
        if len(rule) != 2 or not all(isinstance(part, str) for part in rule):
            raise ConfigError(f"optimizer.rules: {rule!r} is not a pair; allowed: (regular expression, group).")
        pattern, group = rule
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"optimizer.rules: {pattern!r} is not a regular expression: {error}.") from error
        known = {**GROUPS, **(groups or {})}
        if group not in known:
            raise ConfigError(f"optimizer.rules: group {group!r} is unknown; {allowed_values(group, known)}")


def settings_by_leaf(config: Any, parameters: Any, model_groups: tuple[tuple[str, str], ...] = ()) -> Any:
    """A tree like `parameters` (boxed), of `LeafSettings`.

    The first matching rule of the config decides a parameter's group, then the first of the model; a parameter that
    none matches has the optimizer's own learning rate, and decays unless it is a vector. A group's own `weight_decay`
    holds for all of its parameters.

    Raises:
      ConfigError: a rule of the config that matches no parameter, or a group of the model that is not known.
    """
    given = config.groups or {}
    groups = {name: {**GROUPS.get(name, {}), **given.get(name, {})} for name in (*GROUPS, *given)}
    rules = [tuple(rule) for rule in config.rules]
    leaves, structure = jax.tree_util.tree_flatten_with_path(parameters, is_leaf=is_boxed)
    paths = [parameter_path(path) for path, _ in leaves]
    for pattern, _ in rules:
        if not any(re.search(pattern, path) for path in paths):
            raise ConfigError(f"optimizer.rules: {pattern!r} matches no parameter; {allowed_values(pattern, paths)}")
    settings = []
    for path, (_, leaf) in zip(paths, leaves):
        group = next((group for pattern, group in (*rules, *model_groups) if re.search(pattern, path)), None)
        if group is not None and group not in groups:
            raise ConfigError(f"the model's optimizer group {group!r} is not set; give optimizer.groups.{group}.")
        options = groups.get(group, {})
        rate, decay = options.get("learning_rate"), options.get("weight_decay")
        settings.append(
            LeafSettings(
                learning_rate=config.learning_rate if rate is None else rate,
                weight_decay=config.weight_decay * decays(path, leaf, config) if decay is None else decay,
            )
        )
    return jax.tree_util.tree_unflatten(structure, settings)


def decays(path: str, leaf: Any, config: Any) -> bool:
    """Whether weight decay acts on a parameter by default: matrices, not biases, norms or other vectors.

    The leading axis of scanned layers does not make a matrix of a vector; a bias of shape (heads, head_dim) is a bias.
    """
    names = [name for name in axis_names(leaf) if name != "layers"]
    if len(names) < 2 or path.rsplit("/", 1)[-1] == "bias":
        return False
    table = names[0] in ("vocab", "length")  # token and position tables are indexed by their first dimension
    return config.decay_embeddings or not table


def parameter_path(path: tuple[Any, ...]) -> str:
    """A key path of a tree of parameters as `a/b/c`."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)
