"""Position-wise feed-forward layers: mixers of channels, whose state along the sequence is empty."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from seqjax.config import ConfigError, choose
from seqjax.layers.dense import Dense, scaled_init
from seqjax.mixers.base import Costs, Mixer
from seqjax.registry import register_mixer

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": jax.nn.gelu,  # tanh form, as GPT-2
    "gelu_exact": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),
    "silu": jax.nn.silu,
    "sigmoid": jax.nn.sigmoid,
    "identity": lambda x: x,
}


class FeedForward(Mixer):
    """What `mlp` and `glu` share.

    Attributes:
      hidden_dim: width between the two maps; None for `mlp_ratio * embed_dim`.
      activation: a key of `ACTIVATIONS`.
      mlp_bias: biases on the maps.
    """

    hidden_dim: int | None = None
    mlp_ratio: float = 4.0
    activation: str = "gelu"
    mlp_bias: bool = True

    bidirectional = True
    takes_sets = True
    kernels = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        choose(ACTIVATIONS, self.activation, "model.activation")
        if self.width < 1:
            raise ConfigError(f"model.mlp_ratio={self.mlp_ratio} leaves no hidden width; allowed: above 0.")

    @property
    def width(self) -> int:
        return self.hidden_dim or int(self.mlp_ratio * self.embed_dim)

    def _dense(self, name: str, features: int, axes: tuple[str, str], scale: float = 1.0) -> Dense:
        options = {"use_bias": self.mlp_bias, "dtype": self.dtype, "param_dtype": self.param_dtype}
        return Dense(features, axes, kernel_init=scaled_init(scale), name=name, **options)

    def _hidden(self, x: Array) -> Array:
        raise NotImplementedError

    @nn.compact
    def __call__(self, x, state=None, *, segment_ids=None, train=False):
        hidden = nn.with_logical_constraint(self._hidden(x), ("batch", "length_act", "mlp_act"))
        return self._dense("down", self.embed_dim, ("mlp", "embed"), self.residual_init)(hidden), state

    @nn.nowrap
    def init_state(self, batch_size: int, max_length: int) -> tuple:
        return ()

    @nn.nowrap
    def costs(self, length: int) -> Costs:
        kernels = self.kernels * self.embed_dim * self.width
        biases = self.mlp_bias * ((self.kernels - 1) * self.width + self.embed_dim)
        return Costs(parameters=kernels + biases, flops=2 * length * kernels)


@register_mixer("mlp")
class MLP(FeedForward):
    """`W2 f(W1 x)` (Vaswani et al. 2017, eq. 2)."""

    def _hidden(self, x: Array) -> Array:
        return ACTIVATIONS[self.activation](self._dense("up", self.width, ("embed", "mlp"))(x))


@register_mixer("glu")
class GLU(FeedForward):
    """`W2 (f(W1 x) * V x)`, a gated linear unit (Shazeer 2020); "silu" gives SwiGLU, "gelu" GEGLU."""

    activation: str = "silu"
    kernels = 3

    def _hidden(self, x: Array) -> Array:
        gate = ACTIVATIONS[self.activation](self._dense("gate", self.width, ("embed", "mlp"))(x))
        return gate * self._dense("up", self.width, ("embed", "mlp"))(x)
