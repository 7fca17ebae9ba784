"""Marked Hawkes processes of known intensity: what a model of events should find, and the likelihood it cannot beat."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

import numpy as np

from seqjax.config import ConfigError
from seqjax.data.task import Example, Task
from seqjax.registry import register_task

VALIDATION_FRACTION = 0.1


class Process(NamedTuple):
    """A Hawkes process of M marks with exponential kernels (Hawkes 1971, "Spectra of some self-exciting processes").

    Events of mark i come at the rate `background_i + sum_k branching_ij decay_ij exp(-decay_ij (t - t_k))`, a sum over all
    earlier events k, with j the mark of each.

    Attributes:
      background: `[M]`, events per unit of time.
      branching: `[M, M]`, how many events of mark i one event of mark j brings forth by itself.
      decay: `[M, M]`, the rate at which that excitation fades, per unit of time.
    """

    background: np.ndarray
    branching: np.ndarray
    decay: np.ndarray

    def added(self, marks: np.ndarray) -> np.ndarray:
        """`[N, M, M]`: what events of marks `[N]` add to each mark's rate, in the column of the event's own mark."""
        return self.branching * self.decay * np.eye(len(self.background))[marks][:, None]


@register_task("hawkes")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Hawkes(Task):
    """When the next event comes, and of which mark, from all events before it.

    Sequences start at time 0 without a past and end with their last event, so the likelihood of a sequence is the product
    of those of its events. An example has `inputs` `[sequence_length, 1 + M]` float32, the event before: the logarithm of
    the time since the one before that, less `log_mean` and divided by `log_std`, and its mark, one of M ones; all 0 before
    the first event. `targets` `[sequence_length, 2]` float32 are the time to the next event and its mark; `weights`
    `[sequence_length]` float32.

    Attributes:
      background, branching, decay: of the `Process`, by rows; the spectral radius of `branching` is below 1.
      sequence_length: events of a sequence.
      num_sequences: sequences to train on; a tenth as many more, one at least, are the validation split.
    """

    head: ClassVar[str] = "point_process"
    locations: ClassVar[frozenset[str]] = frozenset()
    loss_unit: ClassVar[str] = "nats/event"
    content: ClassVar[str] = "hawkes:1"

    background: tuple[float, ...] = (0.1, 0.1, 0.1)
    branching: tuple[tuple[float, ...], ...] = ((0.1, 0.0, 0.7), (0.7, 0.1, 0.0), (0.0, 0.7, 0.1))
    decay: tuple[tuple[float, ...], ...] = ((0.5, 1.0, 4.0), (4.0, 0.5, 1.0), (1.0, 4.0, 0.5))
    sequence_length: int = 64
    num_sequences: int = 4000

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_process()
        for key, least in (("sequence_length", 2), ("num_sequences", 1)):
            if getattr(self, key) < least:
                raise ConfigError(f"data.{key}={getattr(self, key)} is too small; allowed: {least} or more.")

    def _check_process(self) -> None:
        marks = len(self.background)
        if not marks or not all(isinstance(rate, int | float) and rate > 0 for rate in self.background):
            raise ConfigError(f"data.background={self.background!r} is not a rate per mark; allowed: numbers above 0.")
        for key, allowed, fits in (
            ("branching", "0 and above", lambda entries: (entries >= 0).all()),
            ("decay", "above 0", lambda entries: (entries > 0).all()),
        ):
            rows = getattr(self, key)
            square = [len(row) for row in rows if isinstance(row, tuple | list)] == [marks] * marks == [marks] * len(rows)
            if not square or not fits(np.array(rows, np.float64)):
                raise ConfigError(
                    f"data.{key}={rows!r} is no matrix of the marks; allowed: {marks} x {marks} numbers, {allowed}."
                )
        radius = np.abs(np.linalg.eigvals(self.process.branching)).max()
        if not radius < 1:
            raise ConfigError(
                f"data.branching={self.branching!r} is not stationary: its spectral radius is {radius:.6f}; allowed: below 1."
            )

    @functools.cached_property
    def process(self) -> Process:
        return Process(*(np.array(values, np.float64) for values in (self.background, self.branching, self.decay)))

    @property
    def length(self) -> int:
        return self.sequence_length

    @property
    def input_dim(self) -> int:
        return 1 + self.output_dim

    @property
    def output_dim(self) -> int:
        """The number of marks."""
        return len(self.background)

    @property
    def log_mean(self) -> float:
        """Mean of the logarithms of the training sequences' times between events."""
        return self._log_moments[0]

    @property
    def log_std(self) -> float:
        """Their standard deviation."""
        return self._log_moments[1]

    @functools.cached_property
    def _log_moments(self) -> tuple[float, float]:
        logs = np.log(self.events["train"][0])
        return float(logs.mean()), float(logs.std())

    @functools.cached_property
    def events(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Of each split, times between events `[N, L]` float64, the first from time 0, and marks `[N, L]`; they depend on
        `seed`."""
        counts = {"train": self.num_sequences, "validation": max(1, int(VALIDATION_FRACTION * self.num_sequences))}
        streams = (np.random.RandomState([self.seed, number]) for number in range(len(counts)))  # that NumPy has frozen
        return {
            split: draw(self.process, count, self.sequence_length, random)
            for (split, count), random in zip(counts.items(), streams)
        }

    def examples(self, split: str) -> list[Example]:
        return self._examples[self.check_split(split)]

    @functools.cached_property
    def _examples(self) -> dict[str, list[Example]]:
        weights = np.ones(self.sequence_length, np.float32)
        made = {}
        for split, (gaps, marks) in self.events.items():
            past = np.concatenate(
                [(np.log(gaps)[..., None] - self.log_mean) / self.log_std, np.eye(self.output_dim)[marks]], -1
            )
            inputs = np.pad(past[:, :-1], ((0, 0), (1, 0), (0, 0))).astype(np.float32)
            targets = np.stack([gaps, marks], axis=-1).astype(np.float32)
            made[split] = [{"inputs": x, "targets": y, "weights": weights} for x, y in zip(inputs, targets)]
        return made

    def baselines(self) -> dict[str, float]:
        """Nats per event of the process that made the sequences, which no model can beat; of the same where the mark is told
        without the time, as the head does; and of a Poisson process with the training sequences' rate for each mark."""
        gaps, marks = self.events["train"]
        rates = np.bincount(marks.reshape(-1), minlength=self.output_dim) / gaps.sum()
        poisson = Process(np.maximum(rates, np.finfo(float).tiny), *np.zeros((2, self.output_dim, self.output_dim)))
        held_out = self.events["validation"]
        rates, integrals = intensities(self.process, *held_out)
        of_marks = np.log(np.take_along_axis(mark_probabilities(self.process, *held_out), held_out[1][..., None], axis=2))
        apart = np.log(rates.sum(axis=2)) - integrals.sum(axis=2) + of_marks[..., 0]
        likelihoods = {
            "true process": log_likelihood(self.process, *held_out),
            "true process, mark apart from time": apart,
            "Poisson process": log_likelihood(poisson, *held_out),
        }
        return {name: -float(values.mean()) for name, values in likelihoods.items()}


def draw(process: Process, count: int, length: int, random: np.random.RandomState) -> tuple[np.ndarray, np.ndarray]:
    """Independent sequences of `length` events from time 0: times between events and marks, `[count, length]` both.

    The background of each mark and the excitation of each by each are independent Poisson processes until the next event,
    which is the first event of any of them. Each one's first is found by inverting its integrated rate, exactly (Dassios
    and Zhao 2013, "Exact simulation of Hawkes process with exponentially decaying intensity").
    """
    marks_count = len(process.background)
    excitation = np.zeros((count, marks_count, marks_count))
    gaps, marks = np.empty((count, length)), np.empty((count, length), np.int64)
    for k in range(length):
        needed = random.standard_exponential((count, marks_count, marks_count + 1))
        waits = np.full(needed.shape, np.inf)
        waits[..., 0] = needed[..., 0] / process.background
        used = process.decay * needed[..., 1:]  # an excitation brings an event before it is gone, or none
        brings = used < excitation
        share = np.divide(used, excitation, out=np.zeros_like(used), where=brings)
        waits[..., 1:] = np.where(brings, -np.log1p(-share) / process.decay, np.inf)
        flat = waits.reshape(count, -1)
        gaps[:, k], marks[:, k] = flat.min(axis=1), flat.argmin(axis=1) // (marks_count + 1)
        excitation = excitation * np.exp(-process.decay * gaps[:, k, None, None]) + process.added(marks[:, k])
    return gaps, marks


def excitations(process: Process, gaps: np.ndarray, marks: np.ndarray) -> Iterator[np.ndarray]:
    """For each event in turn, what each mark's earlier events added to each mark's rate, as of the event before: `[N, M, M]`.

    The recursion of Ozaki 1979, "Maximum likelihood estimation of Hawkes' self-exciting point processes".

    Args:
      gaps: `[N, L]`, times between events, the first from time 0.
      marks: `[N, L]` integers.
    """
    excitation = np.zeros((len(gaps), *process.decay.shape))
    for gap, mark in zip(gaps.T, marks.T):
        yield excitation
        excitation = excitation * np.exp(-process.decay * gap[:, None, None]) + process.added(mark)


def intensities(process: Process, gaps: np.ndarray, marks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rate of each mark just before each event, and its integral since the event before: `[N, L, M]` both.

    Arguments as of `excitations`.
    """
    faded = np.divide(1, process.decay, out=np.zeros_like(process.decay), where=process.decay > 0)
    rates, integrals = np.empty((2, *gaps.shape, len(process.background)))
    for k, excitation in enumerate(excitations(process, gaps, marks)):
        gap = gaps[:, k, None, None]
        left = excitation * np.exp(-process.decay * gap)
        rates[:, k] = process.background + left.sum(axis=2)
        integrals[:, k] = process.background * gap[..., 0] + ((excitation - left) * faded).sum(axis=2)
    return rates, integrals


def mark_probabilities(process: Process, gaps: np.ndarray, marks: np.ndarray, points: int = 200) -> np.ndarray:
    """`[N, L, M]`: of each event's mark given the events before it, whenever it comes.

    The integral over the time t of each mark's rate times the probability of no event until t, by the trapezoid rule in the
    logarithm of t at `points`. Other arguments as of `excitations`.
    """
    fastest = process.background.sum() + process.decay.max() + process.added(np.arange(len(process.background))).max()
    log_times, spacing = np.linspace(np.log(1e-6 / fastest), np.log(40 / process.background.sum()), points, retstep=True)
    times = np.exp(log_times)
    fading = np.exp(-process.decay * times[:, None, None])
    integrated = np.divide(1 - fading, process.decay, out=np.zeros_like(fading), where=process.decay > 0)
    found = np.empty((*gaps.shape, len(process.background)))
    for k, excitation in enumerate(excitations(process, gaps, marks)):
        rates = process.background + np.einsum("nij,tij->nti", excitation, fading)
        no_event = np.exp(-process.background.sum() * times - np.einsum("nij,tij->nt", excitation, integrated))
        found[:, k] = spacing * np.einsum("nti,nt->ni", rates, no_event * times)
    return found


def log_likelihood(process: Process, gaps: np.ndarray, marks: np.ndarray) -> np.ndarray:
    """`[N, L]`, in nats, of each event's time and mark given the events before it; arguments as of `excitations`."""
    rates, integrals = intensities(process, gaps, marks)
    return np.log(np.take_along_axis(rates, marks[..., None], axis=2)[..., 0]) - integrals.sum(axis=2)
