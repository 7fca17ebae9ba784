"""Retention: linear attention with a fixed decay for each head."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from seqjax.config import ConfigError
from seqjax.layers.positions import rotary_frequencies, rotate
from seqjax.mixers.linear_attention import MatrixStateMixer
from seqjax.ops.segments import Segments
from seqjax.registry import register_mixer


@register_mixer("retnet")
class RetNet(MatrixStateMixer):
    """Multi-scale retention (Sun et al. 2023, eqs. 5 to 8): `S_t = gamma_h S_(t-1) + k_t v_t^T`, `gamma_h = 1 - 2^(-5 - h)`.

    Queries and keys are rotated by position, which with the decay makes xPos. Then `W_o (silu(x W_g) * norm(y))`, each head's
    outputs normalised by their root mean square without a scale, as the authors' code has it. Planes of rotation are
    `(i, i + K/2)`, as in the house's rotary positions. The authors' rescaling of sums cancels in the norm, and is left out.

    Attributes:
      rope_theta: base of the angles per position; None does not rotate.
    """

    expand_v: float = 2.0
    head_norm: str = "rms_unscaled"
    output_gate: str | None = "silu"
    rope_theta: float | None = 10000.0

    kernel_init = staticmethod(nn.initializers.variance_scaling(2.0**-5, "fan_avg", "uniform"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rope_theta is not None and self.key_dim % 2:
            raise ConfigError(
                f"model.num_heads={self.num_heads} leaves keys of odd width {self.key_dim}, which cannot be rotated; allowed: "
                "even widths, or model.rope_theta=None."
            )

    def log_decay(self, x: Array) -> Array:
        # From its complement: gamma itself would lose the digits that tell heads of long memory apart.
        return jnp.asarray(np.log1p(-(2.0 ** (-5.0 - np.arange(self.num_heads)))), self.wide)[None, None]

    def place(self, a: Array, found: Segments) -> Array:
        if self.rope_theta is None:
            return a
        return rotate(a, found.positions, rotary_frequencies(self.key_dim, self.rope_theta))
