"""Compiling for an absent GPU."""

import jax
import jax.numpy as jnp
import pytest

from seqjax.testing import gpu

PTX = """
.visible .entry k() {
	mov.u32 	%r1, 0;
$L__BB0_1:
	@%p1 bra 	$L__BB0_3;
$L__BB0_2:
	ld.shared.b32 	%r2, [%r1];
	fma.rn.f32 	%r3, %r2, %r2, %r3;
	@%p2 mul.f32 	%r3, %r3, %r2;
	add.s32 	%r1, %r1, 4;
	@%p3 bra 	$L__BB0_2;
$L__BB0_3:
	add.f32 	%r3, %r3, %r3;
	@!%p4 bra 	$L__BB0_1;
	ret;
}
"""


def test_instructions_of_the_innermost_loop():
    [loop] = gpu._innermost_loops(PTX.splitlines())
    counts = gpu._instructions(loop)
    assert counts == {"ld.shared.b32": 1, "fma.rn.f32": 1, "mul.f32": 1, "add.s32": 1, "bra": 1}
    assert gpu.float32_operations(counts) == 2


def test_a_missing_plugin_is_named(monkeypatch):
    monkeypatch.setattr(gpu, "available", lambda: False)
    with pytest.raises(RuntimeError, match=f"jax-cuda13-plugin=={jax.__version__}"):
        gpu.compile_kernels(jnp.sin, jax.ShapeDtypeStruct((8,), jnp.float32))


@pytest.mark.skipif(not gpu.available(), reason="JAX's CUDA plugin is not installed")
def test_a_program_without_kernels_compiles():
    assert gpu.compile_kernels(jnp.sin, jax.ShapeDtypeStruct((8,), jnp.float32)) == []
