"""The notation for layouts, in both directions."""

import numpy as np
import pytest

from seqjax.interop import layout


@pytest.mark.parametrize(
    ("notation", "shape", "in_file"),
    [
        ("", (3, 4), (3, 4)),
        ("V D -> D V", (3, 4), (4, 3)),
        ("(H K) D -> D H K", (3, 2, 5), (10, 3)),
        ("D (H K) -> H K D", (2, 5, 3), (3, 10)),
        ("C 1 K -> K C", (4, 6), (6, 1, 4)),
    ],
)
def test_there_and_back(notation, shape, in_file):
    parameter = np.arange(np.prod(shape)).reshape(shape)
    assert layout.file_shape(notation, shape) == in_file
    tensor = layout.to_file(notation, parameter)
    assert tensor.shape == in_file
    np.testing.assert_array_equal(layout.from_file(notation, tensor, shape), parameter)


def test_the_last_of_merged_axes_varies_fastest():
    parameter = np.arange(6).reshape(1, 2, 3)  # D H K
    np.testing.assert_array_equal(layout.to_file("(H K) D -> D H K", parameter)[:, 0], np.arange(6))
