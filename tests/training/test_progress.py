import io
import time

import pytest

from seqjax.training.progress import Console, Meter, peak_flops


def test_chips_are_told_apart():
    assert peak_flops("TPU v5 lite") == 197e12
    assert peak_flops("TPU v5") == peak_flops("TPU v5p") == 459e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("cpu") is None


def test_speed_leaves_out_the_first_step_and_pauses(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    meter = Meter(tokens_per_step=50, flops_per_step=None)
    assert meter.read() == {}
    now[0] += 30.0  # compilation
    meter.step()
    assert meter.read() == {}
    for _ in range(4):
        now[0] += 0.5
        meter.step()
    assert meter.read() == {"tokens_per_second": pytest.approx(100.0)}
    meter.pause()
    now[0] += 60.0  # evaluation
    meter.step()
    now[0] += 1.0
    meter.step()
    assert meter.read() == {"tokens_per_second": pytest.approx(50.0)}


def test_utilisation_counts_three_forward_passes(monkeypatch):
    monkeypatch.setattr("seqjax.training.progress.peak_flops", lambda kind: 300.0)
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    meter = Meter(tokens_per_step=1, flops_per_step=50.0)
    meter.step()
    now[0] += 1.0
    meter.step()
    assert meter.read()["mfu"] == pytest.approx(0.5)


def test_plain_lines_away_from_a_terminal_and_silence_when_quiet():
    stream = io.StringIO()
    console = Console(10, "bits/byte", stream)
    console.advance(3, {"loss": 1.25, "accuracy": 0.5, "tokens_per_second": 12_300.0, "learning_rate": 0.001})
    console.close()
    line = "step 3/10  loss 1.2500 bits/byte  accuracy 50.0%  12.3k tokens/s  learning_rate 0.001\n"
    assert stream.getvalue() == line
    silent = Console(10, stream=stream, quiet=True)
    silent.advance(4, {"loss": 1.0})
    assert stream.getvalue() == line


def test_a_terminal_gets_a_bar_and_lines_above_it():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    console = Console(10, "nats", stream)
    console.advance(5, {"loss": 1.5})
    console.line("saved [step 5]")
    console.close()
    assert "5/10" in stream.getvalue() and "saved [step 5]" in stream.getvalue()
