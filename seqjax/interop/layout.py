"""How one array is laid out in two places: a small notation for transposes and merged axes.

`"(H K) D -> D H K"`: on the left as a file keeps the tensor, on the right as this project keeps the parameter. Every word is
an axis, parentheses merge axes into one (the last varies fastest), and `1` is an axis of length one that only the file
has. The empty layout changes nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np


def file_shape(layout: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape in the file of a parameter of `shape`."""
    if not layout:
        return tuple(shape)
    file, sizes = _sizes(layout, shape)
    merged = re.findall(r"\([^)]*\)|\S+", file)
    return tuple(math.prod(sizes[axis] for axis in _axes(group)) for group in merged)


def to_file(layout: str, array: np.ndarray) -> np.ndarray:
    """The parameter `array` as the file keeps it."""
    if not layout:
        return array
    own = layout.split("->")[1].split()
    order = [own.index(axis) for axis in _axes(layout.split("->")[0]) if axis != "1"]
    return array.transpose(order).reshape(file_shape(layout, array.shape))


def from_file(layout: str, array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """The file's `array` as a parameter of `shape`."""
    if not layout:
        return array
    file, sizes = _sizes(layout, shape)
    axes = [axis for axis in _axes(file) if axis != "1"]
    split = array.reshape([sizes[axis] for axis in axes])
    return split.transpose([axes.index(axis) for axis in layout.split("->")[1].split()])


def _sizes(layout: str, shape: Sequence[int]) -> tuple[str, dict[str, int]]:
    """The file's side of a layout, and the length of every axis, read off the parameter's shape."""
    file, own = layout.split("->")
    return file, dict(zip(own.split(), shape, strict=True)) | {"1": 1}


def _axes(side: str) -> list[str]:
    return re.findall(r"\w+", side)
