import json
import os
import signal

import jax
import numpy as np
import pytest
import tiny
import tiny_config

from seqjax.config import ConfigError
from seqjax.parallel.rules import use_mesh
from seqjax.training.errors import RunError
from seqjax.training.loop import train
from seqjax.training.restore import load_workdir
from seqjax.training.trainer import Trainer
from seqjax.training.writers import read_records

pytestmark = pytest.mark.xdist_group("loop")


def config(**changes):
    made = tiny_config.get_config()
    made.update_from_flattened_dict(changes)
    return made


def steps_by_hand(config, steps):
    """Parameters after so many steps, without the loop."""
    trainer = Trainer(config)
    state = trainer.init()
    with use_mesh(trainer.mesh):
        for step in range(steps):
            state, _ = trainer.step(state, trainer.place(trainer.task.batch(step)))
    return jax.device_get(state.params)


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def on_batch(monkeypatch, step, action):
    """Call `action` when the loop asks for the batch of `step`."""
    batch = tiny.TinyTask.batch

    def acting(self, number, rows=None):
        if number == step:
            action()
        return batch(self, number, rows)

    monkeypatch.setattr(tiny.TinyTask, "batch", acting)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run: its workdir and result."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    changes = {"training.plot": True, "training.tensorboard": True, "model.dropout": 0.2}
    return workdir, train(config(**changes), workdir), config(**changes)


def test_a_run_leaves_its_records_checkpoints_and_plot(finished):
    workdir, result, _ = finished
    assert result.finished and result.step == 12
    names = {path.name for path in workdir.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "metrics.csv", "loss.png", "checkpoints", "tensorboard"}
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"8", "12"}
    records = read_records(workdir / "metrics.jsonl")
    assert [(r["step"], r["split"]) for r in records] == [
        (4, "train"),
        (6, "validation"),
        (8, "train"),
        (12, "train"),
        (12, "validation"),
    ]
    assert {"loss", "accuracy", "grad_norm", "learning_rate"} <= records[0].keys()
    assert records[-1]["loss"] == result.scores["loss"] < records[0]["loss"]


def test_the_loop_makes_the_steps_and_nothing_else(finished):
    _, result, given = finished
    assert equal(result.state.params, steps_by_hand(given, 12))


def test_the_last_line_is_the_score_in_the_tasks_unit(finished, capsys):
    workdir, result, given = finished
    before = (workdir / "metrics.jsonl").read_text()
    again = train(given, workdir)  # a finished run: restored, evaluated, told again
    assert again.step == 12 and equal(again.state.params, result.state.params)
    printed = capsys.readouterr().out.splitlines()
    assert "Resuming from step 12." in printed
    assert printed[-2:] == ["uniform: 4.0000 bits/token, on the same held-out data", f"bits/token: {result.scores['loss']:.4f}"]
    assert (workdir / "metrics.jsonl").read_text() == before


def test_the_saved_model_is_the_trained_one(finished):
    workdir, result, _ = finished
    restored = load_workdir(workdir)
    assert restored.record["data_digest"] == tiny.TinyTask().digest
    assert equal(restored.variables["params"], result.state.params)


def test_a_signal_stops_after_a_step_and_the_same_call_continues_exactly(finished, tmp_path, monkeypatch, capsys):
    _, result, given = finished
    on_batch(monkeypatch, 7, lambda: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    stopped = train(given, tmp_path / "run")
    assert not stopped.finished and 0 < stopped.step < 12
    assert signal.getsignal(signal.SIGTERM) is before
    said = capsys.readouterr().out
    assert f"Stopped by SIGTERM at step {stopped.step}" in said and "the same command continues" in said
    monkeypatch.undo()
    continued = train(given, tmp_path / "run")
    assert continued.finished and equal(continued.state, result.state)


def test_what_is_not_finite_stops_the_run_and_is_not_saved(tmp_path):
    with pytest.raises(RunError) as error:
        train(config(**{"data.poison": 6, "training.checkpoint_every": 1}), tmp_path / "run")
    assert "step 7: loss is nan" in str(error.value) and "the last good checkpoint is" in str(error.value)
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"5", "6"}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(load_workdir(tmp_path / "run").variables))


def test_a_changed_config_is_refused_and_reporting_may_change(finished):
    workdir, _, given = finished
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    changed = given.copy_and_resolve_references()
    changed.update_from_flattened_dict({"model.embed_dim": 32, "optimizer.beta1": 0.5, "training.log_every": 1})
    with pytest.raises(ConfigError, match=r"differs in model.embed_dim, optimizer.beta1; choose"):
        train(changed, workdir)
    other_data = given.copy_and_resolve_references()
    other_data.data.content_version = "2"
    with pytest.raises(ConfigError, match=r"differs in data.content_version"):
        train(other_data, workdir)
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before
    harmless = given.copy_and_resolve_references()
    harmless.update_from_flattened_dict({"training.log_every": 1, "data.delay": 0.001, "mesh.data": 1})
    assert train(harmless, workdir).step == 12


def test_data_that_changed_under_the_same_config_is_refused(finished, monkeypatch):
    workdir, _, given = finished
    monkeypatch.setattr(tiny.TinyTask, "content", "edited")
    with pytest.raises(ConfigError, match="holds a run on other data"):
        train(given, workdir)


def test_another_models_workdir_and_a_strangers_folder_are_refused(finished, tmp_path):
    workdir, _, given = finished
    identity = json.loads((workdir / "config.json").read_text())
    identity["config"]["model"]["name"] = "other"
    (tmp_path / "config.json").write_text(json.dumps(identity))
    with pytest.raises(ConfigError, match="holds a run of model 'other', not 'tiny'"):
        train(given, tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "metrics.csv").write_text("precious")
    with pytest.raises(ConfigError, match=r"holds metrics.csv but no config.json"):
        train(given, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_a_broken_newest_checkpoint_costs_only_its_steps(finished, tmp_path, capsys):
    _, result, given = finished
    train(given, tmp_path / "run")
    state = tmp_path / "run" / "checkpoints" / "12" / "state"
    largest = max((p for p in state.rglob("d/*")), key=os.path.getsize)
    os.truncate(largest, 10)
    capsys.readouterr()
    again = train(given, tmp_path / "run")
    said = capsys.readouterr()
    assert "Checkpoint 12 is broken" in said.out and "Resuming from step 8." in said.out and said.err == ""
    assert equal(again.state, result.state)
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    assert [(r["step"], r["split"]) for r in records].count((12, "train")) == 1


def test_a_profile_is_written_when_asked_for(tmp_path):
    train(config(**{"training.profile_steps": 2, "training.eval_every": 0}), tmp_path / "run")
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
