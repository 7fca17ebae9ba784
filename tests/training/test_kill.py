"""A run that is killed, at any moment, and started again ends as if nothing had happened."""

import json
import random
import time

import pytest

pytestmark = pytest.mark.xdist_group("kill")

# Slow enough to be hit between steps, with a checkpoint in flight most of the time.
FLAGS = ("--config.training.checkpoint_every=1", "--config.training.num_steps=20", "--config.model.dropout=0.2")
DELAY = "--config.data.delay=0.05"


def outcome(workdir):
    """Checksums of all arrays of the final checkpoint."""
    record = json.loads((workdir / "checkpoints" / "20" / "record" / "metadata").read_text())
    return {path: array["checksum"] for path, array in record["arrays"].items()}


@pytest.fixture(scope="module")
def reference(tmp_path_factory, start_training):
    """What a run without interruption ends with."""
    workdir = tmp_path_factory.mktemp("reference") / "run"
    process = start_training(workdir, *FLAGS)
    _, err = process.communicate()
    assert process.returncode == 0, err
    return outcome(workdir)


def kill_and_continue(workdir, start_training, kills, seed):
    moments = random.Random(seed)
    for _ in range(kills):
        process = start_training(workdir, *FLAGS, DELAY)
        for line in process.stdout:  # the first words: from here on, any moment
            if "parameters" in line:
                break
        time.sleep(moments.uniform(0.0, 1.8))
        process.kill()
        process.communicate()
    process = start_training(workdir, *FLAGS)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "is broken" not in out, out
    return out


def check_records(workdir):
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    keys = [(record["step"], record["split"]) for record in records]
    assert keys == sorted(keys) and len(set(keys)) == len(keys)


def test_killed_once(tmp_path, start_training, reference):
    kill_and_continue(tmp_path / "run", start_training, 1, seed=1)
    assert outcome(tmp_path / "run") == reference
    check_records(tmp_path / "run")


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(5))
def test_killed_again_and_again(tmp_path, start_training, reference, seed):
    kill_and_continue(tmp_path / "run", start_training, 10, seed)
    assert outcome(tmp_path / "run") == reference
    check_records(tmp_path / "run")
