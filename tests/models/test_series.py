"""Series options of forecasting models: levels and scales of windows, and channels as rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqjax
from seqjax.config import ConfigError
from seqjax.models.series import NORMS, last_segment
from seqjax.scaling.flops import count_flops

LENGTH, CHANNELS, HORIZON = 12, 3, 4
WINDOW = np.random.default_rng(0).standard_normal((2, LENGTH, CHANNELS)).astype(np.float32) * [1, 3, 9] + [0, 5, -20]
WINDOW = WINDOW.astype(np.float32)


def build(name="transformer", **options):
    model = {"transformer": {"vocab_size": None, "output_dim": CHANNELS, "residual_init": 1.0, "num_layers": 1}, "ar_net": {}}[
        name
    ]
    forecast = {"input_dim": CHANNELS, "head": "forecast", "horizon": HORIZON}
    return seqjax.build({**seqjax.example_config(name).to_dict(), **model, **forecast, **options})


def init(model, window=WINDOW):
    """Variables with noise: AR-Net starts at zero."""
    noisy = lambda a: a + 0.1 * np.random.default_rng(1).standard_normal(a.shape).astype(a.dtype)
    return jax.tree.map(noisy, jax.jit(model.init)(jax.random.key(0), jnp.asarray(window)))


def run(model, variables, window, segment_ids=None):
    ids = None if segment_ids is None else jnp.asarray(segment_ids)
    return jax.jit(model.apply)(variables, jnp.asarray(window, jnp.float32), segment_ids=ids)[0]


def statistics(window, norm):
    """Level and scale `[B, 1, C]` that a norm takes away."""
    if norm == "none":
        return 0, 1
    if norm == "last":
        return window[:, -1:], 1
    mean = window.mean(axis=1, keepdims=True)
    return mean, np.sqrt(window.var(axis=1, keepdims=True) + 1e-5) if norm == "standard" else 1


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["transformer", "ar_net"])
def test_the_body_forecasts_at_level_0_and_its_forecast_is_put_back(name, norm):
    plain, model = build(name), build(name, series_norm=norm)
    variables = init(plain)
    level, scale = statistics(WINDOW, norm)
    expected = run(plain, variables, (WINDOW - level) / scale) * scale + level
    found = run(model, variables, WINDOW)
    assert found.shape == (2, HORIZON, CHANNELS)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_independent_channels_are_rows_of_one_model():
    one, model = build(input_dim=1, output_dim=1, series_norm="last"), build(channel_independent=True, series_norm="last")
    variables = init(model)
    alone = [run(one, variables, WINDOW[..., c : c + 1]) for c in range(CHANNELS)]
    np.testing.assert_allclose(run(model, variables, WINDOW), np.concatenate(alone, axis=-1), rtol=1e-4, atol=1e-4)


WINDOWED = [(name, {"series_norm": norm}) for name in ("transformer", "ar_net") for norm in NORMS]


@pytest.mark.parametrize(("name", "options"), [*WINDOWED, ("transformer", {"channel_independent": True})])
def test_only_the_last_segment_is_the_window(name, options):
    model = build(name, **options)
    variables = init(model)
    ids = np.array([[4] * 3 + [2] * 7 + [0] * 2, [0] * 5 + [1] * 7])
    found = run(model, variables, WINDOW, ids)
    other = np.where(ids[..., None] == np.array([2, 1])[:, None, None], WINDOW, 100 * WINDOW[:, ::-1] + 7)
    np.testing.assert_allclose(run(model, variables, other, ids), found, rtol=1e-5, atol=1e-5)
    for row, window in ((0, WINDOW[:1, 3:10]), (1, WINDOW[1:, 5:])):
        np.testing.assert_allclose(found[row], run(model, variables, window)[0], rtol=1e-4, atol=1e-4)


def test_the_last_segment_ends_at_the_last_token_outside_padding():
    ids = jnp.array([[1, 1, 2, 2], [2, 1, 2, 0], [0, 0, 3, 3], [0, 0, 0, 0], [5, 0, 5, 0]])
    expected = [[0, 0, 1, 1], [0, 0, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 1, 0]]
    assert last_segment(ids).tolist() == expected


def test_low_precision_keeps_the_level():
    model = build(series_norm="last", dtype="bfloat16")
    far = WINDOW + np.float32(1000.0)  # bfloat16 knows thousands to within 4
    found = run(model, init(model), far)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found - 1000.0, run(model, init(model), WINDOW), atol=0.1)


@pytest.mark.parametrize("options", [{"channel_independent": True}, {"series_norm": "standard", "channel_independent": True}])
def test_costs_count_every_channel(options):
    model = build(embed_dim=128, **options)
    variables = jax.eval_shape(model.init, jax.random.key(0), WINDOW[:1])
    costs = model.costs(LENGTH)
    assert costs.parameters == sum(a.size for a in jax.tree.leaves(variables))
    counted = count_flops(lambda v, x: model.apply(v, x)[0], variables, WINDOW[:1])
    assert 0.85 < costs.flops / counted < 1.05
    assert costs.state_bytes == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"series_norm": "lasst"}, r"model\.series_norm='lasst' is unknown; did you mean 'last'"),
        ({"series_norm": "mean", "head": "regression"}, r"model\.series_norm='mean' sees the whole window.*head='regression'"),
        ({"channel_independent": True, "head": "regression"}, r"model\.channel_independent=True sees the whole window"),
        ({"series_norm": "mean", "output_dim": 2}, r"model\.input_dim=3 and model\.output_dim=2; allowed: the same"),
        ({"series_norm": "mean", "vocab_size": 8, "input_dim": None}, r"acts on continuous inputs"),
    ],
)
def test_series_options_are_of_forecasting_models(options, message):
    with pytest.raises(ConfigError, match=message):
        build(**options)
