"""Compiling for TPU without one."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from seqjax.testing import tpu

needs_libtpu = pytest.mark.skipif(tpu.libtpu_missing() is not None, reason=str(tpu.libtpu_missing()))
BLOCK = jax.ShapeDtypeStruct((128, 128), jnp.float32)

SCHEDULE = """
= control target key start
     0   :  { %s0 = inlined_call_operand.hbm }
   0x1 LB: > { %s1 = sphi }
   0x2 LB: >> { %v1 = vld }
   0x3   : > { %p1 = pand }
   0x4   : >> { %v2 = vst }
   0x5   : > { %s2 = sld }
   0x6 LB: >> { %v3 = vld }
   0x7   :  { %s3 = sst }
"""
UTILIZATION = """== CAPACTIY:
MXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU
    4     3     4     2     1     3     3     1     1     2
== UTILIZATION:
0 0 0 0 0 0 0 0 0 1
0 0 0 0 0 0 0 0 0 1
0 0 0 0 0 2 1 0 0 0
0 0 0 0 0 0 0 0 0 1
0 0 3 0 0 0 0 1 1 0
0 0 0 0 0 0 0 0 0 1
0 0 0 0 0 1 0 0 0 0
0 0 0 0 0 0 0 0 0 1
"""


def doubled(a):
    def double_kernel(a, to):
        @pl.loop(0, 16)
        def _(i):
            rows = pl.ds(8 * i, 8)
            to[rows, :] = 2 * a[rows, :]

    return pl.pallas_call(double_kernel, out_shape=jax.ShapeDtypeStruct(a.shape, a.dtype), name="double_kernel")(a)


def test_loops_of_a_schedule():
    """An inner loop ends with its last bundle of its own depth; bundles of the outer one may lie between."""
    grid, first, second = tpu._loops(SCHEDULE, UTILIZATION)
    assert (grid.depth, grid.bundles, grid.spills) == (1, 6, 2)
    assert (first.depth, first.bundles, first.spills) == (2, 3, 2)
    assert (first.slots["VLOAD"], first.slots["VALU"], first.slots["VSTORE"], first.slots["SALU"]) == (2, 3, 1, 1)
    assert (second.depth, second.bundles, second.spills) == (2, 1, 0)
    assert tpu.report([first]).splitlines()[1].split()[:3] == ["2", "3", "2"]


def test_missing_libtpu_is_said_clearly(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "libtpu" else find(name))
    tpu.devices.cache_clear()
    with pytest.raises(ImportError, match=r"libtpu is not installed: pip install"):
        tpu.compile_for("v5e", doubled, BLOCK)


@needs_libtpu
def test_unknown_chip():
    with pytest.raises(ValueError, match="chip='v9' is unknown; allowed: v5e, v5p, v6e"):
        tpu.compile_for("v9", doubled, BLOCK)


@needs_libtpu
@pytest.mark.parametrize("chip", tpu.TOPOLOGIES)
def test_a_kernel_is_compiled_and_its_loop_read(chip):
    assert "custom-call" in tpu.compile_for(chip, doubled, BLOCK).as_text()
    (loop,) = tpu.schedule(chip, doubled, BLOCK, kernel="double_kernel")
    assert loop.slots["VALU"] == loop.slots["VLOAD"] == loop.slots["VSTORE"] == 1
    assert 1 < loop.bundles < 20


@needs_libtpu
def test_a_kernel_that_is_not_there():
    with pytest.raises(RuntimeError, match="no schedule of a kernel 'other'"):
        tpu.schedule("v5e", doubled, BLOCK, kernel="other")
