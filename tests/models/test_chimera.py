"""Chimera against its equations written out in float64, what its variates see, and its options."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqjax
from seqjax.config import ConfigError

OPTIONS = {"input_dim": 3, "output_dim": 3, "embed_dim": 6, "expand": 1, "state_dim": 2, "num_layers": 1, "head": "regression"}
VALUES = np.random.default_rng(0).standard_normal((2, 6, 3))


def build(**options):
    return seqjax.build({"name": "chimera", **OPTIONS, **options})


def noisy(model, x=VALUES, seed=1):
    """Variables as made, with noise: the last map of a layer starts at zero."""
    rng = np.random.default_rng(seed)
    made = nn.unbox(jax.jit(model.init)(jax.random.key(0), jnp.asarray(x, jnp.float32)))
    return jax.tree.map(lambda a: np.asarray(a, np.float64) + 0.3 * rng.standard_normal(a.shape), made)


def softplus(x):
    return np.logaddexp(x, 0)


def one_side(scan, side, u, steps, weights):
    """One order of the variates, u `[L, V, E]`: both states of every feature, point by point."""
    length, variates, features = u.shape
    columns = slice(side * features, (side + 1) * features)
    a1, a4 = (-np.exp(scan[name][:, columns]) for name in ("a1_log", "a4_log"))
    a2, a3 = (scan[name][:, columns] for name in ("a2", "a3"))
    part = np.arange(features) // (features // 2)  # trend, then season
    h1, h2 = {}, {}
    none = np.zeros((a1.shape[0], features))
    y = np.zeros_like(u)
    for t in range(length):
        for v in range(variates) if side == 0 else reversed(range(variates)):
            above = (t, v - 1 if side == 0 else v + 1)
            d1, d2 = steps[t, v, 0, side], steps[t, v, 1, side]
            b1, b2, c1, c2 = (weights[t, v, i, side][part].T for i in range(4))
            held1, held2 = (np.exp(d1 * a1) - 1) / a1, (np.exp(d2 * a4) - 1) / a4
            drive1 = a2 * h2.get((t - 1, v), none) + b1 * u[t, v]
            drive2 = a3 * h1.get(above, none) + b2 * u[t, v]
            h1[t, v] = np.exp(d1 * a1) * h1.get((t - 1, v), none) + held1 * drive1
            h2[t, v] = np.exp(d2 * a4) * h2.get(above, none) + held2 * drive2
            y[t, v] = (c1 * h1[t, v] + c2 * h2[t, v]).sum(0)
    return y


def expected(params, x):
    """Of the head "regression", layers without norms, `[L, V]` to `[L, V]`."""
    z = x[..., None] * params["embedding"]["kernel"][0] + params["embedding"]["bias"] + params["variates"]
    for name in sorted(name for name in params if name.startswith("scan_")):
        z = z + one_layer(params[name], z)
    return (z @ params["head"]["values"]["kernel"] + params["head"]["values"]["bias"])[..., 0]


def one_layer(scan, z):
    u, gate = z @ scan["in"]["kernel"], z @ scan["gate"]["kernel"]
    raw = np.tensordot(u @ scan["dt_down"]["kernel"], scan["dt_up"]["kernel"], 1)  # [L, V, axis, side, E]
    time = np.concatenate([scan["trend_bias"], scan["seasonal_bias"]], axis=-1)
    steps = softplus(raw + np.stack([time, scan["variate_bias"]]))
    weights = np.tensordot(u, scan["weights"]["kernel"], 1)  # [L, V, which, side, part, N]
    y = sum(one_side(scan, side, u, steps, weights) for side in (0, 1)) + scan["skip"] * u
    return (y * gate / (1 + np.exp(-gate))) @ scan["out"]["kernel"]


def test_the_equations():
    """Of two layers, in one call and in two that hand over their states."""
    model = build(norm="none", num_layers=2, dtype="float64", param_dtype="float64")
    variables = noisy(build(norm="none", num_layers=2))
    wanted = np.stack([expected(variables["params"], row) for row in VALUES])
    with jax.enable_x64(True):
        variables, x = jax.tree.map(jnp.asarray, variables), jnp.asarray(VALUES)
        apply = jax.jit(model.apply)
        whole, _ = apply(variables, x)
        first, state = apply(variables, x[:, :4], model.init_state(2, 6))
        second, _ = apply(variables, x[:, 4:], state)
    np.testing.assert_allclose(whole, wanted, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(np.concatenate([first, second], axis=1), wanted, rtol=1e-10, atol=1e-10)


def test_a_variate_sees_every_other_up_to_its_time():
    model = build()
    variables = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), noisy(model))
    x = jnp.asarray(VALUES[:1], jnp.float32)
    jacobian = jax.jit(jax.jacobian(lambda x: model.apply(variables, x)[0][0, 3]))(x)[:, 0]  # [V, L, V]
    # A step that starts small and a variate two rows away leave little, but never nothing.
    assert np.all(jacobian[:, :4] != 0) and not np.any(jacobian[:, 4:])


@pytest.mark.parametrize("head", ["forecast", "closed_loop"])
def test_forecasts_follow_the_level(head):
    model = build(head=head, horizon=5, series_norm="last", head_state_dim=4)
    variables = noisy(model)
    apply = jax.jit(model.apply)
    level = np.array([0.0, 4.0, -2.0])
    found, state = apply(variables, jnp.asarray(VALUES, jnp.float32))
    moved, _ = apply(variables, jnp.asarray(VALUES + level, jnp.float32))
    assert found.shape == (2, 5, 3) and state is None
    np.testing.assert_allclose(moved, found + level, atol=1e-4)
    costs = model.costs(6)
    assert costs.parameters == sum(a.size for a in jax.tree.leaves(variables)) and costs.state_bytes == 0
    with pytest.raises(ConfigError, match="carries no state"):
        model.init_state(2, 6)


def test_initial_steps_are_in_their_ranges():
    model = build(expand=20)
    made = jax.jit(model.init)(jax.random.key(0), jnp.asarray(VALUES, jnp.float32))
    params = nn.unbox(made)["params"]["scan_0"]
    for name, (least, most) in {"trend": (1e-3, 1e-2), "seasonal": (1e-2, 1e-1), "variate": (0.1, 1.0)}.items():
        steps = softplus(np.asarray(params[f"{name}_bias"]))
        assert least * 0.99 < steps.min() < 2 * least and most / 2 < steps.max() < most * 1.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"causal": False}, r"model\.causal=False: chimera runs forward in time; allowed: True"),
        ({"input_dim": None, "vocab_size": 8}, r"model\.input_dim was not given: chimera takes a series"),
        ({"output_dim": 2}, r"model\.output_dim=2: chimera gives each variate an output; .*input_dim=3"),
        ({"head": "classifier", "num_classes": 2}, r"model\.head='classifier' is unknown; .*closed_loop, forecast, regression"),
        ({"series_norm": "last"}, r"model\.series_norm='last' sees the whole window"),
        ({"embed_dim": 3}, r"model\.embed_dim=3 with model\.expand=1 cannot be halved"),
        ({"trend_steps": (0.1, 0.01)}, r"model\.trend_steps=\(0\.1, 0\.01\) is no range of step sizes"),
        ({"variate_steps": (0.0, 1.0)}, r"model\.variate_steps=\(0\.0, 1\.0\) is no range"),
        ({"state_dim": 0}, r"model\.state_dim=0 is not positive"),
        ({"implementation": "asociative"}, r"model\.implementation='asociative' is unknown; did you mean 'associative'"),
        ({"norm": "layr"}, r"model\.norm='layr' is unknown; did you mean 'layer'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        build(**options)
