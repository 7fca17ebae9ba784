import json

import pytest
import tiny

import seqjax
from seqjax.config import ConfigError, differing_keys, flatten, plain
from seqjax.models.heads import HEADS
from seqjax.training.experiment import REPORTING, complete, resolve, section_of
from seqjax.training.optimizer import OptimizerConfig


def config(**sections):
    return seqjax.experiment_config(model={"name": "tiny"}, data={"name": "tiny"}, **sections)


def test_every_key_has_a_place_and_a_default():
    keys = flatten(config(optimizer={"learning_rate": 0.5}))
    assert keys["optimizer.learning_rate"] == 0.5
    assert keys["model.embed_dim"] == 16
    assert keys["data.seq_length"] == 8
    assert {"optimizer.name", "training.num_steps", "mesh.data"} <= keys.keys()
    assert set(REPORTING) <= keys.keys()


def test_completing_is_idempotent_and_survives_json():
    first = config(optimizer={"groups": {"state_space": {"learning_rate": 1e-4}}, "rules": (("A_log", "no_decay"),)})
    assert complete(first) == first
    stored = json.loads(json.dumps(plain(first)))
    assert differing_keys(complete(stored), first) == []
    assert section_of(complete(stored), "optimizer") == section_of(first, "optimizer")


def test_keys_without_a_default_can_be_set_with_their_type():
    changed = config()
    changed.training.ema_decay = 0.5
    changed.model.vocab_size = 32
    assert section_of(complete(changed), "training").ema_decay == 0.5
    with pytest.raises(TypeError):
        changed.model.vocab_size = "many"


@pytest.mark.parametrize(
    "sections, message",
    [
        ({"optimizer": {"lerning_rate": 1.0}}, "optimizer.lerning_rate is not an option; did you mean 'learning_rate'"),
        ({"training": {"num_steps": 1.5}}, "training.num_steps=1.5 is of type float; allowed: int"),
        ({"training": {"num_steps": 0}}, "training.num_steps=0 is not positive"),
        ({"training": {"log_every": -1}}, "training.log_every=-1 is negative"),
        ({"training": {"ema_decay": 1.0}}, "training.ema_decay=1.0 is out of range"),
        ({"mesh": {"tensr": 2}}, "did you mean 'tensor'"),
        ({"mesh": 3}, "config.mesh=3 is not a section"),
    ],
)
def test_mistakes_are_told_with_the_nearest_name(sections, message):
    with pytest.raises(ConfigError) as error:
        config(**sections)
    assert message in str(error.value)


def test_mistakes_in_names_are_told():
    with pytest.raises(ConfigError, match=r"model\.name is required"):
        seqjax.experiment_config(model={}, data={"name": "tiny"})
    with pytest.raises(ConfigError, match=r"model.name='tinny' is unknown; did you mean 'tiny'"):
        seqjax.experiment_config(model={"name": "tinny"}, data={"name": "tiny"})
    with pytest.raises(ConfigError, match=r"config.optimzer is not a section; did you mean 'optimizer'"):
        complete({"model": {"name": "tiny"}, "data": {"name": "tiny"}, "optimzer": {}})


def test_the_task_decides_what_the_model_leaves_open():
    given = config()
    assert resolve(given, tiny.TinyTask()).model.vocab_size == 16
    assert given.model.vocab_size is None  # what was given stays as it was
    given.model.vocab_size = 32
    assert resolve(given, tiny.TinyTask()).model.vocab_size == 32  # padded
    given.model.vocab_size = 8
    with pytest.raises(ConfigError, match=r"model.vocab_size=8 contradicts data.name='tiny', which has 16"):
        resolve(given, tiny.TinyTask())


def test_the_task_decides_the_head_unless_the_config_names_another():
    class Classify(tiny.TinyTask):
        head = "classifier"

    given = config()
    assert resolve(given, Classify()).model.head == "classifier"
    given.model.head = "forecast"
    with pytest.raises(ConfigError, match=r"model.head='forecast' contradicts"):
        resolve(given, Classify())


def test_a_head_that_serves_the_tasks_head_is_kept(monkeypatch):
    class Forecast(tiny.TinyTask):
        head = "forecast"

    given = config()
    monkeypatch.setitem(HEADS, "other_forecast", type("Other", (HEADS["forecast"],), {}))
    given.model.head = "other_forecast"
    assert resolve(given, Forecast()).model.head == "other_forecast"
    given.model.head = "regression"
    with pytest.raises(ConfigError, match=r"model.head='regression' contradicts data.name='tiny', which has 'forecast'"):
        resolve(given, Forecast())


def test_sections_are_their_dataclasses():
    assert section_of(config(), "optimizer") == OptimizerConfig()
