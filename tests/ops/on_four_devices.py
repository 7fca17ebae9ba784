"""Runs kernels divided over a mesh of four devices and prints, as JSON, whether each part was one device's.

The kernel is the portable implementation by another name: what is tested is how the work is divided. Needs four devices.
"""

import functools
import json

import jax
import numpy as np
from test_selective_scan import check, made

from seqjax.ops import selective_scan as op
from seqjax.parallel.mesh import MeshConfig, make_mesh
from seqjax.parallel.rules import current_spec, use_mesh

parts = []


def kernel(inputs, **how):
    parts.append(inputs.u.shape)
    return op.IMPLEMENTATIONS["xla"](inputs, **how)


def main():
    op.IMPLEMENTATIONS["pallas_tpu"] = kernel
    found = {}
    for groups in (1, 3):
        for without in ((), ("D", "z", "dt_bias", "h0")):
            parts.clear()
            inputs = made(7, 4, 18, 12, 4, groups, without)
            starts = np.random.default_rng(5).random((4, 18)) < 0.2
            with use_mesh(make_mesh(MeshConfig(data=1, fsdp=2, tensor=2))):
                spec = current_spec(("batch", None, "mlp_act"), inputs["u"].shape)
                divided = functools.partial(check, implementation="pallas_tpu", spec=spec)
                divided(inputs, starts=starts)
                divided(inputs, reverse=True)
            found[f"{groups} groups"] = sorted(set(parts))
    print(json.dumps(found))


if __name__ == "__main__":
    assert jax.device_count() == 4
    main()
