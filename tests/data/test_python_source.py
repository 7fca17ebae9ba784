import numpy as np
import pytest

import seqjax
from seqjax.config import ConfigError
from seqjax.data.python_source import PythonSource, library_files
from seqjax.training.trainer import Trainer


@pytest.fixture
def make_task(tiny_library, tmp_path):
    tiny = type("Tiny", (PythonSource,), {"source_dir": tiny_library})
    return lambda **options: tiny(**{"batch_size": 3, "sequence_length": 20, "data_dir": str(tmp_path / "d"), **options})


def contents(folder, split):
    return [path.read_bytes() for kind, path in library_files(folder) if kind == split]


def test_files_of_the_library_and_nothing_else(tiny_library):
    files = list(library_files(tiny_library))
    assert len(files) == 40
    assert [path for _, path in files] == sorted(path for _, path in files)
    assert 1 <= len(contents(tiny_library, "validation")) <= 10


@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_every_held_out_byte_is_predicted_exactly_once(make_task, tiny_library, packing):
    predicted = b""
    pieces = []
    for batch in make_task(packing=packing).eval_batches():
        for row in range(3):
            ids = batch["segment_ids"][row]
            assert np.array_equal(ids > 0, batch["weights"][row] > 0)
            for segment in range(1, ids.max() + 1):
                inputs, targets = batch["inputs"][row][ids == segment], batch["targets"][row][ids == segment]
                assert np.array_equal(inputs[1:], targets[:-1])
                pieces.append((int(inputs[0]), bytes(targets.tolist())))
    documents = contents(tiny_library, "validation")
    assert sum(first == 256 for first, _ in pieces) == len(documents)
    if packing == "split":  # pieces are in the order of the text
        predicted = b"".join(piece for _, piece in pieces)
        assert predicted == b"".join(documents)
        last = 256
        for first, piece in pieces:
            assert first in (256, last)
            last = piece[-1]
    else:
        assert sorted(b"".join(piece for _, piece in pieces)) == sorted(b"".join(documents))


def test_an_epoch_trains_on_every_byte(make_task, tiny_library):
    task = make_task(batch_size=1)
    rows = [task.batch(step) for step in range(len(task.examples("train")))]
    seen = np.concatenate([row["targets"][row["weights"] > 0] for row in rows])
    assert sorted(seen.tolist()) == sorted(b"".join(contents(tiny_library, "train")))


def test_seed_changes_which_documents_share_a_row(make_task):
    def rows(seed):
        examples = make_task(seed=seed).examples("train")
        return {examples[i]["targets"].tobytes() for i in range(len(examples))}

    assert rows(0) == rows(0)
    assert rows(0) != rows(1)


def test_digest_follows_the_text(make_task, tiny_library):
    before = make_task().digest
    (tiny_library / "module_0.py").write_text("changed = True\n")
    changed = make_task()
    assert changed.digest != before
    assert b"changed = True" in changed.corpora["train"].tokens.tobytes() + changed.corpora["validation"].tokens.tobytes()


def test_loss_is_in_bits(make_task):
    task = make_task()
    assert task.loss_unit == "bits/byte"
    assert np.log(8) * task.loss_scale == pytest.approx(3)


def test_baselines_of_the_tiny_library(make_task):
    floors = make_task().baselines()
    assert floors.keys() == {"gzip -9", "order-3 bytes"}
    assert 0 < floors["order-3 bytes"] < 2  # the files are nearly the same
    assert 0 < floors["gzip -9"] < 8


def test_the_installed_library_is_there():
    task = PythonSource()
    assert len(task._files["train"]) > 200
    held_out = sum(path.stat().st_size for path in task._files["validation"])
    total = held_out + sum(path.stat().st_size for path in task._files["train"])
    assert 0.04 < held_out / total < 0.12


def test_bad_options(make_task, tmp_path):
    with pytest.raises(ConfigError, match=r"data\.packing='best'.*'best_fit'"):
        make_task(packing="best")
    with pytest.raises(ConfigError, match=r"data\.sequence_length=0"):
        make_task(sequence_length=0)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ConfigError, match=r"no \*\.py files.*text_file"):
        type("Empty", (PythonSource,), {"source_dir": tmp_path / "nothing"})()


def test_training_aligns_documents_to_the_models_patches(make_task):
    model = {"name": "megabyte", "embed_dim": 8, "patch_size": 4, "num_heads": 2}
    config = seqjax.experiment_config(model=model, data={"name": "python_source", "batch_size": 3, "sequence_length": 20})
    trainer = Trainer(config, make_task())
    assert trainer.task.segment_alignment == trainer.config.data.segment_alignment == 4
    ids = np.concatenate([batch["segment_ids"] for batch in trainer.task.eval_batches()])
    starts = np.diff(ids, axis=1, prepend=0) != 0
    assert starts[:, 1:].any() and not starts[:, np.arange(20) % 4 != 0].any()
    config.model.patch_size = 8
    with pytest.raises(ConfigError, match="segment_alignment=8 does not divide rows of 20"):
        Trainer(config, make_task())
