"""The matrix memory of xLSTM: linear attention with exponential gates, in chunks of matrix products."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from seqjax.ops.linear_attention import linear_attention
from seqjax.ops.log_space import running_max


class MatrixMemory(NamedTuple):
    """Memory and normaliser, its last column, in units of `exp(maximum)`; empty with a maximum of -inf."""

    matrix: Float[Array, "B H K S"]
    maximum: Float[Array, "B H"]

    @classmethod
    def empty(cls, batch_size: int, heads: int, key_dim: int, value_dim: int, dtype: Any) -> MatrixMemory:
        matrix = jnp.zeros((batch_size, heads, key_dim, value_dim + 1), dtype)
        return cls(matrix, jnp.full((batch_size, heads), -jnp.inf, dtype))


def mlstm(
    q: Float[Array, "B L H K"],
    k: Float[Array, "B L H K"],
    v: Float[Array, "B L H W"],
    input_gate: Float[Array, "B L H"],
    forget_gate: Float[Array, "B L H"],
    memory: MatrixMemory,
    *,
    starts: Bool[Array, "B L"] | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B L H W"], MatrixMemory]:
    """`C_t = f_t C_(t-1) + i_t k_t v_t^T`, `n_t = f_t n_(t-1) + i_t k_t`, `y_t = C_t^T q_t / max(|n_t . q_t|, 1)`.

    Beck et al. 2024, "xLSTM", eqs. 19 to 27: `i = exp(input_gate)`, `f = sigmoid(forget_gate)`, keys over `sqrt(K)`. The
    state is kept in units of `exp(m)`, `m_t = max(log f_t + m_(t-1), input_gate_t)`, in which nothing overflows; outputs do
    not depend on it. The bound 1 is `exp(-m)` in these units; nothing is added to it.

    Args:
      input_gate, forget_gate: before exponential and sigmoid.
      memory: before the first token.
      starts: where a segment starts, and the memory is empty.
      chunk_size, implementation: of `linear_attention`.
    Returns:
      Outputs in the dtype of `v`, and the memory after the last token.
    """
    wide = jnp.promote_types(v.dtype, jnp.float32)
    log_f, log_i = jax.nn.log_sigmoid(forget_gate.astype(wide)), input_gate.astype(wide)
    maximum = running_max(log_i, log_f, memory.maximum, starts=starts)
    before = jnp.concatenate([memory.maximum[:, None], maximum[:, :-1]], axis=1)
    log_decay = log_f + jnp.where(before == -jnp.inf, maximum, before) - maximum  # of an empty memory any decay will do
    keys = k.astype(wide) * (jnp.exp(log_i - maximum) / math.sqrt(k.shape[-1]))[..., None]
    values = jnp.pad(v, [(0, 0)] * 3 + [(0, 1)], constant_values=1)
    options = {"starts": starts, "chunk_size": chunk_size, "implementation": implementation}
    y, matrix = linear_attention(q.astype(v.dtype), keys.astype(v.dtype), values, log_decay, memory.matrix, **options)
    y = y.astype(wide)
    mixed = y[..., :-1] / jnp.maximum(jnp.abs(y[..., -1:]), jnp.exp(-maximum)[..., None])
    return mixed.astype(v.dtype), MatrixMemory(matrix, maximum[:, -1])
