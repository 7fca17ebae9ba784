"""ParaGRU and ParaLSTM: nonlinear recurrences that train in parallel over the sequence."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from seqjax.config import ConfigError, choose
from seqjax.layers.dense import scaled_init
from seqjax.layers.norms import GatedRMSNorm
from seqjax.mixers.base import Costs, check_heads
from seqjax.mixers.diagonal_rnn import DiagonalRecurrence, DiagonalRecurrenceState
from seqjax.ops.cells import para_gru_cell, para_lstm_cell
from seqjax.ops.newton_scan import IMPLEMENTATIONS, MAX_ITERATIONS, newton_scan
from seqjax.registry import register_mixer

GATES = 3
HEADS = 4


class ParaRNN(DiagonalRecurrence):
    """Nonlinear cells with diagonal recurrent weights (Danieli et al. 2025), solved by `ops.newton_scan`.

    `u = silu(conv(W_u x))`; the gates' inputs are a block-diagonal map of u, a block per head; then the cell, and
    `W_o (norm(h) silu(W_z x))`. Newton's steps of each call are sown as `intermediates/iterations`.

    Attributes:
      num_heads: blocks of the gates' input map; None is 4, or the largest power of 2 below that divides the inner width.
      implementation: "newton" or "sequential"; None is the loop on CPU and "newton" elsewhere.
      recurrent_init: standard deviation of the recurrent weights at first; None is the authors' `2 / sqrt(5 E)`. With 1 some
        features flip their sign at first, and parity is learned.
      max_iterations, tolerance: of Newton's method, see `newton_scan`.
    """

    num_heads: int | None = None
    implementation: str | None = None
    recurrent_init: float | None = None
    max_iterations: int = MAX_ITERATIONS
    tolerance: float | None = None

    cell: ClassVar[Callable]
    peepholes: ClassVar[int]
    """Gates that see the cell's memory."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self.heads, self.inner, f"the inner width {self.inner}")
        if self.implementation is not None:
            choose(dict.fromkeys(IMPLEMENTATIONS), self.implementation, "model.implementation")
        if self.recurrent_init is not None and not self.recurrent_init > 0:
            raise ConfigError(f"model.recurrent_init={self.recurrent_init} is not positive; allowed: None, or above 0.")
        if self.max_iterations < 1:
            raise ConfigError(f"model.max_iterations={self.max_iterations} is not positive; allowed: 1 and above.")
        if self.tolerance is not None and not self.tolerance > 0:
            raise ConfigError(f"model.tolerance={self.tolerance} is not positive; allowed: None, or above 0.")

    @property
    def heads(self) -> int:
        return math.gcd(HEADS, self.inner) if self.num_heads is None else self.num_heads

    @nn.compact
    def __call__(self, x, state=None, *, segment_ids=None, train=False):
        before = self.located(x, state, segment_ids)
        u, z = jnp.split(self.dense("in", 2 * self.inner, ("embed", "mlp"), use_bias=False)(x), 2, axis=-1)
        u, tail = self.convolve(u, before)
        solution = newton_scan(
            type(self).cell,
            self._recurrent_weights(),
            before.cell,
            self._gate_inputs(jax.nn.silu(u)),
            starts=before.starts,
            tolerance=self.tolerance,
            max_iterations=self.max_iterations,
            implementation=self.implementation,
        )
        self.sow("intermediates", "iterations", solution.iterations)
        hidden = jax.tree.leaves(solution.states)[-1].astype(self.dtype)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        y = GatedRMSNorm(norm_before_gate=True, name="norm", **types)(hidden, z)
        init = scaled_init(self.residual_init)
        y = self.dense("out", self.embed_dim, ("mlp", "embed"), use_bias=False, kernel_init=init)(y)
        if state is not None:
            state = DiagonalRecurrenceState(convolution=tail, cell=solution.last, segment=before.segment)
        return y, state

    def _gate_inputs(self, u: Array) -> Array:
        """`[B, L, gates, E]`."""
        width = self.inner // self.heads
        bound = math.sqrt(6 / (width + self.inner))
        uniform = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
        shape, axes = (self.heads, width, GATES, width), ("heads", None, None, None)
        blocks = self._parameter("blocks", uniform, shape, axes).astype(self.dtype)
        u = u.astype(self.dtype).reshape(*u.shape[:2], self.heads, width)
        mapped = jnp.einsum("blhi,higo->blgho", u, blocks).reshape(*u.shape[:2], GATES, self.inner)

        def init(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
            # The first gate opens from a half to a quarter: features that forget at different rates.
            return jnp.zeros(shape, dtype).at[0].set(-jnp.linspace(0, 1, self.inner, dtype=dtype))

        return mapped.astype(self.wide) + self._parameter("bias", init, (GATES, self.inner), (None, "mlp"))

    def _recurrent_weights(self) -> Any:
        init = nn.initializers.normal(self.recurrent_init or 2 / math.sqrt(5 * self.inner))
        weights = self._parameter("recurrent", init, (GATES, self.inner), (None, "mlp"))
        if not self.peepholes:
            return weights
        return weights, self._parameter("peephole", init, (self.peepholes, self.inner), (None, "mlp"))

    def _parameter(self, name: str, init: Any, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> Array:
        value = self.param(name, nn.with_logical_partitioning(init, axes), shape, self.param_dtype)
        return value.astype(self.wide)

    @nn.nowrap
    def costs(self, length: int) -> Costs:
        """The recurrence counts once: how many steps Newton's method takes depends on the data."""
        kernels = 3 * self.embed_dim * self.inner + GATES * self.inner * self.inner // self.heads
        own = Costs(
            parameters=kernels + (2 * GATES + self.peepholes + 1) * self.inner,
            flops=2 * length * kernels + 14 * self.components * length * self.inner,
        )
        return own + self.frame_costs(length)


@register_mixer("para_gru")
class ParaGRU(ParaRNN):
    """A GRU whose Jacobian is diagonal: `ops.cells.para_gru_cell`."""

    cell = staticmethod(para_gru_cell)
    components = 1
    peepholes = 0


@register_mixer("para_lstm")
class ParaLSTM(ParaRNN):
    """An LSTM whose Jacobian is blocks of 2 x 2, one for each feature: `ops.cells.para_lstm_cell`."""

    cell = staticmethod(para_lstm_cell)
    components = 2
    peepholes = 2
