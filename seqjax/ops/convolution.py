"""Convolutions along the sequence: long ones by fast Fourier transform, short depthwise ones by shifted sums.

Both take packed segments, which do not see one another, and both continue from a tail of earlier inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Tail(NamedTuple):
    """The last inputs of a sequence, for a convolution to continue from.

    Attributes:
      inputs: zeros where there was none yet.
      runs: which segment of its row each belongs to (see `ops.segments`); -1 where there was none.
    """

    inputs: Float[Array, "B S D"]
    runs: Int[Array, "B S"]

    @classmethod
    def fresh(cls, batch_size: int, size: int, width: int, dtype=jnp.float32) -> Tail:
        return cls(jnp.zeros((batch_size, size, width), dtype), jnp.full((batch_size, size), -1, jnp.int32))

    def extended(self, inputs: Array, runs: Array) -> tuple[Array, Array, Tail]:
        """Inputs and runs with the tail in front, and the tail after them."""
        runs = jnp.broadcast_to(runs, inputs.shape[:2])
        inputs = jnp.concatenate([self.inputs, inputs.astype(self.inputs.dtype)], axis=1)
        runs = jnp.concatenate([self.runs, runs], axis=1)
        start = inputs.shape[1] - self.inputs.shape[1]
        return inputs, runs, Tail(inputs[:, start:], runs[:, start:])


def long_convolution(
    u: Float[Array, "B L D"],
    kernel: Float[Array, "M D S"],
    *,
    reverse_kernel: Float[Array, "M D S"] | None = None,
    gate: Float[Array, "B L #M D"] | None = None,
    runs: Int[Array, "B L"] | None = None,
    tail: Tail | None = None,
) -> tuple[Float[Array, "B L M D"], Tail | None]:
    """`y_t = sum_(s <= t) kernel[t - s] u_s` for each of D features and M output channels, in O(L log L).

    Args:
      kernel: S lags, at least as many as there are inputs (with the tail's).
      reverse_kernel: adds `sum_(s > t) reverse_kernel[s - t - 1] u_s`: lag 0 stands for the next input (the convention of
        the bidirectional S4).
      gate: multiplies y.
      runs: an output sees inputs of its own segment only. Costs `log2(L) / 2` times as much: at every scale, the half of
        a block that comes first is convolved into the other half, and one segment at most reaches across.
      tail: inputs before these, whose segments the first ones may continue.
    Returns:
      In at least float32; and the next tail, if one was given.
    Raises:
      ValueError: the kernel is shorter than the inputs, or segments or a tail with a reverse kernel.
    """
    if reverse_kernel is not None and (runs is not None or tail is not None):
        raise ValueError(
            "a convolution with a reverse kernel sees both sides of the sequence: it takes no segment ids and no tail; "
            "allowed: a causal convolution, or a recurrence in each direction."
        )
    length, before = u.shape[1], 0
    u = u.astype(jnp.promote_types(u.dtype, jnp.float32))
    if tail is not None:
        before = tail.inputs.shape[1]
        u, runs, tail = tail.extended(u, jnp.zeros((1, length), jnp.int32) if runs is None else runs)
    if kernel.shape[-1] < u.shape[1]:
        raise ValueError(f"a kernel of {kernel.shape[-1]} lags is too short for {u.shape[1]} inputs; make it as long.")
    lags = kernel[..., : u.shape[1]]
    y = _convolve(u, lags, reverse_kernel) if runs is None else _convolve_segments(u, lags, runs)
    y = y[:, before:]
    return (y if gate is None else y * gate), tail


def _convolve(u: Array, kernel: Array, reverse_kernel: Array | None) -> Array:
    """One circular convolution, padded so that nothing wraps around."""
    length = u.shape[1]
    size = fft_size(2 * length - 1)
    spectrum = jnp.fft.rfft(kernel, n=size)
    if reverse_kernel is not None:  # lag -1 - l lies at the end of the circle
        turned = jnp.flip(reverse_kernel[..., : length - 1], axis=-1)
        spectrum += jnp.fft.rfft(jnp.pad(turned, [(0, 0), (0, 0), (size - turned.shape[-1], 0)]), n=size)
    inputs = jnp.fft.rfft(jnp.swapaxes(u, 1, 2), n=size)
    y = jnp.fft.irfft(inputs[:, None] * spectrum, n=size)[..., :length]  # [B, M, D, L]
    return jnp.moveaxis(y, 3, 1)


def _convolve_segments(u: Array, kernel: Array, runs: Array) -> Array:
    """Divide and conquer over the pairs (input, output) of one segment."""
    batch, length, width = u.shape
    size = 1 << max(length - 1, 1).bit_length()
    channels = kernel.shape[0]
    y = u[:, :, None, :] * kernel[..., 0]
    u = jnp.pad(u, [(0, 0), (0, size - length), (0, 0)])
    runs = jnp.pad(runs, [(0, 0), (0, size - length)], constant_values=-2)
    kernel = jnp.pad(kernel, [(0, 0), (0, 0), (0, max(0, size - kernel.shape[-1]))])
    y = jnp.pad(y, [(0, 0), (0, size - length), (0, 0), (0, 0)])
    half = 1
    while half < size:
        blocks = size // (2 * half)
        inputs = u.reshape(batch, blocks, 2, half, width)[:, :, 0]
        ids = runs.reshape(batch, blocks, 2, half)
        across = ids[:, :, 0, -1:]  # the one segment that may reach from the first half into the second
        inputs = jnp.where((ids[:, :, 0] == across)[..., None], inputs, 0)
        # Outputs half .. 2 half - 1 of a circle of 2 half: no lag below 2 half wraps onto them.
        spectrum = jnp.fft.rfft(kernel[..., : 2 * half])
        found = jnp.fft.irfft(jnp.fft.rfft(jnp.swapaxes(inputs, 2, 3), n=2 * half)[:, :, None] * spectrum, n=2 * half)
        found = jnp.moveaxis(found[..., half:], 4, 2)  # [B, blocks, half, M, D]
        found = jnp.where((ids[:, :, 1] == across)[..., None, None], found, 0)
        found = jnp.pad(found[:, :, None], [(0, 0), (0, 0), (1, 0), (0, 0), (0, 0), (0, 0)])
        y = y + found.reshape(batch, size, channels, width)
        half *= 2
    return y[:, :length]


def fft_size(least: int) -> int:
    """The smallest number from `least` on with no prime factor above 5: sizes that transforms are quick at."""
    size = max(least, 1)
    while True:
        rest = size
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return size
        size += 1


def short_convolution(
    u: Float[Array, "B L D"],
    kernel: Float[Array, "W D"],
    bias: Float[Array, "D"] | None = None,
    *,
    ahead: int = 0,
    runs: Int[Array, "B L"] | None = None,
    tail: Tail | None = None,
) -> tuple[Float[Array, "B L D"], Tail | None]:
    """Depthwise convolution `y_t = bias + sum_w kernel[W - 1 - w] u_(t + ahead - w)`: the last row meets the newest input.

    Args:
      ahead: how many of the W taps look ahead of their output: 0 is causal, `(W - 1) / 2` is centred.
      runs: an output sees inputs of its own segment only.
      tail: the W - 1 inputs before these.
    Returns:
      In the dtype of `u`; and the next tail, if one was given.
    Raises:
      ValueError: a tail of another size than W - 1, or for a convolution that looks ahead; or `ahead` outside the kernel.
    """
    taps, length = kernel.shape[0], u.shape[1]
    if not 0 <= ahead < taps:
        raise ValueError(f"ahead={ahead} is outside a kernel of {taps} taps; allowed: 0 to {taps - 1}.")
    if tail is not None and ahead:
        raise ValueError(f"a convolution that looks ahead={ahead} inputs waits for them: it takes no tail; allowed: ahead=0.")
    if tail is not None and tail.inputs.shape[1] != taps - 1:
        raise ValueError(f"a convolution of {taps} taps continues from {taps - 1} inputs, not {tail.inputs.shape[1]}.")
    own = None if runs is None and tail is None else jnp.broadcast_to(0 if runs is None else runs, u.shape[:2])
    before = Tail.fresh(u.shape[0], taps - 1 - ahead, u.shape[2], u.dtype) if tail is None else tail
    inputs, all_runs, after = before.extended(u, jnp.zeros(u.shape[:2], jnp.int32) if own is None else own)
    if ahead:
        inputs = jnp.pad(inputs, [(0, 0), (0, ahead), (0, 0)])
        all_runs = jnp.pad(all_runs, [(0, 0), (0, ahead)], constant_values=-1)
    y = jnp.zeros_like(u) if bias is None else jnp.broadcast_to(bias, u.shape).astype(u.dtype)
    for tap in range(taps):
        seen = inputs[:, tap : tap + length]
        if own is not None:
            seen = jnp.where((all_runs[:, tap : tap + length] == own)[..., None], seen, 0)
        y = y + (kernel[tap] * seen).astype(u.dtype)
    return y, (None if tail is None else after)
