"""Optimizers: how gradients become updates, and which parameters train apart from the rest."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax
from jaxtyping import Array

from seqjax.config import ConfigError, choose
from seqjax.training.groups import check_groups, check_rules, settings_by_leaf
from seqjax.training.schedules import SCHEDULES, Schedule


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The options of `config.optimizer`.

    Attributes:
      name: a key of `OPTIMIZERS`.
      learning_rate: the peak; the schedule multiplies it.
      schedule: a key of `SCHEDULES`.
      warmup_steps: updates over which the rate rises linearly.
      decay_steps: updates over which it falls; None is the rest of the run ("cosine") or its last fifth ("wsd").
      final_fraction: of the peak, where the fall ends.
      weight_decay: decoupled (adamw, lion, adafactor) or added to the gradient (adam, sgd).
      decay_embeddings: whether decay also shrinks token and position tables.
      beta1, beta2: decay of the first and second moments; beta1 is sgd's momentum.
      epsilon: added to the root of the second moment.
      clip_norm: the largest global norm of the gradient; None does not clip.
      groups: `{group: {"learning_rate": ..., "weight_decay": ...}}`, for the groups that models declare and rules name.
      rules: `((regular expression on a parameter's path, group), ...)`; they win over what the model declares.
    """

    name: str = "adamw"
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    warmup_steps: int = 0
    decay_steps: int | None = None
    final_fraction: float = 0.1
    weight_decay: float = 0.0
    decay_embeddings: bool = True
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    clip_norm: float | None = 1.0
    groups: dict[str, Any] | None = None
    rules: tuple = ()

    def __post_init__(self) -> None:
        choose(OPTIMIZERS, self.name, "optimizer.name")
        choose(SCHEDULES, self.schedule, "optimizer.schedule")
        for key in ("learning_rate", "warmup_steps", "weight_decay", "final_fraction"):
            _refuse(getattr(self, key) < 0, key, getattr(self, key), "is negative; allowed: 0 and above.")
        for key in ("clip_norm", "decay_steps"):
            value = getattr(self, key)
            _refuse(value is not None and value <= 0, key, value, "is not positive; allowed: above 0, or None.")
        for key in ("beta1", "beta2"):
            value = getattr(self, key)
            _refuse(not 0.0 <= value < 1.0, key, value, "is out of range; allowed: 0.0 up to, not including, 1.0.")
        check_groups(self.groups)
        check_rules(self.rules, self.groups)
        # Pairs read back from JSON are lists; a frozen dataclass is set through object.
        object.__setattr__(self, "rules", tuple(tuple(rule) for rule in self.rules))


def _refuse(mistaken: bool, key: str, value: Any, why: str) -> None:
    if mistaken:
        raise ConfigError(f"optimizer.{key}={value} {why}")


def make_schedule(config: OptimizerConfig, num_steps: int) -> Schedule:
    """The schedule as a fraction of the peak learning rate, by number of updates made."""
    make = SCHEDULES[config.schedule]
    return make(num_steps, config.warmup_steps, config.decay_steps, config.final_fraction)


def make_optimizer(
    config: OptimizerConfig,
    num_steps: int,
    parameters: Any,
    model_groups: tuple[tuple[str, str], ...] = (),
) -> optax.GradientTransformation:
    """The transformation from gradients to updates.

    Args:
      num_steps: length of the run, for the schedule.
      parameters: the boxed tree of (abstract) parameters; names of dimensions decide what decays.
      model_groups: what `model.optimizer_groups()` returns.
    Raises:
      ConfigError: a rule that matches no parameter, or a group nobody has set.
    """
    kind = OPTIMIZERS[config.name]
    settings = settings_by_leaf(config, parameters, model_groups)
    decay = _add_scaled_parameters(jax.tree.map(lambda s: s.weight_decay, settings))
    rates = optax.stateless(
        lambda updates, _: jax.tree.map(lambda u, s: u * s.learning_rate, updates, settings),
    )
    schedule = make_schedule(config, num_steps)
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    scale = kind.scale(config)
    direction = optax.chain(scale, decay) if kind.decoupled else optax.chain(decay, scale)
    return optax.chain(clip, direction, rates, optax.scale_by_schedule(lambda step: -schedule(step)))


def _add_scaled_parameters(decays: Any) -> optax.GradientTransformation:
    def add(update: Array, parameter: Array, decay: float) -> Array:
        return update + decay * parameter if decay else update

    return optax.stateless(lambda updates, parameters: jax.tree.map(add, updates, parameters, decays))


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """A direction of descent, and whether weight decay is added after it (decoupled) or to the gradient before."""

    scale: Callable[[OptimizerConfig], optax.GradientTransformation]
    decoupled: bool


def _adam(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)


def _adafactor(config: OptimizerConfig) -> optax.GradientTransformation:
    """Shazeer and Stern 2018: factored second moments, clipped updates, rates relative to each parameter's scale."""
    return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms())


OPTIMIZERS = {
    "adafactor": Optimizer(_adafactor, decoupled=True),
    "adam": Optimizer(_adam, decoupled=False),
    "adamw": Optimizer(_adam, decoupled=True),
    "lion": Optimizer(lambda config: optax.scale_by_lion(config.beta1, config.beta2), decoupled=True),
    "sgd": Optimizer(lambda config: optax.trace(config.beta1), decoupled=False),
}
