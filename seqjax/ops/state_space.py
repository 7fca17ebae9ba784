"""Linear time-invariant state-space systems, each in two exact forms: a convolution kernel and a recurrence.

`x_k = A x_(k-1) + B u_k`, `y_k = C x_k`, one input and M outputs per feature, D features side by side; the kernel is
`K_l = C A^l B`. No kernel is made through an array of size `[D, N, L]`: memory is O(D (N + L)).

- `DiagonalSystem`: complex modes, one of each conjugate pair (S4D, DSS, GSS);
- `DiagonalPlusLowRankSystem`: S4;
- `CompanionSystem`: SpaceTime;
- `DenseSystem`: LSSL, LMU.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Complex, Float

from seqjax.ops.complex_pairs import (
    Pair,
    add,
    conjugate,
    exponential,
    from_complex,
    product,
    real_product,
    reciprocal,
    scale,
    subtract,
    to_complex,
)
from seqjax.ops.recurrence import recurrence, sum_modes

einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


class Times(NamedTuple):
    """Nanoseconds on a CPU, from `experiments/benchmark.py state_space`; they decide which form runs, so ratios matter.

    Attributes:
      setup: of the convolution, once.
      lag: of the kernel, per feature and lag.
      step: of the recurrence, per feature and token.
      outputs: M, each of which is transformed back.
    """

    setup: float
    lag: float
    step: float
    outputs: int


class DiagonalSystem(NamedTuple):
    """Modes `h -> exp(log_decay) h + u`, read out as the real part of `sum_n outputs_n h_n`.

    Input and output weights act only through their product, so the input's are folded into `outputs`; so is the factor 2
    of conjugate pairs.
    """

    log_decay: Pair  # [N, D]
    outputs: Pair  # [M, N, D]

    def times(self) -> Times:
        channels, modes, _ = self.outputs.real.shape
        return Times(setup=3e6, lag=0.4 * modes * channels, step=(0.9 + 0.4 * channels) * modes, outputs=channels)

    def kernel(self, length: int) -> Float[Array, "M D L"]:
        return vandermonde_kernel(self.outputs, self.log_decay, length)

    def init_state(self, batch_size: int) -> Pair:
        shape = (batch_size, *self.outputs.real.shape[1:])
        return Pair(*(jnp.zeros(shape, self.outputs.real.dtype) for _ in range(2)))

    def scan(
        self, u: Float[Array, "B L D"], state: Pair, starts: Bool[Array, "B L"] | None = None
    ) -> tuple[Float[Array, "B L M D"], Pair]:
        constants = (exponential(self.log_decay), self._channels())
        return recurrence(_diagonal_step, constants, state, u, starts=starts, elementwise=True)

    def _channels(self) -> tuple[Pair, ...]:
        return tuple(Pair(re, im) for re, im in zip(self.outputs.real, self.outputs.imag))


def _diagonal_step(constants: tuple, h: Pair, u: Array) -> tuple[Pair, Array]:
    decay, channels = constants
    h = product(decay, h)
    h = Pair(h.real + u[:, None], h.imag)
    return h, jnp.stack([sum_modes(real_product(weights, h)) for weights in channels], axis=1)


def vandermonde_kernel(weights: Pair, log_decay: Pair, length: int) -> Float[Array, "M D L"]:
    """`K[m, d, l] = Re sum_n weights[m, n, d] exp(l log_decay[n, d])`, weights `[M, N, D]`, log_decay `[N, D]`.

    Lags are split as `l = q T + r`, T near the square root of L: powers of either part are few, and a matrix product
    combines them.
    """
    fine = max(1, 1 << (math.isqrt(max(length - 1, 1)).bit_length()))
    coarse = -(-length // fine)
    dtype = weights.real.dtype
    power = lambda steps: exponential(scale(log_decay, jnp.asarray(steps, dtype)[:, None, None]))  # [steps, N, D]
    left = product(Pair(weights.real[:, None], weights.imag[:, None]), power(fine * np.arange(coarse)))  # [M, Q, N, D]
    right = power(np.arange(fine))  # [T, N, D]
    left = jnp.concatenate([left.real, -left.imag], axis=2)
    right = jnp.concatenate([right.real, right.imag], axis=1)
    kernel = einsum("mqnd,rnd->mdqr", left, right)
    return kernel.reshape(*kernel.shape[:2], coarse * fine)[..., :length]


class DiagonalPlusLowRankSystem(NamedTuple):
    """S4: `x' = (diag(Lambda) - P P^*) x + B u` by the bilinear rule, with one of each conjugate pair of modes.

    Gu, Goel and Re 2022 (appendix C), in Goel et al. 2022's stable form with Q = P.
    """

    eigenvalues: Pair  # [N, D], negative real parts
    low_rank: Pair  # P: [R, N, D], R = 1 or 2
    inputs: Pair  # B: [N, D]
    outputs: Pair  # C: [M, N, D]
    dt: Float[Array, "D"]

    def times(self) -> Times:
        (channels, modes, _), rank = self.outputs.real.shape, self.low_rank.real.shape[0]
        lag = (1.5 + 0.8 * (channels + rank) * (1 + rank)) * modes
        return Times(setup=3e6, lag=lag, step=(2 + 8 * rank) * modes, outputs=channels)

    def kernel(self, length: int) -> Float[Array, "M D L"]:
        """From the generating function `sum_l K_l z^l = C (I - z A)^(-1) B`, at nodes inside the unit circle, where it needs
        no power of A."""
        nodes = transfer_nodes(length, self.dt.dtype)
        return kernel_from_transfer(in_blocks(self._transfer, nodes, self.eigenvalues.real.shape[0]), length, nodes)

    def _transfer(self, z: Complex[Array, "J"], one_minus_z: Complex[Array, "J"]) -> Complex[Array, "M D J"]:
        """A sum of Cauchy kernels and a correction of rank R (Woodbury)."""
        channels, rank = self.outputs.real.shape[0], self.low_rank.real.shape[0]
        outer = lambda a, b: product(Pair(a.real[:, None], a.imag[:, None]), b)
        bp = jax.tree.map(lambda b, p: jnp.concatenate([b[None], p]), self.inputs, self.low_rank)  # [1 + R, N, D]
        left = jax.tree.map(lambda c, p: jnp.concatenate([c, p]), self.outputs, conjugate(self.low_rank))
        weights = scale(outer(left, bp), self.dt)  # [M + R, 1 + R, N, D]
        s = 1 + z
        sums = cauchy_sums(weights, scale(self.eigenvalues, self.dt), 2 * one_minus_z, s)  # [M + R, 1 + R, D, J]
        cb, cp = sums[:channels, 0], sums[:channels, 1:]
        pb, pp = sums[channels:, 0], sums[channels:, 1:]
        if rank == 1:
            correction = cp[:, 0] * pb[0] / (1 + s * pp[0, 0])
        else:
            a, b, c, d = 1 + s * pp[0, 0], s * pp[0, 1], s * pp[1, 0], 1 + s * pp[1, 1]
            solved = (d * pb[0] - b * pb[1], a * pb[1] - c * pb[0])
            correction = (cp[:, 0] * solved[0] + cp[:, 1] * solved[1]) / (a * d - b * c)
        return 2 * (cb - s * correction)

    def init_state(self, batch_size: int) -> Pair:
        shape = (batch_size, *self.inputs.real.shape)
        return Pair(*(jnp.zeros(shape, self.dt.dtype) for _ in range(2)))

    def scan(
        self, u: Float[Array, "B L D"], state: Pair, starts: Bool[Array, "B L"] | None = None
    ) -> tuple[Float[Array, "B L M D"], Pair]:
        """The bilinear step in O(N) per feature: `x_k = (2/dt - A)^(-1) ((2/dt + A) x_(k-1) + 2 B u_k)`."""
        rate = 2 / self.dt
        resolvent = reciprocal(Pair(rate - self.eigenvalues.real, -self.eigenvalues.imag))
        ps = _unstacked(self.low_rank)
        qs = [product(conjugate(p), resolvent) for p in ps]  # rows of P^* (2/dt - Lambda)^(-1)
        gram = [[2 * real_product(q, p).sum(0) for p in ps] for q in qs]
        if len(ps) == 1:
            solved = [scale(qs[0], 1 / (1 + gram[0][0]))]
        else:
            (a, b), (c, d) = (1 + gram[0][0], gram[0][1]), (gram[1][0], 1 + gram[1][1])
            inverse = 1 / (a * d - b * c)
            solved = [
                scale(subtract(scale(qs[0], d), scale(qs[1], b)), inverse),
                scale(subtract(scale(qs[1], a), scale(qs[0], c)), inverse),
            ]
        forward = Pair(rate + self.eigenvalues.real, self.eigenvalues.imag)
        constants = (forward, resolvent, tuple(ps), tuple(solved), scale(self.inputs, 2.0), tuple(_unstacked(self.outputs)))
        return recurrence(_diagonal_plus_low_rank_step, constants, state, u, starts=starts, elementwise=True)


def _unstacked(a: Pair) -> list[Pair]:
    return [Pair(re, im) for re, im in zip(a.real, a.imag)]


def _diagonal_plus_low_rank_step(constants: tuple, x: Pair, u: Array) -> tuple[Pair, Array]:
    forward, resolvent, ps, solved, inputs, channels = constants
    v = add(product(forward, x), scale(inputs, u[:, None]))
    for p in ps:
        v = subtract(v, scale(p, 2 * sum_modes(real_product(conjugate(p), x))[:, None]))
    corrections = [2 * sum_modes(real_product(row, v))[:, None] for row in solved]
    for p, correction in zip(ps, corrections):
        v = subtract(v, scale(p, correction))
    x = product(resolvent, v)
    return x, jnp.stack([2 * sum_modes(real_product(c, x)) for c in channels], axis=1)


class Nodes(NamedTuple):
    """Points `z_j = radius exp(-2 pi i j / circle)`, j = 0 .. circle / 2, at which a generating function is evaluated."""

    z: Complex[Array, "J"]
    one_minus_z: Complex[Array, "J"]
    radius: float
    circle: int


def transfer_nodes(length: int, dtype: Any, oversampling: int = 2) -> Nodes:
    """Nodes for a kernel of `length` lags, in numbers of `dtype`.

    A circle of `m L` points and radius r gives `K_l + r^(m L) K_(l + m L) + ...`, with rounding errors grown by up to
    `r^-L`: `r^((m + 1) L) = epsilon` balances the two at `epsilon^(m / (m + 1))`.

    Args:
      oversampling: m, even.
    """
    circle = oversampling * length
    radius = float(jnp.finfo(dtype).eps) ** (1 / (circle + length))
    angle = 2 * np.pi * np.arange(circle // 2 + 1) / circle
    z = radius * np.exp(-1j * angle)
    one_minus_z = (1 - radius) + 2 * radius * np.sin(angle / 2) ** 2 + 1j * radius * np.sin(angle)
    kind = jnp.complex128 if dtype == jnp.float64 else jnp.complex64
    return Nodes(jnp.asarray(z, kind), jnp.asarray(one_minus_z, kind), radius, circle)


def kernel_from_transfer(values: Complex[Array, "*M J"], length: int, nodes: Nodes) -> Float[Array, "*M L"]:
    """The first `length` coefficients of a power series from its values at `transfer_nodes(length, ...)`."""
    kernel = jnp.fft.irfft(values, n=nodes.circle)[..., :length]
    return kernel * jnp.asarray(nodes.radius ** -np.arange(length, dtype=np.float64), kernel.dtype)


def in_blocks(
    transfer: Callable[[Complex[Array, "J"], Complex[Array, "J"]], Complex[Array, "M D J"]], nodes: Nodes, num_modes: int
) -> Complex[Array, "M D J"]:
    """`transfer(z, 1 - z)` for blocks of nodes in turn, which the backward pass computes again: nothing of size `[D, N, J]`
    is kept, and the temporaries of a block, `[D, J / 4 N, N]`, are smaller than the result."""
    count = nodes.z.shape[0]
    size = min(count, max(64, count // (4 * num_modes)))
    padded = [jnp.pad(a, (0, -count % size), mode="edge").reshape(-1, size) for a in (nodes.z, nodes.one_minus_z)]
    values = jax.lax.map(jax.checkpoint(lambda block: transfer(*block)), tuple(padded))  # [J / size, M, D, size]
    return jnp.moveaxis(values, 0, 2).reshape(*values.shape[1:3], -1)[..., :count]


def cauchy_sums(weights: Pair, modes: Pair, g: Complex[Array, "J"], s: Complex[Array, "J"]) -> Complex[Array, "*V D J"]:
    """`sum_n v_n / (g - s m_n)` over modes and their conjugates; differentiable in v `[..., N, D]` and m `[N, D]`.

    A pair of conjugates has one real quadratic below and real numbers above: `2 (g Re v - s Re(v m^*)) / q(m)` with
    `q(m) = (g - s m) (g - s m^*)`.
    """
    v = jax.tree.map(lambda a: a.reshape(-1, *a.shape[-2:]), weights)
    above = jnp.concatenate([v.real, real_product(v, conjugate(modes))])
    turned = jax.tree.map(jnp.transpose, (above, modes))  # features in front, where batched products want them
    found = to_complex(_sums_over_quadratics(*turned, from_complex(g), from_complex(s)))  # [D, 2 V, J]
    g_part, s_part = jnp.split(jnp.swapaxes(found, 0, 1), 2)
    return (2 * (g * g_part - s * s_part)).reshape(*weights.real.shape[:-2], *g_part.shape[1:])


@jax.custom_vjp
def _sums_over_quadratics(above: Float[Array, "D N V"], modes: Pair, g: Pair, s: Pair) -> Pair:
    """`sum_n above_n / q(m_n)`, `[D, V, J]`. The backward pass by hand takes a few times the forward's, by autodiff ten."""
    inverse = _inverse_quadratic(modes, g, s)
    return jax.tree.map(lambda r: einsum("dnv,djn->dvj", above, r), inverse)


