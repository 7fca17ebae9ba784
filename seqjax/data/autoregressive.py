"""Autoregressive processes of known coefficients: what a forecasting model should find, and the error it cannot beat."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import numpy as np

from seqjax.config import ConfigError
from seqjax.data.task import Example, Task
from seqjax.registry import register_task

VALIDATION_FRACTION = 0.1
LARGEST_RADIUS = 1 - 1e-6  # a double root of 1 is computed as 1 - 1e-8 or so


@register_task("autoregressive")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Autoregressive(Task):
    """The next value of `x_t = a_1 x_(t-1) + ... + a_p x_(t-p) + e_t`, with independent normal `e_t`.

    Every sequence is drawn from the stationary process: the values before its first are as likely as any others. An
    example has `inputs`, `targets` and `weights` `[sequence_length, 1]` float32; the first p - 1 targets, which depend
    on values before the sequence, have weight 0, so that the least loss is that of the coefficients.

    Attributes:
      coefficients: `a_1, ..., a_p`, of a stationary process.
      noise: standard deviation of `e_t`.
      sequence_length: values that a model sees, p or more.
      num_sequences: sequences to train on; a tenth as many more, one at least, are the validation split.
    """

    head: ClassVar[str] = "regression"
    locations: ClassVar[frozenset[str]] = frozenset()
    input_dim: ClassVar[int] = 1
    output_dim: ClassVar[int] = 1
    loss_unit: ClassVar[str] = "MSE"
    content: ClassVar[str] = "autoregressive:1"

    coefficients: tuple[float, ...] = (0.6, 0.3)
    noise: float = 1.0
    sequence_length: int = 128
    num_sequences: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.coefficients or not all(isinstance(a, int | float) for a in self.coefficients):
            raise ConfigError(f"data.coefficients={self.coefficients!r} is not a process; allowed: one or more numbers.")
        radius = np.abs(np.linalg.eigvals(companion(self.coefficients))).max()
        if not radius < LARGEST_RADIUS:
            raise ConfigError(
                f"data.coefficients={self.coefficients!r} is not stationary: the spectral radius of its companion matrix "
                f"is {radius:.6f}; allowed: below 1."
            )
        if self.noise <= 0:
            raise ConfigError(f"data.noise={self.noise} is not positive; allowed: above 0.")
        if self.sequence_length < len(self.coefficients):
            raise ConfigError(
                f"data.sequence_length={self.sequence_length} is too small; allowed: {len(self.coefficients)} or more, the "
                "number of data.coefficients."
            )
        if self.num_sequences < 1:
            raise ConfigError(f"data.num_sequences={self.num_sequences} is too small; allowed: 1 or more.")

    @property
    def length(self) -> int:
        return self.sequence_length

    def examples(self, split: str) -> list[Example]:
        """The sequences of a split, which depend on `seed`."""
        return self._examples[self.check_split(split)]

    @functools.cached_property
    def _examples(self) -> dict[str, list[Example]]:
        counts = {"train": self.num_sequences, "validation": max(1, int(VALIDATION_FRACTION * self.num_sequences))}
        weights = (np.arange(self.sequence_length) >= len(self.coefficients) - 1).astype(np.float32)[:, None]
        made = {}
        for number, (split, count) in enumerate(counts.items()):
            random = np.random.RandomState([self.seed, number])  # a stream that NumPy has frozen
            values = draw(self.coefficients, self.noise, count, self.sequence_length + 1, random).astype(np.float32)
            made[split] = [{"inputs": x[:-1], "targets": x[1:], "weights": weights} for x in values[..., None]]
        return made

    def baselines(self) -> dict[str, float]:
        """The variance of the noise, which no model can beat, and of the process, which predicting 0 costs."""
        variance = self.noise**2
        return {"noise floor": variance, "predicting 0": variance * float(stationary_covariance(self.coefficients)[0, 0])}


def companion(coefficients: tuple[float, ...]) -> np.ndarray:
    """`[p, p]`: maps `(x_(t-1), ..., x_(t-p))` to `(x_t, ..., x_(t-p+1))`, noise aside."""
    order = len(coefficients)
    return np.vstack([np.asarray(coefficients, np.float64), np.eye(order - 1, order)])


def stationary_covariance(coefficients: tuple[float, ...]) -> np.ndarray:
    """`[p, p]`: covariance of p values in a row of a stationary process whose noise has variance 1.

    The sum of `A^k Q A^k'` over all k, with the companion matrix A and the noise Q on the newest value. Each round doubles
    the number of terms (Smith 1968, "Matrix equation XA + BX = C").
    """
    power = companion(coefficients)
    covariance = np.zeros_like(power)
    covariance[0, 0] = 1.0
    while np.abs(power).max() > 1e-12:
        covariance = covariance + power @ covariance @ power.T
        power = power @ power
    return covariance


def draw(coefficients: tuple[float, ...], noise: float, count: int, length: int, random: np.random.RandomState) -> np.ndarray:
    """`[count, length]` float64: independent sequences, stationary from their first value on."""
    order = len(coefficients)
    past = noise * random.standard_normal((count, order)) @ np.linalg.cholesky(stationary_covariance(coefficients)).T
    newest_last = np.asarray(coefficients)[::-1]
    values = np.concatenate([past[:, ::-1], noise * random.standard_normal((count, length))], axis=1)
    for t in range(order, order + length):
        values[:, t] += values[:, t - order : t] @ newest_last
    return values[:, order:]
