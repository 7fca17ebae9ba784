"""Acting by a model that was asked for a return."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqjax
from seqjax.config import ConfigError
from seqjax.data.control import Control
from seqjax.generation.control import roll_out

TASK = Control(episode_length=5, num_episodes=20, noise=0.1)


def build(name, **options):
    sizes = {"embed_dim": 16, "num_layers": 1, "num_heads": 2, "position": "sinusoidal"}
    model = seqjax.build({"name": name, "input_dim": 10, "output_dim": 2, "head": "regression", **sizes, **options})
    return model, nn.unbox(model.init(jax.random.key(0), jnp.zeros((1, TASK.length, 10))))


@pytest.mark.parametrize("name", ["aaren", "transformer"])
def test_actions_are_those_of_the_whole_episode_at_once(name):
    model, variables = build(name)
    found = jax.tree.map(np.asarray, roll_out(model, variables, TASK, -3.0, jax.random.key(1), 4))
    tokens = np.zeros((4, 5, 3, 10), np.float32)
    tokens[:, :, range(3), range(3)] = 1
    tokens[:, :, 0, 3] = found["to_go"] / TASK.return_scale
    tokens[:, :, 1, 4:8], tokens[:, :, 2, 8:] = found["states"], found["actions"]
    at_once, _ = model.apply(variables, jnp.asarray(tokens.reshape(4, 15, 10)))
    np.testing.assert_allclose(found["actions"], at_once[:, 1::3], atol=1e-5)
    np.testing.assert_allclose(found["to_go"][:, 1:], -3.0 - found["rewards"].cumsum(axis=1)[:, :-1], rtol=1e-5)


def test_episodes_follow_the_environment():
    model, variables = build("aaren")
    found = jax.tree.map(np.asarray, roll_out(model, variables, TASK, -3.0, jax.random.key(1), 2000))
    np.testing.assert_allclose(np.linalg.norm(found["states"][:, 0], axis=1), 1, rtol=1e-6)
    expected, _ = TASK.environment.step(found["states"], found["actions"], np.zeros(4))
    noise = found["states"][:, 1:] - expected[:, :-1]
    np.testing.assert_allclose(noise[..., :2], 0, atol=1e-6)
    assert noise[..., 2:].std() == pytest.approx(0.1, rel=0.03)
    again = roll_out(*build("transformer"), TASK, -1.0, jax.random.key(1), 2000)
    np.testing.assert_array_equal(again["states"][:, 0], found["states"][:, 0])


def test_models_that_do_not_act_are_refused():
    model, variables = build("aaren", input_dim=10, output_dim=3)
    with pytest.raises(ConfigError, match=r"output_dim=3 does not act in data\.name='control'; allowed: 10 and 2"):
        roll_out(model, variables, TASK, -3.0, jax.random.key(1), 2)
    model, variables = build("transformer", causal=False)
    with pytest.raises(ConfigError, match=r"model\.causal=False"):
        roll_out(model, variables, TASK, -3.0, jax.random.key(1), 2)
