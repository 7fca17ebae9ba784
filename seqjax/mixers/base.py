"""The contract that every sequence mixer keeps, and the law that ties its faces together.

A mixer is one pure function with three faces: *parallel* (a whole sequence), *carried* (a chunk of any length and a
state, one token included) and *split* (the sequence divided over devices).

**The chunk law.** For every split `x = x1 ++ x2 ++ ...`, chaining the carried calls equals one parallel call: outputs,
final state, and gradients with respect to inputs, parameters and initial state. `seqjax.testing.check_mixer` holds any
mixer to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seqjax.config import ConfigError

State = Any  # a pytree of arrays
DType = Any


@dataclasses.dataclass(frozen=True)
class Costs:
    """What one forward pass over one sequence costs, computed without building anything.

    Attributes:
      parameters: number of trained scalars.
      flops: of one sequence, floating-point operations (a multiply-add is 2); attention counts the pairs it needs.
      state_bytes: bytes of carried state of one sequence, with `length` as the cache's capacity.
    """

    parameters: int = 0
    flops: int = 0
    state_bytes: int = 0

    def __add__(self, other: Costs) -> Costs:
        return Costs(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other))))

    def __mul__(self, times: int) -> Costs:
        return Costs(*(times * a for a in dataclasses.astuple(self)))

    __rmul__ = __mul__


class Mixer(nn.Module):
    """Mixes information along the sequence; a Linen module, so `init` and `apply` are pure functions.

    Attributes:
      embed_dim: width D of inputs and outputs.
      causal: False asks for the bidirectional form; a mixer refuses the form that it has not when built (`bidirectional`,
        `causal_form`).
      residual_init: scale of the initial weights of the map back to the residual stream, relative to `1 / sqrt(inputs)`.
      dtype: of the computation; recurrent state is kept in at least float32.
      param_dtype: of the parameters.
    """

    embed_dim: int
    causal: bool = True
    residual_init: float = 1.0
    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32

    bidirectional: ClassVar[bool] = False
    """Whether `causal=False` is supported."""
    causal_form: ClassVar[bool] = True
    """Whether `causal=True` is supported."""
    carries_state: ClassVar[bool] = True
    """Whether the causal form continues from a state."""
    segments: ClassVar[bool] = True
    """Whether `segment_ids` are honoured."""
    derives: ClassVar[bool] = False
    """Whether it makes constants of its parameters by `derived`, which `Model.prepare` can keep."""
    passes_memory: ClassVar[bool] = False
    """Whether its call takes the arguments `memory`, what an earlier sub-layer attends to, and `order`; see `Attention`."""
    takes_sets: ClassVar[bool] = False
    """Whether it can keep apart the sub-sequences of a set (`ops.set_prompt`): by the argument `order`, or token by token."""
    optimizer_groups: ClassVar[tuple[tuple[str, str], ...]] = ()
    """(regular expression on a parameter's path, optimizer group) for parameters that train apart from the rest."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.causal and not self.bidirectional:
            raise ConfigError(f"model.causal=False: {type(self).__name__} has no bidirectional form; allowed: True.")
        if self.causal and not self.causal_form:
            raise ConfigError(f"model.causal=True: {type(self).__name__} has no causal form; allowed: False.")

    def __call__(
        self,
        x: Float[Array, "B L D"],
        state: State | None = None,
        *,
        segment_ids: Int[Array, "B L"] | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "B L D"], State | None]:
        """Mix `x`; with a `state`, continue from it and return the next one (None otherwise)."""
        raise NotImplementedError

    def derived(self, name: str, make: Callable[[], Any]) -> Any:
        """`make()`, arrays that depend on the parameters alone; or the same as `Model.prepare` kept it among the variables, so
        that decoding does not make them again at every token."""
        if self.has_variable("derived", name):
            return self.get_variable("derived", name)
        value = make()
        if self.preparing:
            self.put_variable("derived", name, value)
        return value

    @property
    def preparing(self) -> bool:
        """Whether this call is `Model.prepare`'s."""
        return not self.is_initializing() and self.is_mutable_collection("derived")

    @nn.nowrap
    def init_state(self, batch_size: int, max_length: int) -> State:
        """The state before the first token; every leaf leads with the batch, except scalars."""
        raise NotImplementedError

    @nn.nowrap
    def costs(self, length: int) -> Costs:
        """Parameters, FLOPs and state of one sequence of `length` tokens."""
        raise NotImplementedError

    @nn.nowrap
    def refuse_state(self) -> None:
        """Raise the error of a bidirectional mixer that is asked for a state."""
        allowed = "causal=True, or a call without a state" if self.causal_form else "a call without a state"
        raise ConfigError(
            f"{type(self).__name__} with causal=False sees the whole sequence at once, so it carries no state; "
            f"allowed: {allowed}."
        )


def check_heads(num_heads: int, width: int, called: str) -> None:
    """Raise a ConfigError if `num_heads` do not share a width evenly; `called` says which width."""
    if num_heads < 1 or width % num_heads:
        fits = ", ".join(str(n) for n in range(1, width + 1) if width % n == 0)
        raise ConfigError(f"model.num_heads={num_heads} does not divide {called}; allowed: {fits}.")
