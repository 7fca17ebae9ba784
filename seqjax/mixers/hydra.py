"""Hydra: a state space that sees both sides, as a quasiseparable matrix."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from seqjax.config import ConfigError
from seqjax.layers.norms import GatedRMSNorm
from seqjax.mixers.base import Costs
from seqjax.mixers.mamba2 import HeadwiseStateSpace, split
from seqjax.ops.linear_attention import linear_attention
from seqjax.ops.segments import SegmentState, segment_ends, segments
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
        mixed, *parts = split(convolved, self.inner, *[keys] * 4)
        values, parts = self.split_heads(mixed), [self.split_groups(part) for part in parts]
        rates = self.decay_rates(nn.initializers.zeros)
        steps = split(jax.nn.softplus(dt + jnp.tile(self.step_bias(), 2)), self.heads, self.heads)
        forward, backward = (Direction(b, c, dt, dt * rates) for b, c, dt in zip(parts[::2], parts[1::2], steps))
        linear = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        weights = self.dense("diagonal", self.heads, ("mlp", "heads"), False, linear)(mixed) + self.skip_weights()
        y = quasiseparable(values, forward, backward, weights, starts=starts, chunk_size=self.chunk_size)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = GatedRMSNorm(norm_before_gate=True, epsilon=self.norm_epsilon, name="norm", **types)
        return self.map_out(norm(y.reshape(z.shape), z)), None

    @nn.nowrap
    def init_state(self, batch_size: int, max_length: int) -> None:
        self.refuse_state()

    @nn.nowrap
    def costs(self, length: int) -> Costs:
        weight = self.inner * self.heads
        return self.costs_of(length, 2) + Costs(parameters=weight, flops=2 * length * weight)


class Direction(NamedTuple):
    """A state space that reads in one direction: `S_i = exp(log_decay_i) S_(i-1) + steps_i b_i x_i^T`, `y_i = S_i^T c_i`."""

    b: Float[Array, "B L G N"]
    c: Float[Array, "B L G N"]
    steps: Float[Array, "B L H"]
    log_decay: Float[Array, "B L H"]


def quasiseparable(
    x: Float[Array, "B L H P"],
    forward: Direction,
    backward: Direction,
    diagonal: Float[Array, "B L H"],
    *,
    starts: Bool[Array, "B L"] | None = None,
    chunk_size: int | None = None,
) -> Float[Array, "B L H P"]:
    """`y = M x` for each head, M of the given diagonal, its lower part from `forward` and its upper one from `backward`.

    Below the diagonal `M_ij = c_(i-1)^T exp(log_decay_(j+1) + ... + log_decay_(i-1)) b_j steps_j`: the output of the token
    before i. Blocks off the diagonal are of rank N at most. `starts` keeps segments apart.
    """

    def run(direction: Direction, reverse: bool) -> Array:
        inputs = (direction.steps[..., None] * x).astype(x.dtype)
        options = {"starts": starts, "reverse": reverse, "chunk_size": chunk_size}
        return linear_attention(direction.c, direction.b, inputs, direction.log_decay, **options)[0]

    # The first of a segment has nothing before it, the last nothing after it.
    before = jnp.pad(run(forward, False)[:, :-1], [(0, 0), (1, 0), (0, 0), (0, 0)])
    after = jnp.pad(run(backward, True)[:, 1:], [(0, 0), (0, 1), (0, 0), (0, 0)])
    if starts is not None:
        before = jnp.where(starts[..., None, None], 0, before)
        after = jnp.where(segment_ends(starts)[..., None, None], 0, after)
    return (before + after + diagonal[..., None] * x).astype(x.dtype)
