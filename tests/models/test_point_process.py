"""The head for marked events in time, and its loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import seqjax
from seqjax.config import ConfigError
from seqjax.data.hawkes import Hawkes
from seqjax.scaling.flops import count_flops
from seqjax.training.evaluate import evaluate, means
from seqjax.training.losses import event_likelihood, loss_of

RNG = np.random.default_rng(0)
MARKS, COMPONENTS = 3, 2


def build(name="aaren", **options):
    given = {"name": name, "embed_dim": 8, "num_heads": 2, "num_layers": 1, "input_dim": 1 + MARKS, "head": "point_process"}
    return seqjax.build({**given, "output_dim": MARKS, "mixture_components": COMPONENTS, **options})


def test_likelihood_equals_scipy_and_padding_counts_nothing():
    outputs = 0.4 * RNG.standard_normal((2, 4, 3 * COMPONENTS + MARKS)).astype(np.float32)
    times, marks = np.exp(RNG.standard_normal((2, 4))), RNG.integers(0, MARKS, (2, 4))
    weights = np.array([[1, 1, 1, 0], [1, 0, 1, 1]], np.float32)
    times[weights == 0], marks[weights == 0] = 0, 0
    mean, std = -0.5, 1.7
    expected = {"loss": 0.0, "time_nll": 0.0, "mark_nll": 0.0, "accuracy": 0.0, "rmse": 0.0}
    for place in np.argwhere(weights):
        place = tuple(place)
        logits, locations, log_scales, of_marks = np.split(outputs[place].astype(np.float64), [2, 4, 6])
        parts = scipy.stats.lognorm(std * np.exp(log_scales), scale=np.exp(mean + std * locations))
        mixed = np.exp(logits) / np.exp(logits).sum()
        time_nll = -np.log(mixed @ parts.pdf(times[place]))
        mark_nll = -np.log(np.exp(of_marks)[marks[place]] / np.exp(of_marks).sum())
        expected["time_nll"] += time_nll
        expected["mark_nll"] += mark_nll
        expected["loss"] += time_nll + mark_nll
        expected["accuracy"] += of_marks.argmax() == marks[place]
        expected["rmse"] += (mixed @ parts.mean() - times[place]) ** 2
    batch = {"targets": jnp.asarray(np.stack([times, marks], -1), jnp.float32), "weights": jnp.asarray(weights)}
    found = event_likelihood(jnp.asarray(outputs), batch, num_marks=MARKS, log_mean=mean, log_std=std)
    assert found.keys() == expected.keys()
    for name, (total, count) in found.items():
        assert count == 6
        assert total == pytest.approx(expected[name], rel=1e-4)
    gradient = jax.grad(lambda o: event_likelihood(o, batch, num_marks=MARKS)["loss"][0])(jnp.asarray(outputs))
    assert np.isfinite(gradient).all() and (np.asarray(gradient)[weights == 0] == 0).all()


def test_the_root_of_the_mean_squared_error_is_told():
    assert means({"rmse": np.array([18.0, 2.0]), "loss": np.array([3.0, 2.0])}, 2.0) == {"loss": 3.0, "rmse": 3.0}


@pytest.mark.parametrize("name", ["aaren", "transformer"])
def test_a_model_beside_the_process_it_learns(name):
    task = Hawkes(sequence_length=12, num_sequences=40, batch_size=4)
    model = build(name)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 12, 4)))
    scores = evaluate(model, variables, task)
    assert set(scores) == {"loss", "time_nll", "mark_nll", "accuracy", "rmse"}
    assert scores["loss"] == pytest.approx(scores["time_nll"] + scores["mark_nll"], rel=1e-6)
    assert scores["loss"] > task.baselines()["true process"]
    # The unit of time shifts the likelihood and leaves the task as it is.
    slow = Hawkes(
        background=tuple(rate / 10 for rate in task.background),
        decay=tuple(tuple(rate / 10 for rate in row) for row in task.decay),
        sequence_length=12,
        num_sequences=40,
        batch_size=4,
    )
    moved = evaluate(model, variables, slow)
    assert moved["loss"] == pytest.approx(scores["loss"] + np.log(10), rel=1e-5)
    assert moved["rmse"] == pytest.approx(10 * scores["rmse"], rel=1e-4)


def test_costs_are_those_of_the_program():
    head = build(embed_dim=16).make_head(parent=None)
    row = jax.ShapeDtypeStruct((1, 6, 16), jnp.float32)
    shapes = jax.eval_shape(head.init, jax.random.key(0), row)
    assert head.parameters(16, False) == sum(a.size for a in jax.tree.leaves(shapes)) == 17 * 9
    assert head.flops(16, 6) == count_flops(head.apply, shapes, row) - 6 * 9  # the bias


def test_loss_of_the_task():
    task = Hawkes(sequence_length=4, num_sequences=10, batch_size=2)
    batch = {name: jnp.asarray(array) for name, array in task.batch(0).items()}
    sums = loss_of(task)(jnp.zeros((2, 4, 3 * 5 + 3)), batch)
    logs = np.log(task.batch(0)["targets"][..., 0].astype(np.float64))
    normal = scipy.stats.norm(task.log_mean, task.log_std)
    assert sums["time_nll"][0] == pytest.approx(-(normal.logpdf(logs) - logs).sum(), rel=1e-5)
    assert sums["mark_nll"][0] == pytest.approx(8 * np.log(3), rel=1e-6)


def test_bad_options():
    with pytest.raises(ConfigError, match=r"model\.mixture_components=0 is not positive; allowed: 1 and above"):
        build(mixture_components=0)
    with pytest.raises(ConfigError, match=r"model\.head='point_process' needs model\.output_dim"):
        build(output_dim=None)
