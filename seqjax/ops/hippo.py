"""HiPPO: state matrices that remember the past as coefficients of orthogonal functions, and their diagonal forms.

`x' = A x + B u` with `A [N, N]`, `B [N]`; indices n and k count from 0. These are constants for initialisation, made on the
host in NumPy float64, whatever the model computes in. Only `quasiseparable` is traced, because it is trained.

Complex modes stand for conjugate pairs: N/2 of them, all with imaginary parts at most zero, and `2 Re(C x)` reads them out.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Complex128, Float, Float64

MEASURES = ("legs", "legt", "lagt", "fout", "lmu")
LOW_RANK_MEASURES = ("legs", "legt", "fout")
DIAGONAL_KINDS = ("lin", "inv", "legs", "real")
TRIDIAGONAL_MEASURES = ("legs", "legt", "lagt")


def hippo(measure: str, state_dim: int) -> tuple[Float64[np.ndarray, "N N"], Float64[np.ndarray, "N"]]:
    """`A [N, N]` and `B [N]` of a measure (Gu et al. 2020, 2022; Voelker et al. 2019).

    Args:
      measure:
        "legs": Legendre polynomials on all of the past, scaled.
        "legt": Legendre polynomials on a sliding window, halved as in the S4 code: half of the A and B of the HiPPO paper.
        "lagt": Laguerre polynomials, the past weighted by a decaying exponential.
        "fout": Fourier basis on a sliding window; N is even, and state 1 is never driven.
        "lmu": the Legendre memory unit with theta = 1: divide A and B by theta, the length of the window.
      state_dim: N.
    Raises:
      ValueError: unknown measure, N < 1, or an odd N for "fout".
    """
    _check_choice("measure", measure, MEASURES)
    _check_state_dim(state_dim, even_for="measure='fout'" if measure == "fout" else None)
    n = np.arange(state_dim)
    root = np.sqrt(2 * n + 1.0)
    below, at_or_below = (np.tril(np.ones((state_dim, state_dim)), offset) for offset in (-1, 0))
    signs = (-1.0) ** (n[:, None] - n)
    if measure == "legs":
        return -np.outer(root, root) * below - np.diag(n + 1.0), root
    if measure == "legt":
        return -0.5 * np.outer(root, root) * np.where(at_or_below, 1, signs), 0.5 * root
    if measure == "lagt":
        return 0.5 * np.eye(state_dim) - at_or_below, np.ones(state_dim)
    if measure == "lmu":
        return (2 * n + 1.0)[:, None] * np.where(at_or_below, -signs, -1), (2 * n + 1.0) * (-1.0) ** n
    B = np.where(n % 2 == 0, np.where(n == 0, 1, np.sqrt(2)), 0)
    turns = np.where(n[:-1] % 2 == 0, np.pi * (n[:-1] // 2), 0)
    return np.diag(turns, -1) - np.diag(turns, 1) - np.outer(B, B), B


def normal_plus_low_rank(measure: str, state_dim: int) -> Float64[np.ndarray, "R N"]:
    """`P [rank, N]` such that `A + P^T P` is normal, a multiple of the identity plus a skew matrix (S4, theorem 1).

    Args:
      measure: "legs" (rank 1, multiple -1/2), "legt" (rank 2, multiple 0) or "fout" (rank 1, multiple 0).
      state_dim: N.
    Raises:
      ValueError: no such form is known for the measure, N < 1, or an odd N for "fout".
    """
    _check_choice("measure", measure, LOW_RANK_MEASURES)
    _check_state_dim(state_dim, even_for="measure='fout'" if measure == "fout" else None)
    n = np.arange(state_dim)
    if measure == "legs":
        return np.sqrt(n + 0.5)[None]
    if measure == "legt":
        odd = n % 2 == 1
        return np.sqrt(n + 0.5) * np.stack([odd, ~odd])
    return hippo("fout", state_dim)[1][None]


class DiagonalPlusLowRank(NamedTuple):
    """A measure in the basis of its modes, where it is `diag(eigenvalues) - P^T conj(P)`; one mode of each pair is kept.

    In the original basis, `2 Re(V diag(eigenvalues) V^*)` is `A + P^T P` and `2 Re(V B)` is B.

    Attributes:
      eigenvalues: of `A + P^T P`, imaginary parts ascending and at most zero.
      P: the low-rank correction in the basis of the modes, `P conj(V)`.
      B: the input vector in that basis, `B conj(V)` (that is, `V^* B`), not clipped.
      V: the modes, orthonormal columns.
    """

    eigenvalues: Complex128[np.ndarray, "M"]
    P: Complex128[np.ndarray, "R M"]
    B: Complex128[np.ndarray, "M"]
    V: Complex128[np.ndarray, "N M"]


def diagonal_plus_low_rank(measure: str, state_dim: int) -> DiagonalPlusLowRank:
    """The measure in the basis that makes `A + P^T P` diagonal (S4, Gu et al. 2022), M = N/2 modes.

    Each mode has a phase that the eigensolver is free to choose: compare products such as `conj(P_n) B_n` across machines,
    never P, B or V alone.

    Args:
      measure: "legs", "legt" or "fout".
      state_dim: N, even.
    Raises:
      ValueError: no such form is known for the measure, or N is not a positive even number.
    """
    _check_choice("measure", measure, LOW_RANK_MEASURES)
    _check_state_dim(state_dim, even_for="conjugate pairs")
    _, B = hippo(measure, state_dim)
    P = normal_plus_low_rank(measure, state_dim)
    eigenvalues, V = _modes(measure, state_dim)
    eigenvalues, V = eigenvalues[: state_dim // 2], V[:, : state_dim // 2]
    if measure == "fout":
        # States 0 and 1 both have frequency zero: neither eigenvector found is half of a conjugate pair, this one is.
        eigenvalues[-1] = eigenvalues[-1].real
        V[:, -1] = np.pad([np.sqrt(0.5), 1j * np.sqrt(0.5)], (0, state_dim - 2))
    return DiagonalPlusLowRank(eigenvalues, P @ V.conj(), B @ V.conj(), V)


def diagonal_init(kind: str, state_dim: int) -> Complex128[np.ndarray, "M"]:
    """Eigenvalues of a diagonal state matrix (S4D, Gu et al. 2022b); imaginary parts at most zero.

    The S4D paper writes the conjugates of "lin" and "inv", which give the same real outputs for conjugate readouts.

    Args:
      kind:
        "lin": `-1/2 - i pi n`, N/2 modes. Mode 0 is real, and a readout of pairs counts it twice, as in S4D.
        "inv": `-1/2 - i (N / pi) (N / (2 n + 1) - 1)`, N/2 modes.
        "legs": the eigenvalues of `diagonal_plus_low_rank("legs", N)`, N/2 modes.
        "real": `-(n + 1)`, N real modes with zero imaginary part, to be read out without conjugates.
      state_dim: N, even unless the kind is "real".
    Raises:
      ValueError: unknown kind, or N is not a positive even number (positive for "real").
    """
    _check_choice("kind", kind, DIAGONAL_KINDS)
    _check_state_dim(state_dim, even_for=None if kind == "real" else "conjugate pairs")
    if kind == "legs":
        return diagonal_plus_low_rank("legs", state_dim).eigenvalues
    if kind == "real":
        return -(np.arange(state_dim) + 1.0) + 0j
    n = np.arange(state_dim // 2)
    frequencies = np.pi * n if kind == "lin" else state_dim / np.pi * (state_dim / (2 * n + 1) - 1)
    # 0 - f rather than -f: a frequency of zero is then plus zero.
    return -0.5 + 1j * (0 - frequencies)


def block_diagonal_legs(
    state_dim: int, blocks: int, *, conjugate_symmetry: bool = True
) -> tuple[Complex128[np.ndarray, "P"], Complex128[np.ndarray, "N P"], Complex128[np.ndarray, "P N"]]:
    """The normal part of `blocks` LegS matrices of size `N / blocks`, diagonalised (S5, Smith et al. 2023).

    Args:
      state_dim: N, over all blocks.
      blocks: how many; divides N, and with conjugate symmetry leaves an even block size.
      conjugate_symmetry: keep one mode of each pair, imaginary parts at most zero: P = N / 2, and twice the real part of
        `V diag(eigenvalues) V_inverse` is the matrix. Otherwise P = N, and that product is the matrix.
    Returns:
      eigenvalues `[P]`, V `[N, P]`, V_inverse `[P, N]` (`V^*`; an inverse on the left only when P < N).
    Raises:
      ValueError: N < 1, blocks does not divide N, or an odd block size with conjugate symmetry.
    """
    _check_state_dim(state_dim)
    if blocks < 1 or state_dim % blocks:
        raise ValueError(f"blocks={blocks} does not divide state_dim={state_dim}; allowed: a positive divisor of state_dim.")
    size = state_dim // blocks
    if conjugate_symmetry and size % 2:
        raise ValueError(
            f"state_dim={state_dim} in blocks={blocks} gives the odd block size {size}; conjugate pairs need an even one."
        )
    eigenvalues, V = _modes("legs", size)
    kept = size // 2 if conjugate_symmetry else size
    V = np.kron(np.eye(blocks), V[:, :kept])
    return np.tile(eigenvalues[:kept], blocks), V, V.conj().T


class Quasiseparable(NamedTuple):
    """`A = -diag(P) (diag(D) + T^{-1}) diag(Q)` and `B = P * b`, T tridiagonal. Leading axes are batch axes.

    Attributes:
      sub, diagonal, super: of T, `[..., N - 1]`, `[..., N]`, `[..., N - 1]`.
      P, Q, D, b: `[..., N]`.
    """

    sub: Float[ArrayLike, "..."]
    diagonal: Float[ArrayLike, "..."]
    super: Float[ArrayLike, "..."]
    P: Float[ArrayLike, "..."]
    Q: Float[ArrayLike, "..."]
    D: Float[ArrayLike, "..."]
    b: Float[ArrayLike, "..."]


def tridiagonal_family(measure: str, state_dim: int) -> Quasiseparable:
    """The member of the trainable family that equals a measure (LSSL, Gu et al. 2021, corollary 4.1), without noise.

    Args:
      measure: "legs" and "lagt" give `hippo(measure, N)`; "legt" gives twice its A and B, the unhalved LegT.
      state_dim: N.
    Raises:
      ValueError: the measure is not in the family, or N < 1.
    """
    _check_choice("measure", measure, TRIDIAGONAL_MEASURES)
    _check_state_dim(state_dim)
    n = np.arange(state_dim)
    ones, zeros = np.ones(state_dim), np.zeros(state_dim)
    root = ones if measure == "lagt" else np.sqrt(2 * n + 1.0)
    if measure == "legt":
        corners = 0.5 * (n == 0) + 0.5 * (n == state_dim - 1)
        return Quasiseparable(-0.5 * ones[1:], corners, 0.5 * ones[1:], root, root, zeros, ones)
    D = -0.5 * ones if measure == "lagt" else -n / (2 * n + 1)
    return Quasiseparable(-ones[1:], ones, zeros[1:], root, root, D, ones)


def quasiseparable(parameters: Quasiseparable) -> tuple[Float[Array, "*batch N N"], Float[Array, "*batch N"]]:
    """The dense `A [..., N, N]` and `B [..., N]` of `x' = A x + B u`, in at least float32; differentiable.

    T is solved densely, with pivots: training may bring it where the O(N) elimination without pivots breaks down.
    """
    sub, diagonal, above, P, Q, D, b = (_at_least_float32(p) for p in parameters)
    T = _band(diagonal, 0) + _band(sub, -1) + _band(above, 1)
    with jax.default_matmul_precision("highest"):
        inner = jnp.linalg.solve(T, _band(Q, 0)) + _band(D * Q, 0)
    return -P[..., :, None] * inner, P * b


def _band(values: Array, offset: int) -> Array:
    """A matrix with `values` on one diagonal and zeros elsewhere, over leading axes."""
    size = values.shape[-1] + abs(offset)
    rows = np.arange(values.shape[-1]) + max(-offset, 0)
    return jnp.zeros((*values.shape[:-1], size, size), values.dtype).at[..., rows, rows + offset].set(values)


def _at_least_float32(a: ArrayLike) -> Array:
    a = jnp.asarray(a)
    return a.astype(jnp.promote_types(a.dtype, jnp.float32))


def _modes(measure: str, state_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """All N eigenvalues of `A + P^T P`, imaginary parts ascending, and its orthonormal eigenvectors `[N, N]`."""
    P = normal_plus_low_rank(measure, state_dim)
    normal = hippo(measure, state_dim)[0] + P.T @ P
    real = np.mean(np.diag(normal))
    # -i times a skew matrix is Hermitian: this solver gives real frequencies and orthonormal modes, a general one neither.
    frequencies, V = np.linalg.eigh(-1j * (normal - real * np.eye(state_dim)))
    return real + 1j * frequencies, V


def _check_choice(name: str, given: str, allowed: Collection[str]) -> None:
    if given not in allowed:
        raise ValueError(f"{name}={given!r} is not possible here; allowed: {', '.join(allowed)}.")


def _check_state_dim(state_dim: int, even_for: str | None = None) -> None:
    if state_dim < 1:
        raise ValueError(f"state_dim={state_dim} is too small; allowed: 1 or more.")
    if even_for and state_dim % 2:
        raise ValueError(f"state_dim={state_dim} is odd; allowed for {even_for}: even numbers.")
