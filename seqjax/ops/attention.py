"""Softmax attention: exact, grouped heads, causal, sliding window, packed segments, bias, ALiBi, sinks, from a cache.

Shapes: queries `[B, T, H, K]`, keys `[B, S, G, K]`, values `[B, S, G, W]`; G divides H (grouped-query attention, Ainslie et
al. 2023; G = 1 is multi-query), query head h reads key head `h // (H / G)`.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seqjax.ops import blockwise_attention
from seqjax.ops.attention_mask import AttentionMask, AttentionSpec, distances, visible
from seqjax.ops.dispatch import dispatch, undivided_mesh
from seqjax.ops.softmax import SoftmaxSums, merge_sums


def flash_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G W"],
    *,
    causal: bool = True,
    window: int | None = None,
    segment_ids: tuple[Int[Array, "#B T"], Int[Array, "#B S"]] | None = None,
    q_offset: int | Int[Array, ""] | Int[Array, "B"] = 0,
    kv_positions: Int[Array, "S"] | None = None,
    bias: Float[Array, "#B #H T S"] | None = None,
    alibi_slopes: Float[Array, "H"] | None = None,
    softcap: float | None = None,
    sinks: Float[Array, "H"] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B T H W"] | tuple[Float[Array, "B T H W"], Float[Array, "B T H"]]:
    """`softmax(cap(scale * q k^T) + bias - slope * distance) v` over the pairs that the masks allow.

    Differentiable in q, k, v, bias, sinks; the other arrays are constants.

    Args:
      q, k, v: any float dtype; logits and the softmax are computed in at least float32.
      causal: a query sees only keys at its own position or before.
      window: a query sees keys less than `window` positions away (before it, and when not causal also after it).
      segment_ids: of queries and of keys; a pair attends only where the two are equal. A negative key id is never seen.
      q_offset: position of the first query, where the first key stands at 0 (queries that continue a cache, or that are
        the last of a longer input); an array may differ by row.
      kv_positions: positions of the keys where they are not 0, 1, 2, ... (a ring buffer).
      bias: added to the logits; -inf masks a pair.
      alibi_slopes: per-head slope of the linear distance penalty (Press et al. 2022).
      softcap: `cap(x) = softcap * tanh(x / softcap)` (Gemma 2, 2024); None is no cap.
      sinks: per head, the logit of a key without value: it joins the sum of each softmax, no mask hides it (gpt-oss, 2025).
      scale: default `1 / sqrt(K)`.
      return_lse: also give the log of each softmax's sum, of the sink too, in at least float32, for `merge_attention`.
      implementation: "xla" (memory linear in length), "pallas_tpu" (from 16 queries on, without bias), "pallas_gpu" (the same
        on Hopper, in half precision, for heads of width 64, 128 or 256, without soft cap, ALiBi and kv_positions), "cudnn"
        (in half precision, causal or without masks, no log-sum-exp), "reference" (plain, materialises all pairs), or None
        for the platform's fastest that serves the call.
    Returns:
      In the dtype of `v`; a query that may see no key gets zeros, and without a sink its log-sum-exp is -inf.
    Raises:
      ValueError: G does not divide H, the window or the soft cap is not positive, or the implementation does not serve
        this call.
    """
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} key heads.")
    for name, value in (("window", window), ("softcap", softcap)):
        if value is not None and value <= 0:
            raise ValueError(f"{name}={value} is not positive; allowed: None, or above 0.")
    static_offset = q_offset if isinstance(q_offset, int) else None
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    spec = AttentionSpec(causal, window, static_offset, scale, softcap)
    offsets = None if static_offset is not None else jnp.atleast_1d(q_offset)
    mask = AttentionMask(offsets, kv_positions, segment_ids, alibi_slopes)
    served = {name: kernel for name, kernel in KERNELS.items() if _serves(name, spec, mask, q, k, v, bias)}
    available = {name: functools.partial(_attend, kernel, spec) for name, kernel in served.items()}
    available["reference"] = functools.partial(_reference, spec)
    if not return_lse and sinks is None and _cudnn_serves(spec, mask, q, k, v, bias):
        available["cudnn"] = functools.partial(_cudnn, spec)
    out, lse = dispatch(implementation, available, mask, q, k, v, bias)
    if sinks is not None:
        nothing = jnp.zeros((1, 1, 1, 1), out.dtype)
        out, lse = merge_attention((out, nothing), (lse, sinks.astype(lse.dtype)[None, None]))
    return (out, lse) if return_lse else out


def decode_attention(
    q: Float[Array, "B T H K"],
    k_cache: Float[Array, "B S G K"],
    v_cache: Float[Array, "B S G W"],
    lengths: Int[Array, "B"],
    *,
    window: int | None = None,
    segment_ids: tuple[Int[Array, "#B T"], Int[Array, "#B S"]] | None = None,
    bias: Float[Array, "#B #H T S"] | None = None,
    alibi_slopes: Float[Array, "H"] | None = None,
    softcap: float | None = None,
    sinks: Float[Array, "H"] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B T H W"] | tuple[Float[Array, "B T H W"], Float[Array, "B T H"]]:
    """Attention of each row's newest tokens to its cache, which holds as many tokens as `lengths` says.

    Reads no block of the cache that no row has reached or, with a window, that all have left.

    Args:
      q: the last T tokens of each row, which the cache already holds: query t stands at position `lengths - T + t`.
      k_cache, v_cache: slot s holds the token at position s; slots from `lengths` on are never seen.
      lengths: tokens in each row's cache. A row that is empty gets zeros.
      window, segment_ids, bias, alibi_slopes, softcap, sinks, scale, return_lse, implementation: as `flash_attention`.
    Returns, Raises:
      As `flash_attention`.
    """
    return flash_attention(
        q,
        k_cache,
        v_cache,
        causal=True,
        window=window,
        segment_ids=segment_ids,
        q_offset=lengths - q.shape[1],
        bias=bias,
        alibi_slopes=alibi_slopes,
        softcap=softcap,
        sinks=sinks,
        scale=scale,
        return_lse=return_lse,
        implementation=implementation,
    )


def merge_attention(
    outputs: Sequence[Float[Array, "..."]], lses: Sequence[Float[Array, "..."]]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Attention to all keys, from the attention to each part of them: exact, in any order and grouping.

    Args:
      outputs: of each part, `[..., W]`; the parts broadcast together.
      lses: the log-sum-exp of each part's logits, `[...]`; -inf for a part in which a query sees no key.
    Returns:
      Output and log-sum-exp of the whole; zeros and -inf where no part has a key.
    """
    parts = [SoftmaxSums(lse, out, jnp.ones_like(lse)) for out, lse in zip(outputs, lses)]
    whole = functools.reduce(merge_sums, parts)
    return whole.mean.astype(jnp.result_type(*outputs)), whole.log_sum


