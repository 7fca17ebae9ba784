"""The closed-loop head: a system reads a window, then runs on its own outputs."""

import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqjax
from seqjax.config import ConfigError
from seqjax.models.heads import ClosedLoopHead, ending_at_last, fits
from seqjax.ops.companion import closed_loop, companion_read, companion_rows, unit_sum
from seqjax.scaling.flops import count_flops

GOLDEN = np.load(pathlib.Path(__file__).parent / "data/spacetime.npz")
RNG = np.random.default_rng(0)
BATCH, LENGTH, ORDER, WIDTH, HORIZON = 2, 15, 5, 4, 9
SYSTEM = {name: RNG.standard_normal((ORDER, WIDTH)) for name in ("last_column", "b", "c", "k")}
WINDOW = RNG.standard_normal((BATCH, LENGTH, WIDTH))


def normalized(v):
    return v / np.abs(v).sum(axis=0)


def rolled(p, window, horizon):
    """Outputs and inputs of the closed loop, feature by feature, by feeding each input back: `[B, T, D]` both."""
    y, fed = np.zeros((2, len(window), horizon, window.shape[2]))
    for row in range(window.shape[0]):
        for h in range(window.shape[2]):
            a, c, k = (normalized(p[name])[:, h] for name in ("last_column", "c", "k"))
            b, loop_b, raw_k = p["b"][:, h], normalized(p["b"])[:, h], p["k"][:, h]
            A = np.diag(np.ones(len(a) - 1), -1) + np.outer(a, np.eye(len(a))[-1])
            x = np.zeros(len(a))
            for u in window[row, :, h]:
                x = A @ x + b * u
            for t in range(horizon):
                y[row, t, h], fed[row, t, h] = c @ x, raw_k @ x
                x = A @ x + loop_b * (k @ x)
    return y, fed


def applied(p, window, segment_ids=None, **options):
    """The head's outputs without its output map."""
    types = {"dtype": "float64", "param_dtype": "float64"}
    head = ClosedLoopHead(window.shape[-1], state_dim=len(p["b"]), **{"horizon": HORIZON, **types, **options})
    values = {"kernel": np.eye(window.shape[-1]), "bias": np.zeros(window.shape[-1])}
    with jax.enable_x64(True):
        return np.asarray(jax.jit(head.apply)({"params": {**p, "values": values}}, jnp.asarray(window), segment_ids))


def test_the_rollout_feeds_its_own_forecasts_back():
    np.testing.assert_allclose(applied(SYSTEM, WINDOW), rolled(SYSTEM, WINDOW, HORIZON)[0], atol=1e-12)


def test_outputs_equal_the_authors():
    p = {name: GOLDEN[f"closed_w.{name}"].astype(np.float64).T for name in "abck"}
    p["last_column"] = p.pop("a")
    window = GOLDEN["closed_u"].astype(np.float64)
    y, fed = rolled(p, window, 5)
    np.testing.assert_allclose(y, GOLDEN["closed_y"], atol=2e-6)
    np.testing.assert_allclose(fed, GOLDEN["closed_unext"], atol=2e-6)
    np.testing.assert_allclose(applied(p, window, horizon=5), GOLDEN["closed_y"], atol=2e-6)


def test_an_autoregression_is_continued_exactly():
    """`b = e_1`, `A` the shift and `k = c` the coefficients: every later value follows from the last ones."""
    coefficients = np.array([1.2, -0.5, 0.3, -0.4, 0.1])[:, None]
    series = list(RNG.standard_normal((ORDER, 2, 1)))
    for _ in range(12):
        series.append(sum(a * x for a, x in zip(coefficients[:, 0], series[::-1])))
    series = np.stack(series, axis=1)
    shift, first = np.zeros((ORDER, 1)), np.eye(ORDER)[:, :1]
    with jax.enable_x64(True):
        shift, first, k = (jnp.asarray(v) for v in (shift, first, coefficients))
        got = closed_loop(shift, first, k, k, companion_read(shift, first, jnp.asarray(series[:, :8])), 9)
    np.testing.assert_allclose(got, series[:, 8:], atol=1e-12)


