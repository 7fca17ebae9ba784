import jax
import pytest
from jax.sharding import AxisType

from seqjax.config import ConfigError
from seqjax.parallel.mesh import AXES, MeshConfig, make_mesh


def test_default_mesh_holds_all_devices_with_automatic_axes():
    mesh = make_mesh()
    assert mesh.axis_names == AXES
    assert mesh.shape["data"] == jax.device_count()
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize("sizes", [{"data": 3}, {"tensor": 2}, {"data": 1, "fsdp": 2, "sequence": 2}])
def test_sizes_that_do_not_fit_name_the_number_of_devices(sizes):
    with pytest.raises(ConfigError, match=r"mesh.data=.* 1, the devices there are"):
        make_mesh(MeshConfig(**sizes), devices=jax.devices()[:1])


@pytest.mark.parametrize(
    "sizes, message",
    [({"data": 0}, "mesh.data=0"), ({"fsdp": -2}, "mesh.fsdp=-2"), ({"fsdp": -1}, "mesh.data and mesh.fsdp are both -1")],
)
def test_impossible_sizes_are_refused_before_devices_are_asked(sizes, message):
    with pytest.raises(ConfigError, match=message):
        MeshConfig(**sizes)
