"""Side-by-side timing, and the record of measured figures."""

import json
import time

import jax.numpy as jnp

from seqjax.scaling.record import provenance, table, write_record
from seqjax.scaling.timing import Timing, time_side_by_side


def test_functions_take_turns_and_the_order_turns_around():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    timings = time_side_by_side(functions, rounds=3, warmup=2)
    assert "".join(calls) == "aabb" + "ab" + "ba" + "ab"
    assert {name: len(timing.seconds) for name, timing in timings.items()} == {"a": 3, "b": 3}


def test_seconds_are_those_of_the_call():
    timings = time_side_by_side({"slow": lambda: time.sleep(0.02), "array": lambda: jnp.ones(3)}, rounds=3)
    assert timings["slow"].median >= 0.02
    assert timings["array"].speedup(timings["slow"]) > 1


def test_medians_quartiles_and_ratios():
    quick, slow = Timing((1.0, 2.0, 3.0, 4.0, 5.0)), Timing((2.0, 4.0, 6.0, 8.0, 10.0))
    assert (quick.median, quick.quartiles) == (3.0, (2.0, 4.0))
    assert quick.speedup(slow) == 2.0
    assert quick.speedup_quartiles(slow) == (2.0, 2.0)
    assert slow.speedup(quick) == 0.5


def test_a_record_says_where_figures_come_from(tmp_path):
    path = tmp_path / "results" / "speed.json"
    write_record(path, provenance(("jax",)), [{"seconds": 1.5}], settings={"rounds": 3})
    record = json.loads(path.read_text())
    assert record["results"] == [{"seconds": 1.5}] and record["settings"] == {"rounds": 3}
    assert record["machine"].keys() == {"processor", "cores", "load", "devices"}
    assert record["versions"].keys() == {"python", "jax"}
    assert record["command"].startswith("python ") and record["date"].endswith("+00:00")


def test_tables():
    rows = [{"name": "a", "s": 0.123456}, {"name": "bb", "s": 2}]
    assert table(rows).split("\n") == ["| name | s      |", "| ---- | ------ |", "| a    | 0.1235 |", "| bb   | 2      |"]
    assert table([]) == ""
