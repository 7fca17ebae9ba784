"""An experiment's config: five sections, every key with its default, checked before anything is built."""

from __future__ import annotations

import ast
import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict, config_dict

from seqjax import registry
from seqjax.config import ConfigError, Option, allowed_values, check_options, options_of, plain
from seqjax.models.heads import fits
from seqjax.parallel.mesh import MeshConfig
from seqjax.training.optimizer import OptimizerConfig

SECTIONS = ("model", "data", "optimizer", "training", "mesh")

DECIDED_BY_TASK = ("vocab_size", "input_dim", "num_classes", "output_dim", "horizon", "head")

# Keys that change what is reported, kept or where it is computed, and never what is: a run may resume with others.
REPORTING = (
    "training.log_every",
    "training.eval_every",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.tensorboard",
    "training.plot",
    "training.profile_steps",
    "training.sample_tokens",
    "training.sample_temperature",
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
    "mesh.sequence",
)


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """The options of `config.training`.

    Attributes:
      num_steps: updates in the whole run.
      seed: of parameters and dropout.
      microbatches: parts that a batch is split into to save memory; the update is that of the whole batch.
      ema_decay: decay of an exponential moving average of the parameters, which evaluation then uses; None keeps none.
      log_every, eval_every, checkpoint_every: steps between log lines, evaluations, checkpoints; 0 is never (the end of
        the run always evaluates and saves).
      keep_checkpoints: how many of the newest checkpoints stay.
      tensorboard: also write TensorBoard events.
      plot: draw loss.png at each evaluation.
      profile_steps: write a profiler trace of so many steps, shortly after the start; 0 writes none.
      sample_tokens: how many tokens to generate at the end, for models that generate; 0 is none.
      sample_temperature: of that sample.
    """

    num_steps: int = 1000
    seed: int = 0
    microbatches: int = 1
    ema_decay: float | None = None
    log_every: int = 10
    eval_every: int = 100
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    tensorboard: bool = False
    plot: bool = True
    profile_steps: int = 0
    sample_tokens: int = 0
    sample_temperature: float = 0.8

    def __post_init__(self) -> None:
        for key in ("num_steps", "microbatches", "keep_checkpoints"):
            if getattr(self, key) < 1:
                raise ConfigError(f"training.{key}={getattr(self, key)} is not positive; allowed: 1 and above.")
        for key in ("log_every", "eval_every", "checkpoint_every", "profile_steps", "sample_tokens"):
            if getattr(self, key) < 0:
                raise ConfigError(f"training.{key}={getattr(self, key)} is negative; allowed: 0 and above.")
        if self.ema_decay is not None and not 0.0 <= self.ema_decay < 1.0:
            raise ConfigError(
                f"training.ema_decay={self.ema_decay} is out of range; allowed: 0.0 up to, not including, 1.0, or None."
            )
        if self.sample_temperature < 0:
            raise ConfigError(f"training.sample_temperature={self.sample_temperature} is negative; allowed: 0 and above.")


SCHEMAS = {"optimizer": OptimizerConfig, "training": TrainingConfig, "mesh": MeshConfig}


def experiment_config(
    model: Mapping[str, Any],
    data: Mapping[str, Any],
    optimizer: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    mesh: Mapping[str, Any] | None = None,
) -> ConfigDict:
    """An experiment's config with every key and its default, so that `--config.section.key=value` can set any of them.

    Args:
      model: `name` of an architecture, and its options.
      data: `name` of a task, and its options.
      optimizer, training, mesh: options of `OptimizerConfig`, `TrainingConfig`, `MeshConfig`.
    Raises:
      ConfigError: an unknown name or key, or a value of the wrong type or out of range.
    """
    given = {"model": model, "data": data, "optimizer": optimizer, "training": training, "mesh": mesh}
    return complete(given)