def attended_pairs(length: int, *, causal: bool, window: int | None) -> int:
    """How many (query, key) pairs one sequence of `length` tokens needs."""
    reach = length if window is None else min(window, length)
    before = reach * (reach + 1) // 2 + (length - reach) * reach  # each query's keys at or before it
    return before if causal else 2 * before - length


class Kernel(NamedTuple):
    """One implementation of attention; `blockwise_attention` documents both functions' arguments.

    Attributes:
      forward: `(spec, mask, q, k, v, bias) -> (output [B, T, H, W], log-sum-exp [B, T, H])`.
      backward: `(spec, mask, (q, k, v, bias), outputs, cotangents) -> cotangents of q, k, v, bias`, from the outputs of
        `forward` and their cotangents.
    """

    forward: Callable
    backward: Callable


def _kernel(platform: str) -> Kernel:
    """The kernels of a platform. Their module is not imported before it is needed: it loads the platform's compiler."""

    def run(name: str, *arguments: Any) -> tuple:
        return getattr(importlib.import_module(f"seqjax.ops.kernels.attention_{platform}"), name)(*arguments)

    return Kernel(functools.partial(run, "forward"), functools.partial(run, "backward"))


KERNELS = {
    "xla": Kernel(blockwise_attention.forward, blockwise_attention.backward),
    "pallas_tpu": _kernel("tpu"),
    "pallas_gpu": _kernel("gpu"),
}

FEWEST_QUERIES = 16
"""Fewer are a step of decoding: kernels would rearrange the whole cache, or read it once for each head of a group; XLA reads it
once, where it lies."""
WIDEST_HEAD = 256
MOST_PAIRS = 2**34
"""Tables of more pairs of blocks than in 131,072 x 131,072 tokens do not fit into a TPU's scalar memory."""
GPU_WIDTHS = (64, 128, 256)
HOPPER = (9, 0)
"""Compute capability of the GPUs that have the matrix products of the GPU kernel: none before and none after."""


