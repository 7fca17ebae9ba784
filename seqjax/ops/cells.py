"""One step of gated recurrent networks: dense ones, and those whose features do not mix within a step."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def gru_cell(
    constants: tuple[Float[Array, "D 3 D"], Float[Array, "D"]], h: Float[Array, "B D"], x: Float[Array, "B 3 D"]
) -> tuple[Float[Array, "B D"], Float[Array, "B D"]]:
    """Gated recurrent unit (Cho et al. 2014), with the reset gate after the matrix, as in cuDNN: one product per step.

    `r = sigmoid(x_r + R_r h)`, `z = sigmoid(x_z + R_z h)`, `n = tanh(x_n + r (R_n h + b))`, `h' = (1 - z) n + z h`.

    Args:
      constants: R, in the order r, z, n, and b.
      x: maps of the inputs, biases included, in the same order.
    Returns:
      The next state, twice: as `ops.recurrence` wants it.
    """
    weights, bias = constants
    fed = _recurrent(h, weights)
    r, z = jax.nn.sigmoid(x[:, 0] + fed[:, 0]), jax.nn.sigmoid(x[:, 1] + fed[:, 1])
    n = jnp.tanh(x[:, 2] + r * (fed[:, 2] + bias))
    h = (1 - z) * n + z * h
    return h, h


def lstm_cell(
    weights: Float[Array, "D 4 D"], state: tuple[Float[Array, "B D"], Float[Array, "B D"]], x: Float[Array, "B 4 D"]
) -> tuple[tuple[Float[Array, "B D"], Float[Array, "B D"]], Float[Array, "B D"]]:
    """Long short-term memory (Hochreiter and Schmidhuber 1997) with a forget gate (Gers et al. 2000).

    `i, f, o = sigmoid(x + R h)`, `g = tanh(x_g + R_g h)`, `c' = f c + i g`, `h' = o tanh(c')`.

    Args:
      weights: R, in the order i, f, g, o.
      state: c and h.
      x: maps of the inputs, biases included, in the same order.
    Returns:
      The next state, and its h.
    """
    c, h = state
    gates = x + _recurrent(h, weights)
    i, f, o = (jax.nn.sigmoid(gates[:, k]) for k in (0, 1, 3))
    c = f * c + i * jnp.tanh(gates[:, 2])
    h = o * jnp.tanh(c)
    return (c, h), h


def _recurrent(h: Float[Array, "B D"], weights: Float[Array, "D G D"]) -> Float[Array, "B G D"]:
    width, gates, _ = weights.shape
    fed = jnp.matmul(h, weights.reshape(width, gates * width), precision=jax.lax.Precision.HIGHEST)
    return fed.reshape(h.shape[0], gates, width)


def para_gru_cell(weights: Float[Array, "3 D"], h: Float[Array, "... D"], x: Float[Array, "... 3 D"]) -> Float[Array, "... D"]:
    """A GRU with one recurrent weight per feature and gate (Danieli et al. 2025), for `ops.newton_scan`.

    `z = sigmoid(a_z h + x_z)`, `r = sigmoid(a_r h + x_r)`, `c = tanh(a_c h r + x_c)`, `h' = (1 - z) h + z c`.

    Args:
      weights: a, in the order z, r, c.
      x: maps of the inputs, biases included, in the same order.
    """
    z = jax.nn.sigmoid(weights[0] * h + x[..., 0, :])
    r = jax.nn.sigmoid(weights[1] * h + x[..., 1, :])
    c = jnp.tanh(weights[2] * h * r + x[..., 2, :])
    return h + z * (c - h)


def para_lstm_cell(
    weights: tuple[Float[Array, "3 D"], Float[Array, "2 D"]],
    state: tuple[Float[Array, "... D"], Float[Array, "... D"]],
    x: Float[Array, "... 3 D"],
) -> tuple[Float[Array, "... D"], Float[Array, "... D"]]:
    """An LSTM with one recurrent weight per feature and gate, peepholes, and its input gate the forget gate's complement
    (Danieli et al. 2025), for `ops.newton_scan`.

    `f = sigmoid(a_f h + p_f c + x_f)`, `c' = f c + (1 - f) tanh(a_c h + x_c)`, `o = sigmoid(a_o h + p_o c' + x_o)`,
    `h' = o tanh(c')`.

    Args:
      weights: a, in the order f, o, c, and p, in the order f, o.
      state: c and h.
      x: maps of the inputs, biases included, in the order f, o, c.
    Returns:
      The next c and h.
    """
    (a, p), (c, h) = weights, state
    f = jax.nn.sigmoid(a[0] * h + p[0] * c + x[..., 0, :])
    g = jnp.tanh(a[2] * h + x[..., 2, :])
    c = g + f * (c - g)
    o = jax.nn.sigmoid(a[1] * h + p[1] * c + x[..., 1, :])
    return c, o * jnp.tanh(c)


def slstm_cell(
    weights: Float[Array, "H D 4 D"],
    state: tuple[Float[Array, "B H D"], Float[Array, "B H D"], Float[Array, "B H D"], Float[Array, "B H D"]],
    x: Float[Array, "B 4 H D"],
) -> tuple[tuple, Float[Array, "B H D"]]:
    """The scalar memory of xLSTM with exponential gates, heads apart (Beck et al. 2024, eqs. 8 to 18).

    `i = exp(x_i + R_i h)`, `f = sigmoid(x_f + R_f h)`, `z = tanh(x_z + R_z h)`, `o = sigmoid(x_o + R_o h)`,
    `c' = f c + i z`, `n' = f n + i`, `h' = o c' / n'`; c and n are kept in units of `exp(m)`, so that nothing overflows.

    Args:
      weights: R, a matrix per head and gate, in the order i, f, z, o.
      state: c, n, h and m; where n is 0 nothing has been seen.
      x: maps of the inputs, biases included, in the same order.
    Returns:
      The next state, and its h.
    """
    c, n, h, m = state
    heads, width = weights.shape[:2]
    fed = jnp.einsum("bhd,hdp->bhp", h, weights.reshape(heads, width, -1), precision=jax.lax.Precision.HIGHEST)
    i, f, z, o = jnp.moveaxis(x + fed.reshape(*h.shape[:2], 4, width).swapaxes(1, 2), 1, 0)
    kept = jax.nn.log_sigmoid(f) + m
    m = jax.lax.stop_gradient(jnp.where(n == 0, i, jnp.maximum(kept, i)))
    kept, added = jnp.where(n == 0, 0, jnp.exp(kept - m)), jnp.exp(i - m)
    c, n = kept * c + added * jnp.tanh(z), kept * n + added
    h = jax.nn.sigmoid(o) * c / n
    return (c, n, h, m), h
