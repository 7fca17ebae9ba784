import numpy as np
import pytest

from seqjax.config import ConfigError
from seqjax.data.autoregressive import Autoregressive

PROCESS = (0.5, -0.3, 0.4)


def values(task, split="train"):
    """`[N, L + 1]` of a split."""
    examples = task.examples(split)
    assert all(np.array_equal(e["inputs"][1:], e["targets"][:-1]) for e in examples)
    return np.stack([np.append(e["inputs"], e["targets"][-1]) for e in examples]).astype(np.float64)


def test_least_squares_finds_coefficients_and_noise():
    x = values(Autoregressive(coefficients=PROCESS, noise=0.5, num_sequences=2000, sequence_length=40))
    past = np.stack([x[:, 2 - lag : -1 - lag] for lag in range(3)], axis=-1).reshape(-1, 3)
    found, residual, *_ = np.linalg.lstsq(past, x[:, 3:].reshape(-1), rcond=None)
    np.testing.assert_allclose(found, PROCESS, atol=0.015)  # five standard errors
    assert residual[0] / len(past) == pytest.approx(0.25, rel=0.03)


def test_stationary_from_the_first_value_on():
    task = Autoregressive(coefficients=PROCESS, noise=0.5, num_sequences=20000, sequence_length=4)
    x = values(task)
    # Of an MA(infinity), written out: the impulse response, and sums of its products.
    response = [1.0]
    for _ in range(400):
        response.append(sum(a * r for a, r in zip(PROCESS, response[::-1])))
    response = np.array(response)
    for lag in range(4):
        expected = 0.25 * np.sum(response[lag:] * response[: len(response) - lag])
        for start in range(5 - lag):
            measured = np.mean(x[:, start] * x[:, start + lag])
            assert measured == pytest.approx(expected, abs=0.05 * 0.25 * np.sum(response**2))
    assert task.baselines()["predicting 0"] == pytest.approx(0.25 * np.sum(response**2), rel=1e-9)
    assert task.baselines()["noise floor"] == 0.25


def test_only_targets_whose_past_is_seen_count():
    weights = Autoregressive(coefficients=PROCESS, sequence_length=6).examples("train")[0]["weights"]
    assert weights[:, 0].tolist() == [0, 0, 1, 1, 1, 1]


def test_splits_and_seeds_differ():
    make = lambda **options: Autoregressive(num_sequences=20, sequence_length=8, **options)
    train, validation = values(make()), values(make(), "validation")
    assert (len(train), len(validation)) == (20, 2)
    assert not np.isin(validation, train).any()
    assert not np.isin(values(make(seed=1)), train).any()
    assert np.array_equal(values(make(batch_size=4)), train)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coefficients": (0.7, 0.4)}, r"data\.coefficients=\(0\.7, 0\.4\) is not stationary.* is 1\.07\d+; allowed: below 1"),
        ({"coefficients": (2.0, -1.0)}, r"is not stationary"),  # a double root of 1
        ({"coefficients": ()}, r"data\.coefficients=\(\) is not a process"),
        ({"coefficients": ("a",)}, r"allowed: one or more numbers"),
        ({"noise": 0.0}, r"data\.noise=0\.0 is not positive"),
        ({"sequence_length": 1}, r"data\.sequence_length=1 is too small; allowed: 2 or more"),
        ({"num_sequences": 0}, r"data\.num_sequences=0 is too small"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        Autoregressive(**options)
