"""Selective scan: a diagonal recurrence whose decay, input and output weights change with the token (Mamba's S6)."""

from __future__ import annotations

import functools
import importlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from seqjax.ops.complex_pairs import Pair, add, exponential, product, real_product, scale
from seqjax.ops.dispatch import PLATFORM_KERNELS, dispatch, platform_kernel, undivided_mesh
from seqjax.ops.kernels.selective_scan import Inputs
from seqjax.ops.recurrence import chunk_size_for, chunked, joined, recurrence, reset, scan_chunks, sum_modes
from seqjax.ops.segments import reversed_starts


def selective_scan(
    u: Float[Array, "B L E"],
    dt: Float[Array, "B L E"],
    A: Float[Array, "E N"] | Pair,
    B: Float[Array, "... N"] | Pair,
    C: Float[Array, "... N"] | Pair,
    D: Float[Array, "E"] | None = None,
    z: Float[Array, "B L E"] | None = None,
    dt_bias: Float[Array, "E"] | None = None,
    dt_softplus: bool = False,
    h0: Float[Array, "B N E"] | Pair | None = None,
    segment_ids: Int[Array, "B L"] | None = None,
    reverse: bool = False,
    return_state: bool = False,
    chunk_size: int | None = None,
    implementation: str | None = None,
    *,
    starts: Bool[Array, "B L"] | None = None,
    spec: PartitionSpec | None = None,
) -> Array | tuple[Array, Array | Pair]:
    """`h_t = exp(delta_t A) h_(t-1) + delta_t u_t B_t`, `y_t = C_t h_t + D u_t`, times `silu(z_t)` (Gu and Dao 2023).

    `delta = softplus(dt + dt_bias)`, or without the softplus; the input is held by Euler's rule, as in the authors' code.
    Arithmetic and state in at least float32; differentiable in every float argument, in reverse mode; memory for the
    backward pass is O(B L E + B N E L / chunk_size).

    Args:
      A: negative. A `Pair` of real and imaginary parts makes modes complex, one of each conjugate pair: then the state is a
        pair, and `y_t = 2 Re(C_t h_t) + D u_t`.
      B, C: of each token, one set for all features or G groups (feature e uses group `e // (E / G)`); or `[E, N]`, the same
        for all tokens. With a complex A, real or pairs.
      h0: the state before the first token processed.
      segment_ids: the state is zero where a token's id differs from the one before it in the processed order; the first
        token continues from `h0`.
      reverse: run from the last token to the first.
      return_state: also return the state after the last token processed, `[B, N, E]`.
      chunk_size: tokens between states kept for the backward pass; None chooses.
      implementation: "xla", "pallas_tpu", "pallas_gpu" or "reference" (a plain loop that JAX differentiates); None takes the
        kernel of the platform that this process runs on, where it serves the call, and else "xla".
      starts: in place of `segment_ids`: where a segment starts, the first token included.
      spec: how the current mesh divides u, in batch and features: a kernel then runs on each device's part.
    Returns:
      `[B, L, E]` in the dtype of `u`.
    Raises:
      ValueError: groups that do not divide the features, an unknown implementation, or one that does not serve the call.
    """
    if segment_ids is not None and starts is None:
        starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], [(0, 0), (1, 0)])
    if isinstance(A, Pair) or any(isinstance(w, Pair) or w.ndim == 2 for w in (B, C)):
        if implementation not in (None, "xla"):
            raise ValueError(
                f"implementation={implementation!r} does not serve complex or constant weights; allowed: None, xla."
            )
        delta = step_sizes(dt, None if dt_bias is None else dt_bias[None], dt_softplus)
        y, last = _general(u.astype(delta.dtype), delta, A, B, C, h0, starts, reverse, chunk_size)
        of_all = Inputs(u, dt, None, None, None, None if D is None else D[None], z, None, None, None)
        y = finished(y, of_all)
        return (y, last) if return_state else y
    batch_size, length, features = u.shape
    groups = B.shape[2] if B.ndim == 4 else 1
    if features % groups:
        raise ValueError(f"{groups} groups do not divide {features} features.")
    if spec is not None and (implementation or platform_kernel()) in PLATFORM_KERNELS and not undivided_mesh():
        how = {"dt_softplus": dt_softplus, "reverse": reverse, "chunk_size": chunk_size, "implementation": implementation}
        y, last = _divided(spec, how, (u, dt, A, B, C, D, z, dt_bias, h0, starts))
        return (y, last) if return_state else y
    wide = jnp.promote_types(A.dtype, jnp.float32)
    rows = functools.partial(_to_rows, groups=groups)
    weights = lambda w: (
        jnp.moveaxis(w, 2, 1).reshape(batch_size * groups, length, -1) if groups > 1 else w.reshape(batch_size, length, -1)
    )
    of_group = lambda a: None if a is None else a.astype(wide).reshape(groups, -1)
    h0 = jnp.zeros((batch_size, A.shape[1], features), wide) if h0 is None else h0.astype(wide)
    inputs = Inputs(
        u=rows(u),
        dt=rows(dt.astype(u.dtype)),
        A=jnp.moveaxis(A.astype(wide).reshape(groups, -1, A.shape[1]), 1, 2),
        B=weights(B),
        C=weights(C),
        D=of_group(D),
        z=None if z is None else rows(z),
        dt_bias=of_group(dt_bias),
        h0=rows(h0),
        starts=None if starts is None else jnp.repeat(starts, groups, axis=0),
    )
    how = {"softplus": dt_softplus, "reverse": reverse, "chunk_size": chunk_size}
    available = {name: functools.partial(run, **how) for name, run in IMPLEMENTATIONS.items() if _serves(name, inputs)}
    y, last = dispatch(implementation, available, inputs)
    y, last = (_from_rows(a, batch_size) for a in (y, last))
    return (y, last) if return_state else y


