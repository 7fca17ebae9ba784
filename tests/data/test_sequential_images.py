import gzip

import numpy as np
import pytest

from seqjax.config import ConfigError
from seqjax.data.sequential_images import SequentialImages


@pytest.fixture
def make_task(mnist_dir, cifar_dir, tmp_path):
    folders = {"mnist": str(mnist_dir), "cifar10": str(cifar_dir)}

    def make(dataset="mnist", **options):
        defaults = {"batch_size": 4, "manual_dir": folders[dataset], "data_dir": str(tmp_path / "data")}
        return SequentialImages(dataset=dataset, **{**defaults, **options})

    return make


def whole(task, split):
    """All examples of a split as one batch."""
    examples = task.examples(split)
    rows = [examples[i] for i in range(len(examples))]
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def test_mnist_pixels_are_normalised(make_task, mnist_dir):
    test = whole(make_task(), "test")
    arrays = np.load(mnist_dir / "mnist.npz")
    expected = (arrays["x_test"].reshape(5, 784, 1) / 255 - 0.1307) / 0.3081
    np.testing.assert_allclose(test["inputs"], expected, rtol=1e-5, atol=1e-6)
    assert test["targets"].tolist() == arrays["y_test"].tolist()


def test_patches_are_squares_in_raster_order(make_task):
    task = make_task("cifar10", patch_size=4)
    assert (task.length, task.input_dim) == (64, 48)
    patches, pixels = whole(task, "test")["inputs"], whole(make_task("cifar10"), "test")["inputs"].reshape(-1, 32, 32, 3)
    for at in (0, 9, 63):
        row, column = 4 * (at // 8), 4 * (at % 8)
        square = pixels[:, row : row + 4, column : column + 4]
        np.testing.assert_array_equal(patches[:, at], square.reshape(len(square), 48))


def test_train_and_validation_divide_the_shuffled_training_images(make_task, mnist_dir):
    task = make_task(objective="density")
    train, validation = (whole(task, split)["targets"] for split in ("train", "validation"))
    assert (len(train), len(validation)) == (27, 3)
    images = {row.tobytes() for row in np.load(mnist_dir / "mnist.npz")["x_train"].reshape(30, 784).astype(np.int32)}
    assert {row.tobytes() for row in [*train, *validation]} == images
    assert len(set(whole(make_task(), "validation")["targets"].tolist())) > 1  # the file is sorted by label


def test_density_predicts_each_pixel_from_those_before(make_task):
    task = make_task(objective="density")
    test = whole(task, "test")
    assert (task.vocab_size, task.num_classes, task.length, task.loss_unit) == (257, None, 784, "bits/dim")
    assert (test["inputs"][:, 0] == 256).all()
    assert np.array_equal(test["inputs"][:, 1:], test["targets"][:, :-1])


def test_a_conditional_density_begins_with_the_class(make_task):
    task, plain = make_task(objective="density", class_conditional=True), make_task(objective="density")
    labels = whole(make_task(), "test")["targets"]
    assert len(set(labels.tolist())) > 1
    found, expected = whole(task, "test"), whole(plain, "test")
    assert task.vocab_size == 266
    assert np.array_equal(found["inputs"][:, 0], 256 + labels)
    assert np.array_equal(found["inputs"][:, 1:], expected["inputs"][:, 1:])
    assert np.array_equal(found["targets"], expected["targets"])
    with pytest.raises(ConfigError, match="gives the answer away"):
        make_task(class_conditional=True)


def test_density_is_read_against_models_of_few_pixels(make_task):
    task = make_task(objective="density")
    pixels = np.concatenate([task.examples("validation")[i]["targets"] for i in range(len(task.examples("validation")))])
    found = task.baselines()
    size = 8 * len(gzip.compress(pixels.astype(np.uint8).tobytes(), 9, mtime=0)) / pixels.size
    np.testing.assert_allclose(found["gzip -9"], size)
    assert found["order-2 pixel model"] > 7.5  # noise: nothing to learn
    assert make_task().baselines() == {}


def test_permutation_is_of_pixels_and_fixed(make_task):
    plain = whole(make_task(), "test")["inputs"]
    permuted = whole(make_task(permuted=True), "test")["inputs"]
    assert not np.array_equal(plain, permuted)
    order = np.random.RandomState(0).permutation(784)
    assert np.array_equal(permuted, plain[:, order])
    assert np.array_equal(permuted, whole(make_task(permuted=True, seed=3), "test")["inputs"])


def test_cifar_in_colour(make_task):
    task = make_task("cifar10")
    assert (task.length, task.input_dim, task.head) == (1024, 3, "classifier")
    test = whole(task, "test")
    expected = np.array([[10 * n, 200 - 10 * n, 90] for n in range(4)]) / 255
    expected = (expected - [0.4914, 0.4822, 0.4465]) / [0.2470, 0.2435, 0.2616]
    np.testing.assert_allclose(test["inputs"], np.broadcast_to(expected[:, None], (4, 1024, 3)), atol=0.05)
    assert test["targets"].tolist() == [0, 0, 1, 1]


def test_cifar_in_gray(make_task):
    task = make_task("cifar10", grayscale=True, objective="density")
    assert (task.length, task.vocab_size) == (1024, 257)
    expected = [round(0.299 * 10 * n + 0.587 * (200 - 10 * n) + 0.114 * 90) for n in range(4)]
    np.testing.assert_allclose(whole(task, "test")["targets"][:, 500], expected, atol=2)
    assert make_task("cifar10", grayscale=True).input_dim == 1


def test_cifar_density_has_the_channels_of_a_pixel_together(make_task):
    task = make_task("cifar10", objective="density")
    assert task.length == 3072
    np.testing.assert_allclose(whole(task, "test")["targets"][2, :6], [20, 180, 90] * 2, atol=2)


def test_public_images_are_read_through_tfds(monkeypatch, tmp_path):
    import tensorflow_datasets as tfds

    images = [{"image": np.full((28, 28, 1), i, np.uint8), "label": i % 10} for i in range(20)]
    asked = []

    def data_source(name, **options):
        asked.append((name, options["builder_kwargs"]))
        return {"train": images, "test": images[:3]}

    monkeypatch.setattr(tfds, "data_source", data_source)
    task = SequentialImages(objective="density", data_dir=str(tmp_path))
    assert whole(task, "test")["targets"][:, 0].tolist() == [0, 1, 2]
    assert [len(task.examples(split)) for split in task.splits] == [18, 2, 3]
    assert asked == [("mnist:3.0.1", {"file_format": "array_record"})]


def test_failed_download_says_what_to_do(monkeypatch, tmp_path):
    import tensorflow_datasets as tfds

    def data_source(name, **options):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tfds, "data_source", data_source)
    with pytest.raises(ConfigError, match=r"cifar10.*no route to host.*data\.manual_dir.*cifar10_jpgbytes\.npz"):
        SequentialImages(dataset="cifar10", data_dir=str(tmp_path)).batch(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "mnits"}, r"data\.dataset='mnits' is unknown; did you mean 'mnist'"),
        ({"objective": "classification"}, r"data\.objective='classification' is unknown"),
        ({"grayscale": True}, r"data\.grayscale=True has no meaning"),
        ({"patch_size": 3}, r"data\.patch_size=3 does not divide the 28 pixels of a side; allowed: 1, 2, 4, 7, 14, 28"),
        ({"patch_size": 4, "objective": "density"}, r"data\.patch_size=4 is for data\.objective='classify'"),
        ({"manual_dir": "/nonexistent"}, r"data\.manual_dir='/nonexistent' must hold the file mnist\.npz"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        SequentialImages(**options)
