"""HiPPO matrices against closed forms written as loops, their identities, and the reference implementation's numbers."""

import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqjax.ops import hippo as module
from seqjax.ops.hippo import (
    block_diagonal_legs,
    diagonal_init,
    diagonal_plus_low_rank,
    hippo,
    normal_plus_low_rank,
    quasiseparable,
    tridiagonal_family,
)

REFERENCE = pathlib.Path(__file__).parent / "data" / "hippo.npz"
LOW_RANK = ("legs", "legt", "fout")


def entry(measure, n, k):
    """A[n, k], from the papers."""
    roots = math.sqrt(2 * n + 1) * math.sqrt(2 * k + 1)
    if measure == "legs":
        return -roots if n > k else -(n + 1) if n == k else 0
    if measure == "legt":
        return -roots / 2 * (1 if n >= k else (-1) ** (k - n))
    if measure == "lagt":
        return -1 if n > k else -0.5 if n == k else 0
    if measure == "lmu":
        return (2 * n + 1) * (-1 if n < k else (-1) ** (n - k + 1))
    rotation = 0
    if n % 2 == 1 and k == n - 1:
        rotation = math.pi * (k // 2)
    if k % 2 == 1 and n == k - 1:
        rotation = -math.pi * (n // 2)
    return rotation - driven("fout", n) * driven("fout", k)


def driven(measure, n):
    """B[n]."""
    return {
        "legs": math.sqrt(2 * n + 1),
        "legt": math.sqrt(2 * n + 1) / 2,
        "lagt": 1,
        "lmu": (2 * n + 1) * (-1) ** n,
        "fout": 1 if n == 0 else 0 if n % 2 else math.sqrt(2),
    }[measure]


@pytest.mark.parametrize(
    "measure,state_dim", [(m, n) for m in module.MEASURES for n in (1, 2, 5, 8) if m != "fout" or n % 2 == 0]
)
def test_matrices_equal_their_closed_forms(measure, state_dim):
    A, B = hippo(measure, state_dim)
    assert A.dtype == B.dtype == np.float64
    np.testing.assert_allclose(A, [[entry(measure, n, k) for k in range(state_dim)] for n in range(state_dim)], rtol=1e-14)
    np.testing.assert_allclose(B, [driven(measure, n) for n in range(state_dim)], rtol=1e-14)


def test_legs_eigenvalues_are_minus_one_to_minus_n():
    # Triangular, but far from normal: a general solver finds even small matrices' eigenvalues to a few digits less.
    found = np.sort(np.linalg.eigvals(hippo("legs", 8)[0]).real)[::-1]
    np.testing.assert_allclose(found, -np.arange(1, 9), rtol=1e-9)


def test_lmu_is_unhalved_legt_in_another_scaling():
    A, B = hippo("legt", 7)
    lmu_A, lmu_B = hippo("lmu", 7)
    n = np.arange(7)
    scales = np.sqrt(2 * n + 1) * (-1.0) ** n
    np.testing.assert_allclose(scales[:, None] * (2 * A) / scales, lmu_A, rtol=1e-13)
    np.testing.assert_allclose(scales * 2 * B, lmu_B, rtol=1e-13)


@pytest.mark.parametrize("measure,rank,multiple", [("legs", 1, -0.5), ("legt", 2, 0.0), ("fout", 1, 0.0)])
@pytest.mark.parametrize("state_dim", [4, 8, 64])
def test_low_rank_correction_leaves_a_multiple_of_the_identity_plus_skew(measure, rank, multiple, state_dim):
    A, _ = hippo(measure, state_dim)
    P = normal_plus_low_rank(measure, state_dim)
    assert P.shape == (rank, state_dim)
    skew = A + P.T @ P - multiple * np.eye(state_dim)
    np.testing.assert_allclose(skew, -skew.T, atol=1e-12)


@pytest.mark.parametrize("measure", LOW_RANK)
@pytest.mark.parametrize("state_dim", [2, 4, 8, 64])
def test_modes_rebuild_the_matrices(measure, state_dim):
    A, B = hippo(measure, state_dim)
    P = normal_plus_low_rank(measure, state_dim)
    modes = diagonal_plus_low_rank(measure, state_dim)
    V = modes.V
    # 1e-12 of the largest eigenvalue, 1300 at N = 64.
    np.testing.assert_allclose(2 * np.real(V * modes.eigenvalues @ V.conj().T), A + P.T @ P, atol=1e-12 * state_dim)
    np.testing.assert_allclose(2 * np.real(V @ modes.B), B, atol=1e-12)
    np.testing.assert_allclose(2 * np.real(V @ modes.P.T), P.T, atol=1e-12)
    both = np.concatenate([V, V.conj()], axis=1)
    np.testing.assert_allclose(both.conj().T @ both, np.eye(state_dim), atol=1e-12)
    frequencies = modes.eigenvalues.imag
    assert np.all(np.diff(frequencies) > 0) and np.all(frequencies <= 0)
    assert (frequencies[-1] == 0) == (measure == "fout")
    assert all(a.dtype == np.complex128 for a in modes)


@pytest.mark.parametrize("measure", LOW_RANK)
def test_diagonal_plus_low_rank_is_the_whole_matrix_in_another_basis(measure):
    w, P, _, V = diagonal_plus_low_rank(measure, 8)
    w, P, V = (np.concatenate([a, a.conj()], axis=-1) for a in (w, P, V))
    np.testing.assert_allclose(V @ (np.diag(w) - P.T @ P.conj()) @ V.conj().T, hippo(measure, 8)[0], atol=1e-12)


@pytest.mark.parametrize("measure", LOW_RANK)
@pytest.mark.parametrize("state_dim", [4, 8])
def test_equals_the_reference_implementation(measure, state_dim):
    with np.load(REFERENCE) as file:
        wanted = {key: file[f"{measure}_{key}_{state_dim}"] for key in ("A", "B", "P", "eigenvalues", "modes_P", "modes_B")}
    # The reference keeps FouT's P, and so its modes, in float32.
    tolerance = 1e-6 if measure == "fout" else 1e-12
    A, B = hippo(measure, state_dim)
    modes = diagonal_plus_low_rank(measure, state_dim)
    np.testing.assert_allclose(A, wanted["A"], atol=1e-12)
    np.testing.assert_allclose(B, wanted["B"], atol=1e-12)
    np.testing.assert_allclose(normal_plus_low_rank(measure, state_dim), wanted["P"], atol=tolerance)
    np.testing.assert_allclose(modes.eigenvalues, wanted["eigenvalues"], atol=tolerance)
    # Only products within a mode are defined: its phase is not.
    within = lambda P, B: np.einsum("im,jm->ijm", stacked := np.concatenate([P, B[None]]), stacked.conj())
    np.testing.assert_allclose(within(modes.P, modes.B), within(wanted["modes_P"], wanted["modes_B"]), atol=10 * tolerance)


def test_known_frequencies():
    legs = diagonal_init("legs", 8)
    np.testing.assert_allclose(legs.real, -0.5, atol=1e-12)
    np.testing.assert_allclose(-legs.imag, [19.857, 5.354, 1.958, 0.4275], atol=5e-4)
    fastest = {kind: np.abs(diagonal_init(kind, 64).imag).max() for kind in ("legs", "inv", "lin")}
    assert fastest == pytest.approx({"legs": 1303.27, "inv": 1283.43, "lin": 97.39}, abs=0.01)


def test_diagonal_kinds_equal_their_closed_forms():
    for n in range(4):
        assert diagonal_init("lin", 8)[n] == pytest.approx(complex(-0.5, -math.pi * n), rel=1e-14)
        assert diagonal_init("inv", 8)[n] == pytest.approx(-0.5 - 1j * (8 / math.pi) * (8 / (2 * n + 1) - 1), rel=1e-14)
    np.testing.assert_array_equal(diagonal_init("real", 5), [-1, -2, -3, -4, -5])
    for kind in module.DIAGONAL_KINDS:
        values = diagonal_init(kind, 8)
        assert values.dtype == np.complex128 and values.shape == (8 if kind == "real" else 4,)
        assert not np.any(np.signbit(values.imag) & (values.imag == 0))
    np.testing.assert_array_equal(diagonal_init("legs", 8), diagonal_plus_low_rank("legs", 8).eigenvalues)


@pytest.mark.parametrize("blocks", [1, 3])
def test_block_diagonal_legs_rebuilds_every_block(blocks):
    size = 12 // blocks
    P = normal_plus_low_rank("legs", size)
    wanted = np.kron(np.eye(blocks), hippo("legs", size)[0] + P.T @ P)
    eigenvalues, V, inverse = block_diagonal_legs(12, blocks)
    assert (eigenvalues.shape, V.shape, inverse.shape) == ((6,), (12, 6), (6, 12))
    np.testing.assert_allclose(2 * np.real(V * eigenvalues @ inverse), wanted, atol=1e-12)
    np.testing.assert_allclose(inverse @ V, np.eye(6), atol=1e-12)
    assert np.all(eigenvalues.imag < 0)
    full, V, inverse = block_diagonal_legs(12, blocks, conjugate_symmetry=False)
    assert (full.shape, V.shape) == ((12,), (12, 12))
    np.testing.assert_allclose(V * full @ inverse, wanted, atol=1e-12)
    np.testing.assert_allclose(V @ inverse, np.eye(12), atol=1e-12)
    np.testing.assert_array_equal(full.reshape(blocks, size)[:, : size // 2].ravel(), eigenvalues)


@pytest.mark.parametrize("measure", module.TRIDIAGONAL_MEASURES)
@pytest.mark.parametrize("state_dim", [1, 7, 64])
def test_structured_family_starts_at_the_measure(measure, state_dim):
    unhalved = 2 if measure == "legt" else 1
    with jax.enable_x64(True):
        A, B = quasiseparable(tridiagonal_family(measure, state_dim))
    wanted_A, wanted_B = (unhalved * a for a in hippo(measure, state_dim))
    # LegT's T has condition number 0.6 N: 1e-12 is a hundred times the rounding error of its solve at N = 64.
    np.testing.assert_allclose(A, wanted_A, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(B, wanted_B, rtol=1e-14)
    A, B = quasiseparable(tridiagonal_family(measure, state_dim))
    assert A.dtype == B.dtype == jnp.float32
    np.testing.assert_allclose(A, wanted_A, atol=1e-5 * np.abs(wanted_A).max())


def test_structured_family_takes_leading_axes_and_generic_parameters():
    rng = np.random.default_rng(0)
    start = tridiagonal_family("legs", 5)
    parameters = type(start)(*(p + 0.1 * rng.standard_normal((2, 3, *p.shape)) for p in start))
    with jax.enable_x64(True):
        A, B = jax.jit(quasiseparable)(parameters)
    for i, j in np.ndindex(2, 3):
        sub, diagonal, above, P, Q, D, b = (p[i, j] for p in parameters)
        T = np.diag(diagonal) + np.diag(sub, -1) + np.diag(above, 1)
        np.testing.assert_allclose(A[i, j], -np.diag(P) @ (np.diag(D) + np.linalg.inv(T)) @ np.diag(Q), atol=1e-12)
        np.testing.assert_allclose(B[i, j], P * b, atol=1e-14)


@pytest.mark.parametrize("measure", module.TRIDIAGONAL_MEASURES)
def test_structured_family_has_exact_gradients(measure):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        parameters = jax.tree.map(jnp.asarray, tridiagonal_family(measure, 6))
        weights, direction = rng.standard_normal((6, 6)), jax.tree.map(lambda p: rng.standard_normal(p.shape), parameters)
        value = jax.jit(lambda p: jnp.sum(quasiseparable(p)[0] * weights) + jnp.sum(quasiseparable(p)[1]))
        moved = lambda h: jax.tree.map(lambda p, d: p + h * d, parameters, direction)
        slope = (value(moved(1e-6)) - value(moved(-1e-6))) / 2e-6
        gradients = jax.grad(value)(parameters)
        along = sum(jnp.sum(g * d) for g, d in zip(gradients, direction))
    np.testing.assert_allclose(along, slope, rtol=1e-7)


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: hippo("legz", 4), "measure='legz' is not possible here; allowed: legs, legt, lagt, fout, lmu"),
        (lambda: hippo("legs", 0), "state_dim=0 is too small; allowed: 1 or more"),
        (lambda: hippo("fout", 5), "state_dim=5 is odd; allowed for measure='fout': even numbers"),
        (lambda: normal_plus_low_rank("lagt", 4), "measure='lagt' is not possible here; allowed: legs, legt, fout"),
        (lambda: normal_plus_low_rank("fout", 3), "state_dim=3 is odd"),
        (lambda: diagonal_plus_low_rank("lmu", 4), "measure='lmu' is not possible here; allowed: legs, legt, fout"),
        (lambda: diagonal_plus_low_rank("legs", 5), "state_dim=5 is odd; allowed for conjugate pairs: even numbers"),
        (lambda: diagonal_init("linear", 4), "kind='linear' is not possible here; allowed: lin, inv, legs, real"),
        (lambda: diagonal_init("lin", 3), "state_dim=3 is odd"),
        (lambda: diagonal_init("real", 0), "state_dim=0 is too small"),
        (lambda: block_diagonal_legs(12, 5), "blocks=5 does not divide state_dim=12"),
        (lambda: block_diagonal_legs(12, 0), "blocks=0 does not divide state_dim=12"),
        (lambda: block_diagonal_legs(12, 4), "state_dim=12 in blocks=4 gives the odd block size 3"),
        (lambda: tridiagonal_family("fout", 4), "measure='fout' is not possible here; allowed: legs, legt, lagt"),
        (lambda: tridiagonal_family("legs", -1), "state_dim=-1 is too small"),
    ],
)
def test_bad_arguments_are_one_clear_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()
