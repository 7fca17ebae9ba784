"""The weighted average of RWKV: a softmax over the past whose scores fall with their distance."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from seqjax.ops.affine_scan import affine_scan
from seqjax.ops.log_space import running_max
from seqjax.ops.softmax import SoftmaxSums, decay_between, merge_sums


def wkv(
    k: Float[Array, "B L E"],
    v: Float[Array, "B L E"],
    decay: Float[Array, "E"],
    bonus: Float[Array, "E"],
    state: SoftmaxSums,
    *,
    starts: Bool[Array, "B L"] | None = None,
) -> tuple[Float[Array, "B L E"], SoftmaxSums]:
    """Average of the values so far by `exp(k_i - (t - 1 - i) decay)`, and `exp(bonus + k_t)` for the token itself.

    Peng et al. 2023, "RWKV: Reinventing RNNs for the Transformer era", eq. 16 and appendix D.

    Args:
      decay: per step, above 0.
      state: sums before the first token, `[B, E]` and `[B, E, 1]`, with weights as the next token sees them but for its decay.
      starts: where a segment starts: nothing came before.
    Returns:
      Averages and the sums after the last token, in at least float32.
    """
    dtype = jnp.result_type(jnp.float32, k, v, state.numerator)
    k, v = k.astype(dtype), v.astype(dtype)
    maximum = running_max(k, -decay[None, None], state.maximum, starts=starts)
    before = _earlier(state.maximum, maximum, starts, -jnp.inf)
    kept = decay_between(before - decay, maximum)
    tokens = jnp.exp(k - maximum)
    added = jnp.stack([tokens * v, tokens], axis=-1)
    initial = jnp.concatenate([state.numerator, state.denominator[..., None]], axis=-1)
    sums, _ = affine_scan(kept[..., None], added, initial, starts=starts)
    past = _earlier(initial, sums, starts, 0.0)
    past = SoftmaxSums(before, past[..., :1], past[..., 1])
    mean = merge_sums(past, SoftmaxSums(bonus + k, v[..., None], jnp.ones_like(k))).mean[..., 0]
    return mean, SoftmaxSums(maximum[:, -1], sums[:, -1, :, :1], sums[:, -1, :, 1])


def _earlier(first: Array, values: Array, starts: Array | None, empty: float) -> Array:
    """What stands before each token: `first`, then the values up to the last but one, and `empty` where a segment starts."""
    earlier = jnp.concatenate([first[:, None], values[:, :-1]], axis=1)
    return earlier if starts is None else jnp.where(starts.reshape(*starts.shape, *(1,) * (values.ndim - 2)), empty, earlier)