def _inverse_quadratic(modes: Pair, g: Pair, s: Pair) -> Pair:
    """`1 / q(m)`, `[D, J, N]`."""
    m, g, s = jax.tree.map(lambda a: jnp.expand_dims(a, 1), (modes, g, s))
    return reciprocal(product(subtract(g, product(s, m)), subtract(g, product(s, conjugate(m)))))


def _sums_backward(saved: tuple, d_sums: Pair) -> tuple:
    above, modes, g, s = saved
    inverse = _inverse_quadratic(modes, g, s)
    both = lambda spec, a, b: einsum(spec, a.real, b.real) + einsum(spec, a.imag, b.imag)
    d_above = both("dvj,djn->dnv", d_sums, inverse)
    d_inverse = jax.tree.map(lambda d: einsum("dnv,dvj->djn", above, d), d_sums)
    d_quadratic = scale(product(conjugate(product(inverse, inverse)), d_inverse), -1.0)
    # q = g^2 - 2 g s Re m + s^2 |m|^2
    d_real = -2 * both("j,djn->dn", product(g, s), d_quadratic)
    d_size = 2 * both("j,djn->dn", product(s, s), d_quadratic)
    return d_above, Pair(d_real + d_size * modes.real, d_size * modes.imag), None, None


_sums_over_quadratics.defvjp(lambda *inputs: (_sums_over_quadratics(*inputs), inputs), _sums_backward)


