"""What a body's features become: logits, class scores, a match of pairs, values, a forecast, events. Any head fits any body."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seqjax.config import ConfigError
from seqjax.layers.dense import Dense
from seqjax.ops.companion import closed_loop, companion_read, unit_sum


class Head(nn.Module):
    """Maps features `[B, L, D]` to a model's outputs.

    Attributes:
      output_dim: width of the output: vocabulary, number of classes, or channels.
      horizon: how many steps a forecast spans.
      pool: how a sequence becomes one vector: "mean" over its valid tokens, or its "last" valid token.
      state_dim: order of the systems of a head that has them.
      softcap: bound on logits x of the language model, `softcap * tanh(x / softcap)`; None is none.
      num_components: of the mixture that is the next event's time.
    """

    output_dim: int
    horizon: int = 1
    pool: str = "mean"
    state_dim: int = 64
    softcap: float | None = None
    num_components: int = 16
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    per_token: ClassVar[bool] = True
    """Whether there is an output for every token, so that the model can carry a state."""
    size_option: ClassVar[str] = "output_dim"
    """The model option that gives `output_dim`."""
    serves: ClassVar[str | None] = None
    """What a task may ask for, beside the head's own name, that this head answers."""

    variates: ClassVar[bool] = False
    """Whether the body's tokens are the channels of a window, each a vector of its values over time."""

    @nn.nowrap
    def parameters(self, embed_dim: int, tied: bool) -> int:
        """How many parameters the head trains."""
        return embed_dim * self.output_dim + self.output_dim

    @nn.nowrap
    def flops(self, embed_dim: int, length: int) -> int:
        """Floating-point operations on one sequence of `length` tokens."""
        return 2 * embed_dim * self.output_dim * (length if self.per_token else 1)

    def _dense(self, name: str, features: int, axes: tuple[str | None, str | None], use_bias: bool = True) -> Dense:
        return Dense(features, axes, use_bias=use_bias, dtype=self.dtype, param_dtype=self.param_dtype, name=name)


class LanguageModelHead(Head):
    """Logits over the vocabulary for every token; with a tied embedding, inner products with its table."""

    size_option = "vocab_size"

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], segment_ids: Array | None = None, attend: Callable | None = None
    ) -> Float[Array, "B L V"]:
        logits = attend(x) if attend else self._dense("logits", self.output_dim, ("embed", "vocab"), False)(x)
        if self.softcap is not None:
            logits = self.softcap * jnp.tanh(logits / self.softcap)
        return nn.with_logical_constraint(logits, ("batch", "length_act", "vocab_act"))

    @nn.nowrap
    def parameters(self, embed_dim: int, tied: bool) -> int:
        return 0 if tied else embed_dim * self.output_dim


class RegressionHead(Head):
    """`output_dim` values for every token."""

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"], segment_ids=None, attend=None) -> Float[Array, "B L O"]:
        return self._dense("values", self.output_dim, ("embed", None))(x)


class PointProcessHead(Head):
    """When the next event comes, and of which of `output_dim` marks O, for every token (Shchur et al. 2020, section 3).

    Of a mixture of K log-normal distributions the parameters that `LogNormalMixture.of` takes, `[B, L, 3K]`, and then logits
    of the marks, which do not depend on the time.
    """

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"], segment_ids=None, attend=None) -> Float[Array, "B L E"]:
        return self._dense("event", self.width, ("embed", None))(x)

    @property
    def width(self) -> int:
        return 3 * self.num_components + self.output_dim

    @nn.nowrap
    def parameters(self, embed_dim: int, tied: bool) -> int:
        return (embed_dim + 1) * self.width

    @nn.nowrap
    def flops(self, embed_dim: int, length: int) -> int:
        return 2 * embed_dim * self.width * length


class ClassifierHead(Head):
    """Class scores of a whole sequence, from its pooled features. Tokens of segment 0 are padding."""

    per_token = False
    size_option = "num_classes"

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"], segment_ids=None, attend=None) -> Float[Array, "B C"]:
        return self._dense("scores", self.output_dim, ("embed", None))(pool(x, segment_ids, self.pool))


class MatchingHead(Head):
    """Class scores of a pair, from both towers' pooled features `u`, `v` as `[u, v, u - v, u * v]` (Mou et al. 2016).

    The body sees the pair as two rows; inputs are `[B, 2, L]`.
    """

    per_token = False
    size_option = "num_classes"

    @nn.compact
    def __call__(self, x: Float[Array, "B2 L D"], segment_ids=None, attend=None) -> Float[Array, "B C"]:
        towers = pool(x, segment_ids, self.pool)
        u, v = towers[0::2], towers[1::2]
        pair = jnp.concatenate([u, v, u - v, u * v], axis=-1)
        hidden = jax.nn.relu(self._dense("pair", x.shape[-1], (None, "embed"))(pair))
        return self._dense("scores", self.output_dim, ("embed", None))(hidden)

    @nn.nowrap
    def parameters(self, embed_dim: int, tied: bool) -> int:
        return 4 * embed_dim * embed_dim + embed_dim + super().parameters(embed_dim, tied)

    @nn.nowrap
    def flops(self, embed_dim: int, length: int) -> int:
        # Halved: costs are per row of the body, and one pair is two of its rows.
        return 4 * embed_dim * embed_dim + super().flops(embed_dim, length) // 2


