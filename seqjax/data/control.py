"""Episodes of a control problem by controllers of mixed quality, to learn from which action brings which return."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple

import numpy as np

from seqjax.config import ConfigError
from seqjax.data.task import Example, Task
from seqjax.registry import register_task

VALIDATION_FRACTION = 0.1
RETURN, STATE, ACTION = range(3)
"""Kinds of token, in their order within a step."""


class LinearQuadratic(NamedTuple):
    """Linear dynamics with normal noise and quadratic costs: S numbers of state, A of action.

    Attributes:
      transition, control: `x_(t+1) = transition x_t + control u_t + noise_std e_t`, `[S, S]` and `[S, A]`.
      noise_std: `[S]`.
      state_cost, action_cost: `[S, S]` and `[A, A]`; the reward of step t is
        `-x_(t+1)' state_cost x_(t+1) - u_t' action_cost u_t`.
    """

    transition: np.ndarray
    control: np.ndarray
    noise_std: np.ndarray
    state_cost: np.ndarray
    action_cost: np.ndarray

    def step(self, state: Any, action: Any, normal: Any) -> tuple[Any, Any]:
        """The next states `[..., S]` and rewards `[...]`, of NumPy's or JAX's arrays; `normal` `[..., S]` is e_t."""
        after = state @ self.transition.T + action @ self.control.T + self.noise_std * normal
        costs = (after @ self.state_cost * after).sum(-1) + (action @ self.action_cost * action).sum(-1)
        return after, -costs

    def solve(self, num_steps: int) -> tuple[np.ndarray, np.ndarray, float]:
        """The best controller of `num_steps` steps, `u_t = -gains_t x_t`, by Riccati's recursion (Bertsekas 2017, "Dynamic
        Programming and Optimal Control", section 3.1).

        Returns:
          gains: `[num_steps, A, S]`.
          cost: `[S, S]`, and constant: the expected return from x is `-x' cost x - constant`.
        """
        cost, constant, gains = np.zeros_like(self.state_cost), 0.0, []
        for _ in range(num_steps):
            ahead = self.state_cost + cost
            constant += float(np.square(self.noise_std) @ np.diag(ahead))
            curvature = self.action_cost + self.control.T @ ahead @ self.control
            gains.append(np.linalg.solve(curvature, self.control.T @ ahead @ self.transition))
            cost = self.transition.T @ ahead @ (self.transition - self.control @ gains[-1])
        return np.stack(gains[::-1]), cost, constant


def point_mass(step_size: float, noise: float) -> LinearQuadratic:
    """A mass in the plane, state (place, velocity), pushed by an acceleration towards the origin: S = 4, A = 2."""
    axes = np.eye(2)
    return LinearQuadratic(
        transition=np.kron([[1, step_size], [0, 1]], axes),
        control=np.kron([[step_size**2 / 2], [step_size]], axes),
        noise_std=noise * np.repeat([0.0, 1.0], 2),
        state_cost=np.kron(np.diag([1.0, 0.1]), axes),
        action_cost=0.1 * axes,
    )


@register_task("control")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Control(Task):
    """The action that was taken, from the return that came of it, the state, and all before: what a Decision Transformer
    learns (Chen et al. 2021, "Decision Transformer: Reinforcement Learning via Sequence Modeling").

    A mass rests on the unit circle and is pushed to the origin, by the best controller times a gain that is drawn for every
    episode, with noise on each action. Asked for a high return, a model should act as if the gain were 1.

    A step is three tokens: the return-to-go (the sum of rewards from here on), the state, the action. An example has
    `inputs` `[3 T, 10]` float32: three that say the kind of token, then the return-to-go divided by `return_scale`, the
    state, the action, each 0 in tokens of other kinds. `targets` and `weights` `[3 T, 2]` float32 are the action at the
    tokens of states; the others have weight 0.

    Attributes:
      episode_length: steps T of an episode.
      gains: the least and the greatest gain of the data's controllers.
      action_noise: standard deviation of the noise on the data's actions.
      step_size: time of a step.
      noise: standard deviation of the noise on the velocity.
      num_episodes: episodes to train on; a tenth as many more, one at least, are the validation split.
    """

    head: ClassVar[str] = "regression"
    locations: ClassVar[frozenset[str]] = frozenset()
    loss_unit: ClassVar[str] = "MSE"
    content: ClassVar[str] = "control:1"
    state_dim: ClassVar[int] = 4
    output_dim: ClassVar[int] = 2
    input_dim: ClassVar[int] = 3 + 1 + 4 + 2

    episode_length: int = 20
    gains: tuple[float, float] = (0.1, 1.0)
    action_noise: float = 0.2
    step_size: float = 0.25
    noise: float = 0.02
    num_episodes: int = 2000

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("episode_length", "num_episodes"):
            if getattr(self, key) < 1:
                raise ConfigError(f"data.{key}={getattr(self, key)} is too small; allowed: 1 or more.")
        if len(self.gains) != 2 or not self.gains[0] <= self.gains[1]:
            raise ConfigError(f"data.gains={self.gains!r} is no range; allowed: two numbers, the smaller one first.")
        if self.step_size <= 0:
            raise ConfigError(f"data.step_size={self.step_size} is not positive; allowed: above 0.")
        for key in ("action_noise", "noise"):
            if getattr(self, key) < 0:
                raise ConfigError(f"data.{key}={getattr(self, key)} is negative; allowed: 0 and above.")

    @property
    def length(self) -> int:
        return 3 * self.episode_length

    @functools.cached_property
    def environment(self) -> LinearQuadratic:
        return point_mass(self.step_size, self.noise)

    @functools.cached_property
    def optimal_return(self) -> float:
        """The expected return of the best controller, the same from every start."""
        _, cost, constant = self.environment.solve(self.episode_length)
        return -float(cost[0, 0]) - constant

    @staticmethod
    def starts(normals: Any) -> Any:
        """`[N, 4]`: at rest on the unit circle, in the direction of `[N, 2]` normal numbers."""
        return normals / (normals**2).sum(-1, keepdims=True) ** 0.5 @ np.eye(2, 4, dtype=np.float32)

    @functools.cached_property
    def return_scale(self) -> float:
        """The training episodes' mean absolute return."""
        return float(np.abs(self.returns("train")).mean())

    def returns(self, split: str) -> np.ndarray:
        """`[N]` float64: the return of each episode of a split."""
        return self.episodes[self.check_split(split)][2].sum(axis=1)

    @functools.cached_property
    def episodes(self) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Of each split, states `[N, T, 4]` before the actions `[N, T, 2]` and the rewards `[N, T]` that these bring, float64;
        they depend on `seed`."""
        counts = {"train": self.num_episodes, "validation": max(1, int(VALIDATION_FRACTION * self.num_episodes))}
        streams = (np.random.RandomState([self.seed, number]) for number in range(len(counts)))  # that NumPy has frozen
        return {split: self._draw(count, random) for (split, count), random in zip(counts.items(), streams)}

    def _draw(self, count: int, random: np.random.RandomState) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        best, _, _ = self.environment.solve(self.episode_length)
        gains = random.uniform(*self.gains, (count, 1))
        state, steps = self.starts(random.standard_normal((count, self.output_dim))), []
        for t in range(self.episode_length):
            action = -gains * (state @ best[t].T) + self.action_noise * random.standard_normal((count, self.output_dim))
            after, reward = self.environment.step(state, action, random.standard_normal(state.shape))
            steps.append((state, action, reward))
            state = after
        states, actions, rewards = (np.stack(series, axis=1) for series in zip(*steps))
        return states, actions, rewards

    def token(self, kind: int, values: Any) -> Any:
        """`[..., 10]` float32 tokens of one kind, of returns-to-go `[..., 1]`, states `[..., 4]` or actions `[..., 2]`, NumPy's
        or JAX's."""
        places = np.eye(self.input_dim, dtype=np.float32)
        first = (3, 4, 4 + self.state_dim)[kind]
        scale = np.float32(self.return_scale if kind == RETURN else 1.0)
        return (values / scale) @ places[first : first + values.shape[-1]] + places[kind]

    def examples(self, split: str) -> list[Example]:
        return self._examples[self.check_split(split)]

    @functools.cached_property
    def _examples(self) -> dict[str, list[Example]]:
        weights = np.repeat((np.arange(self.length) % 3 == STATE).astype(np.float32)[:, None], self.output_dim, axis=1)
        made = {}
        for split, (states, actions, rewards) in self.episodes.items():
            to_go = np.flip(np.flip(rewards, 1).cumsum(axis=1), 1)[..., None]
            kinds = [self.token(kind, values) for kind, values in ((RETURN, to_go), (STATE, states), (ACTION, actions))]
            inputs = np.stack(kinds, axis=2).reshape(len(states), self.length, -1).astype(np.float32)
            targets = np.repeat(actions, 3, axis=1).astype(np.float32) * weights
            made[split] = [{"inputs": x, "targets": y, "weights": weights} for x, y in zip(inputs, targets)]
        return made

    def baselines(self) -> dict[str, float]:
        """The variance of the noise on the actions, which no model can beat, and the error of predicting 0."""
        actions = self.episodes["validation"][1]
        return {"noise floor": self.action_noise**2, "predicting 0": float(np.square(actions).mean())}
