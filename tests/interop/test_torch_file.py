"""PyTorch's own files of weights: one that PyTorch wrote (see `make_pretrained.py`), and ones that must be refused."""

import pathlib
import pickle
import zipfile

import numpy as np
import pytest

from seqjax.config import ConfigError
from seqjax.interop.torch_file import TorchFile

STORED = pathlib.Path(__file__).parent / "pretrained" / "torch_file.bin"
NUMBERS = np.arange(24.0).reshape(4, 6)


@pytest.mark.parametrize(
    ("name", "kind", "wanted"),
    [
        ("whole", "F32", NUMBERS),
        ("again", "F32", NUMBERS),
        ("turned", "F32", NUMBERS.T),
        ("part", "F32", NUMBERS[1:, 2:4]),
        ("one", "F32", NUMBERS[2, 3]),
        ("bfloat16", "BF16", NUMBERS),
        ("float16", "F16", NUMBERS),
        ("float64", "F64", NUMBERS),
        ("int64", "I64", np.arange(5)),
        ("parameter", "F32", np.ones((2, 3))),
    ],
)
def test_every_tensor_is_what_pytorch_stored(name, kind, wanted):
    with TorchFile(STORED) as file:
        assert file.get_slice(name).get_dtype() == kind
        assert file.get_slice(name).get_shape() == wanted.shape
        np.testing.assert_array_equal(file.get_tensor(name).astype(np.float64), wanted)


def test_names_are_those_of_the_state_dict():
    with TorchFile(STORED) as file:
        assert {"whole", "again", "turned"} <= set(file.keys())


class Harmful:
    def __reduce__(self):
        return (print, ("run",))


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda path: path.write_bytes(b"no archive"), "damaged or older than PyTorch 1.6"),
        (lambda path: path.write_bytes(STORED.read_bytes()[:200]), "damaged or older than PyTorch 1.6"),
        (lambda path: _archive(path, pickle.dumps({"a": Harmful()})), r"it names builtins\.print; allowed: a state dict"),
        (lambda path: _archive(path, None), "damaged or older than PyTorch 1.6"),
    ],
)
def test_other_files_are_refused(write, said, tmp_path, capsys):
    path = tmp_path / "pytorch_model.bin"
    write(path)
    with pytest.raises(ConfigError, match=said):
        TorchFile(path)
    assert not capsys.readouterr().out


def _archive(path, content):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl" if content else "archive/other", content or b"")
