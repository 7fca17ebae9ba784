import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_config

from seqjax.config import ConfigError
from seqjax.training.checkpoint import Checkpoints
from seqjax.training.errors import RunError
from seqjax.training.restore import load_workdir
from seqjax.training.trainer import Trainer
from seqjax.training.workdir import claim


def state_at(step):
    return {
        "params": {"w": jax.random.normal(jax.random.key(step), (300, 40)), "b": jnp.ones(7, jnp.bfloat16)},
        "opt_state": (jnp.int32(step), None, {"w": jnp.sin(jnp.arange(12.0) * step)}),
    }


def target(state):
    def abstract(array):
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)

    return lambda record: jax.tree.map(abstract, state)


@pytest.fixture
def saved(tmp_path):
    """A workdir with checkpoints 1 and 2."""
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (0, 1, 2):
        checkpoints.save(step, state_at(step), {"note": "kept"})
    checkpoints.close()
    return tmp_path


def restore(workdir, state=None, create=True):
    """The restored state and step, and what was said."""
    said = []
    checkpoints = Checkpoints(workdir, keep=2, report=said.append, create=create)
    try:
        restored, record = checkpoints.restore_latest(target(state_at(0) if state is None else state))
    finally:
        checkpoints.close()
    return restored, record["step"], said


def same(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))
    )


def data_file(workdir, step):
    """The file of a checkpoint that holds its largest array."""
    state = workdir / "checkpoints" / str(step) / "state"
    return max((p for p in state.rglob("d/*") if p.is_file()), key=os.path.getsize)


def test_what_was_saved_comes_back_and_only_the_newest_are_kept(saved):
    restored, step, said = restore(saved)
    assert (step, said) == (2, [])
    assert same(restored, state_at(2))
    assert {p.name for p in (saved / "checkpoints").iterdir()} == {"1", "2"}


def test_a_fresh_workdir_has_nothing(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.restore_latest(target(state_at(0))) is None
    checkpoints.close()


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip, os.unlink])
def test_a_broken_checkpoint_is_set_aside_and_the_one_before_is_used(saved, damage):
    damage(data_file(saved, 2))
    restored, step, said = restore(saved)
    assert step == 1 and same(restored, state_at(1))
    assert len(said) == 1 and "\n" not in said[0] and "Checkpoint 2 is broken" in said[0]
    assert (saved / "set_aside" / "2").is_dir()
    assert restore(saved)[1:] == (1, [])  # and is not met again
    checkpoints = Checkpoints(saved, keep=2)
    checkpoints.save(2, state_at(2), {})  # its step can be saved anew
    checkpoints.close()
    assert same(restore(saved)[0], state_at(2))


def test_a_changed_number_that_files_do_not_notice_is_noticed(saved, monkeypatch):
    """Corruption that leaves the files readable, as of memory or a faulty disk, shows in the checksums."""
    record_of = Checkpoints.record

    def tampered(self, step):
        record = record_of(self, step)
        if step == 2:
            record["arrays"]["params/w"]["checksum"] ^= 1
        return record

    monkeypatch.setattr(Checkpoints, "record", tampered)
    _, step, said = restore(saved)
    assert step == 1 and "the checksum of params/w does not match" in said[0]


def test_a_changed_record_is_noticed(saved):
    path = saved / "checkpoints" / "2" / "record" / "metadata"
    path.write_text(path.read_text().replace("kept", "kepT"))
    _, step, said = restore(saved)
    assert step == 1 and "record does not match" in said[0]


def test_when_none_is_good_the_run_says_so_and_keeps_the_pieces(saved):
    for step in (1, 2):
        truncate(data_file(saved, step))
    with pytest.raises(RunError, match="none of the 2 checkpoints"):
        restore(saved)
    assert {p.name for p in (saved / "set_aside").iterdir()} == {"1", "2"}


def test_a_reader_moves_nothing(saved):
    truncate(data_file(saved, 2))
    assert restore(saved, create=False)[1] == 1
    assert not (saved / "set_aside").exists() and (saved / "checkpoints" / "2").is_dir()


def test_another_models_checkpoint_is_refused_and_stays(saved):
    other = state_at(0)
    other["params"]["w"] = jnp.zeros((300, 41))
    with pytest.raises(ConfigError, match=r"params/w is float32\[300, 41\] here, and float32\[300, 40\] there"):
        restore(saved, other)
    other["params"]["extra"] = jnp.zeros(3)
    other["params"].pop("w")
    with pytest.raises(ConfigError, match=r"params/extra is .* no such array there"):
        restore(saved, other)
    assert restore(saved)[1] == 2


def test_what_is_not_finite_is_never_saved(saved):
    checkpoints = Checkpoints(saved, keep=2)
    broken = state_at(3)
    broken["params"]["w"] = broken["params"]["w"].at[3, 4].set(jnp.nan)
    with pytest.raises(RunError, match=r"step 3: params/w is not finite, .* last good checkpoint is .*/2\."):
        checkpoints.save(3, broken, {})
    checkpoints.close()
    assert restore(saved)[1] == 2


def test_saving_survives_donation(tmp_path):
    """The arrays of a state may be overwritten as soon as `save` returns."""
    checkpoints = Checkpoints(tmp_path, keep=3)
    bump = jax.jit(lambda tree: jax.tree.map(lambda a: a + 1, tree), donate_argnums=0)
    state = {"w": jnp.zeros((1000, 1000))}
    for step in range(3):
        checkpoints.save(step, state, {})
        state = bump(state)
    restored, record = checkpoints.restore_latest(target(state))
    checkpoints.close()
    assert record["step"] == 2 and (restored["w"] == 2.0).all()


def test_a_model_comes_back_from_its_workdir_alone(tmp_path):
    trainer = Trainer(tiny_config.get_config())
    path = claim(tmp_path / "run", trainer.config, trainer.task.digest)
    with pytest.raises(ConfigError, match="without checkpoints"):
        load_workdir(path)
    state = trainer.init()
    checkpoints = Checkpoints(path)
    batch = {name: {"shape": list(s.shape), "dtype": str(s.dtype)} for name, s in trainer.batch_shapes.items()}
    checkpoints.save(7, state, {"batch": batch})
    checkpoints.close()
    restored = load_workdir(path)
    assert restored.record["step"] == 7 and restored.config == trainer.config and restored.model == trainer.model
    assert same(restored.variables, state.model_variables())
    with pytest.raises(ConfigError, match="holds no run"):
        load_workdir(tmp_path)
