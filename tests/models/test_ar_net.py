"""AR-Net against sums written out, its regulariser, and the coefficients it finds."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqjax
from seqjax.config import ConfigError
from seqjax.models.ar_net import SMALLEST, sparsity_penalty
from seqjax.parallel.rules import use_mesh
from seqjax.scaling.flops import count_flops
from seqjax.training.trainer import Trainer

ROOT = pathlib.Path(__file__).parent.parent.parent
RNG = np.random.default_rng(0)
VALUES = jnp.asarray(RNG.standard_normal((2, 9, 3)), jnp.float32)


def build(**options):
    return seqjax.build({"name": "ar_net", "input_dim": 3, "order": 4, **options})


def params(model, seed=1):
    rng = np.random.default_rng(seed)
    made = {"kernel": rng.standard_normal((model.steps, model.order))}
    if model.use_bias:
        made["bias"] = rng.standard_normal(model.steps)
    return {"params": jax.tree.map(lambda a: a.astype(np.float32), made)}


@pytest.mark.parametrize("use_bias", [True, False])
def test_regression_sums_the_values_of_the_same_segment(use_bias):
    model = build(use_bias=use_bias)
    variables = params(model)
    kernel, bias = variables["params"]["kernel"], variables["params"].get("bias", np.zeros(1))
    ids = np.array([[1, 1, 1, 1, 1, 1, 2, 2, 1], [0, 0, 3, 3, 3, 3, 3, 3, 3]])
    starts = [[0] * 6 + [6] * 2 + [8], [0] * 2 + [2] * 7]
    expected = np.zeros((2, 9, 3))
    for b in range(2):
        for t in range(9):
            past = [kernel[0, i] * VALUES[b, t - i] for i in range(4) if t - i >= starts[b][t]]
            expected[b, t] = np.sum(past, axis=0) + bias[0]
    np.testing.assert_allclose(model.apply(variables, VALUES, segment_ids=jnp.asarray(ids))[0], expected, rtol=1e-5, atol=1e-5)


def test_forecast_maps_the_last_values_to_all_steps():
    model = build(head="forecast", horizon=5)
    variables = params(model)
    kernel, bias = variables["params"]["kernel"], variables["params"]["bias"]
    expected = [[[kernel[t] @ row[:-5:-1, c] + bias[t] for c in range(3)] for t in range(5)] for row in np.asarray(VALUES)]
    np.testing.assert_allclose(model.apply(variables, VALUES)[0], expected, rtol=1e-5, atol=1e-5)


def test_forecast_from_a_window_shorter_than_the_order():
    model = build(head="forecast", horizon=5, series_norm="last")
    variables = params(model)
    kernel, bias = variables["params"]["kernel"], variables["params"]["bias"]
    ids = jnp.array([[3, 3, 3, 3, 3, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0, 1, 1, 1]])
    for row, window in ((0, VALUES[0, 5:7]), (1, VALUES[1, 6:])):
        level = np.asarray(window[-1])
        expected = kernel[:, : len(window)] @ (np.asarray(window)[::-1] - level) + bias[:, None] + level
        np.testing.assert_allclose(model.apply(variables, VALUES, segment_ids=ids)[0][row], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"use_bias": False}, {"head": "forecast", "horizon": 5}, {"order": 1}])
def test_costs_are_those_of_the_program(options):
    model = build(**options)
    variables = model.init(jax.random.key(0), VALUES[:1])
    costs = model.costs(9)
    assert costs.parameters == sum(a.size for a in jax.tree.leaves(variables))
    counted = count_flops(lambda v, x: model.apply(v, x)[0], variables, VALUES[:1])
    biases = 3 * (5 if model.forecasts else 9) * model.use_bias
    assert costs.flops == counted - biases
    if not model.forecasts:
        assert costs.state_bytes == sum(a.nbytes for a in jax.tree.leaves(model.init_state(1, 9)))


def test_the_regulariser_is_the_papers():
    weights = np.array([[1.0, -0.5, 0.01, 0.3], [2.0, -0.001, 0.7, 0.2]], np.float32)
    expected = np.mean([2 / (1 + np.exp(-3 * abs(w) ** (1 / 3))) - 1 for w in weights.ravel().astype(np.float64)])
    assert float(sparsity_penalty(jnp.asarray(weights))) == pytest.approx(expected, rel=1e-5)
    gradient = jax.grad(sparsity_penalty)(jnp.array([[0.0, SMALLEST / 2, 2 * SMALLEST, -0.5]]))[0]
    assert np.isfinite(gradient).all()
    assert gradient[:2].tolist() == [0, 0] and gradient[2] > -gradient[3] > 0


def test_the_regulariser_is_sown_in_training_alone():
    model = build(sparsity=0.25, regularization=0.02)
    variables = params(model)
    sown = lambda train: model.apply(variables, VALUES, train=train, mutable=["losses"])[1]
    (penalty,) = sown(True)["losses"]["sparsity"]
    assert float(penalty) == pytest.approx(0.02 * 3 * float(sparsity_penalty(variables["params"]["kernel"])), rel=1e-6)
    assert not sown(False)
    assert not build(sparsity=1.0).apply(variables, VALUES, train=True, mutable=["losses"])[1]


@pytest.mark.parametrize("seed", range(3))
def test_finds_the_coefficients_of_a_sparse_process(seed):
    scope: dict = {}
    exec((ROOT / "configs" / "ar20_ar_net.py").read_text(), scope)
    config = scope["get_config"]()
    config.data.seed = config.training.seed = seed
    trainer = Trainer(config)
    state = trainer.init()
    with use_mesh(trainer.mesh):
        for step in range(config.training.num_steps):
            state, _ = trainer.step(state, trainer.place(trainer.task.batch(step)))
    found = np.asarray(state.params["kernel"][0])
    assert np.abs(found - scope["COEFFICIENTS"]).max() < 0.02
    x = np.stack([np.append(e["inputs"], e["targets"][-1]) for e in trainer.task.examples("train")]).astype(np.float64)
    past = np.stack([x[:, 19 - lag : -1 - lag] for lag in range(20)], axis=-1).reshape(-1, 20)
    least_squares = np.linalg.lstsq(past, x[:, 20:].reshape(-1), rcond=None)[0]
    assert np.abs(found - least_squares).max() < 0.015
    # The regulariser tells the coefficients that are 0, which least squares does not.
    absent = np.array(scope["COEFFICIENTS"]) == 0
    assert np.abs(found[absent]).mean() < 0.5 * np.abs(least_squares[absent]).mean()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 0}, r"model\.order=0 is not positive"),
        ({"horizon": 0}, r"model\.horizon=0 is not positive"),
        ({"input_dim": None}, r"model\.input_dim was not given: ar_net takes continuous inputs"),
        ({"head": "language_model"}, r"model\.head='language_model' is unknown; allowed: forecast, regression"),
        ({"sparsity": 0.0}, r"model\.sparsity=0\.0 is out of range"),
        ({"regularization": -0.1}, r"model\.regularization=-0\.1 is negative"),
        ({"series_norm": "last"}, r"model\.series_norm='last' sees the whole window"),
        ({"dtype": "float8"}, r"model\.dtype='float8'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        build(**options)


def test_wrong_calls_are_refused():
    forecast = build(head="forecast", order=10)
    with pytest.raises(ConfigError, match=r"model\.order=10 is longer than the window; allowed: up to 9"):
        forecast.init(jax.random.key(0), VALUES)
    with pytest.raises(ConfigError, match="carries no state"):
        forecast.init_state(2, 9)
    with pytest.raises(ConfigError, match=r"takes \[B, L, C\] floats with 3 channels"):
        build().init(jax.random.key(0), VALUES[..., :2])
