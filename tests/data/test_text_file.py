import numpy as np
import pytest

from seqjax.config import ConfigError
from seqjax.data.text_file import TextFile


@pytest.fixture
def make_task(tmp_path):
    def make(text, **options):
        path = tmp_path / "text.txt"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        defaults = {"batch_size": 4, "sequence_length": 8, "data_dir": str(tmp_path / "data")}
        return TextFile(path=str(path), **{**defaults, **options})

    return make


@pytest.mark.parametrize("tokens", ["byte", "char"])
@pytest.mark.parametrize("size", [100, 163, 170, 171])  # the last window full, short, of one token
def test_every_held_out_token_but_the_first_is_predicted_once(make_task, tokens, size):
    text = "".join(chr(33 + i % 90) for i in range(size))
    task = make_task(text, tokens=tokens)
    kept = [(b["inputs"][b["weights"] > 0], b["targets"][b["weights"] > 0]) for b in task.eval_batches()]
    inputs, targets = (np.concatenate(part) for part in zip(*kept))
    held_out = text[int(0.9 * size) :]
    assert task.tokenizer.decode(targets) == held_out[1:]
    assert task.tokenizer.decode(inputs) == held_out[:-1]
    examples = task.examples("validation")
    assert all(examples[i]["weights"].any() for i in range(len(examples)))


def test_an_epoch_takes_the_window_at_every_offset_once(make_task):
    text = "".join(chr(33 + i) for i in range(80))
    task = make_task(text, batch_size=1)
    windows = len(task.examples("train"))
    assert windows == 72 - 8
    batches = [task.batch(step) for step in range(windows)]
    starts = sorted(text.index(task.tokenizer.decode(batch["inputs"][0])) for batch in batches)
    assert starts == list(range(windows))
    assert all(text.index(task.tokenizer.decode(b["targets"][0])) == text.index(chr(b["inputs"][0, 1])) for b in batches)


def test_vocabularies_and_units(make_task):
    task = make_task("héllo, world! " * 20, tokens="char")
    assert task.tokenizer.characters == " !,dehlorwé".replace("e", "")
    assert (task.vocab_size, task.loss_unit, task.loss_scale, task.baselines()) == (10, "nats/char", 1.0, {})
    task = make_task("héllo, world! " * 20)
    assert (task.vocab_size, task.loss_unit) == (257, "bits/byte")
    assert task.baselines().keys() == {"gzip -9", "order-3 bytes"}


def test_folder_is_its_text_files_in_order_of_path(tmp_path):
    folder = tmp_path / "folder"
    for name, content in {
        "b.txt": b"b" * 100,
        "a/z.md": b"a" * 100,
        ".hidden": b"h" * 100,
        "a/.git/config": b"h" * 100,
        "image.png": b"\x89PNG\xff" * 20,
        "zeros.bin": b"\0" * 100,
        "empty.txt": b"",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    task = TextFile(path=str(folder), sequence_length=8, data_dir=str(tmp_path / "data"))
    text = np.concatenate([task._tokens["train"], task._tokens["validation"]]).tobytes()
    assert text == b"a" * 100 + b"b" * 100


def test_relative_path(make_task, tmp_path, monkeypatch):
    absolute = make_task("abc" * 100)
    monkeypatch.chdir(tmp_path)
    relative = TextFile(path="text.txt", sequence_length=8, batch_size=4, data_dir="data")
    assert relative.digest == absolute.digest
    assert np.array_equal(relative.batch(1)["inputs"], absolute.batch(1)["inputs"])


def test_changed_text_is_read_anew(make_task):
    first = make_task("abc" * 100)
    assert set(first.batch(0)["inputs"].ravel()) == set(b"abc")
    second = make_task("xyz" * 100)
    assert set(second.batch(0)["inputs"].ravel()) == set(b"xyz")
    assert second.digest != first.digest


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, r"is empty; allowed: a text file"),
        ("a", {"tokens": "bytes"}, r"data\.tokens='bytes' is unknown; did you mean 'byte'"),
        ("a", {"validation_fraction": 0.0}, r"data\.validation_fraction=0\.0 is out of range"),
        ("a", {"sequence_length": 0}, r"data\.sequence_length=0"),
    ],
)
def test_bad_options(make_task, text, options, message):
    with pytest.raises(ConfigError, match=message):
        make_task(text, **options)


def test_bad_text_is_named_when_it_is_read(make_task):
    with pytest.raises(ConfigError, match="too short: 9 tokens"):
        make_task("a" * 9).batch(0)
    with pytest.raises(ConfigError, match="not UTF-8"):
        make_task(b"\xff" * 100, tokens="char").batch(0)
    assert make_task(b"\xff" * 100, tokens="byte").batch(0)["inputs"].min() == 255


def test_missing_path_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.path='.*nowhere\.txt' does not exist"):
        TextFile(path=str(tmp_path / "nowhere.txt"))
    with pytest.raises(ConfigError, match="holds no text"):
        (tmp_path / "bare").mkdir()
        TextFile(path=str(tmp_path / "bare"))
