"""The contract that every task keeps, held against each of them on small data."""

import dataclasses
import itertools

import numpy as np
import pytest

from seqjax.config import ConfigError, Option, options_of
from seqjax.data.autoregressive import Autoregressive
from seqjax.data.control import Control
from seqjax.data.forecasting import Forecasting
from seqjax.data.hawkes import Hawkes
from seqjax.data.python_source import PythonSource
from seqjax.data.sequential_images import SequentialImages
from seqjax.data.task import Task
from seqjax.data.text_file import TextFile


@dataclasses.dataclass(frozen=True, kw_only=True)
class Numbers(Task):
    """Example `i` says `i`: shows which examples a batch took."""

    count: int = 10
    length = 1
    content = "numbers"

    def examples(self, split):
        return [{"inputs": np.array([i]), "targets": np.array([i]), "weights": np.ones(1)} for i in range(self.count)]


NAMES = ["python_split", "python_best_fit", "bytes", "chars", "classify", "density", "forecast", "regress", "events", "control"]


@pytest.fixture(params=NAMES)
def make_task(request, tmp_path, tiny_library, mnist_dir, ett_dir):
    text = tmp_path / "text.txt"
    text.write_text("to be, or not to be: that is the question. " * 20)
    tiny = type("Tiny", (PythonSource,), {"source_dir": tiny_library})
    prepared = {"data_dir": str(tmp_path / "data")}
    cls, options = {
        "python_split": (tiny, {"sequence_length": 24, **prepared}),
        "python_best_fit": (tiny, {"sequence_length": 24, "packing": "best_fit", **prepared}),
        "bytes": (TextFile, {"path": str(text), "sequence_length": 16, **prepared}),
        "chars": (TextFile, {"path": str(text), "sequence_length": 16, "tokens": "char", **prepared}),
        "classify": (SequentialImages, {"manual_dir": str(mnist_dir), **prepared}),
        "density": (SequentialImages, {"manual_dir": str(mnist_dir), "objective": "density", **prepared}),
        "forecast": (Forecasting, {"manual_dir": str(ett_dir), "lookback": 12, "horizon": 2700}),
        "regress": (Autoregressive, {"sequence_length": 6, "num_sequences": 90}),
        "events": (Hawkes, {"sequence_length": 6, "num_sequences": 90}),
        "control": (Control, {"episode_length": 2, "num_episodes": 90}),
    }[request.param]
    return lambda **changes: cls(**{"batch_size": 4, **options, **changes})


def equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def test_batch_is_a_function_of_seed_and_step(make_task):
    one, other = make_task(), make_task()
    forward = {step: one.batch(step) for step in (0, 1, 2, 10**9)}
    for step in (10**9, 2, 0, 1):
        assert equal(other.batch(step), forward[step])
    assert not equal(forward[0], forward[1])
    assert not equal(make_task(seed=1).batch(0), forward[0])


def test_rows_are_a_slice_of_the_batch(make_task):
    task = make_task()
    whole = task.batch(3)
    for rows in (slice(0, 2), slice(2, 4), slice(3, None)):
        assert equal(task.batch(3, rows), {key: value[rows] for key, value in whole.items()})
    for whole, part in itertools.zip_longest(task.eval_batches(), task.eval_batches(rows=slice(1, 3))):
        assert equal(part, {key: value[1:3] for key, value in whole.items()})


def test_batches_are_what_the_attributes_say(make_task):
    task = make_task()
    splits = [task.eval_batches(split) for split in task.splits if split != "train"]
    batches = [task.batch(0), *itertools.chain(*splits)]
    assert len(batches) > 2
    for batch in batches:
        tokens = task.vocab_size is not None
        assert batch["inputs"].shape == ((4, task.length) if tokens else (4, task.length, task.input_dim))
        assert batch["inputs"].dtype == (np.int32 if tokens else np.float32)
        shapes = {
            "classifier": (4,),
            "language_model": (4, task.length),
            "regression": (4, task.length, task.output_dim),
            "forecast": (4, task.horizon, task.output_dim),
            "point_process": (4, task.length, 2),
        }
        assert batch["targets"].shape == shapes[task.head]
        labels = task.num_classes or task.vocab_size
        assert batch["targets"].dtype == (np.int32 if labels else np.float32)
        assert not labels or (batch["targets"].min() >= 0 and batch["targets"].max() < labels)
        assert not tokens or (batch["inputs"].min() >= 0 and batch["inputs"].max() < task.vocab_size)
        assert batch["weights"].shape == (
            batch["targets"].shape[:2] if task.head == "point_process" else batch["targets"].shape
        )
        assert batch["weights"].dtype == np.float32
        assert ("segment_ids" in batch) == isinstance(task, PythonSource)


def test_options_are_readable_and_plain(make_task):
    options = options_of(type(make_task()))
    assert options["batch_size"] == Option(int, 32)
    assert {"seed", *make_task().locations} <= options.keys()


def test_digest_follows_options_and_not_locations(make_task, tmp_path):
    digest = make_task().digest
    assert make_task().digest == digest
    if "data_dir" in make_task().locations:
        assert make_task(data_dir=str(tmp_path / "elsewhere")).digest == digest
    assert len({digest, make_task(seed=1).digest, make_task(batch_size=5).digest}) == 3


def test_bad_options(make_task):
    with pytest.raises(ConfigError, match=r"data\.batch_size=0"):
        make_task(batch_size=0)
    with pytest.raises(ConfigError, match=r"data\.seed=-1"):
        make_task(seed=-1)
    with pytest.raises(ConfigError, match="'validation'"):
        make_task().eval_batches("validaton")
    with pytest.raises(ValueError, match="step=-1"):
        make_task().batch(-1)
    with pytest.raises(ValueError, match="selects nothing"):
        make_task().batch(0, slice(4, 8))


def test_every_epoch_takes_every_example_once_in_its_own_order():
    task = Numbers(batch_size=3)
    drawn = np.concatenate([task.batch(step)["inputs"][:, 0] for step in range(10)])
    epochs = drawn.reshape(3, 10)
    assert (np.sort(epochs) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3


@pytest.mark.parametrize("count", [1, 3, 4, 7, 8])
def test_evaluation_takes_every_example_once_in_order(count):
    batches = list(Numbers(batch_size=4, count=count).eval_batches())
    assert all(batch["inputs"].shape == (4, 1) for batch in batches)
    kept = np.concatenate([batch["inputs"][batch["weights"] > 0] for batch in batches])
    assert kept.tolist() == list(range(count))


def test_the_order_of_training_is_for_ever():
    # Written down once: a change of these numbers breaks resuming from every checkpoint.
    task = Numbers(batch_size=10, seed=7)
    assert [task.batch(step)["inputs"][:, 0].tolist() for step in (0, 10**9)] == [
        [7, 9, 0, 8, 4, 2, 5, 6, 3, 1],
        [4, 8, 7, 3, 2, 9, 0, 5, 6, 1],
    ]
