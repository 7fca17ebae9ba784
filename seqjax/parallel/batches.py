"""Host batches onto the mesh."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from seqjax.parallel.rules import batch_sharding


def process_rows(batch_size: int, mesh: Mesh) -> slice:
    """The rows of a global batch that this process must load: the span of those that its devices hold."""
    sharding = batch_sharding((batch_size,), mesh)
    spans = [index[0].indices(batch_size) for index in sharding.addressable_devices_indices_map((batch_size,)).values()]
    return slice(min(start for start, *_ in spans), max(stop for _, stop, _ in spans))


def place_batch(
    batch: Mapping[str, np.ndarray], mesh: Mesh, rows: slice | None = None, batch_size: int | None = None
) -> dict[str, jax.Array]:
    """Put a batch on the mesh.

    Args:
      batch: arrays that lead with the rows `rows` of a batch of `batch_size` rows (None: all of them).
    Returns:
      Global arrays, rows split over the mesh's batch axes.
    """
    start = 0 if rows is None else rows.start

    def place(array: np.ndarray) -> jax.Array:
        array = np.asarray(array)
        shape = (batch_size or array.shape[0], *array.shape[1:])
        sharding = batch_sharding(shape, mesh)
        if jax.process_count() == 1:
            return jax.device_put(array, sharding)

        def piece(index: tuple[slice, ...]) -> np.ndarray:
            low, high, _ = index[0].indices(shape[0])
            return array[(slice(low - start, high - start), *index[1:])]

        return jax.make_array_from_callback(shape, sharding, piece)

    return {name: place(array) for name, array in batch.items()}
