"""The training step: pure functions from a state and a batch to the next state and what to report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from seqjax.config import ConfigError
from seqjax.parallel.rules import unboxed
from seqjax.training.losses import Loss, in_window
from seqjax.training.schedules import Schedule

Batch = dict[str, Array]
Metrics = dict[str, Any]


@flax.struct.dataclass
class TrainState:
    """All that training carries from step to step; a pytree of arrays.

    Attributes:
      step: number of updates made.
      params: parameters, without boxes.
      opt_state: of the optimizer.
      variables: the model's other collections, such as `batch_stats`.
      ema: moving average of `params`; None when not kept.
    """

    step: Int[Array, ""]
    params: Any
    opt_state: Any
    variables: dict[str, Any]
    ema: Any = None

    def model_variables(self) -> dict[str, Any]:
        """What to evaluate or generate with: the moving average where there is one, else the parameters."""
        return {"params": self.params if self.ema is None else self.ema, **self.variables}


def init_variables(model: nn.Module, key: Array, batch: Batch) -> dict[str, Any]:
    """The model's boxed variables for batches like `batch` (arrays or shapes); what it sows is left out."""
    inputs = {name: jnp.zeros(batch[name].shape, batch[name].dtype) for name in ("inputs", "segment_ids") if name in batch}
    variables = model.init(key, inputs["inputs"], segment_ids=inputs.get("segment_ids"))
    return {name: tree for name, tree in variables.items() if name not in ("losses", "intermediates")}


def init_state(model: nn.Module, optimizer: optax.GradientTransformation, seed: int, batch: Batch, ema: bool) -> TrainState:
    """The state before the first update: parameters and optimizer state, made together so that one jit shards both."""
    variables = unboxed(init_variables(model, _keys(seed)[0], batch))
    params = variables.pop("params")
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        variables=variables,
        ema=jax.tree.map(jnp.copy, params) if ema else None,
    )


def _keys(seed: int) -> Array:
    """The keys of initialisation and of training steps."""
    return jax.random.split(jax.random.key(seed))


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    loss: Loss,
    *,
    learning_rate: Schedule,
    seed: int = 0,
    microbatches: int = 1,
    ema_decay: float | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The function of one update, not yet jitted.

    The gradient is that of (sum of losses) / (sum of counts) over the whole batch, in however many microbatches it is
    computed. Randomness is a function of the seed and the step. Metrics are `(sum, count)` pairs, and the scalars
    `grad_norm` (before clipping) and `learning_rate`.
    """

    def objective(params: Any, variables: Any, batch: Batch, key: Array) -> tuple[Array, tuple[Metrics, Any]]:
        outputs, mutated = _apply(model, {"params": params, **variables}, batch, key)
        sums = loss(*in_window(outputs, batch))
        total, count = sums["loss"]
        auxiliary = mutated.pop("losses", None)
        if auxiliary is not None:
            extra = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(auxiliary)) * jax.lax.stop_gradient(count)
            sums, total = {**sums, "auxiliary": (extra, count)}, total + extra
        return total, (sums, mutated)

    gradient = jax.grad(objective, has_aux=True)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(_keys(seed)[1], state.step)
        grads, sums, variables = _accumulate(gradient, state, batch, key, microbatches)
        count = sums["loss"][1]
        # A batch in which nothing counts has sums of zero; it must not divide them by zero.
        scale = 1.0 / jnp.where(count > 0, count, 1.0)
        grads = jax.tree.map(lambda g, p: (g * scale).astype(p.dtype), grads, state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            ema = jax.tree.map(lambda e, p: e * ema_decay + p * (1.0 - ema_decay), ema, params)
        metrics = {**sums, "grad_norm": optax.tree.norm(grads), "learning_rate": learning_rate(state.step)}
        return TrainState(state.step + 1, params, opt_state, variables, ema), metrics

    return train_step


def _apply(model: nn.Module, variables: dict[str, Any], batch: Batch, key: Array) -> tuple[Array, dict[str, Any]]:
    mutable = ["losses", *(name for name in variables if name != "params")]
    (outputs, _), mutated = model.apply(
        variables,
        batch["inputs"],
        segment_ids=batch.get("segment_ids"),
        train=True,
        rngs={"dropout": key},
        mutable=mutable,
    )
    return outputs, dict(mutated)


def _accumulate(
    gradient: Callable, state: TrainState, batch: Batch, key: Array, microbatches: int
) -> tuple[Any, Metrics, dict[str, Any]]:
    """Sums of gradients and metrics over the microbatches, and the model's variables after the last of them."""
    if microbatches == 1:
        grads, (sums, variables) = gradient(state.params, state.variables, batch, key)
        return grads, sums, {**state.variables, **variables}

    def add(carry: tuple, microbatch: tuple) -> tuple[tuple, None]:
        grads, sums, variables = carry
        index, part = microbatch
        new, (new_sums, mutated) = gradient(state.params, variables, part, jax.random.fold_in(key, index))
        grads = jax.tree.map(lambda total, g: total + g.astype(total.dtype), grads, new)
        return (grads, jax.tree.map(jnp.add, sums, new_sums), {**variables, **mutated}), None

    parts = {name: _interleave(array, microbatches) for name, array in batch.items()}
    first = {name: array[0] for name, array in parts.items()}
    shapes = jax.eval_shape(gradient, state.params, state.variables, first, key)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.promote_types(s.dtype, jnp.float32)), (shapes[0], shapes[1][0]))
    carry, _ = jax.lax.scan(add, (*zeros, state.variables), (jnp.arange(microbatches), parts))
    return carry


def _interleave(array: Array, microbatches: int) -> Array:
    """`[B, ...]` to `[M, B / M, ...]`: microbatch m has rows m, m + M, ..., so every device keeps its own rows."""
    if array.shape[0] % microbatches:
        raise ConfigError(f"training.microbatches={microbatches} does not divide data.batch_size={array.shape[0]}.")
    return array.reshape(array.shape[0] // microbatches, microbatches, *array.shape[1:]).swapaxes(0, 1)
