"""Tasks whose targets are values, from a config to scores: per token, and forecasts of a window."""

import numpy as np
import pytest

import seqjax
from seqjax.parallel.rules import use_mesh
from seqjax.training.trainer import Trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twenty months of two noisy days in `ETTh2.csv`."""
    made = tmp_path_factory.mktemp("ett")
    hours = np.arange(14400)[:, None] + [0, 6]
    table = np.sin(hours * 2 * np.pi / 24) + 0.3 * np.random.default_rng(0).standard_normal((14400, 2))
    rows = "".join(f"2016-07-01 00:00:00,{a:.4f},{b:.4f}\n" for a, b in table.tolist())
    (made / "ETTh2.csv").write_text("date,HUFL,OT\n" + rows)
    return str(made)


def make_trainer(model, data):
    return Trainer(seqjax.experiment_config(model=model, data=data, optimizer={"learning_rate": 0.01, "name": "adam"}))


def train(trainer, steps):
    state = trainer.init()
    with use_mesh(trainer.mesh):
        for step in range(steps):
            state, metrics = trainer.step(state, trainer.place(trainer.task.batch(step)))
    return state, metrics


def test_forecasts_are_scored_on_every_window(folder):
    data = {"name": "forecasting", "dataset": "ETTh2", "manual_dir": folder, "lookback": 24, "horizon": 5, "batch_size": 512}
    trainer = make_trainer({"name": "ar_net", "order": 24, "series_norm": "last"}, data)
    before = trainer.evaluate(trainer.init())  # weights of zero repeat the last value
    assert before["loss"] == pytest.approx(trainer.task.baselines()["last value"], rel=1e-5)
    examples = trainer.task.examples("test")
    errors = [np.abs(e["targets"] - e["inputs"][-1:]).mean() for e in map(examples.__getitem__, range(len(examples)))]
    assert trainer.evaluate(trainer.init(), "test")["mae"] == pytest.approx(np.mean(errors), rel=1e-5)
    state, metrics = train(trainer, 60)
    assert set(metrics) == {"loss", "mae", "grad_norm", "learning_rate"}
    assert trainer.evaluate(state)["loss"] < 0.5 * before["loss"]


def test_a_stack_forecasts_with_independent_channels(folder):
    data = {"name": "forecasting", "dataset": "ETTh2", "manual_dir": folder, "lookback": 12, "horizon": 5, "batch_size": 4}
    options = {"embed_dim": 8, "num_heads": 2, "num_layers": 1, "series_norm": "standard", "channel_independent": True}
    trainer = make_trainer({"name": "transformer", **options}, data)
    model = trainer.config.model
    assert (model.head, model.input_dim, model.output_dim, model.horizon) == ("forecast", 2, 2, 5)
    _, metrics = train(trainer, 1)
    assert float(metrics["loss"][1]) == 4 * 5 * 2


def test_next_values_are_scored_where_they_count():
    data = {"name": "autoregressive", "coefficients": (0.5, 0.4), "sequence_length": 16, "num_sequences": 640}
    trainer = make_trainer({"name": "ar_net", "order": 2}, data)
    assert trainer.model.head == "regression"
    state, metrics = train(trainer, 100)
    assert float(metrics["loss"][1]) == 32 * 15  # the first target's past is not all seen
    examples = trainer.task.examples("validation")
    before = np.mean([np.square(e["targets"][1:]).mean() for e in examples])
    assert trainer.evaluate(trainer.init())["loss"] == pytest.approx(before, rel=1e-5)
    assert trainer.evaluate(state)["loss"] == pytest.approx(trainer.task.baselines()["noise floor"], rel=0.15)
