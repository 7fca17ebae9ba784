"""Hydra: a state space that sees both sides, as a quasiseparable matrix."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from seqjax.config import ConfigError
from seqjax.layers.norms import GatedRMSNorm
from seqjax.mixers.base import Costs
from seqjax.mixers.mamba2 import HeadwiseStateSpace, split
from seqjax.ops.linear_attention import linear_attention
from seqjax.ops.segments import SegmentState, segments
from seqjax.registry import register_mixer


@register_mixer("hydra")
class Hydra(HeadwiseStateSpace):
    """Hydra (Hwang et al. 2024, section 4): `y = shift(SSD(x)) + flip(shift(SSD(flip(x)))) + (W_d x + D) x`, for each head.

    Each direction has its own B, C and steps; decay rates and the steps' bias are shared. A shift moves outputs one token
    on, so that a direction mixes what lies strictly before (behind) a token, and the token itself has a weight of its own.
    The convolution looks `conv_width // 2` tokens to each side. Then `W_o (norm(y) silu(z))`. Attributes as in Mamba-2.
    """

    causal: bool = False
    state_dim: int = 64
    conv_width: int = 7

    bidirectional = True
    causal_form = False
    carries_state = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.conv_width % 2 == 0:
            raise ConfigError(f"model.conv_width={self.conv_width} has no middle; allowed: odd numbers.")

    @nn.compact
    def __call__(self, x, state=None, *, segment_ids=None, train=False):
        if state is not None:
            self.refuse_state()
        starts = runs = None
        if segment_ids is not None:
            found, _ = segments(segment_ids, SegmentState.fresh(x.shape[0]), x.shape[1])
            starts, runs = found.starts, found.runs
        keys = self.num_groups * self.state_dim
        z, convolved, dt = self.map_in(x, self.inner, self.inner + 4 * keys, 2 * self.heads)
        convolved, _ = self.convolve(convolved, ahead=self.conv_width // 2, runs=runs)
        mixed, *rest = split(convolved, self.inner, *[keys] * 4)
        values = self.split_heads(mixed)
        dt = dt.reshape(*dt.shape[:2], 2, self.heads).astype(self.wide)
        dt = jax.nn.softplus(dt + self.step_bias())
        rates = self.decay_rates(nn.initializers.zeros)
        linear = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        weight = self.dense("diagonal", self.heads, ("mlp", "heads"), False, linear)(mixed)
        y = (weight + self.skip_weights())[..., None] * values
        for direction, move in enumerate((_to_next, _to_previous)):
            b, c = (self.split_groups(a) for a in rest[2 * direction : 2 * direction + 2])
            step = dt[:, :, direction]
            inputs = (c, b, (step[..., None] * values).astype(self.dtype), step * rates)
            options = {"starts": starts, "reverse": direction == 1, "chunk_size": self.chunk_size}
            y = y + move(linear_attention(*inputs, **options)[0], starts)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = GatedRMSNorm(norm_before_gate=True, epsilon=self.norm_epsilon, name="norm", **types)
        return self.map_out(norm(y.astype(self.dtype).reshape(z.shape), z)), None

    @nn.nowrap
    def init_state(self, batch_size: int, max_length: int) -> None:
        self.refuse_state()

    @nn.nowrap
    def costs(self, length: int) -> Costs:
        weight = self.inner * self.heads
        return self.costs_of(length, 2) + Costs(parameters=weight, flops=2 * length * weight)


def _to_next(y: Float[Array, "B L H P"], starts: Bool[Array, "B L"] | None) -> Float[Array, "B L H P"]:
    """Every token gets the output of the one before it, the first of a segment zero."""
    moved = jnp.pad(y[:, :-1], [(0, 0), (1, 0), (0, 0), (0, 0)])
    return moved if starts is None else jnp.where(starts[..., None, None], 0, moved)


def _to_previous(y: Float[Array, "B L H P"], starts: Bool[Array, "B L"] | None) -> Float[Array, "B L H P"]:
    """Every token gets the output of the one after it, the last of a segment zero."""
    if starts is not None:
        y = jnp.where(starts[..., None, None], 0, y)
    return jnp.pad(y[:, 1:], [(0, 0), (0, 1), (0, 0), (0, 0)])
