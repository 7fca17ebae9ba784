"""Images a pixel at a time: classification from continuous pixels (sMNIST, sCIFAR) and density of pixel values."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from seqjax.config import ConfigError, choose
from seqjax.data.baselines import gzip_bits_per_byte, ngram_bits_per_byte
from seqjax.data.corpora import Corpus
from seqjax.data.storage import data_root, prepare_once
from seqjax.data.task import NATS_TO_BITS, Example, Examples, Task
from seqjax.registry import register_task

VALIDATION_FRACTION = 0.1
BASELINE_PIXELS = 8_000_000
"""Of a split, at most, that `baselines` reads."""
NUM_CLASSES = 10
BOS_ID = 256  # before the first pixel value, of 0-255
GRAY_WEIGHTS = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """What the task needs to know of a data set.

    Attributes:
      public: name and version of the public TFDS builder.
      manual_file: the file that takes its place in `manual_dir`.
      shape: `(height, width, channels)`.
      mean, std: of the training pixels by channel, with pixels in 0-1: the customary constants.
      gray: `(mean, std)` after conversion to gray, None where the images are gray already.
    """

    public: str
    manual_file: str
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    gray: tuple[float, float] | None


DATASETS = {
    "mnist": ImageSet("mnist:3.0.1", "mnist.npz", (28, 28, 1), (0.1307,), (0.3081,), None),
    "cifar10": ImageSet(
        "cifar10:3.0.2",
        "cifar10_jpgbytes.npz",
        (32, 32, 3),
        (0.4914, 0.4822, 0.4465),
        (0.2470, 0.2435, 0.2616),
        (0.4808, 0.2392),
    ),
}


@register_task("sequential_images")
@dataclasses.dataclass(frozen=True, kw_only=True)
class SequentialImages(Task):
    """Images as sequences of pixels, row by row.

    - `objective="classify"`: `inputs` `[L, C]` float32, `(pixel / 255 - mean) / std` by channel with the constants of
      `DATASETS`; `targets` the label. L = 784 for MNIST, 1024 for CIFAR-10. With patches of P x P pixels, row by row too,
      `[L / P^2, P^2 C]`.
    - `objective="density"`: `targets` the pixel values 0-255, `inputs` the same shifted by one after a beginning id of
      256, or of 256 + label with `class_conditional`; the channels of a pixel follow one another (CIFAR-10 in colour:
      L = 3072).

    The last 10 % of a fixed permutation of the official training images are the validation split; "test" is the official
    test split. Images come from the public TFDS builder, or, with `manual_dir`, from a file there:

    - `mnist.npz`: `x_train` `[60000, 28, 28]` uint8, `y_train` `[60000]`, and `x_test`, `y_test`;
    - `cifar10_jpgbytes.npz`: `jpg_train` uint8, the JPEG files end to end, their sizes `len_train` `[50000]`,
      `y_train`, and the same for `test`. JPEG is lossy: bits/dim on it do not compare with the literature's.

    Attributes:
      dataset: "mnist" or "cifar10".
      objective: "classify" or "density".
      class_conditional: the beginning id of a density tells the label.
      permuted: pixels in a fixed random order (psMNIST), the same for every `seed`.
      grayscale: one channel instead of three, for CIFAR-10.
      patch_size: P, the side of the square of pixels that one step holds; a divisor of the image's sides.
      manual_dir: folder of the file to use instead of a download.
      data_dir: where prepared images lie (default `$SEQJAX_DATA_DIR` or `~/.cache/seqjax`).
    """

    splits: ClassVar[tuple[str, ...]] = ("train", "validation", "test")
    locations: ClassVar[frozenset[str]] = frozenset({"data_dir", "manual_dir"})

    dataset: str = "mnist"
    objective: str = "classify"
    class_conditional: bool = False
    permuted: bool = False
    grayscale: bool = False
    patch_size: int = 1
    manual_dir: str | None = None
    data_dir: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        image_set = choose(DATASETS, self.dataset, "data.dataset")
        choose(dict.fromkeys(("classify", "density")), self.objective, "data.objective")
        if self.grayscale and image_set.gray is None:
            raise ConfigError(f"data.grayscale=True has no meaning for data.dataset={self.dataset!r}, which is gray already.")
        if self.class_conditional and self.objective == "classify":
            raise ConfigError(
                "data.class_conditional=True with data.objective='classify' gives the answer away; allowed: False."
            )
        side = image_set.shape[0]
        if self.patch_size < 1 or side % self.patch_size:
            allowed = ", ".join(str(n) for n in range(1, side + 1) if side % n == 0)
            raise ConfigError(
                f"data.patch_size={self.patch_size} does not divide the {side} pixels of a side; allowed: {allowed}."
            )
        if self.patch_size > 1 and (self.permuted or self.objective == "density"):
            raise ConfigError(
                f"data.patch_size={self.patch_size} is for data.objective='classify' and pixels in their order; allowed: 1."
            )
        if self.manual_dir is not None and not self._manual_path.is_file():
            raise ConfigError(f"data.manual_dir={self.manual_dir!r} must hold the file {image_set.manual_file}; it does not.")

    @property
    def _set(self) -> ImageSet:
        return DATASETS[self.dataset]

    @property
    def _manual_path(self) -> Path:
        return Path(self.manual_dir or "").expanduser() / self._set.manual_file

    @property
    def _channels(self) -> int:
        return 1 if self.grayscale else self._set.shape[-1]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        return (*self._set.shape[:2], self._channels)

    @property
    def head(self) -> str:
        return "classifier" if self.objective == "classify" else "language_model"

    @property
    def length(self) -> int:
        height, width, _ = self._set.shape
        return height * width // self.patch_size**2 * (1 if self.objective == "classify" else self._channels)

    @property
    def input_dim(self) -> int | None:
        return self.patch_size**2 * self._channels if self.objective == "classify" else None

    @property
    def vocab_size(self) -> int | None:
        if self.objective == "classify":
            return None
        return BOS_ID + (NUM_CLASSES if self.class_conditional else 1)

    @property
    def num_classes(self) -> int | None:
        return NUM_CLASSES if self.objective == "classify" else None

    @property
    def loss_unit(self) -> str:
        return "nats/image" if self.objective == "classify" else "bits/dim"

    @property
    def loss_scale(self) -> float:
        return 1.0 if self.objective == "classify" else NATS_TO_BITS

    @functools.cached_property
    def content(self) -> str:
        if self.manual_dir is None:
            return self._set.public
        return hashlib.sha256(self._manual_path.read_bytes()).hexdigest()[:16]

    @functools.cached_property
    def _official(self) -> dict[str, Examples]:
        """The official "train" and "test": `image` `[H, W, C]` uint8 and `label`."""
        if self.manual_dir is None:
            return _public_images(self._set.public, self.data_dir)
        return _manual_images(self.dataset, self._manual_path, self.content, self.data_dir)

    @functools.cached_property
    def _train_order(self) -> np.ndarray:
        """A permutation of the official training images: data sets come sorted by label."""
        return np.random.RandomState(0).permutation(len(self._official["train"]))  # a stream that NumPy has frozen

    @functools.cached_property
    def _pixel_order(self) -> np.ndarray | slice:
        height, width, _ = self._set.shape
        return np.random.RandomState(0).permutation(height * width) if self.permuted else slice(None)

    def examples(self, split: str) -> Images:
        if self.check_split(split) == "test":
            source = self._official["test"]
            return Images(source, np.arange(len(source)), self._example)
        held_out = int(VALIDATION_FRACTION * len(self._train_order))
        first, last = np.split(self._train_order, [len(self._train_order) - held_out])
        return Images(self._official["train"], first if split == "train" else last, self._example)

    def baselines(self) -> dict[str, float]:
        """Of a density, bits/dim of the first validation images: compressed, and under counts of the first training images."""
        if self.objective == "classify":
            return {}
        train, held_out = (self._some_pixels(split) for split in ("train", "validation"))
        order = 2  # more context is seen too rarely in so few pixels
        counted = ngram_bits_per_byte(train, held_out, order)
        return {"gzip -9": gzip_bits_per_byte(held_out.tokens), f"order-{order} pixel model": counted}

    def _some_pixels(self, split: str) -> Corpus:
        images = self.examples(split)
        count = min(len(images), BASELINE_PIXELS // self.length)
        pixels = np.concatenate([images[i]["targets"] for i in range(count)]).astype(np.uint8)
        return Corpus(pixels, self.length * np.arange(count + 1))

    def _example(self, image: np.ndarray, label: int) -> Example:
        pixels = np.asarray(image).reshape(-1, self._set.shape[-1])
        if self.grayscale:
            pixels = np.rint(pixels @ GRAY_WEIGHTS)[:, None].astype(np.uint8)
        pixels = pixels[self._pixel_order]
        if self.objective == "classify":
            mean, std = self._set.gray if self.grayscale else (self._set.mean, self._set.std)
            inputs = (pixels.astype(np.float32) / 255 - np.float32(mean)) / np.float32(std)
            return {"inputs": self._patches(inputs), "targets": np.int32(label), "weights": np.float32(1)}
        targets = pixels.reshape(-1).astype(np.int32)
        first = BOS_ID + (int(label) if self.class_conditional else 0)
        inputs = np.concatenate([[first], targets[:-1]], dtype=np.int32)
        return {"inputs": inputs, "targets": targets, "weights": np.ones(len(targets), np.float32)}

    def _patches(self, pixels: np.ndarray) -> np.ndarray:
        """`[H * W, C]` to `[H * W / P^2, P^2 * C]`."""
        (height, width, _), side = self._set.shape, self.patch_size
        squares = pixels.reshape(height // side, side, width // side, side, -1).swapaxes(1, 2)
        return squares.reshape(self.length, -1)


class Images:
    """Chosen images of a source, each made into an example when it is asked for."""

    def __init__(self, source: Examples, chosen: np.ndarray, make: Callable[[np.ndarray, int], Example]) -> None:
        self._source, self._chosen, self._make = source, chosen, make

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> Example:
        record = self._source[int(self._chosen[index])]
        return self._make(record["image"], record["label"])


def _public_images(builder: str, data_dir: str | None) -> dict[str, Examples]:
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    folder = data_root(data_dir) / "tensorflow_datasets"
    try:
        sources = tfds.data_source(builder, data_dir=folder, builder_kwargs={"file_format": "array_record"})
    except Exception as error:  # no network, no TensorFlow to prepare with, a broken download: TFDS has no common error
        reason = f"{type(error).__name__}: {error}".split("\n")[0][:200]
        raise ConfigError(
            f"data.manual_dir is not given, and TFDS could not get {builder} into {folder} ({reason}): preparing it the "
            f"first time takes a network and the tensorflow package; else set data.manual_dir to a folder with "
            f"{DATASETS[builder.split(':')[0]].manual_file}."
        ) from error
    return {"train": sources["train"], "test": sources["test"]}


def _manual_images(dataset: str, path: Path, content: str, data_dir: str | None) -> dict[str, Examples]:
    def features() -> dict[str, Any]:
        import tensorflow_datasets as tfds

        image = tfds.features.Tensor(shape=DATASETS[dataset].shape, dtype=np.uint8, encoding="bytes")
        return {"image": image, "label": tfds.features.ClassLabel(num_classes=NUM_CLASSES)}

    def reader(split: str) -> Callable[[], Iterator[dict[str, Any]]]:
        return lambda: _read_images(path, split, DATASETS[dataset].shape)

    return prepare_once(dataset, content, features, {split: reader(split) for split in ("train", "test")}, data_dir)


def _read_images(path: Path, split: str, shape: tuple[int, int, int]) -> Iterator[dict[str, Any]]:
    """The images of an .npz file, given there as an array or as JPEG files end to end."""
    with np.load(path) as arrays:
        labels = arrays[f"y_{split}"]
        if f"x_{split}" in arrays:
            images = iter(arrays[f"x_{split}"].reshape(-1, *shape))
        else:
            images = _decode_jpeg(arrays[f"jpg_{split}"], arrays[f"len_{split}"])
        for image, label in zip(images, labels, strict=True):
            yield {"image": image, "label": int(label)}


def _decode_jpeg(files: np.ndarray, sizes: np.ndarray) -> Iterator[np.ndarray]:
    try:
        from PIL import Image
    except ImportError:
        raise ConfigError("data.manual_dir holds JPEG files, which need Pillow: pip install pillow.") from None
    end = 0
    for size in sizes.tolist():
        start, end = end, end + size
        yield np.asarray(Image.open(io.BytesIO(files[start:end].tobytes())).convert("RGB"))
