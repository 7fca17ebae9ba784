"""Which mesh axes split which logical axis: the one table, and the shardings that follow from it.

Parameters and activations name their dimensions by meaning ("embed", "heads"); only this table knows a mesh axis.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from seqjax.config import ConfigError, allowed_values

RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    # activations
    ("batch", ("data", "fsdp")),
    ("length_act", "sequence"),
    ("embed_act", None),
    ("mlp_act", "tensor"),
    ("heads_act", "tensor"),
    ("vocab_act", "tensor"),
    # parameters
    ("layers", None),
    ("embed", "fsdp"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("vocab", "tensor"),
    ("channels", "tensor"),
    ("head_dim", None),
    ("length", None),
    ("norm", None),
    ("state", None),
)


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[Mesh]:
    """Make `mesh` and the rules current, so that the constraints inside models take effect."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield mesh


def is_boxed(leaf: Any) -> bool:
    """Whether a leaf of a tree of variables is an array with logical axis names."""
    return isinstance(leaf, nn.Partitioned)


def axis_names(leaf: Any) -> tuple[str | None, ...]:
    """The logical names of a leaf's dimensions; None for each dimension of an array that carries no names."""
    return tuple(leaf.names) if is_boxed(leaf) else (None,) * leaf.ndim


def unboxed(tree: Any) -> Any:
    """The arrays of a boxed tree. Unlike `nn.unbox`, it adds no constraint, so abstract values pass too."""
    return jax.tree.map(lambda leaf: leaf.value if is_boxed(leaf) else leaf, tree, is_leaf=is_boxed)


def partition_spec(names: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """How `mesh` splits an array of `shape` whose dimensions have these logical names.

    A mesh axis that does not divide the dimension (three key-value heads, say, over four devices), or that an earlier
    dimension already uses, is dropped for this array: it is then repeated along that axis, which costs memory and is
    never wrong.

    Raises:
      ConfigError: a name that is not in the table.
    """
    table, used, spec = dict(RULES), set(), []
    for name, size in zip(names, shape, strict=True):
        if name is not None and name not in table:
            raise ConfigError(f"logical axis {name!r} has no rule; {allowed_values(name, table)}")
        axes = table[name] if name is not None else None
        kept: list[str] = []
        for axis in (axes,) if isinstance(axes, str) else axes or ():
            ways = mesh.shape[axis] * math.prod(mesh.shape[a] for a in kept)
            if mesh.shape[axis] > 1 and axis not in used and size % ways == 0:
                kept.append(axis)
        used.update(kept)
        spec.append(kept[0] if len(kept) == 1 else tuple(kept) or None)
    return PartitionSpec(*spec)


def current_spec(names: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec | None:
    """How the current mesh splits an array, as `partition_spec`; None where it has one device at most."""
    mesh = jax.sharding.get_abstract_mesh()
    return partition_spec(names, shape, mesh) if mesh.size > 1 else None


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A `NamedSharding` for each array of a boxed (abstract) tree of variables; the result has no boxes."""

    def sharding(leaf: Any) -> NamedSharding:
        shape = leaf.value.shape if is_boxed(leaf) else leaf.shape
        return NamedSharding(mesh, partition_spec(axis_names(leaf), shape, mesh))

    return jax.tree.map(sharding, tree, is_leaf=is_boxed)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """The sharding of a batch's array: rows over `data` and `fsdp`, the second dimension, if any, over `sequence`."""
    names = ("batch", "length_act", *(None for _ in shape[2:]))[: len(shape)]
    return NamedSharding(mesh, partition_spec(names, shape, mesh))


def batch_ways(mesh: Mesh) -> int:
    """Into how many parts the mesh splits the rows of a batch."""
    return math.prod(mesh.shape[axis] for axis in dict(RULES)["batch"])
