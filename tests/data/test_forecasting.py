import numpy as np
import pytest

from seqjax.config import ConfigError
from seqjax.data.forecasting import Forecasting


@pytest.fixture
def make_task(ett_dir):
    return lambda **options: Forecasting(**{"manual_dir": str(ett_dir), "lookback": 30, "horizon": 10, **options})


@pytest.fixture
def standardised(ett_table):
    train = ett_table[:8640]
    return (ett_table - train.mean(axis=0)) / train.std(axis=0)


def test_every_window_of_a_split_is_the_table_at_its_hours(make_task, standardised):
    task = make_task()
    for split, first, last in (("train", 30, 8640), ("validation", 8640, 11520), ("test", 11520, 14400)):
        examples = task.examples(split)
        assert len(examples) == last - first - 10 + 1  # a forecast starts at each hour from `first` and ends by `last`
        for index in (0, 17, len(examples) - 1):
            hour = first + index
            np.testing.assert_allclose(examples[index]["inputs"], standardised[hour - 30 : hour], atol=1e-5)
            np.testing.assert_allclose(examples[index]["targets"], standardised[hour : hour + 10], atol=1e-5)
            assert (examples[index]["weights"] == np.ones((10, 3), np.float32)).all()


def test_univariate_is_the_column_of_oil_temperature(make_task, standardised):
    task = make_task(univariate=True)
    assert (task.input_dim, task.output_dim, make_task().input_dim) == (1, 1, 3)
    np.testing.assert_allclose(task.examples("test")[3]["targets"], standardised[11523:11533, 2:], atol=1e-5)


def test_baselines_are_the_errors_of_what_they_say(make_task):
    task = make_task(horizon=30)
    errors = {"last value": [], "last day": [], "window mean": []}
    examples = task.examples("validation")
    for window in map(examples.__getitem__, range(len(examples))):
        past, future = window["inputs"], window["targets"]
        day = np.concatenate([past[-24:], past[-24:]])[:30]
        for name, forecast in (("last value", past[-1]), ("last day", day), ("window mean", past.mean(axis=0))):
            errors[name].append(np.mean((future - forecast) ** 2))
    expected = {name: np.mean(values) for name, values in errors.items()}
    assert task.baselines() == pytest.approx(expected, rel=1e-5)
    assert expected["last day"] < expected["window mean"]
    assert "last day" not in make_task(lookback=23).baselines()


def test_content_is_that_of_the_file_wherever_it_lies(make_task, ett_dir, tmp_path):
    text = (ett_dir / "ETTh1.csv").read_text()
    (tmp_path / "ETTh1.csv").write_text(text)
    assert make_task(manual_dir=str(tmp_path)).digest == make_task().digest
    (tmp_path / "ETTh1.csv").write_text(text + "2018-07-01 00:00:00,0,0,0\n")
    assert make_task(manual_dir=str(tmp_path)).digest != make_task().digest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"manual_dir": None}, r"data\.manual_dir is required: a folder that holds ETTh1\.csv, from https://.*ETDataset"),
        ({"dataset": "ETTh2"}, r"data\.manual_dir=.* does not hold ETTh2\.csv; it is from https://.*ETDataset"),
        ({"dataset": "ETTh3"}, r"data\.dataset='ETTh3' is unknown; did you mean 'ETTh"),
        ({"lookback": 0}, r"data\.lookback=0 is too small"),
        ({"horizon": 2881}, r"data\.horizon=2881 do not fit the splits; allowed: a horizon of up to 2880"),
        ({"lookback": 8631}, r"data\.lookback=8631 and data\.horizon=10 do not fit the splits.* 8640 for both"),
    ],
)
def test_bad_options(make_task, options, message):
    with pytest.raises(ConfigError, match=message):
        make_task(**options)


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        ("date,A,OT\n" + "x,1,2\n" * 100, {}, r"holds 100 hours; needed: 14400"),
        ("date,A,B\nx,1,2\n", {"univariate": True}, r"has no column 'OT'; it has: A, B"),
        ("date,A,OT\nx,1,\n", {}, r"is not a table of numbers"),
    ],
)
def test_bad_files(make_task, tmp_path, table, options, message):
    (tmp_path / "ETTh1.csv").write_text(table)
    with pytest.raises(ConfigError, match=message):
        make_task(manual_dir=str(tmp_path), **options).examples("train")
