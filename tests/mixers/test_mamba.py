"""Mamba against its equations in NumPy float64, and its accounts. Whole models against transformers: `tests/interop`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqjax
from seqjax.config import ConfigError
from seqjax.mixers.mamba import Mamba
from seqjax.parallel.mesh import MeshConfig, make_mesh
from seqjax.parallel.rules import batch_sharding, shardings, unboxed, use_mesh
from seqjax.testing import tpu

WIDTH, LENGTH = 8, 11


def silu(x):
    return x / (1 + np.exp(-x))


def prepared(seed=0, **options):
    """A mixer with parameters off their initial values, inputs, and the parameters in float64."""
    mixer = Mamba(embed_dim=WIDTH, state_dim=4, **options)
    x = jax.random.normal(jax.random.key(seed), (2, LENGTH, WIDTH))
    variables = jax.jit(mixer.init)(jax.random.key(seed + 1), x)
    moved = lambda key, a: a + 0.2 * jax.random.normal(key, a.shape)
    leaves, structure = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(seed + 2), len(leaves))
    variables = jax.tree.unflatten(structure, [moved(key, leaf) for key, leaf in zip(keys, leaves)])
    return mixer, variables, x, jax.tree.map(lambda a: np.asarray(a, np.float64), variables["params"])


def value(tree, *path):
    """A parameter by its path, out of the box that names its axes."""
    for key in path:
        tree = tree[key]
    return getattr(tree, "value", tree)


def direction(p, u, suffix, selective, complex_modes):
    """Convolution and scan of one direction, before the gate."""
    batch, length, inner = u.shape
    kernel = value(p, "conv" + suffix, "kernel")
    taps = len(kernel)
    padded = np.concatenate([np.zeros((batch, taps - 1, inner)), u], axis=1)
    u = silu(sum(kernel[i] * padded[:, i : i + length] for i in range(taps)) + value(p, "conv" + suffix, "bias"))
    dt = np.zeros_like(u)
    if "dt" in selective:
        dt = u @ value(p, "dt_down" + suffix, "kernel") @ value(p, "dt_up" + suffix, "kernel")
    delta = np.logaddexp(dt + value(p, "dt_bias" + suffix), 0)
    A = -np.exp(value(p, "a_log" + suffix)).T
    if complex_modes:
        A = A + 1j * value(p, "a_imag" + suffix).T
    modes = A.shape[1]

    def weights(name):
        if name.upper() in selective:
            w = u @ value(p, name + suffix, "kernel")
            return (w[..., :modes] + 1j * w[..., modes:] if complex_modes else w)[:, :, None]
        real = value(p, f"{name}_real{suffix}").T
        w = real + 1j * value(p, f"{name}_imag{suffix}").T if complex_modes else real
        return np.broadcast_to(w, (batch, length, inner, modes))

    b, c = weights("b"), weights("c")
    h, y = np.zeros((batch, inner, modes), A.dtype), np.zeros_like(u)
    for t in range(length):
        h = np.exp(delta[:, t, :, None] * A) * h + (delta * u)[:, t, :, None] * b[:, t]
        y[:, t] = (2 if complex_modes else 1) * (c[:, t] * h).sum(2).real
    return y + value(p, "skip" + suffix) * u


def by_hand(p, x, *, causal=True, selective=("dt", "B", "C"), complex_modes=False, gate=True):
    x = np.asarray(x, np.float64)
    u = x @ value(p, "in", "kernel")
    y = direction(p, u, "", selective, complex_modes)
    if not causal:
        y = y + direction(p, u[:, ::-1], "_reverse", selective, complex_modes)[:, ::-1]
    y = y * silu(x @ value(p, "gate", "kernel")) if gate else y
    return y @ value(p, "out", "kernel")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": False},
        {"gate": False, "dt_rank": 3, "conv_width": 2, "expand": 3},
        {"complex_modes": True},
        {"selective": ()},
        {"selective": ("dt",), "complex_modes": True},
        {"selective": ("B", "C")},
    ],
)
def test_equals_the_equations(options):
    mixer, variables, x, doubles = prepared(**options)
    y, _ = jax.jit(mixer.apply)(variables, x)
    named = {key: options[key] for key in ("causal", "selective", "complex_modes", "gate") if key in options}
    expected = by_hand(doubles, x, **named)
    np.testing.assert_allclose(y, expected, atol=3e-6 * np.abs(expected).max())


def test_starts_as_the_authors_do():
    mixer = Mamba(embed_dim=64)
    variables = mixer.init(jax.random.key(0), jnp.zeros((1, 2, 64)))["params"]
    np.testing.assert_allclose(value(variables, "a_log"), np.tile(np.log(np.arange(1, 17))[:, None], 128), rtol=1e-6)
    steps = np.logaddexp(value(variables, "dt_bias"), 0)
    assert 0.001 * 0.99 <= steps.min() < 0.003
    assert 0.03 < steps.max() <= 0.1 * 1.01
    assert np.abs(value(variables, "dt_up", "kernel")).max() <= 4**-0.5
    assert (value(variables, "skip") == 1).all()


@pytest.mark.parametrize(
    ("width", "layers", "parameters"), [(768, 24, 129_135_360), (1024, 48, 371_516_416), (1536, 48, 793_204_224)]
)
def test_published_sizes(width, layers, parameters):
    """mamba-130m, 370m and 790m, whose vocabulary is padded to 50,280."""
    model = seqjax.build({"name": "mamba", "vocab_size": 50280, "embed_dim": width, "num_layers": layers})
    assert model.costs(1).parameters == parameters


def test_state_does_not_grow():
    mixer = Mamba(embed_dim=16)
    sizes = [sum(a.size for a in jax.tree.leaves(mixer.init_state(1, length))) for length in (10, 100_000)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selective": ("dt", "b")}, "model.selective='b' is unknown; allowed: B, C, dt"),
        ({"complex_modes": True, "state_dim": 5}, "did you mean 6"),
        ({"dt_min": 0.2}, "no range of step sizes"),
        ({"implementation": "pallas_gpus"}, "did you mean 'pallas_gpu'"),
        ({"expand": 0}, "model.expand=0 is not positive"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        Mamba(embed_dim=8, **options)


def test_bidirectional_carries_no_state():
    mixer, variables, x, _ = prepared(causal=False)
    with pytest.raises(ConfigError, match="carries no state"):
        mixer.init_state(2, 8)
    state = Mamba(embed_dim=WIDTH, state_dim=4).init_state(2, 8)
    with pytest.raises(ConfigError, match="carries no state"):
        mixer.apply(variables, x, state)


@pytest.mark.skipif(tpu.libtpu_missing() is not None, reason=str(tpu.libtpu_missing()))
def test_four_chips_scan_each_its_part():
    """Forward and backward kernels on rows and features of one chip each, in a program divided over a mesh."""
    mixer = Mamba(embed_dim=128, implementation="pallas_tpu")
    x = jax.ShapeDtypeStruct((8, 64, 128), jnp.float32)
    boxed = jax.eval_shape(mixer.init, jax.random.key(0), x)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), tpu.devices("v5p"))
    placed = lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
    with use_mesh(mesh):
        variables = jax.tree.map(placed, unboxed(boxed), shardings(boxed, mesh))
        x = placed(x, batch_sharding(x.shape, mesh))
        gradient = jax.jit(jax.grad(lambda variables, x: mixer.apply(variables, x)[0].sum(), argnums=(0, 1)))
        program = gradient.trace(variables, x).lower(lowering_platforms=("tpu",)).compile().as_text()
    kernels = [line for line in program.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    assert len(kernels) == 2
    assert all("f32[4,64,128]" in line and "f32[8," not in line for line in kernels)  # half of the rows and of 256 features
