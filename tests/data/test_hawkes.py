import numpy as np
import pytest
import scipy.stats

from seqjax.config import ConfigError
from seqjax.data.hawkes import Hawkes, Process, draw, intensities, log_likelihood, mark_probabilities

RNG = np.random.default_rng(0)
PROCESS = Process(
    background=np.array([0.3, 0.2]),
    branching=np.array([[0.3, 0.4], [0.5, 0.1]]),
    decay=np.array([[1.0, 2.0], [3.0, 0.7]]),
)
GAPS, MARKS = RNG.exponential(1.0, (3, 12)), RNG.integers(0, 2, (3, 12))


def rate(times, marks, mark, now):
    """Of one mark, from the definition: a sum over all events before `now`."""
    total = PROCESS.background[mark]
    for when, other in zip(times, marks):
        if when < now:
            decay = PROCESS.decay[mark, other]
            total += PROCESS.branching[mark, other] * decay * np.exp(-decay * (now - when))
    return total


def test_rates_are_those_of_the_definition():
    found, _ = intensities(PROCESS, GAPS, MARKS)
    for row, (times, marks) in enumerate(zip(GAPS.cumsum(axis=1), MARKS)):
        expected = [[rate(times[:k], marks[:k], mark, now) for mark in range(2)] for k, now in enumerate(times)]
        np.testing.assert_allclose(found[row], expected, rtol=1e-12)


def test_likelihood_is_that_of_the_definition():
    found = log_likelihood(PROCESS, GAPS, MARKS)
    for row, (times, marks) in enumerate(zip(GAPS.cumsum(axis=1), MARKS)):
        for k, now in enumerate(times):
            before = times[k - 1] if k else 0.0
            compensator = PROCESS.background.sum() * (now - before)
            for when, other in zip(times[:k], marks[:k]):
                faded = np.exp(-PROCESS.decay[:, other] * (before - when)) - np.exp(-PROCESS.decay[:, other] * (now - when))
                compensator += PROCESS.branching[:, other] @ faded
            expected = np.log(rate(times[:k], marks[:k], marks[k], now)) - compensator
            assert found[row, k] == pytest.approx(expected, rel=1e-12)


def test_likelihood_in_other_units_of_time():
    slower = Process(PROCESS.background / 10, PROCESS.branching, PROCESS.decay / 10)
    np.testing.assert_allclose(
        log_likelihood(slower, 10 * GAPS, MARKS), log_likelihood(PROCESS, GAPS, MARKS) - np.log(10), rtol=1e-12
    )


def test_times_rescaled_by_the_compensator_are_exponential():
    gaps, marks = draw(PROCESS, 50, 200, np.random.RandomState(0))
    rates, integrals = intensities(PROCESS, gaps, marks)
    rescaled = integrals.sum(axis=2)
    assert scipy.stats.kstest(rescaled.reshape(-1), "expon").pvalue > 0.01
    assert abs(np.corrcoef(rescaled[:, :-1].reshape(-1), rescaled[:, 1:].reshape(-1))[0, 1]) < 0.03  # three standard errors
    # A mark comes as often as its share of the rate says.
    shares = rates / rates.sum(axis=2, keepdims=True)
    excess = (marks == 0) - shares[..., 0]
    assert abs(excess.sum()) < 3 * np.sqrt((shares[..., 0] * shares[..., 1]).sum())
    # A sampler of another process is told apart.
    other = draw(PROCESS._replace(branching=0.8 * PROCESS.branching), 50, 200, np.random.RandomState(0))
    assert scipy.stats.kstest(intensities(PROCESS, *other)[1].sum(axis=2).reshape(-1), "expon").pvalue < 1e-9


def test_rate_in_the_long_run():
    gaps, marks = draw(PROCESS, 40, 1500, np.random.RandomState(0))
    expected = np.linalg.solve(np.eye(2) - PROCESS.branching, PROCESS.background)
    late = slice(500, None)
    np.testing.assert_allclose(np.bincount(marks[:, late].reshape(-1)) / gaps[:, late].sum(), expected, rtol=0.05)


