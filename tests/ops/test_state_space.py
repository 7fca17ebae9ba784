"""State-space systems: kernels against powers of dense matrices in float64, recurrences against those kernels' sums."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from seqjax.ops.complex_pairs import Pair
from seqjax.ops.discretization import discretize_diagonal
from seqjax.ops.hippo import diagonal_init, diagonal_plus_low_rank, hippo
from seqjax.ops.state_space import CompanionSystem, DenseSystem, DiagonalPlusLowRankSystem, DiagonalSystem

DATA = dict(np.load(pathlib.Path(__file__).parent / "data" / "s4.npz"))
GOLDEN = sorted({key.split("/")[0] for key in DATA})


def powers(A, B, C, length):
    """`C A^l B`: A `[D, N, N]` or, diagonal, `[D, N]`; B `[D, N]`, C `[M, D, N]`; one power after another."""
    kernel = np.empty((*C.shape[:2], length))
    x = B.astype(np.result_type(A, B))
    for lag in range(length):
        kernel[:, :, lag] = np.einsum("mdn,dn->md", C, x).real
        x = A * x if A.ndim == 2 else np.einsum("dij,dj->di", A, x)
    return kernel


def with_conjugates(a):
    return np.concatenate([a, a.conj()], axis=-1)


def bilinear(A, B, dt):
    """Of dense A `[D, N, N]` and B `[D, N]`, dt `[D]`."""
    one, half = np.eye(A.shape[-1]), dt[:, None, None] / 2 * A
    return np.linalg.solve(one - half, one + half), np.linalg.solve(one - half, (dt[:, None] * B)[..., None])[..., 0]


def pair(a, dtype):
    """`[..., D, N]` complex to pairs `[..., N, D]`."""
    a = np.swapaxes(a, -1, -2)
    return Pair(jnp.asarray(a.real, dtype), jnp.asarray(a.imag, dtype))


def low_rank_system(eigenvalues, P, B, C, dt, dtype):
    """The system, and its dense discrete matrices: eigenvalues, B `[D, N]`, P `[R, D, N]`, C `[M, D, N]`, dt `[D]`."""
    system = DiagonalPlusLowRankSystem(*(pair(a, dtype) for a in (eigenvalues, P, B, C)), jnp.asarray(dt, dtype))
    eigenvalues, P, B, C = (with_conjugates(a) for a in (eigenvalues, P, B, C))
    A = np.einsum("dn,nm->dnm", eigenvalues, np.eye(eigenvalues.shape[-1])) - np.einsum("rdn,rdm->dnm", P, P.conj())
    return system, (*bilinear(A, B, dt), C)


def diagonal_system(a, B, C, dt, method, dtype, paired=True):
    """The system, and its discrete diagonal: a, B `[D, N]`, C `[M, D, N]`, dt `[D]`."""
    z = dt[:, None] * a
    decay, gain = (
        np.asarray(p.real) + 1j * np.asarray(p.imag) for p in discretize_diagonal(a.real, a.imag, dt[:, None], method)
    )
    log_decay = z if method == "zoh" else np.log(decay)
    system = DiagonalSystem(pair(log_decay, dtype), pair((2 if paired else 1) * gain * B * C, dtype))
    if method == "zoh":
        A, B = np.exp(z), np.expm1(z) / a * B
    else:
        A, B = (1 + z / 2) / (1 - z / 2), dt[:, None] / (1 - z / 2) * B
    return system, (*(with_conjugates(x) if paired else x for x in (A, B, C)),)


def complex_normal(rng, *shape):
    return rng.standard_normal(shape) + 1j * rng.standard_normal(shape)


def hippo_system(name, dtype, state_dim=64, width=2, channels=1):
    """A system at its usual start: `dplr_MEASURE`, `diagonal_KIND_METHOD`, `companion` or `dense`, and its matrices."""
    kind, *which = name.split("_")
    rng = np.random.default_rng(0)
    dt = np.geomspace(0.001, 0.1, width)
    repeat = lambda a: np.repeat(a[..., None, :], width, axis=-2)
    C = complex_normal(rng, channels, width, state_dim // 2)
    if kind == "dplr":
        form = diagonal_plus_low_rank(which[0], state_dim)
        return low_rank_system(repeat(form.eigenvalues), repeat(form.P), repeat(form.B), C, dt, dtype)
    if kind == "diagonal":
        a = diagonal_init(which[0], state_dim)
        if which[0] == "real":
            C = rng.standard_normal((channels, width, state_dim)) + 0j
        return diagonal_system(repeat(a), np.ones((width, len(a))), C, dt, which[1], dtype, paired=which[0] != "real")
    C = rng.standard_normal((channels, width, state_dim))
    if kind == "companion":
        column = rng.standard_normal((width, state_dim))
        column /= np.abs(column).sum(1, keepdims=True)
        A = np.pad(np.eye(state_dim - 1), [(1, 0), (0, 1)]) + column[:, :, None] * (np.arange(state_dim) == state_dim - 1)
        B = rng.standard_normal((width, state_dim))
        system = CompanionSystem(*(jnp.asarray(np.swapaxes(a, -1, -2), dtype) for a in (column, B, C)))
        return system, (A, B, C)
    A, B = (np.repeat(a[None], width, 0) for a in hippo("legs", state_dim))
    A, B = bilinear(A, B, dt)
    if which == ["shared"]:
        A, B = A[:1], B[:1]
    system = DenseSystem(*(jnp.asarray(a, dtype) for a in (A, B, C)))
    return system, (*(np.broadcast_to(a, (width, *a.shape[1:])) for a in (A, B)), C)


DIAGONAL = [f"diagonal_{kind}_{method}" for kind in ("legs", "lin", "inv") for method in ("zoh", "bilinear")]
SYSTEMS = ["dplr_legs", "dplr_legt", "dplr_fout", *DIAGONAL, "diagonal_real_zoh", "companion", "dense", "dense_shared"]
FORMS = ["dplr_legs", "dplr_legt", "diagonal_lin_zoh", "diagonal_real_zoh", "companion", "dense", "dense_shared"]


def error(kernel, wanted):
    """The largest error of each feature's kernel, relative to that kernel's largest value."""
    return (np.abs(np.asarray(kernel) - wanted).max(-1) / np.abs(wanted).max(-1)).max()


@pytest.mark.parametrize("name", SYSTEMS)
def test_long_kernels_equal_powers_of_the_dense_matrix(name):
    """At N = 64 and L = 4096, in both precisions."""
    for double, tolerance in ((True, 1e-9), (False, 2e-4)):
        with jax.enable_x64(double):
            system, dense = hippo_system(name, jnp.float64 if double else jnp.float32)
            kernel = jax.jit(lambda system: system.kernel(4096))(system)
        assert error(kernel, powers(*dense, 4096)) < tolerance


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("length", [1, 2, 7, 65])
def test_kernels_of_any_length(length, name):
    """Shorter and longer than the state, with several outputs."""
    with jax.enable_x64(True):
        system, dense = hippo_system(name, jnp.float64, state_dim=16, channels=3)
        kernel = system.kernel(length)
    assert kernel.shape == (3, 2, length)
    assert error(kernel, powers(*dense, length)) < 1e-9


@functools.partial(jax.jit, static_argnames="cuts")
def in_parts(system, u, starts, cuts):
    y, state = [], system.init_state(u.shape[0])
    for a, b in zip(cuts, cuts[1:]):
        part, state = system.scan(u[:, a:b], state, None if starts is None else starts[:, a:b])
        y.append(part)
    return jnp.concatenate(y, axis=1), state


def run_dense(A, B, C, u, starts):
    """`x_k = A x_(k-1) + B u_k`, `y_k = C x_k`, one row and one token at a time."""
    y = np.zeros((*u.shape[:2], *C.shape[:2]))
    for b in range(u.shape[0]):
        x = np.zeros_like(B)
        for t in range(u.shape[1]):
            x = np.zeros_like(B) if starts is not None and starts[b, t] else x
            x = (A * x if A.ndim == 2 else np.einsum("dij,dj->di", A, x)) + B * u[b, t][:, None]
            y[b, t] = np.einsum("mdn,dn->md", C, x).real
    return y


@pytest.mark.parametrize("name", FORMS)
def test_scans_equal_the_dense_recurrence(name):
    """Whole and in parts, packed and not."""
    rng = np.random.default_rng(0)
    u, starts = rng.standard_normal((2, 30, 2)), rng.random((2, 30)) < 0.15
    with jax.enable_x64(True):
        system, dense = hippo_system(name, jnp.float64, state_dim=16, channels=3)
        for at in (None, starts):
            wanted = run_dense(*dense, u, at)
            at = None if at is None else jnp.asarray(at)
            whole, last = in_parts(system, jnp.asarray(u), at, (0, 30))
            parts, end = in_parts(system, jnp.asarray(u), at, (0, 1, 13, 30))
            np.testing.assert_allclose(whole, wanted, atol=1e-12 * np.abs(wanted).max())
            np.testing.assert_allclose(parts, wanted, atol=1e-12 * np.abs(wanted).max())
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), last, end)


@pytest.mark.parametrize("name", FORMS)
def test_kernels_have_the_gradients_of_finite_differences(name):
    with jax.enable_x64(True):
        system, _ = hippo_system(name, jnp.float64, state_dim=8, channels=2)
        check_grads(
            jax.jit(lambda system: system.kernel(21)), (system,), order=1, modes=["rev"], eps=1e-5, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("name", ["diagonal", "dplr_rank_1", "dplr_rank_2"])
def test_kernels_need_memory_for_features_times_lags_only(name):
    """Compiled, not run: below a tenth of one complex array `[D, N, L]`, with the backward pass too."""
    width, state_dim, length = 512, 64, 16384
    struct = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    pairs = lambda *shape: Pair(struct(*shape, state_dim // 2, width), struct(*shape, state_dim // 2, width))
    if name == "diagonal":
        system = DiagonalSystem(pairs(), pairs(1))
    else:
        system = DiagonalPlusLowRankSystem(pairs(), pairs(int(name[-1])), pairs(), pairs(1), struct(width))

    def forward_and_back(system, weights):
        kernel, pull = jax.vjp(lambda system: system.kernel(length), system)
        return kernel, pull(weights)

    for function, arguments in (
        (lambda system: system.kernel(length), (system,)),
        (forward_and_back, (system, struct(1, width, length))),
    ):
        memory = jax.jit(function).lower(*arguments).compile().memory_analysis()
        assert memory.temp_size_in_bytes + memory.output_size_in_bytes < 0.1 * (8 * width * state_dim * length)


@pytest.mark.parametrize("name", GOLDEN)
def test_kernels_equal_those_of_the_authors(name):
    """From the parameters of their modules, `A = -exp(A_real) - i A_imag`, `dt = exp(inv_dt)`."""
    read = lambda key: DATA[f"{name}/{key}"].astype(np.float64)
    whole = lambda key: read(key)[..., 0] + 1j * read(key)[..., 1]
    kind, _, *method = name.split("_")
    a, dt = -np.exp(read("A_real")) - 1j * read("A_imag"), np.exp(read("inv_dt"))[:, 0]
    with jax.enable_x64(True):
        if kind == "dplr":
            system, _ = low_rank_system(a, whole("P"), whole("B")[0], whole("C"), dt, jnp.float64)
        else:
            system, _ = diagonal_system(a, whole("B")[0], whole("C"), dt, method[0], jnp.float64)
        kernel = system.kernel(32)
    assert error(kernel[0], read("K_dense")) < 1e-9
    assert error(kernel, read("K")) < 2e-5  # theirs is in single precision