def test_rows_are_powers_of_the_closed_loop():
    a, b, c, k = (SYSTEM[name][:, :1] for name in ("last_column", "b", "c", "k"))
    A = np.diag(np.ones(ORDER - 1), -1) + np.outer(a, np.eye(ORDER)[-1]) + np.outer(b, k)
    with jax.enable_x64(True):
        rows = companion_rows(*(jnp.asarray(v) for v in (a, c)), 6, (jnp.asarray(b), jnp.asarray(k)))
        sums = jnp.abs(unit_sum(jnp.asarray(SYSTEM["k"]))).sum(0)
    np.testing.assert_allclose(rows[..., 0], [c[:, 0] @ np.linalg.matrix_power(A, l) for l in range(6)], rtol=1e-10)
    np.testing.assert_allclose(sums, 1)


def test_only_the_last_segment_is_read():
    ids = np.array([[3] * 4 + [5] * 8 + [0] * 3, [0] * 6 + [2] * 9])
    want = [applied(SYSTEM, WINDOW[:1, 4:12])[0], applied(SYSTEM, WINDOW[1:, 6:])[0]]
    np.testing.assert_allclose(applied(SYSTEM, WINDOW, ids), want, atol=1e-12)
    turned = ending_at_last(jnp.arange(1.0, 31).reshape(2, 15, 1), jnp.asarray(ids))[..., 0]
    assert turned[0].tolist() == [0] * 7 + list(range(5, 13)) and turned[1].tolist() == [0] * 6 + list(range(22, 31))


def build(**options):
    sizes = {"vocab_size": None, "input_dim": 2, "output_dim": 2, "residual_init": 1.0}
    head = {"head": "closed_loop", "horizon": 6, "head_state_dim": 8}
    return seqjax.build({**seqjax.example_config("spacetime").to_dict(), **sizes, **head, **options})


@pytest.mark.parametrize("options", [{}, {"channel_independent": True, "series_norm": "last"}, {"causal": False}])
def test_a_model_forecasts_with_it_and_counts_its_costs(options):
    model = build(norm="none", **options)
    window = jnp.asarray(RNG.standard_normal((3, 40, 2)), jnp.float32)
    variables = nn.unbox(jax.jit(model.init)(jax.random.key(0), window))
    forecast = jax.jit(model.apply)(variables, window)[0]
    assert forecast.shape == (3, 6, 2) and np.isfinite(forecast).all()
    costs = model.costs(40)
    assert costs.parameters == sum(a.size for a in jax.tree.leaves(variables)) and costs.state_bytes == 0
    if model.channel_independent:  # what does not depend on the channel is made once, and counted for each
        return
    wide = build(norm="none", embed_dim=128, **options)
    row = jax.ShapeDtypeStruct((1, 40, 2), jnp.float32)
    shapes = jax.eval_shape(wide.init, jax.random.key(0), row)
    counted = count_flops(lambda v, x: wide.apply(v, x)[0], shapes, row)
    assert 0.85 < wide.costs(40).flops / counted < 1.05


def test_the_heads_own_costs_are_exact():
    head = ClosedLoopHead(3, horizon=50, state_dim=32)
    row = jax.ShapeDtypeStruct((1, 60, 16), jnp.float32)
    shapes = jax.eval_shape(head.init, jax.random.key(0), row)
    assert head.parameters(16, False) == sum(a.size for a in jax.tree.leaves(shapes))
    assert 0.95 < head.flops(16, 60) / count_flops(head.apply, shapes, row) < 1.05


def test_it_serves_forecasting_tasks_and_carries_no_state():
    assert fits("closed_loop", "forecast") and not fits("closed_loop", "regression")
    with pytest.raises(ConfigError, match=r"closed_loop.*carries no state"):
        build().init_state(1, 10)
    with pytest.raises(ConfigError, match=r"model\.head_state_dim=0 is not positive"):
        build(head_state_dim=0)