def test_marks_whenever_the_event_comes():
    found = mark_probabilities(PROCESS, GAPS, MARKS)
    np.testing.assert_allclose(found.sum(axis=2), 1, atol=1e-5)
    # Sampled: the last event of a sequence whose others are given.
    random, samples = np.random.RandomState(0), 20000
    excitation = np.zeros((2, 2))
    for gap, mark in zip(GAPS[0, :-1], MARKS[0, :-1]):
        excitation *= np.exp(-PROCESS.decay * gap)
        excitation[:, mark] += PROCESS.branching[:, mark] * PROCESS.decay[:, mark]
    hits, total = 0, (PROCESS.background.sum() + excitation.sum())
    for _ in range(samples):  # Ogata's thinning
        now = 0.0
        while True:
            now += random.exponential(1 / total)
            rates = PROCESS.background + (excitation * np.exp(-PROCESS.decay * now)).sum(axis=1)
            if random.uniform() * total < rates.sum():
                hits += random.uniform() * rates.sum() < rates[0]
                break
    assert hits / samples == pytest.approx(found[0, -1, 0], abs=3 * 0.5 / np.sqrt(samples))


def test_examples_hold_the_past_and_the_next_event():
    task = Hawkes(sequence_length=8, num_sequences=30)
    gaps, marks = task.events["validation"]
    assert len(task.examples("validation")) == 3
    for example, gap, mark in zip(task.examples("validation"), gaps, marks):
        np.testing.assert_allclose(example["targets"], np.stack([gap, mark], axis=1), rtol=1e-6)
        inputs = example["inputs"]
        assert (inputs[0] == 0).all()
        np.testing.assert_allclose(np.exp(inputs[1:, 0] * task.log_std + task.log_mean), gap[:-1], rtol=1e-5)
        assert (inputs[1:, 1:] == np.eye(3)[mark[:-1]]).all()
    logs = np.log(task.events["train"][0])
    assert (task.log_mean, task.log_std) == (pytest.approx(logs.mean()), pytest.approx(logs.std()))


def test_baselines():
    options = {"sequence_length": 40, "num_sequences": 500}
    found = Hawkes(**options).baselines()
    names = ["true process", "true process, mark apart from time", "Poisson process"]
    assert list(found) == names and found[names[0]] < found[names[1]] < found[names[2]] - 0.5
    # Without excitation all three are the entropy of a Poisson process, 1 - log(rate), and of its marks.
    still = {"background": (0.5, 1.5), "branching": ((0.0, 0.0), (0.0, 0.0)), "decay": ((1.0, 1.0), (1.0, 1.0))}
    entropy = 1 - np.log(2) - 0.25 * np.log(0.25) - 0.75 * np.log(0.75)
    assert list(Hawkes(**still, **options).baselines().values()) == pytest.approx([entropy] * 3, abs=0.08)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"background": ()}, r"data\.background=\(\) is not a rate per mark; allowed: numbers above 0"),
        ({"background": (0.1, 0.0, 0.1)}, r"is not a rate per mark"),
        ({"background": (0.1, 0.1)}, r"data\.branching=.* is no matrix of the marks; allowed: 2 x 2 numbers, 0 and above"),
        ({"branching": ((0.1,),)}, r"allowed: 3 x 3 numbers"),
        ({"branching": (0.1, 0.1, 0.1)}, r"allowed: 3 x 3 numbers"),
        ({"branching": ((0.1, 0.0, -0.7), (0.7, 0.1, 0.0), (0.0, 0.7, 0.1))}, r"0 and above"),
        ({"decay": ((0.0, 1.0, 1.0),) * 3}, r"data\.decay=.* allowed: 3 x 3 numbers, above 0"),
        ({"branching": ((0.4, 0.4, 0.4),) * 3}, r"not stationary: its spectral radius is 1\.2\d*; allowed: below 1"),
        ({"sequence_length": 1}, r"data\.sequence_length=1 is too small; allowed: 2 or more"),
        ({"num_sequences": 0}, r"data\.num_sequences=0 is too small"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        Hawkes(**options)
