import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from seqjax.config import ConfigError
from seqjax.training.groups import settings_by_leaf
from seqjax.training.optimizer import OPTIMIZERS, OptimizerConfig, make_optimizer


def boxed(shape, *names):
    return nn.LogicallyPartitioned(jnp.ones(shape), names)


PARAMETERS = {
    "embedding": {"table": boxed((6, 4), "vocab", "embed")},
    "positions": {"table": boxed((5, 4), "length", "embed")},
    "layers": {
        "kernel": boxed((2, 4, 8), "layers", "embed", "mlp"),
        "norm": boxed((2, 4), "layers", "norm"),
        "bias": boxed((2, 2, 4), "layers", "heads", "head_dim"),
        "A_log": boxed((2, 4, 3), "layers", "channels", "state"),
    },
    "logits": {"kernel": boxed((4, 6), "embed", "vocab")},
}
MODEL_GROUPS = (("A_log", "state_space"),)


def settings(**options):
    return settings_by_leaf(OptimizerConfig(weight_decay=0.1, **options), PARAMETERS, MODEL_GROUPS)


def test_by_default_matrices_decay_and_vectors_biases_and_state_space_parameters_do_not():
    decays = jax.tree.map(lambda s: s.weight_decay > 0, settings())
    assert decays == {
        "embedding": {"table": True},
        "positions": {"table": True},
        "layers": {"kernel": True, "norm": False, "bias": False, "A_log": False},
        "logits": {"kernel": True},
    }


def test_tables_are_spared_on_request_and_the_output_layer_is_not_a_table():
    found = settings(decay_embeddings=False)
    assert found["embedding"]["table"].weight_decay == found["positions"]["table"].weight_decay == 0.0
    assert found["logits"]["kernel"].weight_decay == 0.1


def test_groups_set_rates_and_rules_win_over_the_model():
    found = settings(
        groups={"state_space": {"learning_rate": 1e-4}, "slow": {"learning_rate": 1e-5, "weight_decay": 0.3}},
        rules=((r"layers/norm", "slow"),),
    )
    assert found["layers"]["A_log"].learning_rate == 1e-4
    assert found["layers"]["A_log"].weight_decay == 0.0  # the group's own default stays
    assert found["layers"]["norm"].learning_rate == 1e-5
    assert found["layers"]["norm"].weight_decay == 0.3  # a group's own decay holds even for vectors
    moved = settings(rules=(("A_log", "no_decay"),), groups={"state_space": {"learning_rate": 1e-4}})
    assert moved["layers"]["A_log"].learning_rate == OptimizerConfig().learning_rate


@pytest.mark.parametrize(
    "options, message",
    [
        ({"name": "adamm"}, "optimizer.name='adamm' is unknown; did you mean 'adam'"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"learning_rate": -1.0}, "optimizer.learning_rate=-1.0 is negative"),
        ({"clip_norm": 0.0}, "optimizer.clip_norm=0.0 is not positive"),
        ({"beta2": 1.0}, "optimizer.beta2=1.0 is out of range"),
        ({"rules": (("(", "no_decay"),)}, "is not a regular expression"),
        ({"rules": (("kernel", "slwo"),)}, "group 'slwo' is unknown"),
        ({"rules": ("kernel",)}, "is not a pair"),
        ({"groups": {"slow": {"lr": 1.0}}}, "optimizer.groups.slow.lr is not an option"),
        ({"groups": {"slow": 3}}, "optimizer.groups.slow=3 is not a mapping"),
    ],
)
def test_mistakes_are_told(options, message):
    with pytest.raises(ConfigError) as error:
        OptimizerConfig(**options)
    assert message in str(error.value)


def test_rules_and_groups_that_mean_nothing_are_told():
    with pytest.raises(ConfigError, match="'kernal' matches no parameter"):
        settings(rules=(("kernal", "no_decay"),))
    with pytest.raises(ConfigError, match="optimizer group 'mystery' is not set"):
        settings_by_leaf(OptimizerConfig(), PARAMETERS, (("kernel", "mystery"),))


def updates_of(optimizer, steps=3):
    params = {"w": jnp.arange(1.0, 7.0).reshape(2, 3), "b": jnp.ones(3)}
    state = optimizer.init(params)
    for step in range(steps):
        grads = jax.tree.map(lambda p, step=step: jnp.cos(p * (step + 1)), params)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_adamw_is_optax_adamw():
    axes = {"w": boxed((2, 3), "embed", "mlp"), "b": boxed((3,), "mlp")}
    config = OptimizerConfig(learning_rate=0.1, schedule="constant", weight_decay=0.2, clip_norm=None, beta2=0.99)
    reference = optax.adamw(0.1, 0.9, 0.99, 1e-8, weight_decay=0.2, mask={"w": True, "b": False})
    ours = updates_of(make_optimizer(config, 10, axes))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, updates_of(reference))


def test_clipping_bounds_the_gradient_that_sgd_applies():
    axes = {"w": boxed((2,), "embed")}
    config = OptimizerConfig("sgd", learning_rate=1.0, schedule="constant", beta1=0.0, clip_norm=2.0)
    optimizer = make_optimizer(config, 10, axes)
    params = {"w": jnp.zeros(2)}
    updates, _ = optimizer.update({"w": jnp.array([30.0, 40.0])}, optimizer.init(params), params)
    np.testing.assert_allclose(updates["w"], [-1.2, -1.6], rtol=1e-6)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_optimizer_descends_and_decays(name):
    axes = {"w": boxed((2, 3), "embed", "mlp")}
    start = {"w": jnp.array([[1.0, -2.0, 3.0], [0.5, 1.0, -1.0]])}

    def run(weight_decay):
        config = OptimizerConfig(name, learning_rate=0.05, schedule="constant", weight_decay=weight_decay)
        optimizer = make_optimizer(config, 100, axes)
        params, state = start, optimizer.init(start)
        for _ in range(40):
            updates, state = optimizer.update(jax.tree.map(lambda p: p - 0.3, params), state, params)
            params = optax.apply_updates(params, updates)
        return params["w"]

    plain, decayed = run(0.0), run(0.5)
    assert jnp.abs(plain - 0.3).max() < jnp.abs(start["w"] - 0.3).max()
    assert jnp.abs(decayed).sum() < jnp.abs(plain).sum()