def _serves(
    implementation: str, spec: AttentionSpec, mask: AttentionMask, q: Array, k: Array, v: Array, bias: Array | None
) -> bool:
    """Whether an implementation computes this call, on the current mesh."""
    if implementation == "xla":
        return True
    some = q.shape[0] > 0 and q.shape[1] >= FEWEST_QUERIES and k.shape[1] > 0
    if not some or bias is not None or not undivided_mesh():
        return False
    if implementation == "pallas_gpu":
        plain = spec.scale > 0 and spec.softcap is None and mask.kv_positions is None and mask.alibi_slopes is None
        fits = q.shape[-1] == v.shape[-1] and q.shape[-1] in GPU_WIDTHS and _half_precision(q, k, v)
        # Mosaic GPU of before JAX 0.11 loads otherwise.
        return plain and fits and _compute_capability() == HOPPER and jax.__version_info__ >= (0, 11)
    narrow = q.dtype == k.dtype == v.dtype and q.dtype in (jnp.float32, jnp.bfloat16)
    return narrow and max(q.shape[-1], v.shape[-1]) <= WIDEST_HEAD and q.shape[1] * k.shape[1] <= MOST_PAIRS


def _cudnn_serves(spec: AttentionSpec, mask: AttentionMask, q: Array, k: Array, v: Array, bias: Array | None) -> bool:
    """Whether cuDNN computes this call; it gives no log-sum-exp in float32."""
    plain = bias is None and spec.window is None and spec.softcap is None and all(a is None for a in mask)
    placed = spec.q_offset == 0 or not spec.causal
    some = q.shape[0] > 0 and q.shape[1] >= FEWEST_QUERIES and k.shape[1] > 0
    capability = _compute_capability()
    widest = 256 if capability >= HOPPER else 128
    fits = q.shape[-1] == v.shape[-1] <= widest and q.shape[-1] % 8 == 0
    return plain and placed and some and fits and _half_precision(q, k, v) and capability >= (8, 0)


def _half_precision(*arrays: Array) -> bool:
    [dtype, *others] = {a.dtype for a in arrays}
    return not others and dtype in (jnp.bfloat16, jnp.float16)


def _compute_capability() -> tuple[int, ...]:
    """Of this process's GPU, (0,) if AMD made it; where it has none, it compiles for another machine's, Hopper."""
    if jax.default_backend() != "gpu":
        return HOPPER
    numbers = jax.devices()[0].compute_capability.split(".")
    return tuple(map(int, numbers)) if all(map(str.isdigit, numbers)) else (0,)


def _cudnn(spec: AttentionSpec, mask: AttentionMask, q: Array, k: Array, v: Array, bias: Array | None) -> tuple[Array, Array]:
    """The output, and in place of the log-sum-exp, for which nobody asked, no number."""
    out = jax.nn.dot_product_attention(q, k, v, scale=spec.scale, is_causal=spec.causal, implementation="cudnn")
    return out, jnp.full(q.shape[:3], jnp.nan, jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(
    kernel: Kernel, spec: AttentionSpec, mask: AttentionMask, q: Array, k: Array, v: Array, bias: Array | None
) -> tuple[Array, Array]:
    return kernel.forward(spec, mask, q, k, v, bias)


def _attend_forward(kernel: Kernel, spec: AttentionSpec, mask: AttentionMask, *operands: Array | None) -> tuple:
    outputs = kernel.forward(spec, mask, *operands)
    return outputs, (mask, operands, outputs)


def _attend_backward(kernel: Kernel, spec: AttentionSpec, saved: tuple, cotangents: tuple[Array, Array]) -> tuple:
    return None, *kernel.backward(spec, *saved, cotangents)


_attend.defvjp(_attend_forward, _attend_backward)


def _reference(
    spec: AttentionSpec, mask: AttentionMask, q: Array, k: Array, v: Array, bias: Array | None
) -> tuple[Array, Array]:
    """All pairs at once, differentiated by JAX."""
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    repeats = q.shape[2] // k.shape[2]
    tokens = jnp.arange(q.shape[1]), jnp.arange(k.shape[1])
    wide_k, wide_v = (jnp.repeat(a.astype(dtype), repeats, axis=2) for a in (k, v))
    logits = spec.scale * jnp.einsum("bthk,bshk->bhts", q.astype(dtype), wide_k)
    if spec.softcap is not None:
        logits = spec.softcap * jnp.tanh(logits / spec.softcap)
    if bias is not None:
        logits = logits + bias.astype(dtype)
    if mask.alibi_slopes is not None:
        distance = jnp.abs(distances(spec, mask, *tokens))[:, None].astype(dtype)
        logits = logits - jax.lax.stop_gradient(mask.alibi_slopes.astype(dtype))[:, None, None] * distance
    logits = jnp.where(visible(spec, mask, *tokens)[:, None], logits, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True, initial=-jnp.inf))
    top = jnp.where(top > -jnp.inf, top, 0)
    weights = jnp.exp(logits - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    seen, total = total > 0, jnp.where(total > 0, total, 1)
    mixed = jnp.einsum("bhts,bshw->bthw", weights / total, wide_v).astype(v.dtype)
    return mixed, jnp.where(seen, top + jnp.log(total), -jnp.inf)[..., 0].transpose(0, 2, 1)