class CompanionSystem(NamedTuple):
    """`A` has ones below the diagonal and `last_column` in its last column (Zhang et al. 2023, SpaceTime, eq. 5).

    It expresses every autoregression of order N: the transfer function is a ratio of polynomials.
    """

    last_column: Float[Array, "N D"]  # absolute values sum to 1 at most, or the kernel may grow
    inputs: Float[Array, "N D"]
    outputs: Float[Array, "M N D"]

    def times(self) -> Times:
        channels, order, _ = self.outputs.shape
        return Times(setup=5e5, lag=55.0 * channels, step=4 + 0.9 * order, outputs=channels)

    def kernel(self, length: int) -> Float[Array, "M D L"]:
        """O(N log N + L log L): with S the shift, `c (I - z A)^(-1) b = c R b + z (c R a) (e R b) / (1 - z e R a)` where
        `R = (I - z S)^(-1)`, and `c R b` is the polynomial in z of the correlations of c and b."""
        nodes = transfer_nodes(length, self.inputs.dtype, oversampling=4)  # a node costs little here
        order = self.inputs.shape[0]
        polynomial = functools.partial(_polynomial_values, nodes=nodes)
        last = lambda v: polynomial(jnp.flip(v, 0))  # e R v: the entries of v from the last to the first
        size = 2 * order

        def correlation(c: Array, v: Array) -> Array:
            spectrum = jnp.fft.rfft(c, n=size, axis=-2) * jnp.conj(jnp.fft.rfft(v, n=size, axis=-2))
            return jnp.fft.irfft(spectrum, n=size, axis=-2)[..., :order, :]

        z = nodes.z
        a_last = z * last(self.last_column)
        numerator = polynomial(correlation(self.outputs, self.last_column)) * z * last(self.inputs)
        values = polynomial(correlation(self.outputs, self.inputs)) + numerator / (1 - a_last)
        return kernel_from_transfer(values, length, nodes)

    def init_state(self, batch_size: int) -> Float[Array, "B N D"]:
        return jnp.zeros((batch_size, *self.inputs.shape), self.inputs.dtype)

    def scan(
        self, u: Float[Array, "B L D"], state: Float[Array, "B N D"], starts: Bool[Array, "B L"] | None = None
    ) -> tuple[Float[Array, "B L M D"], Float[Array, "B N D"]]:
        constants = (self.last_column, self.inputs, tuple(self.outputs))
        return recurrence(_companion_step, constants, state, u, starts=starts, elementwise=True)