def _divided(spec: PartitionSpec, how: dict[str, Any], inputs: tuple) -> tuple[Array, Array]:
    """The scan of each device's rows and features by itself. Features stay whole where their division would cut groups."""
    rows, _, features = spec
    grouped = inputs[3].ndim == 4 and inputs[3].shape[2] > 1
    features = None if grouped else features
    spec = PartitionSpec(rows, None, features)

    def part(u, dt, A, B, C, D, z, dt_bias, h0, starts):
        return selective_scan(u, dt, A, B, C, D, z, dt_bias, h0=h0, starts=starts, return_state=True, **how)

    of_feature, of_token, of_state = PartitionSpec(features), PartitionSpec(rows), PartitionSpec(rows, None, features)
    specs = (spec, spec, of_feature, of_token, of_token, of_feature, spec, of_feature, of_state, of_token)
    # Absent inputs are empty trees, which take any spec; types of replication stop at kernels.
    return jax.shard_map(part, in_specs=specs, out_specs=(spec, of_state), check_vma=False)(*inputs)


def _to_rows(a: Float[Array, "B X E"], groups: int) -> Float[Array, "R X F"]:
    """The features of each group as rows of their own."""
    if groups == 1:
        return a
    batch_size, length, features = a.shape
    split = a.reshape(batch_size, length, groups, features // groups)
    return jnp.moveaxis(split, 2, 1).reshape(batch_size * groups, length, features // groups)


def _from_rows(a: Float[Array, "R X F"], batch_size: int) -> Float[Array, "B X E"]:
    groups = a.shape[0] // batch_size
    if groups == 1:
        return a
    split = a.reshape(batch_size, groups, *a.shape[1:])
    return jnp.moveaxis(split, 1, 2).reshape(batch_size, a.shape[1], groups * a.shape[2])


def step_sizes(dt: Array, dt_bias: Array | None, softplus: bool) -> Array:
    """Step sizes `[R, L, E]`, at least float32."""
    dt = dt.astype(jnp.promote_types(dt.dtype, jnp.float32))
    if dt_bias is not None:
        dt = dt + _of_rows(dt_bias, dt.shape[0])[:, None]
    return jax.nn.softplus(dt) if softplus else dt


def _of_rows(a: Float[Array, "G *S"], rows: int) -> Float[Array, "R *S"]:
    """A parameter of each group, for each row; of one group, for all of them."""
    return a if a.shape[0] == 1 else jnp.tile(a, (rows // a.shape[0], *(1,) * (a.ndim - 1)))


def finished(y: Array, inputs: Inputs) -> Array:
    """`D u` added, and gated."""
    if inputs.D is not None:
        y = y + _of_rows(inputs.D, y.shape[0])[:, None] * inputs.u.astype(y.dtype)
    if inputs.z is not None:
        y = y * jax.nn.silu(inputs.z.astype(y.dtype))
    return y.astype(inputs.u.dtype)


def _xla(inputs: Inputs, *, softplus: bool, reverse: bool, chunk_size: int | None) -> tuple[Array, Array]:
    delta = step_sizes(inputs.dt, inputs.dt_bias, softplus)
    taken = _Tokens(delta, *(a.astype(delta.dtype) for a in (inputs.u, inputs.B, inputs.C)), inputs.starts)
    A = inputs.A[0] if inputs.A.shape[0] == 1 else _of_rows(inputs.A, delta.shape[0])
    y, last = _in_time(A, inputs.h0, taken, reverse, chunk_size)
    return finished(y, inputs), last


class _Tokens(NamedTuple):
    """What each step reads, `[L, R, ...]`; within the scan in chunks, `[K, Q, R, ...]`."""

    delta: Array  # [L, R, E]
    u: Array  # [L, R, E]
    B: Array  # [L, R, N]
    C: Array  # [L, R, N]
    starts: Array | None  # [L, R]


def _in_time(A: Array, h0: Array, tokens: _Tokens, reverse: bool, chunk_size: int | None) -> tuple[Array, Array]:
    """Batch-major tokens in processing order and whole chunks: steps of size zero, which change no state, fill the last."""
    length = tokens.u.shape[1]
    if reverse:
        flipped = jax.tree.map(lambda a: jnp.flip(a, 1), tokens._replace(starts=None))
        tokens = flipped._replace(starts=reversed_starts(tokens.starts))
    tokens = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), tokens)
    if length == 1:
        last, y = _step(A, h0, jax.tree.map(lambda a: a[0], tokens))
        return y[:, None], last
    size = min(chunk_size or chunk_size_for(length), length)
    tokens = jax.tree.map(lambda a: jnp.pad(a, [(0, -length % size), *[(0, 0)] * (a.ndim - 1)]), tokens)
    y, last = _scan(A, h0, chunked(tokens, size))
    y = jnp.swapaxes(y.reshape(-1, *y.shape[2:])[:length], 0, 1)
    return (jnp.flip(y, 1) if reverse else y), last


def _step(A: Array, h: Float[Array, "R N E"], now: _Tokens) -> tuple[Array, Array]:
    h, _ = _advance(h, now, jnp.exp(now.delta[:, None] * A))
    return h, sum_modes(h * now.C[:, :, None])


def _advance(h: Float[Array, "R N E"], now: _Tokens, decay: Float[Array, "R N E"]) -> tuple[Array, Array]:
    """The next state, and what is left in it of the state before."""
    left = decay * reset(h, now.starts)
    return left + (now.delta * now.u)[:, None] * now.B[:, :, None], left


@jax.custom_vjp
def _scan(A: Float[Array, "*R N E"], h0: Float[Array, "R N E"], tokens: _Tokens) -> tuple[Array, Array]:
    """Outputs `[K, Q, R, E]` and the last state. By hand for two reasons, beside keeping one state a chunk: the gradients of
    B and C, sums over all features, become matrix products behind the loop, three times as fast on CPU as a reduction at
    every step; and that of A is summed over rows once."""
    last, y = jax.lax.scan(functools.partial(_step, A), h0, joined(tokens))
    return chunked(y, tokens.u.shape[1]), last


def _scan_forward(A: Array, h0: Array, tokens: _Tokens) -> tuple:
    def chunk(h: Array, of_chunk: _Tokens) -> tuple[Array, tuple]:
        after, y = jax.lax.scan(functools.partial(_step, A), h, of_chunk)
        return after, (y, h)

    last, (y, kept) = scan_chunks(chunk, h0, tokens)
    return (y, last), (A, kept, tokens)


def _scan_backward(saved: tuple, cotangents: tuple) -> tuple:
    A, kept, tokens = saved
    d_y, d_last = cotangents
    spread = jnp.broadcast_to(A, d_last.shape)

    def back(carry: tuple, xs: tuple) -> tuple[tuple, tuple]:
        d_h, d_A = carry
        now, decay, left, d_y = xs
        d_h = d_h + now.C[:, :, None] * d_y[:, None]
        d_exponent = d_h * left
        d_driven = sum_modes(d_h * now.B[:, :, None])
        d_delta = sum_modes(d_exponent * spread) + d_driven * now.u
        d_A = d_A + d_exponent * now.delta[:, None]
        return (reset(d_h * decay, now.starts), d_A), (d_h, d_delta, d_driven * now.delta)

    def chunk(carry: tuple, xs: tuple) -> tuple[tuple, _Tokens]:
        h, now, d_y = xs
        decay = jnp.exp(now.delta[:, :, None] * A)  # of all steps at once: within the loop XLA computes it for every use
        _, left = jax.lax.scan(lambda h, xs: _advance(h, *xs), h, (now, decay))
        carry, (d_h, d_delta, d_u) = jax.lax.scan(back, carry, (now, decay, left, d_y), reverse=True)
        driven = now.delta * now.u
        d_C = _over_features(left, d_y) + jnp.sum(driven * d_y, axis=-1, keepdims=True) * now.B
        return carry, _Tokens(d_delta, d_u, _over_features(d_h, driven), d_C, None)

    (d_h, d_A), d_tokens = scan_chunks(chunk, (d_last, jnp.zeros_like(spread)), (kept, tokens, d_y), reverse=True)
    return (d_A if A.ndim == 3 else d_A.sum(0)), d_h, d_tokens


def _over_features(states: Float[Array, "Q R N E"], weights: Float[Array, "Q R E"]) -> Float[Array, "Q R N"]:
    return jnp.einsum("qrne,qre->qrn", states, weights, precision=jax.lax.Precision.HIGHEST)


_scan.defvjp(_scan_forward, _scan_backward)


def _reference(inputs: Inputs, *, softplus: bool, reverse: bool, chunk_size: int | None) -> tuple[Array, Array]:
    """Every token in turn, differentiated by JAX."""
    del chunk_size
    delta = step_sizes(inputs.dt, inputs.dt_bias, softplus)
    A = _of_rows(inputs.A, delta.shape[0])
    length = delta.shape[1]
    h, y, starts = inputs.h0, [None] * length, inputs.starts
    if starts is not None and reverse:
        starts = jnp.pad(starts[:, 1:], [(0, 0), (0, 1)])
    for t in reversed(range(length)) if reverse else range(length):
        driven = (delta[:, t] * inputs.u[:, t])[:, None] * inputs.B[:, t, :, None]
        h = jnp.exp(delta[:, t, None] * A) * reset(h, None if starts is None else starts[:, t]) + driven
        y[t] = (inputs.C[:, t, :, None] * h).sum(1)
    return finished(jnp.stack(y, axis=1), inputs), h


def _kernel(platform: str, inputs: Inputs, *, softplus: bool, reverse: bool, chunk_size: int | None) -> tuple[Array, Array]:
    """By the kernels of a platform, which keep states every so many tokens: a multiple of what they can."""
    multiple = KERNEL_CHUNK if chunk_size is None else CHUNK_MULTIPLE * -(-chunk_size // CHUNK_MULTIPLE)
    return _by_kernel(_Kernel(platform, softplus, reverse, multiple), inputs)


class _Kernel(NamedTuple):
    """Which kernel, and what it is given when it is compiled."""

    platform: str
    softplus: bool
    reverse: bool
    chunk_size: int

    def run(self, name: str, *arrays: Any, **options: Any) -> Any:
        # Not imported before it is needed: a kernel's module loads its platform's compiler.
        module = importlib.import_module(f"seqjax.ops.kernels.selective_scan_{self.platform}")
        how = {"softplus": self.softplus, "reverse": self.reverse, "chunk_size": self.chunk_size}
        return getattr(module, name)(*arrays, **how, **options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_kernel(kernel: _Kernel, inputs: Inputs) -> tuple[Array, Array]:
    out, last, _ = kernel.run("forward", inputs, keep_states=False)
    return out, last


def _by_kernel_forward(kernel: _Kernel, inputs: Inputs) -> tuple:
    out, last, states = kernel.run("forward", inputs, keep_states=True)
    return (out, last), (inputs, states)


def _by_kernel_backward(kernel: _Kernel, saved: tuple, cotangents: tuple) -> tuple:
    inputs, states = saved
    d_out, d_last = cotangents
    return (kernel.run("backward", inputs, states, d_out, d_last),)


_by_kernel.defvjp(_by_kernel_forward, _by_kernel_backward)


def _serves(implementation: str, inputs: Inputs) -> bool:
    """Whether an implementation computes what the inputs ask for, on the current mesh."""
    if not implementation.startswith("pallas_"):
        return True
    if implementation == "pallas_gpu" and jax.__version_info__ < (0, 11):  # Mosaic GPU of before loads otherwise
        return False
    arrays = jax.tree.leaves(inputs._replace(starts=None))
    narrow = all(a.dtype in (jnp.float32, jnp.bfloat16) for a in arrays)
    return narrow and undivided_mesh() and inputs.u.shape[1] > 1 and inputs.A.shape[1] <= LARGEST_KERNEL_STATE


KERNEL_CHUNK = 128
"""Tokens between the states that kernels keep by default."""
CHUNK_MULTIPLE = 16
LARGEST_KERNEL_STATE = 128

IMPLEMENTATIONS = {
    "xla": _xla,
    "reference": _reference,
    "pallas_tpu": functools.partial(_kernel, "tpu"),
    "pallas_gpu": functools.partial(_kernel, "gpu"),
}


def _general(
    u: Array,
    delta: Array,
    A: Array | Pair,
    B: Array | Pair,
    C: Array | Pair,
    h0: Array | Pair | None,
    starts: Array | None,
    reverse: bool,
    chunk_size: int | None,
) -> tuple[Array, Array | Pair]:
    """Complex modes, or weights that do not change with the token: what the selective scan is compared with."""
    batch_size, _, features = u.shape
    groups = {w.shape[2] for w in jax.tree.leaves((B, C)) if w.ndim == 4}
    if groups - {1}:
        raise ValueError("complex or constant weights take one group, B and C of shape [B, L, N] or [E, N].")
    paired = isinstance(A, Pair)
    parts = lambda w: (w if isinstance(w, Pair) else Pair(w, jnp.zeros_like(w))) if paired else w
    wide = lambda tree: jax.tree.map(lambda a: a.astype(delta.dtype), tree)
    A, B, C = (wide(parts(w)) for w in (A, B, C))
    if h0 is None:
        h0 = jax.tree.map(lambda a: jnp.zeros((batch_size, a.shape[1], features), delta.dtype), A)
    constant = {name: jax.tree.map(jnp.transpose, w) for name, w in (("B", B), ("C", C)) if jax.tree.leaves(w)[0].ndim == 2}
    changing = {
        name: jax.tree.map(lambda a: a.reshape(*a.shape[:2], -1), w) for name, w in (("B", B), ("C", C)) if name not in constant
    }
    constants = {"A": jax.tree.map(jnp.transpose, A), **constant}
    step = _complex_step if paired else _real_step
    how = {"starts": starts, "reverse": reverse, "chunk_size": chunk_size, "elementwise": True}
    return recurrence(step, constants, wide(h0), {"u": u, "delta": delta, **changing}, **how)


def _weights(name: str, constants: dict, now: dict) -> Array | Pair:
    """`[N, E]` (with a leading batch where constants are spread) or `[B, N, 1]`."""
    return constants[name] if name in constants else jax.tree.map(lambda a: a[:, :, None], now[name])


def _real_step(constants: dict, h: Array, now: dict) -> tuple[Array, Array]:
    delta = now["delta"][:, None]
    h = jnp.exp(delta * constants["A"]) * h + delta * now["u"][:, None] * _weights("B", constants, now)
    return h, sum_modes(h * _weights("C", constants, now))


def _complex_step(constants: dict, h: Pair, now: dict) -> tuple[Pair, Array]:
    delta = now["delta"][:, None]
    driven = scale(_weights("B", constants, now), delta * now["u"][:, None])
    h = add(product(exponential(scale(constants["A"], delta)), h), driven)
    return h, 2 * sum_modes(real_product(_weights("C", constants, now), h))
