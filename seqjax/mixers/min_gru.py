"""minGRU: a GRU without its state in the gates, and so a linear recurrence."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from seqjax.config import choose
from seqjax.layers.dense import scaled_init
from seqjax.mixers.base import Costs
from seqjax.mixers.diagonal_rnn import DiagonalRecurrence, DiagonalRecurrenceState
from seqjax.ops.affine_scan import affine_scan
from seqjax.registry import register_mixer


def positive(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x + 1/2` above zero, `sigmoid(x)` below: the candidates of the form that computes in logarithms."""
    return jnp.where(x >= 0, jnp.maximum(x, 0) + 0.5, jax.nn.sigmoid(x))


CANDIDATES = {"identity": lambda x: x, "positive": positive}


@register_mixer("min_gru")
class MinGRU(DiagonalRecurrence):
    """minGRU (Feng et al. 2024, "Were RNNs all we needed?"): `h_t = (1 - z_t) h_(t-1) + z_t g(W_h x_t)`, `z = sigmoid(W_z x)`.

    A short convolution before it, as in the paper's language models, and a map out after it. The recurrence is one scan of
    affine maps, which needs neither positive states nor logarithms.

    Attributes:
      candidate: g, "identity" or "positive", the paper's log-space form.
      use_bias: of all maps.
    """

    expand: int = 2
    candidate: str = "identity"
    use_bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        choose(CANDIDATES, self.candidate, "model.candidate")

    @property
    def convolved(self) -> int:
        return self.embed_dim

    @nn.compact
    def __call__(self, x, state=None, *, segment_ids=None, train=False):
        before = self.located(x, state, segment_ids)
        u, tail = self.convolve(x.astype(self.dtype), before)
        mapped = self.dense("in", (2, self.inner), ("embed", None, "mlp"), use_bias=self.use_bias)(u).astype(self.wide)
        gate, candidates = mapped[:, :, 0], CANDIDATES[self.candidate](mapped[:, :, 1])
        inputs = jax.nn.sigmoid(gate) * candidates
        hidden, last = affine_scan(jax.nn.sigmoid(-gate), inputs, before.cell, starts=before.starts)
        init = scaled_init(self.residual_init)
        out = self.dense("out", self.embed_dim, ("mlp", "embed"), use_bias=self.use_bias, kernel_init=init)
        if state is not None:
            state = DiagonalRecurrenceState(convolution=tail, cell=last, segment=before.segment)
        return out(hidden.astype(self.dtype)), state

    @nn.nowrap
    def costs(self, length: int) -> Costs:
        kernels = 3 * self.embed_dim * self.inner
        own = Costs(
            parameters=kernels + self.use_bias * (2 * self.inner + self.embed_dim),
            flops=2 * length * kernels + 8 * length * self.inner,
        )
        return own + self.frame_costs(length)