def _companion_step(constants: tuple, x: Array, u: Array) -> tuple[Array, Array]:
    last_column, inputs, channels = constants
    shifted = jnp.pad(x[:, :-1], [(0, 0), (1, 0), (0, 0)])
    x = shifted + last_column * x[:, -1:] + inputs * u[:, None]
    return x, jnp.stack([sum_modes(c * x) for c in channels], axis=1)


def _polynomial_values(coefficients: Float[Array, "*M N D"], nodes: Nodes) -> Complex[Array, "*M D J"]:
    """`sum_m coefficients[m] z^m` at the nodes."""
    order = coefficients.shape[-2]
    powers = jnp.asarray(nodes.radius ** np.arange(order, dtype=np.float64), coefficients.dtype)
    scaled = jnp.swapaxes(coefficients, -1, -2) * powers
    folded = jnp.pad(scaled, [(0, 0)] * (scaled.ndim - 1) + [(0, -order % nodes.circle)])  # a full turn is no turn
    return jnp.fft.rfft(folded.reshape(*folded.shape[:-1], -1, nodes.circle).sum(-2), n=nodes.circle)


class DenseSystem(NamedTuple):
    """A dense matrix per feature, or one for all (D_A = 1)."""

    matrix: Float[Array, "D_A N N"]
    inputs: Float[Array, "D_A N"]
    outputs: Float[Array, "M D N"]

    def times(self) -> Times:
        channels, _, order = self.outputs.shape
        return Times(setup=5e5, lag=1.0 * order * channels, step=0.15 * order**2, outputs=channels)

    def kernel(self, length: int) -> Float[Array, "M D L"]:
        """Krylov vectors by doubling, lags split as `l = q T + r`: `(C A^(q T)) (A^r B)`."""
        fine = max(1, 1 << (math.isqrt(max(length - 1, 1)).bit_length()))
        coarse = -(-length // fine)
        columns, power = self.inputs[..., None], self.matrix
        while columns.shape[-1] < fine:  # power is A^(number of columns)
            columns = jnp.concatenate([columns, einsum("dij,djr->dir", power, columns)], axis=-1)
            power = einsum("dij,djk->dik", power, power)
        rows = self.outputs[:, :, None]
        power = jnp.broadcast_to(power, (self.outputs.shape[1], *power.shape[1:])) if power.shape[0] == 1 else power
        while rows.shape[2] < coarse:
            rows = jnp.concatenate([rows, einsum("mdqi,dij->mdqj", rows, power)], axis=2)
            power = einsum("dij,djk->dik", power, power)
        columns = jnp.broadcast_to(columns, (self.outputs.shape[1], *columns.shape[1:]))
        kernel = einsum("mdqi,dir->mdqr", rows[:, :, :coarse], columns)
        return kernel.reshape(*kernel.shape[:2], coarse * fine)[..., :length]

    def init_state(self, batch_size: int) -> Float[Array, "B D N"]:
        return jnp.zeros((batch_size, *self.outputs.shape[1:]), self.matrix.dtype)

    def scan(
        self, u: Float[Array, "B L D"], state: Float[Array, "B D N"], starts: Bool[Array, "B L"] | None = None
    ) -> tuple[Float[Array, "B L M D"], Float[Array, "B D N"]]:
        return recurrence(_dense_step, tuple(self), state, u, starts=starts)


def _dense_step(constants: tuple, x: Array, u: Array) -> tuple[Array, Array]:
    matrix, inputs, outputs = constants
    moved = einsum("ij,bdj->bdi", matrix[0], x) if matrix.shape[0] == 1 else einsum("dij,bdj->bdi", matrix, x)
    x = moved + inputs * u[..., None]
    return x, einsum("mdn,bdn->bmd", outputs, x)


StateSpaceSystem = DiagonalSystem | DiagonalPlusLowRankSystem | CompanionSystem | DenseSystem
