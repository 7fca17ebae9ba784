import threading

import numpy as np
import pytest

from seqjax.data.storage import data_root, prepare_once


def features():
    import tensorflow_datasets as tfds

    return {"x": tfds.features.Tensor(shape=(2,), dtype=np.uint8)}


def examples(count, value=0):
    return lambda: ({"x": np.array([i, value], np.uint8)} for i in range(count))


def read(sources):
    return {split: [example["x"].tolist() for example in source] for split, source in sources.items()}


def test_prepared_once_in_order_and_without_noise(tmp_path, capfd):
    made = []

    def counted():
        made.append(1)
        return examples(50)()

    for _ in range(2):
        sources = prepare_once("toy", "abc", features, {"train": counted, "test": examples(3, 9)}, str(tmp_path))
        assert read(sources) == {"train": [[i, 0] for i in range(50)], "test": [[i, 9] for i in range(3)]}
    assert made == [1]
    assert capfd.readouterr() == ("", "")


def test_other_content_is_prepared_anew(tmp_path):
    for content, value in (("abc", 1), ("abd", 2), ("abc", 1)):
        assert read(prepare_once("toy", content, features, {"train": examples(1, value)}, str(tmp_path))) == {
            "train": [[0, value]]
        }


def test_two_that_prepare_at_once_agree_and_leave_nothing_behind(tmp_path):
    both, results = threading.Barrier(2, timeout=20), []

    def meeting():
        both.wait()  # neither can finish before the other has begun
        return examples(5)()

    def prepare():
        results.append(read(prepare_once("toy", "abc", features, {"train": meeting}, str(tmp_path))))

    threads = [threading.Thread(target=prepare) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [{"train": [[i, 0] for i in range(5)]}] * 2
    assert [path.name for path in (tmp_path / "toy").iterdir()] == ["abc"]


def test_failed_preparation_leaves_nothing_behind(tmp_path):
    def broken():
        yield {"x": np.zeros(2, np.uint8)}
        raise OSError("half way")

    with pytest.raises(OSError, match="half way"):
        prepare_once("toy", "abc", features, {"train": broken}, str(tmp_path))
    assert list((tmp_path / "toy").iterdir()) == []
    assert read(prepare_once("toy", "abc", features, {"train": examples(1)}, str(tmp_path))) == {"train": [[0, 0]]}


def test_data_root(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SEQJAX_DATA_DIR", raising=False)
    assert data_root() == tmp_path / "home" / ".cache" / "seqjax"
    monkeypatch.setenv("SEQJAX_DATA_DIR", str(tmp_path / "set"))
    assert data_root() == tmp_path / "set"
    assert data_root(str(tmp_path / "given")) == tmp_path / "given"
