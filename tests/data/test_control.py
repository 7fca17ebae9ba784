import numpy as np
import pytest

from seqjax.config import ConfigError
from seqjax.data.control import ACTION, RETURN, STATE, Control


def expected_return(task, gains, start):
    """Of `u_t = -gains_t x_t`: mean and covariance of the state, step by step."""
    e = task.environment
    mean, covariance, total = start, np.zeros((4, 4)), 0.0
    for gain in gains:
        second = np.outer(mean, mean) + covariance
        total -= np.trace(gain.T @ e.action_cost @ gain @ second)
        closed = e.transition - e.control @ gain
        mean, covariance = closed @ mean, closed @ covariance @ closed.T + np.diag(e.noise_std**2)
        total -= np.trace(e.state_cost @ (np.outer(mean, mean) + covariance))
    return total


def test_no_controller_beats_the_best():
    task = Control(episode_length=6, noise=0.1)
    best, cost, constant = task.environment.solve(6)
    start = np.array([0.6, -0.8, 0.3, 0.1])
    assert expected_return(task, best, start) == pytest.approx(-start @ cost @ start - constant, rel=1e-12)
    rest = task.starts(np.array([[3.0, -4.0]]))[0]
    assert rest.tolist() == pytest.approx([0.6, -0.8, 0, 0])
    assert task.optimal_return == pytest.approx(expected_return(task, best, rest), rel=1e-12)
    # Its return is stationary, and falls with every change.
    rng = np.random.default_rng(0)
    for _ in range(20):
        change = rng.standard_normal(best.shape)
        up, down = (expected_return(task, best + sign * 1e-3 * change, start) for sign in (1, -1))
        top = expected_return(task, best, start)
        assert up < top and down < top and up - down == pytest.approx(0, abs=0.05 * (2 * top - up - down))


def test_episodes_follow_the_dynamics_and_the_gains():
    task = Control(episode_length=5, gains=(0.4, 0.4), action_noise=0.0, noise=0.0, num_episodes=10)
    states, actions, rewards = task.episodes["validation"]
    assert states.shape == (1, 5, 4)
    np.testing.assert_allclose(np.linalg.norm(states[:, 0, :2], axis=1), 1)
    best, _, _ = task.environment.solve(5)
    for t in range(5):
        place, speed, push = states[0, t, :2], states[0, t, 2:], actions[0, t]
        np.testing.assert_allclose(push, -0.4 * best[t] @ states[0, t])
        place, speed = place + 0.25 * speed + 0.25**2 / 2 * push, speed + 0.25 * push
        assert rewards[0, t] == pytest.approx(-(place @ place) - 0.1 * speed @ speed - 0.1 * push @ push)
        if t < 4:
            np.testing.assert_allclose(states[0, t + 1], np.concatenate([place, speed]))


def test_the_best_controllers_episodes_have_its_return():
    task = Control(gains=(1.0, 1.0), action_noise=0.0, noise=0.1, num_episodes=4000)
    returns = task.returns("train")
    assert returns.mean() == pytest.approx(task.optimal_return, abs=3 * returns.std() / np.sqrt(len(returns)))


def test_tokens_of_an_example():
    task = Control(episode_length=4, num_episodes=20)
    states, actions, rewards = task.episodes["train"]
    example = task.examples("train")[7]
    for t in range(4):
        of_return, of_state, of_action = example["inputs"][3 * t : 3 * t + 3]
        to_go = rewards[7, t:].sum() / np.abs(rewards.sum(axis=1)).mean()
        np.testing.assert_allclose(of_return, [1, 0, 0, to_go, *[0] * 6], rtol=1e-5)
        np.testing.assert_allclose(of_state, [0, 1, 0, 0, *states[7, t], 0, 0], rtol=1e-5)
        np.testing.assert_allclose(of_action, [0, 0, 1, 0, 0, 0, 0, 0, *actions[7, t]], rtol=1e-5)
        np.testing.assert_allclose(example["targets"][3 * t : 3 * t + 3], [[0, 0], actions[7, t], [0, 0]], rtol=1e-6)
        assert example["weights"][3 * t : 3 * t + 3].tolist() == [[0, 0], [1, 1], [0, 0]]
    assert (RETURN, STATE, ACTION) == (0, 1, 2)


def test_baselines():
    # The noise is what remains of the actions where the gain is known.
    task = Control(gains=(0.5, 0.5), num_episodes=20000)
    states, actions, _ = task.episodes["validation"]
    best, _, _ = task.environment.solve(20)
    noise = actions + 0.5 * np.einsum("tas,nts->nta", best, states)
    found = task.baselines()
    assert np.square(noise).mean() == pytest.approx(found["noise floor"], rel=0.02)
    assert found["predicting 0"] == pytest.approx(np.square(actions).mean())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"episode_length": 0}, r"data\.episode_length=0 is too small; allowed: 1 or more"),
        ({"num_episodes": 0}, r"data\.num_episodes=0 is too small"),
        ({"gains": (1.0, 0.5)}, r"data\.gains=\(1\.0, 0\.5\) is no range; allowed: two numbers, the smaller one first"),
        ({"gains": (1.0,)}, r"is no range"),
        ({"step_size": 0.0}, r"data\.step_size=0\.0 is not positive"),
        ({"noise": -0.1}, r"data\.noise=-0\.1 is negative; allowed: 0 and above"),
        ({"action_noise": -0.1}, r"data\.action_noise=-0\.1 is negative"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        Control(**options)
