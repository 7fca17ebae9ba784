"""Chimera: a two-dimensional selective state space over the time and the variates of a series."""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from seqjax.config import ConfigError, choose
from seqjax.layers.dense import Dense, scaled_init
from seqjax.layers.norms import NORMS, make_norm, norm_parameters
from seqjax.mixers.base import Costs
from seqjax.mixers.mamba import AS_AUTHORS, step_bias
from seqjax.mixers.state_space import constant
from seqjax.models.base import Model
from seqjax.models.heads import Head
from seqjax.models.series import check_series, series_rows
from seqjax.ops.segments import SegmentState, segments
from seqjax.ops.selective_scan_2d import IMPLEMENTATIONS, Axes, Transition, selective_scan_2d
from seqjax.registry import register_architecture

SIDES, PARTS = 2, 2  # both orders of the variates; trend and season


class VariateScan(nn.Module):
    """One layer: `out((scan(u) + skip u) silu(W_z x))` with `u = W_u x`, on features of each variate at each time.

    The first half of u is scanned by the trend's system, the second by the season's, which start with other steps in time,
    and each once from the first variate to the last and once back, with parameters of its own; both orders are added.
    Step sizes are `softplus(W_up W_down u + b)`, B and C are linear in u.

    Attributes:
      embed_dim: width of inputs and outputs.
      inner: width of u, even.
      state_dim: N, states of each feature and axis.
      rank: inner width of the map to step sizes.
      trend_steps, seasonal_steps, variate_steps: ranges of the initial steps.
      residual_init: scale of the last map's initial weights, relative to `1 / sqrt(inputs)`.
    """

    embed_dim: int
    inner: int
    state_dim: int
    rank: int
    trend_steps: tuple[float, float]
    seasonal_steps: tuple[float, float]
    variate_steps: tuple[float, float]
    residual_init: float
    chunk_size: int | None
    implementation: str | None
    dtype: Any
    param_dtype: Any

    optimizer_groups: ClassVar[tuple[tuple[str, str], ...]] = (
        ("/(a1_log|a2|a3|a4_log|skip|trend_bias|seasonal_bias|variate_bias)$", "state_space"),
    )

    @property
    def wide(self) -> Any:
        """The dtype of states, and of the parameters that the scan reads."""
        return jnp.promote_types(self.param_dtype, jnp.float32)

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L V D"], h0: Axes | None, starts: Bool[Array, "B L"] | None
    ) -> tuple[Float[Array, "B L V D"], Axes]:
        u = self._dense("in", self.inner, ("embed", "mlp"))(x)
        gate = jax.nn.silu(self._dense("gate", self.inner, ("embed", "mlp"))(x))
        steps = self._steps(u)
        weights = self._dense("weights", (4, SIDES, PARTS, self.state_dim), ("mlp", None, None, None, None))(u)
        b1, b2, c1, c2 = (_in_order(weights[:, :, :, i]) for i in range(4))
        y, last = selective_scan_2d(
            jnp.concatenate([u, jnp.flip(u, 2)], axis=-1),
            Axes(_in_order(steps[:, :, :, 0]), _in_order(steps[:, :, :, 1])),
            self._transition(),
            Axes(b1, b2),
            Axes(c1, c2),
            h0=h0,
            starts=starts,
            chunk_size=self.chunk_size,
            implementation=self.implementation,
        )
        down, up = jnp.split(y, SIDES, axis=-1)
        skip = self._parameter("skip", nn.initializers.ones, (self.inner,), ("mlp",)).astype(self.dtype)
        y = (down + jnp.flip(up, 2) + skip * u) * gate
        return self._dense("out", self.embed_dim, ("mlp", "embed"), scaled_init(self.residual_init))(y), last

    def _steps(self, u: Float[Array, "B L V I"]) -> Float[Array, "B L V 2 S I"]:
        """Steps in time and in variates, of each order of the variates."""
        low = self._dense("dt_down", self.rank, ("mlp", None))(u)
        raw = self._dense("dt_up", (2, SIDES, self.inner), (None, None, None, "mlp"))(low)

        def bias(name: str, steps: tuple[float, float], width: int) -> Array:
            return self._parameter(name, step_bias(*steps), (SIDES, width), (None, "mlp"))

        trend = bias("trend_bias", self.trend_steps, self.inner // PARTS)
        season = bias("seasonal_bias", self.seasonal_steps, self.inner // PARTS)
        time = jnp.concatenate([trend, season], axis=-1)
        return jax.nn.softplus(raw + jnp.stack([time, bias("variate_bias", self.variate_steps, self.inner)]))

    def _transition(self) -> Transition:
        """A1 and A4 are `-(n + 1)` at first, A2 and A3 are 1: no state then exceeds what drives it."""
        shape, axes = (self.state_dim, SIDES * self.inner), ("state", "mlp")
        rates = constant(np.log(np.arange(1.0, self.state_dim + 1)))
        a1, a4 = (-jnp.exp(self._parameter(name, rates, shape, axes)).T for name in ("a1_log", "a4_log"))
        a2, a3 = (self._parameter(name, nn.initializers.ones, shape, axes).T for name in ("a2", "a3"))
        return Transition(a1, a2, a3, a4)

    def _dense(self, name: str, features: int | tuple[int, ...], axes: tuple, init: Any = AS_AUTHORS) -> Dense:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return Dense(features, axes, use_bias=False, kernel_init=init, name=name, **types)

    def _parameter(self, name: str, init: Any, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> Array:
        return self.param(name, nn.with_logical_partitioning(init, axes), shape, self.param_dtype).astype(self.wide)

    @nn.nowrap
    def init_state(self, batch_size: int, variates: int) -> Axes:
        """Both states before the first token, of every variate, `[B, N, V, E]`; E holds both orders of the variates."""
        zeros = jnp.zeros((batch_size, self.state_dim, variates, SIDES * self.inner), self.wide)
        return Axes(zeros, zeros)

    @nn.nowrap
    def costs(self, points: int, variates: int) -> Costs:
        """Of so many points of the grid."""
        inner, states = self.inner, self.state_dim * SIDES * self.inner
        maps = inner * (3 * self.embed_dim + self.rank * (1 + 2 * SIDES) + 4 * SIDES * PARTS * self.state_dim)
        return Costs(
            parameters=maps + 4 * states + 2 * SIDES * inner + inner,
            flops=points * (2 * maps + 26 * states),
            state_bytes=2 * states * variates * jnp.dtype(self.wide).itemsize,
        )


def _in_order(sides: Float[Array, "B L V S *E"]) -> Float[Array, "B L V *F"]:
    """What belongs to the order of the variates, and to the reverse order in that order, side by side."""
    return jnp.concatenate([sides[:, :, :, 0], jnp.flip(sides[:, :, :, 1], 2)], axis=3)


class ChimeraState(NamedTuple):
    """Each layer's states of every variate, and the current segment."""

    layers: tuple[Axes, ...]
    segment: SegmentState


@register_architecture(
    "chimera",
    example={"input_dim": 3, "output_dim": 3, "head": "regression", "embed_dim": 8, "num_layers": 1, "state_dim": 4},
    inputs=("continuous",),
)
class Chimera(Model):
    """Chimera (Behrouz et al. 2024, "Chimera: Effectively Modeling Multivariate Time Series with 2-Dimensional State Space
    Models"): residual layers of `VariateScan` on features of every variate; a head reads each variate's own features.

    Causal in time: the state holds two vectors per variate and feature, and a token costs the same at any length.

    From the paper: the recurrence of two states on the grid of time and variates, its four matrices that do not depend on
    the input, steps, B and C that do, zero-order hold, a system for the trend (small steps in time) and one for the season
    (large steps), both orders of the variates, and the gate. Its authors published no code, and its text was not at hand,
    so these are chosen here: all four matrices are diagonal; A2 and A3 are held like inputs, `(a1 - 1) / A1 A2`, because
    `exp(dt A2)` nears 1 with small steps and its sums grow beyond bounds; the two systems share the maps in and out, a
    half of the features each; a variate is told from others by a vector added to its embedding; initial values.

    Attributes (beside those of `Model`):
      num_layers: number of layers.
      state_dim: N, states of each feature and axis.
      expand: width of the scan in units of `embed_dim`.
      dt_rank: inner width of the map to step sizes; None is `embed_dim / 16`, rounded up.
      trend_steps, seasonal_steps: least and greatest initial step in time of the two systems, variate_steps: of both along
        variates; log-uniform.
      embed_init: standard deviation of a variate's initial vector. B, C and the gate are linear in a token's features, so where
        values are near 0, as the last one is with `series_norm="last"`, the vector alone lets a layer speak.
      norm: "layer", "rms", "batch" or "none", before each layer and before the head; norm_epsilon: added to the variance.
      residual_init: scale of the initial weights of each layer's last map, relative to `1 / sqrt(inputs)`.
      series_norm: what forecasts leave out of a window and add again, see `seqjax.models.series`.
      chunk_size, implementation: of the scan, see `ops.selective_scan_2d`.
    """

    num_layers: int = 2
    state_dim: int = 16
    expand: int = 2
    dt_rank: int | None = None
    trend_steps: tuple = (0.001, 0.01)
    seasonal_steps: tuple = (0.01, 0.1)
    variate_steps: tuple = (0.1, 1.0)
    norm: str = "layer"
    norm_epsilon: float = 1e-5
    residual_init: float = 0.0
    series_norm: str = "none"
    chunk_size: int | None = None
    implementation: str | None = None
    embed_init: float = 1.0
    head: str = "forecast"
    position: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.causal:
            raise ConfigError("model.causal=False: chimera runs forward in time; allowed: True.")
        if self.input_dim is None:
            raise ConfigError("model.input_dim was not given: chimera takes a series of so many variates, not tokens.")
        choose(dict.fromkeys(("closed_loop", "forecast", "regression")), self.head, "model.head")
        if self.output_dim != self.input_dim:
            raise ConfigError(
                f"model.output_dim={self.output_dim}: chimera gives each variate an output; allowed: that of "
                f"model.input_dim={self.input_dim}."
            )
        check_series(self.series_norm, False, self.head, self.input_dim)
        for key in ("num_layers", "state_dim", "expand", "dt_rank", "chunk_size"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"model.{key}={value} is not positive; allowed: 1 and above.")
        if self.expand * self.embed_dim % PARTS:
            raise ConfigError(
                f"model.embed_dim={self.embed_dim} with model.expand={self.expand} cannot be halved; allowed: an even product."
            )
        for key in ("trend_steps", "seasonal_steps", "variate_steps"):
            _check_steps(key, getattr(self, key))
        choose(NORMS, self.norm, "model.norm")
        if self.implementation is not None:
            choose(IMPLEMENTATIONS, self.implementation, "model.implementation")

    @nn.compact
    def __call__(
        self,
        inputs: Float[Array, "B L C"],
        state: ChimeraState | None = None,
        *,
        segment_ids: Int[Array, "B L"] | None = None,
        train: bool = False,
    ) -> tuple[Array, ChimeraState | None]:
        """Outputs of the head for each variate, `[B, L, C]` or forecasts `[B, T, C]`, and the next state if one was given.

        Args:
          inputs: values of C variates.
          state: from `init_state`, or a previous call.
          segment_ids: a new segment starts wherever the id changes; nothing crosses. Heads that pool take 0 for padding.
          train: dropout and batch statistics are on; needs the rng `dropout` where its rate is positive.
        """
        inputs, segment_ids = self.sequences(inputs, segment_ids, state)
        batch_size, length, variates = inputs.shape
        before = SegmentState.fresh(batch_size) if state is None else state.segment
        found, segment = segments(segment_ids, before, length)
        starts = None if segment_ids is None else found.starts
        rows, row_ids, restore = series_rows(inputs, segment_ids, self.series_norm, channel_independent=True)
        x, _ = self.embed(rows, jnp.repeat(found.positions, variates, axis=0), train)
        x = x.reshape(batch_size, variates, length, -1).swapaxes(1, 2)
        init = nn.with_logical_partitioning(nn.initializers.normal(self.embed_init), (None, "embed"))
        x = x + self.param("variates", init, (variates, self.embed_dim), self.param_dtype).astype(x.dtype)
        layers = (None,) * self.num_layers if state is None else state.layers
        x, layers = self._layers(x, layers, starts, train)
        outputs = self.make_head(name="head")(x.swapaxes(1, 2).reshape(-1, length, self.embed_dim), row_ids)
        return restore(outputs), None if state is None else ChimeraState(layers, segment)

    def _layers(
        self, x: Float[Array, "B L V D"], states: tuple, starts: Array | None, train: bool
    ) -> tuple[Float[Array, "B L V D"], tuple]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = lambda name: make_norm(self.norm, epsilon=self.norm_epsilon, name=name, **types)
        after = []
        for i, h0 in enumerate(states):
            y, last = self.make_scan(name=f"scan_{i}")(norm(f"norm_{i}")(x, train), h0, starts)
            x = x + nn.Dropout(self.dropout, deterministic=not train)(y)
            x = nn.with_logical_constraint(x, ("batch", "length_act", None, "embed_act"))
            after.append(last)
        return norm("norm")(x, train), tuple(after)

    @nn.nowrap
    def make_scan(self, **where: Any) -> VariateScan:
        """One layer; `where` may name it and its parent."""
        rank = self.dt_rank or math.ceil(self.embed_dim / 16)
        steps = (self.trend_steps, self.seasonal_steps, self.variate_steps)
        how = (self.residual_init, self.chunk_size, self.implementation, self.dtype, self.param_dtype)
        return VariateScan(self.embed_dim, self.expand * self.embed_dim, self.state_dim, rank, *steps, *how, **where)

    @nn.nowrap
    def make_head(self, **options: Any) -> Head:
        """The head module, which reads one variate; `options` as in `Model`."""
        return super().make_head(**{"output_dim": 1, **options})

    @nn.nowrap
    def init_state(self, batch_size: int, max_length: int) -> ChimeraState:
        """The state before the first token; its size does not depend on `max_length`.

        Raises:
          ConfigError: the head reads whole sequences, or the position table is shorter.
        """
        self.check_state(max_length)
        fresh = self.make_scan(parent=None).init_state(batch_size, self.input_dim)
        return ChimeraState((fresh,) * self.num_layers, SegmentState.fresh(batch_size))

    @nn.nowrap
    def costs(self, length: int) -> Costs:
        """Parameters, FLOPs and state of one sequence of `length` tokens, from the parts' own accounts."""
        of_one = self.clone(parent=None, input_dim=1, output_dim=1).frame_costs(length)
        layers = self.num_layers * self.make_scan(parent=None).costs(length * self.input_dim, self.input_dim)
        norms = (self.num_layers + 1) * norm_parameters(self.norm, self.embed_dim)
        return Costs(
            parameters=of_one.parameters + self.input_dim * self.embed_dim + layers.parameters + norms,
            flops=self.input_dim * of_one.flops + layers.flops,
            state_bytes=layers.state_bytes + 12 if self.make_head(parent=None).per_token else 0,
        )

    @nn.nowrap
    def optimizer_groups(self) -> tuple[tuple[str, str], ...]:
        return VariateScan.optimizer_groups


def _check_steps(key: str, steps: tuple) -> None:
    numbers = len(steps) == 2 and all(isinstance(step, int | float) for step in steps)
    if not numbers or not 0 < steps[0] <= steps[1]:
        raise ConfigError(f"model.{key}={steps!r} is no range of step sizes; allowed: (least, greatest), above 0.")
