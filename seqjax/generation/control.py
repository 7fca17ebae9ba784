"""Acting in an environment by a model that was asked for a return, from a carried state."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from seqjax.config import ConfigError
from seqjax.data.control import ACTION, RETURN, STATE, Control


@functools.partial(jax.jit, static_argnames=("model", "task", "num_episodes"))
def roll_out(
    model: nn.Module, variables: Any, task: Control, wanted: float | Float[Array, ""], key: Array, num_episodes: int = 128
) -> dict[str, Array]:
    """Episodes whose actions are a model's, which is asked for a return (Chen et al. 2021, section 3).

    Each step the model reads the return that is still to come, the state, and then the action it gave: two calls that
    continue from its state. Starts and noise of an episode depend on the key alone, whatever the model.

    Args:
      model: with a head "regression", for the tokens of `task`; it carries a state.
      variables: its variables, without boxes.
      wanted: the return asked for at the start; rewards are subtracted as they come.
    Returns:
      `states` `[N, T, 4]` before each action, `actions` `[N, T, 2]`, `rewards` `[N, T]`, `to_go` `[N, T]`, float32.
    Raises:
      ConfigError: the model's inputs or outputs are not the task's, or it carries no state.
    """
    if (model.input_dim, model.output_dim) != (task.input_dim, task.output_dim):
        raise ConfigError(
            f"a model with input_dim={model.input_dim} and output_dim={model.output_dim} does not act in data.name='control'; "
            f"allowed: {task.input_dim} and {task.output_dim}."
        )
    start_key, noise_key = jax.random.split(key)
    starts = task.starts(jax.random.normal(start_key, (num_episodes, task.output_dim)))
    normals = jax.random.normal(noise_key, (task.episode_length, num_episodes, task.state_dim))
    environment = jax.tree.map(jnp.float32, task.environment)
    variables = model.prepare(variables)

    def step(carry: tuple, normal: Array) -> tuple[tuple, dict[str, Array]]:
        place, to_go, state = carry
        asked = jnp.stack([task.token(RETURN, to_go[:, None]), task.token(STATE, place)], axis=1)
        outputs, state = model.apply(variables, asked, state)
        action = outputs[:, -1]
        _, state = model.apply(variables, task.token(ACTION, action)[:, None], state)
        after, reward = environment.step(place, action, normal)
        return (after, to_go - reward, state), {"states": place, "actions": action, "rewards": reward, "to_go": to_go}

    first = (starts, jnp.full(num_episodes, wanted, jnp.float32), model.init_state(num_episodes, task.length))
    _, steps = jax.lax.scan(step, first, normals)
    return {name: series.swapaxes(0, 1) for name, series in steps.items()}
