"""One program on one device and on eight: the same losses, the arrays spread as the rules say."""

import json
import os

import numpy as np
import pytest

pytestmark = pytest.mark.xdist_group("sharded")


@pytest.fixture(scope="module")
def result(tmp_path_factory, start):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    process = start("tests/training/on_eight_devices.py", tmp_path_factory.mktemp("eight") / "run", XLA_FLAGS=flags)
    out, err = process.communicate()
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


@pytest.mark.parametrize("mesh", ["mixed", "sequence"])
def test_every_mesh_gives_the_losses_of_one_device(result, mesh):
    one = result["losses"]["one"]
    np.testing.assert_allclose(result["losses"][mesh], one, rtol=2e-5)
    np.testing.assert_allclose(result["scores"][mesh], result["scores"]["one"], rtol=2e-5)
    assert one[-1] < one[0]


def test_microbatches_on_a_mesh_give_the_losses_of_the_whole_batch(result):
    np.testing.assert_allclose(result["losses"]["microbatches"], result["losses"]["whole"], rtol=2e-5)


def test_parameters_moments_and_average_are_spread_alike(result):
    """The stack `[2, 16, 32]` is split over fsdp in its second dimension and over tensor in its third."""
    assert result["shards"]["one"] == [[[2, 16, 32]]] * 3
    assert result["shards"]["mixed"] == [[[2, 8, 16]]] * 3
    assert result["shards"]["sequence"] == [[[2, 16, 16]]] * 3


def test_a_checkpoint_is_restored_on_other_meshes_bit_for_bit(result):
    on_eight, on_one, on_data = result["checksums"]
    assert on_eight == on_one == on_data
    np.testing.assert_allclose(result["restored_score"], result["scores"]["mixed"], rtol=2e-5)


def test_the_step_compiles_once_on_a_mesh(result):
    assert result["compiled"] == 1


def test_factored_moments_that_lie_unlike_their_parameter_train_too(result):
    assert np.isfinite(result["factored"]).all() and result["factored"][-1] < result["factored"][0]
