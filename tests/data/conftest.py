import numpy as np
import pytest


@pytest.fixture
def tiny_library(tmp_path):
    """A folder laid out like a standard library: 40 small files to read, and some to leave out."""
    folder = tmp_path / "lib"
    for number in range(40):
        path = folder / ("package" if number % 2 else "") / f"module_{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"def f_{number}(x):\n" + "    x += 1\n" * (number % 7) + "    return x\n")
    for left_out in ("site-packages/a.py", "package/test/b.py", "idlelib/c.py", "package/notes.txt", "config-x/d.py"):
        path = folder / left_out
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("LEFT OUT\n")
    (folder / "empty.py").touch()
    return folder


@pytest.fixture(scope="session")
def ett_table():
    """`[14410, 3]`: twenty months of hours and a bit, of three series with days in them."""
    hours = np.arange(14410)[:, None]
    noise = np.random.default_rng(0).standard_normal((14410, 3))
    return (np.sin(hours * 2 * np.pi / np.array([24, 24, 168])) + 0.2 * noise + [0, 5, -3]).round(4)


@pytest.fixture(scope="session")
def ett_dir(ett_table, tmp_path_factory):
    """`ETTh1.csv` of that table, laid out as the public file is."""
    folder = tmp_path_factory.mktemp("manual_ett")
    rows = "".join(f"2016-07-01 00:00:00,{a},{b},{c}\n" for a, b, c in ett_table.tolist())
    (folder / "ETTh1.csv").write_text("date,HUFL,HULL,OT\n" + rows)
    return folder


@pytest.fixture
def mnist_dir(tmp_path):
    """`mnist.npz` with 30 training and 5 test images, sorted by label."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 30), ("test", 5)):
        arrays[f"x_{split}"] = rng.integers(0, 256, (count, 28, 28), np.uint8)
        arrays[f"y_{split}"] = np.arange(count) * 10 // count
    folder = tmp_path / "manual_mnist"
    folder.mkdir()
    np.savez(folder / "mnist.npz", **arrays)
    return folder


@pytest.fixture
def cifar_dir(tmp_path):
    """`cifar10_jpgbytes.npz` with 20 training and 4 test images of one colour each, which JPEG keeps to within 2."""
    import io

    from PIL import Image

    folder = tmp_path / "manual_cifar"
    folder.mkdir()
    arrays = {}
    for split, count in (("train", 20), ("test", 4)):
        files = []
        for number in range(count):
            buffer = io.BytesIO()
            Image.new("RGB", (32, 32), (10 * number, 200 - 10 * number, 90)).save(buffer, "JPEG", quality=95)
            files.append(np.frombuffer(buffer.getvalue(), np.uint8))
        arrays |= {f"jpg_{split}": np.concatenate(files), f"len_{split}": np.array([len(f) for f in files])}
        arrays[f"y_{split}"] = np.arange(count) // 2 % 10
    np.savez(folder / "cifar10_jpgbytes.npz", **arrays)
    return folder
