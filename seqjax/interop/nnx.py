"""Models of this project for users of Flax NNX."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
from flax import nnx
from flax.nnx.bridge.variables import linen_vars_to_nnx_attrs


class Bridge(nnx.bridge.ToNNX):
    """A Linen module as an NNX module, whose variables are plain.

    Flax's own bridge keeps the logical axis names of boxed parameters, and NNX then refuses to make them outside a mesh that
    has axes of those names. Here the names are dropped; variables that are sharded already stay so.
    """

    def lazy_init(self, *args: Any, **kwargs: Any) -> Bridge:
        """Make fresh variables, for inputs of the shapes and dtypes of these, and return the module itself."""
        return self.hold(self.to_nnx__module.init(self.to_nnx__rngs.params(), *args, **kwargs))

    def hold(self, variables: Mapping[str, Any]) -> Bridge:
        """Take over Linen `variables`, boxed or not."""
        for name, value in linen_vars_to_nnx_attrs(dict(nn.unbox(variables))).items():
            setattr(self, name, nnx.data(value))
        return self


def as_nnx(model: nn.Module, variables: Mapping[str, Any] | None = None, *, rngs: nnx.Rngs | None = None) -> Bridge:
    """An NNX module that computes what a Linen model does, and is called like it.

        model = as_nnx(seqjax.build(config)).lazy_init(tokens)       # fresh parameters
        model = as_nnx(*seqjax.load_pretrained(path))                # given ones
        logits, _ = model(tokens)

    Args:
      model: any model or mixer; as a part of a larger NNX module, initialise it before.
      variables: its variables, boxed or not, which the NNX module then holds; without them it is empty until `lazy_init`
        is called with example inputs.
      rngs: streams for the initialisation ("params") and for training ("dropout"); default `nnx.Rngs(0)`.
    Returns:
      The NNX module; its parameters are `nnx.Param`s, nested and named as in Linen.
    """
    module = Bridge(model, rngs=nnx.Rngs(0) if rngs is None else rngs)
    return module if variables is None else module.hold(variables)