class ForecastHead(Head):
    """The next `horizon` values of `output_dim` channels, from the last valid token's features."""

    per_token = False
    serves = "forecast"

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"], segment_ids=None, attend=None) -> Float[Array, "B T O"]:
        last = pool(x, segment_ids, "last")
        flat = self._dense("forecast", self.horizon * self.output_dim, ("embed", None))(last)
        return flat.reshape(-1, self.horizon, self.output_dim)

    @nn.nowrap
    def parameters(self, embed_dim: int, tied: bool) -> int:
        return self.horizon * super().parameters(embed_dim, tied)

    @nn.nowrap
    def flops(self, embed_dim: int, length: int) -> int:
        return self.horizon * super().flops(embed_dim, length)


class VariatesHead(Head):
    """The next `horizon` values of each channel, from its own token: iTransformer's inverted forecast (Liu et al. 2024)."""

    per_token = False
    serves = "forecast"
    variates = True

    @nn.compact
    def __call__(self, x: Float[Array, "B O D"], segment_ids=None, attend=None) -> Float[Array, "B T O"]:
        return self._dense("forecast", self.horizon, ("embed", None))(x).swapaxes(1, 2)

    @nn.nowrap
    def parameters(self, embed_dim: int, tied: bool) -> int:
        return (embed_dim + 1) * self.horizon

    @nn.nowrap
    def flops(self, embed_dim: int, length: int) -> int:
        return 2 * embed_dim * self.horizon * self.output_dim


class ClosedLoopHead(Head):
    """The next `horizon` values, by systems that read the window and then run on their own outputs (SpaceTime's decoder).

    A companion system per feature, `x_(t+1) = A x_t + b u_t`, reads the features of the window. Its next states are
    those of `A + b k^T`: the input is its own forecast `k x`. Outputs `c x` become values by one map for all steps, so
    parameters do not grow with the horizon (Zhang et al. 2023, section 3.2). As in the authors' code, a, k and c have
    absolute values that sum to 1, and b too where it feeds back.
    """

    per_token = False
    serves = "forecast"

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"], segment_ids=None, attend=None) -> Float[Array, "B T O"]:
        wide = jnp.promote_types(self.param_dtype, jnp.float32)
        init = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("state", "embed"))
        vector = lambda name: self.param(name, init, (self.state_dim, x.shape[-1]), self.param_dtype).astype(wide)
        a, b, c, k = unit_sum(vector("last_column")), vector("b"), unit_sum(vector("c")), unit_sum(vector("k"))
        state = companion_read(a, b, ending_at_last(x, segment_ids).astype(wide))
        y = closed_loop(a, unit_sum(b), k, c, state, self.horizon)
        return self._dense("values", self.output_dim, ("embed", None))(y)

    @nn.nowrap
    def parameters(self, embed_dim: int, tied: bool) -> int:
        return 4 * self.state_dim * embed_dim + super().parameters(embed_dim, tied)

    @nn.nowrap
    def flops(self, embed_dim: int, length: int) -> int:
        reading, rolling = (2 + 2) * length, (6 + 2) * self.horizon  # powers, and what they do to one row
        return self.state_dim * embed_dim * (reading + rolling) + self.horizon * super().flops(embed_dim, length)


HEADS: dict[str, type[Head]] = {
    "language_model": LanguageModelHead,
    "classifier": ClassifierHead,
    "matching": MatchingHead,
    "regression": RegressionHead,
    "point_process": PointProcessHead,
    "forecast": ForecastHead,
    "closed_loop": ClosedLoopHead,
    "variates": VariatesHead,
}


def fits(head: str, wanted: str) -> bool:
    """Whether a model with head `head` can learn a task that needs head `wanted`."""
    return head == wanted or (head in HEADS and HEADS[head].serves == wanted)


def pool(x: Float[Array, "B L D"], segment_ids: Int[Array, "B L"] | None, how: str) -> Float[Array, "B D"]:
    """One vector per row: the mean over tokens outside segment 0, or the last of them. Without ids all tokens count."""
    if segment_ids is None:
        return x.mean(axis=1) if how == "mean" else x[:, -1]
    valid = segment_ids != 0
    if how == "mean":
        count = jnp.maximum(valid.sum(axis=1, keepdims=True), 1).astype(x.dtype)
        return jnp.where(valid[..., None], x, 0).sum(axis=1) / count
    last = x.shape[1] - 1 - jnp.argmax(valid[:, ::-1], axis=1)
    return jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]


def last_segment(segment_ids: Int[Array, "B L"]) -> Int[Array, "B L"]:
    """1 in the segment of each row's last token outside segment 0, else 0; all 0 in a row without such a token."""
    runs = jnp.cumsum(jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0, axis=1)
    last = jnp.where(segment_ids != 0, runs, -1).max(axis=1, keepdims=True)
    return (runs == last).astype(segment_ids.dtype)


def ending_at_last(x: Float[Array, "B L D"], segment_ids: Int[Array, "B L"] | None) -> Float[Array, "B L D"]:
    """Rows turned so that their `last_segment` ends them, zeros before it."""
    if segment_ids is None:
        return x
    window = last_segment(segment_ids)
    after = jnp.argmax(window[:, ::-1], axis=1)
    return jax.vmap(lambda row, shift: jnp.roll(row, shift, axis=0))(jnp.where(window[..., None] != 0, x, 0), after)


def check_pool(how: str) -> None:
    """Raise a ConfigError unless `how` is a way to pool."""
    if how not in ("mean", "last"):
        raise ConfigError(f"model.pool={how!r} is unknown; allowed: last, mean.")
