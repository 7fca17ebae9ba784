import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from seqjax.config import ConfigError
from seqjax.parallel.batches import place_batch, process_rows
from seqjax.parallel.mesh import AXES, make_mesh
from seqjax.parallel.rules import RULES, axis_names, batch_sharding, batch_ways, partition_spec, shardings, unboxed

MESH = AbstractMesh((2, 2, 2, 1), AXES)


@pytest.mark.parametrize(
    "names, shape, spec",
    [
        (("embed", "mlp"), (8, 16), P("fsdp", "tensor")),
        (("layers", "embed", "heads", "head_dim"), (3, 8, 4, 5), P(None, "fsdp", "tensor", None)),
        (("batch", "length_act"), (8, 6), P(("data", "fsdp"), None)),
        ((None, "vocab"), (8, 6), P(None, "tensor")),
    ],
)
def test_logical_names_become_mesh_axes(names, shape, spec):
    assert partition_spec(names, shape, MESH) == spec


def test_an_axis_that_does_not_divide_is_dropped_for_that_array():
    assert partition_spec(("embed", "kv_heads"), (8, 3), MESH) == P("fsdp", None)
    assert partition_spec(("batch",), (6,), MESH) == P("data")  # 6 rows over 2, not over 4
    assert partition_spec(("batch",), (5,), MESH) == P(None)


def test_a_mesh_axis_splits_one_dimension_of_an_array():
    assert partition_spec(("embed", "embed"), (8, 8), MESH) == P("fsdp", None)
    assert partition_spec(("mlp", "heads"), (3, 8), MESH) == P(None, "tensor")  # the first did not divide


def test_an_unknown_logical_name_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"'embd' has no rule; did you mean 'embed'"):
        partition_spec(("embd",), (8,), MESH)


def test_the_table_names_each_logical_axis_once_and_only_mesh_axes():
    names = [name for name, _ in RULES]
    assert len(names) == len(set(names))
    assert {axis for _, axes in RULES for axis in ((axes,) if isinstance(axes, str) else axes or ())} == set(AXES)


def test_boxed_trees_yield_shardings_without_boxes():
    tree = {
        "kernel": nn.LogicallyPartitioned(jax.ShapeDtypeStruct((8, 16), jnp.float32), ("embed", "mlp")),
        "mean": jax.ShapeDtypeStruct((8,), jnp.float32),
    }
    specs = jax.tree.map(lambda s: s.spec, shardings(tree, MESH))
    assert specs == {"kernel": P("fsdp", "tensor"), "mean": P(None)}
    assert axis_names(tree["mean"]) == (None,)
    assert unboxed(tree)["kernel"].shape == (8, 16)


def test_batches_are_split_by_rows_and_length():
    mesh = AbstractMesh((1, 2, 1, 2), AXES)
    assert batch_ways(mesh) == 2
    assert batch_sharding((4, 6), mesh).spec == P("fsdp", "sequence")
    assert batch_sharding((4,), mesh).spec == P("fsdp")
    assert batch_sharding((4, 5, 3), mesh).spec == P("fsdp", None, None)


def test_one_process_places_all_rows_unchanged():
    mesh = make_mesh()
    batch = {"inputs": np.arange(12, dtype=np.int32).reshape(4, 3), "weights": np.ones(4, np.float32)}
    assert process_rows(4, mesh) == slice(0, 4)
    placed = place_batch(batch, mesh)
    for name, array in batch.items():
        np.testing.assert_array_equal(placed[name], array)
        assert placed[name].dtype == array.dtype