def complete(config: Mapping[str, Any] | ConfigDict) -> ConfigDict:
    """Check a config and fill in what it leaves out; a complete config passes unchanged.

    Raises:
      ConfigError: as `experiment_config`, or a section that does not exist.
    """
    for section in config:
        if section not in SECTIONS:
            raise ConfigError(f"config.{section} is not a section; {allowed_values(section, SECTIONS)}")
    filled = {section: _section(section, _given(section, config.get(section))) for section in SECTIONS}
    return ConfigDict(filled)


def section_of(config: ConfigDict, section: str) -> Any:
    """Section `optimizer`, `training` or `mesh` of a complete config, as its dataclass."""
    return SCHEMAS[section](**_given(section, config[section]))


def resolve(config: ConfigDict, task: Any) -> ConfigDict:
    """The config with what the task decides filled into its model: the keys `DECIDED_BY_TASK`.

    Only keys that the architecture has and that stand at the architecture's default are filled. A vocabulary may be
    larger than the task's (padded to a multiple of 128, say), and a head may be any that serves the task's.

    Raises:
      ConfigError: the config says otherwise than the task.
    """
    model = config.model.copy_and_resolve_references()
    defaults = registry.architecture(model.name).options(_options(model))
    for key in DECIDED_BY_TASK:
        wanted = getattr(task, key, None)
        if key not in model or wanted is None or model[key] == wanted:
            continue
        value = model[key]
        if key == "vocab_size" and value is not None and value > wanted:
            continue
        if key == "head" and fits(value, wanted):
            continue
        if value is not None and value != defaults[key].default:
            raise ConfigError(f"model.{key}={value!r} contradicts data.name={config.data.name!r}, which has {wanted!r}.")
        with model.ignore_type():
            model[key] = wanted
    return ConfigDict({section: model if section == "model" else config[section] for section in SECTIONS})


def with_data(config: ConfigDict, settings: Sequence[str]) -> ConfigDict:
    """The config with options of its task set anew, each by `KEY=VALUE`; the model stays as it was trained."""
    given = config.to_dict()
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set={setting} is not of the form KEY=VALUE.")
        try:
            given["data"][key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            given["data"][key] = value  # a string without quotes
    return complete(given)


def _options(section: Mapping[str, Any] | ConfigDict) -> dict[str, Any]:
    return {key: value for key, value in _given("", section).items() if key != "name"}


def _given(section: str, value: Any) -> dict[str, Any]:
    """A section's keys as a dict; nested ConfigDicts become dicts, placeholders their values."""
    if value is None:
        return {}
    if not isinstance(value, Mapping | ConfigDict):
        raise ConfigError(f"config.{section}={value!r} is not a section; allowed: a mapping from keys to values.")
    return {key: plain(v) if isinstance(v, Mapping | ConfigDict) else v for key, v in value.items()}


def _section(section: str, given: dict[str, Any]) -> dict[str, Any]:
    if section in SCHEMAS:
        allowed = _schema(section)
        checked = check_options(given, allowed, section)
        SCHEMAS[section](**checked)  # the dataclass checks ranges and names
        return _with_placeholders(checked, allowed)
    if "name" not in given:
        raise ConfigError(f"{section}.name is required and was not given.")
    name = given.pop("name")
    allowed = registry.architecture(name).options(given) if section == "model" else options_of(registry.task(name))
    return {"name": name, **_with_placeholders(check_options(given, allowed, section), allowed)}


def _schema(section: str) -> dict[str, Option]:
    fields = dataclasses.fields(SCHEMAS[section])
    hints = typing.get_type_hints(SCHEMAS[section])
    return {field.name: Option(hints[field.name], field.default) for field in fields}


def _with_placeholders(values: Mapping[str, Any], allowed: Mapping[str, Option]) -> dict[str, Any]:
    """Values with None under a plain type replaced by a typed placeholder, so that the command line can set them."""
    return {key: value if value is not None else _placeholder(allowed[key].annotation) for key, value in values.items()}


def _placeholder(annotation: Any) -> Any:
    kinds = [kind for kind in typing.get_args(annotation) if kind is not type(None)] or [annotation]
    for kind in (float, int, str, bool, tuple):
        if kind in kinds:
            return config_dict.placeholder(kind)
    return None
