"""Long-horizon forecasting of multivariate time series: windows of the past, and the values that follow them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import ClassVar

import numpy as np

from seqjax.config import ConfigError, choose
from seqjax.data.task import Example, Task
from seqjax.registry import register_task

DATASETS = ("ETTh1", "ETTh2")
SOURCE = "https://github.com/zhouhaoyi/ETDataset (folder ETT-small)"
TARGET = "OT"  # the oil temperature: what univariate forecasts are of

DAY = 24
MONTH = 30 * DAY
ENDS = {"train": 12 * MONTH, "validation": 16 * MONTH, "test": 20 * MONTH}
"""The hour at which each split ends; what the files hold after the last is left out, as Informer and its successors do."""


@register_task("forecasting")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Forecasting(Task):
    """The next `horizon` hours of a table of hourly series, from the `lookback` hours before them.

    The electricity transformer data and its split into 12, 4 and 4 months are those of Zhou et al. 2021 ("Informer"):
    every channel has the mean and standard deviation of the training months taken away. Windows start at every hour;
    those of "validation" and "test" reach back into the split before, so that every hour of a split is forecast.

    An example has `inputs` `[lookback, C]`, `targets` and `weights` `[horizon, C]`, all float32; C is 7, or 1.

    Attributes:
      dataset: "ETTh1" or "ETTh2".
      manual_dir: folder that holds `<dataset>.csv`. TFDS has no builder of these data, so it must be given.
      lookback: hours that a model sees.
      horizon: hours that it forecasts.
      univariate: only the column "OT", forecast from its own past.
    """

    head: ClassVar[str] = "forecast"
    splits: ClassVar[tuple[str, ...]] = tuple(ENDS)
    locations: ClassVar[frozenset[str]] = frozenset({"manual_dir"})
    loss_unit: ClassVar[str] = "MSE"

    dataset: str = "ETTh1"
    manual_dir: str | None = None
    lookback: int = 96
    horizon: int = 96
    univariate: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        choose(dict.fromkeys(DATASETS), self.dataset, "data.dataset")
        for key in ("lookback", "horizon"):
            if getattr(self, key) < 1:
                raise ConfigError(f"data.{key}={getattr(self, key)} is too small; allowed: 1 or more.")
        held_out = ENDS["validation"] - ENDS["train"]
        if self.lookback + self.horizon > ENDS["train"] or self.horizon > held_out:
            raise ConfigError(
                f"data.lookback={self.lookback} and data.horizon={self.horizon} do not fit the splits; allowed: a horizon "
                f"of up to {held_out} hours, and {ENDS['train']} for both together."
            )
        if self.manual_dir is None:
            raise ConfigError(f"data.manual_dir is required: a folder that holds {self._path.name}, from {SOURCE}.")
        if not self._path.is_file():
            raise ConfigError(f"data.manual_dir={self.manual_dir!r} does not hold {self._path.name}; it is from {SOURCE}.")

    @property
    def _path(self) -> Path:
        return Path(self.manual_dir or "").expanduser() / f"{self.dataset}.csv"

    @property
    def length(self) -> int:
        return self.lookback

    @property
    def input_dim(self) -> int:
        return self._series.shape[1]

    @property
    def output_dim(self) -> int:
        return self.input_dim

    @functools.cached_property
    def content(self) -> str:
        return hashlib.sha256(self._path.read_bytes()).hexdigest()[:16]

    @functools.cached_property
    def _series(self) -> np.ndarray:
        """`[hours, C]` float32: the whole table, standardised by its training months."""
        values = read_table(self._path, TARGET if self.univariate else None)
        if len(values) < ENDS["test"]:
            raise ConfigError(f"{self._path} holds {len(values)} hours; needed: {ENDS['test']}, for 20 months of 30 days.")
        train = values[: ENDS["train"]]
        std = train.std(axis=0)
        return ((values - train.mean(axis=0)) / np.where(std > 0, std, 1)).astype(np.float32)

    def examples(self, split: str) -> Windows:
        """Windows of a split, at every hour."""
        before = self.splits.index(self.check_split(split)) - 1
        start = ENDS[self.splits[before]] - self.lookback if before >= 0 else 0
        return Windows(self._series[start : ENDS[split]], self.lookback, self.horizon)

    def baselines(self) -> dict[str, float]:
        """MSE on the validation split of repeating each window's last value, its last day, and its mean."""
        past, future = np.split(self.examples("validation").all(), [self.lookback], axis=1)
        forecasts = {"last value": past[:, -1:], "window mean": past.mean(axis=1, keepdims=True, dtype=np.float64)}
        if self.lookback >= DAY:
            hours = np.arange(self.horizon) % DAY
            forecasts["last day"] = past[:, self.lookback - DAY + hours]
        return {name: float(np.mean(np.square(future - f), dtype=np.float64)) for name, f in forecasts.items()}


class Windows:
    """Examples from windows of `[N, C]` series: window `i` begins at row `i`."""

    def __init__(self, series: np.ndarray, lookback: int, horizon: int) -> None:
        self._series, self._lookback, self._span = series, lookback, lookback + horizon

    def __len__(self) -> int:
        return len(self._series) - self._span + 1

    def __getitem__(self, index: int) -> Example:
        past, future = np.split(self._series[index : index + self._span], [self._lookback])
        return {"inputs": past, "targets": future, "weights": np.ones_like(future)}

    def all(self) -> np.ndarray:
        """`[len(self), lookback + horizon, C]`: a view of every window."""
        return np.lib.stride_tricks.sliding_window_view(self._series, self._span, axis=0).swapaxes(1, 2)


def read_table(path: Path, column: str | None = None) -> np.ndarray:
    """`[N, C]` float64 of a CSV file whose first column is the time: all its other columns, or the one named.

    Raises:
      ConfigError: no such column, or something that is not a number.
    """
    with path.open() as file:
        names = file.readline().strip().split(",")
    if column is not None and column not in names[1:]:
        raise ConfigError(f"{path} has no column {column!r}; it has: {', '.join(names[1:])}.")
    wanted = range(1, len(names)) if column is None else (names.index(column),)
    try:
        return np.loadtxt(path, delimiter=",", skiprows=1, usecols=wanted, ndmin=2)
    except ValueError as error:
        raise ConfigError(f"{path} is not a table of numbers: {error}.") from error
