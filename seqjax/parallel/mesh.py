"""The mesh of devices that a run is spread over."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from seqjax.config import ConfigError

AXES = ("data", "fsdp", "tensor", "sequence")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many ways the devices split each kind of work; at most one axis may be -1, "the rest".

    Attributes:
      data: copies of the model, each with its own rows of the batch.
      fsdp: ways to split the batch *and* the parameters, gathered where they are used.
      tensor: ways to split heads, feed-forward widths and the vocabulary.
      sequence: ways to split the length.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1

    def __post_init__(self) -> None:
        for axis in AXES:
            size = getattr(self, axis)
            if size < 1 and size != -1:
                raise ConfigError(f"mesh.{axis}={size} is not a size; allowed: 1 and above, or -1 for the rest.")
        if self.sizes().count(-1) > 1:
            free = " and ".join(f"mesh.{axis}" for axis in AXES if getattr(self, axis) == -1)
            raise ConfigError(f"{free} are both -1; allowed: one axis that takes the rest of the devices.")

    def sizes(self) -> tuple[int, ...]:
        """The sizes in the order of `AXES`."""
        return tuple(getattr(self, axis) for axis in AXES)


def make_mesh(config: MeshConfig | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh `(data, fsdp, tensor, sequence)` over `devices` (default: all of them).

    Raises:
      ConfigError: the sizes do not multiply to the number of devices.
    """
    config = config or MeshConfig()
    devices = jax.devices() if devices is None else list(devices)
    fixed = math.prod(size for size in config.sizes() if size != -1)
    sizes = tuple(len(devices) // fixed if size == -1 else size for size in config.sizes())
    if math.prod(sizes) != len(devices):
        asked = ", ".join(f"mesh.{axis}={getattr(config, axis)}" for axis in AXES)
        rest = "a divisor" if -1 in config.sizes() else "a product"
        raise ConfigError(f"{asked} ask for {fixed} devices; allowed: {rest} of {len(devices)}, the devices there are.")
    # Auto axes: the compiler propagates shardings. Explicit axes, make_mesh's own default, refuse Linen's constraints.
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
