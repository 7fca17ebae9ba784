"""Data sets on disk: prepared once by a TFDS builder, found again by a hash of what they were made from."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from seqjax.data.task import Examples

VERSION = "1.0.0"


def data_root(data_dir: str | None = None) -> Path:
    """Where prepared data lies: `data_dir`, else `$SEQJAX_DATA_DIR`, else `~/.cache/seqjax`."""
    return Path(data_dir or os.environ.get("SEQJAX_DATA_DIR") or "~/.cache/seqjax").expanduser().absolute()


def prepare_once(
    name: str,
    content: str,
    features: Callable[[], Mapping[str, Any]],
    splits: Mapping[str, Callable[[], Iterable[Mapping[str, Any]]]],
    data_dir: str | None = None,
) -> dict[str, Examples]:
    """Read every split of a data set, after writing it to disk if no process has done so yet.

    The folder, `name/content`, is named for what is in it, so data that changed is prepared anew and never mistaken for
    the old. A process prepares in a folder of its own and renames it into place: others see all of it or nothing, and
    when two prepare at once the first to finish is kept.

    Args:
      name: of the data set, in snake_case.
      content: hash of all that decides the examples.
      features: called to make the TFDS features of an example, by name.
      splits: called to make the examples of each split, which keep their order.
      data_dir: as in `data_root`.
    Returns:
      A random-access source (ArrayRecord files, no TensorFlow) of each split's examples.
    """
    import tensorflow_datasets as tfds

    home = data_root(data_dir) / name / content
    if not home.exists():
        private = home.with_name(f".{content}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
        try:
            builder = _builder_class(name)(features(), splits, private)
            tfds.disable_progress_bar()
            builder.download_and_prepare()
            _move_into_place(private / name / VERSION, home)
        finally:
            shutil.rmtree(private, ignore_errors=True)
    builder = tfds.builder_from_directory(home)
    return {split: builder.as_data_source(split=split) for split in splits}


def _move_into_place(private: Path, home: Path) -> None:
    try:
        private.rename(home)
    except OSError:
        if not home.exists():
            raise  # not a lost race: another process would have left `home`


def _builder_class(dataset_name: str) -> type:
    import tensorflow_datasets as tfds

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = dataset_name
        VERSION = tfds.core.Version(VERSION)
        # TFDS looks beside the class's file for a description and checksums of downloads; there are none. Its look-up
        # also needs importlib_resources, which it does not declare.
        code_path = None
        pkg_dir_path = Path(__file__).parent

        def __init__(self, features: Mapping[str, Any], splits: Mapping[str, Callable], directory: Path) -> None:
            self._features, self._splits = features, splits
            super().__init__(data_dir=directory, file_format="array_record")

        def _info(self) -> Any:
            features = tfds.features.FeaturesDict(self._features)
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {split: self._generate_examples(examples()) for split, examples in self._splits.items()}

        def _generate_examples(self, examples: Iterable[Mapping[str, Any]]) -> Iterable[tuple[int, Mapping[str, Any]]]:
            return enumerate(examples)

        def _log_download_bytes(self) -> None:
            """TFDS prints a notice here, which has no place on a program's standard output."""

        _log_download_done = _log_download_bytes

    return Builder
