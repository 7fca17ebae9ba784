import csv
import json
import sys

import pytest

from seqjax.config import ConfigError
from seqjax.training.plots import plot_losses
from seqjax.training.writers import MetricsFiles, TensorBoard, read_records


def rows(workdir):
    with (workdir / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_both_files_hold_every_record(tmp_path):
    files = MetricsFiles(tmp_path, 0)
    files.write({"step": 1, "split": "train", "loss": 2.0})
    files.write({"step": 1, "split": "validation", "loss": 2.5, "accuracy": 0.5})  # brings a new column
    files.write({"step": 2, "split": "train", "loss": float("nan")})
    assert read_records(tmp_path / "metrics.jsonl") == [
        {"step": 1, "split": "train", "loss": 2.0},
        {"step": 1, "split": "validation", "loss": 2.5, "accuracy": 0.5},
        {"step": 2, "split": "train", "loss": None},
    ]
    assert [(row["step"], row["loss"], row["accuracy"]) for row in rows(tmp_path)][:2] == [
        ("1", "2.0", ""),
        ("1", "2.5", "0.5"),
    ]
    assert len(rows(tmp_path)) == 3


def test_resuming_drops_what_will_be_measured_again_and_what_a_crash_cut_short(tmp_path):
    files = MetricsFiles(tmp_path, 0)
    for step in (1, 2, 3):
        files.write({"step": step, "split": "train", "loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "split": "tr')
    resumed = MetricsFiles(tmp_path, 2)
    assert [record["step"] for record in resumed.records] == [1, 2]
    resumed.write({"step": 3, "split": "train", "loss": 9.0})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 2.0), (3, 9.0)]
    assert [row["loss"] for row in rows(tmp_path)] == ["1.0", "2.0", "9.0"]


def test_repeating_a_finished_run_repeats_no_record(tmp_path):
    record = {"step": 5, "split": "validation", "loss": 1.0}
    MetricsFiles(tmp_path, 0).write(record)
    again = MetricsFiles(tmp_path, 5)
    again.write(record)
    assert again.records == [record] and len(rows(tmp_path)) == 1


def test_tensorboard_events_are_written_or_their_absence_is_told(tmp_path, monkeypatch):
    board = TensorBoard(tmp_path, 0)
    board.write({"step": 1, "split": "train", "loss": 2.0})
    board.close()
    assert list((tmp_path / "tensorboard").glob("events*"))
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ConfigError, match="needs the package tensorboardX"):
        TensorBoard(tmp_path, 0)


def test_losses_are_drawn_or_matplotlib_is_missing(tmp_path, monkeypatch):
    records = [{"step": i, "split": split, "loss": 1.0 / i} for i in (1, 2) for split in ("train", "validation")]
    records.append({"step": 3, "split": "train", "loss": None})
    path = tmp_path / "loss.png"
    assert plot_losses(records, path, "nats", {"uniform": 2.0})
    assert path.read_bytes().startswith(b"\x89PNG") and [p.name for p in tmp_path.iterdir()] == ["loss.png"]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not plot_losses(records, path)
