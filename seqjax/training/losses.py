"""Losses and scores of a batch, as sums and counts.

Every function returns `{name: (sum, count)}`, float32 scalars, never a mean: sums and counts add up exactly over
microbatches, devices, hosts and evaluation batches, and are divided once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from seqjax.config import ConfigError
from seqjax.models.base import Window
from seqjax.ops.log_normal_mixture import LogNormalMixture

Sums = dict[str, tuple[Array, Array]]
Loss = Callable[[Array, dict[str, Array]], Sums]


def softmax_cross_entropy(
    logits: Float[Array, "*B V"], targets: Int[Array, "*B"], weights: Num[Array, "*B"] | None = None
) -> Sums:
    """Negative log-likelihood of `targets`, in nats, and how often the largest logit is the target.

    Args:
      logits: unnormalised, of any float dtype; the arithmetic is in at least float32.
      targets: per token `[B, L]` or per sequence `[B]`, in `0..V-1`.
      weights: how much each target counts; 0 leaves it out.
    Returns:
      Sums over all targets, under `loss` and `accuracy`; the counts are the weights' sum.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    # A masked sum, not a gather: with the vocabulary split over devices it needs no exchange but the final addition.
    chosen = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1) == targets[..., None]
    nll = jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1)
    hits = (jnp.argmax(logits, axis=-1) == targets).astype(logits.dtype)
    weights = _weights_like(nll, weights)
    count = jnp.sum(weights)
    return {"loss": (_weighted_sum(nll, weights), count), "accuracy": (_weighted_sum(hits, weights), count)}


def squared_error(
    predictions: Float[Array, "..."], targets: Float[Array, "..."], weights: Num[Array, "..."] | None = None
) -> Sums:
    """Squared error of every predicted value, under `loss`, and absolute error, under `mae`.

    Args:
      predictions: same shape as `targets`, `[B, L, C]` or `[B, T, C]`; a last dimension of 1 may be missing in either.
      weights: leads like `targets`, `[B, L]` or `[B]` say; 0 leaves values out. The count is of values: weights times C.
    """
    if predictions.shape == (*targets.shape, 1):
        predictions = predictions[..., 0]
    elif targets.shape == (*predictions.shape, 1):
        targets = targets[..., 0]
    if predictions.shape != targets.shape:
        raise ConfigError(f"the model predicts values of shape {predictions.shape}; the task's are {targets.shape}.")
    wide = jnp.promote_types(predictions.dtype, jnp.float32)
    error = predictions.astype(wide) - targets.astype(wide)
    weights = _weights_like(error, weights)
    count = jnp.sum(weights)
    return {"loss": (_weighted_sum(jnp.square(error), weights), count), "mae": (_weighted_sum(jnp.abs(error), weights), count)}


def event_likelihood(
    outputs: Float[Array, "B L E"], batch: dict[str, Array], *, num_marks: int, log_mean: float = 0.0, log_std: float = 1.0
) -> Sums:
    """Negative log-likelihood of the next events, in nats per event: density of the time, probability of the mark.

    Args:
      outputs: of the head "point_process" with `num_marks` marks, E = 3K + `num_marks`.
      batch: `targets` `[B, L, 2]`, times to the next event and marks, `weights` `[B, L]`.
      log_mean, log_std: what the head's mixture is relative to, see `LogNormalMixture.of`. The likelihood is of the times.
    Returns:
      Sums under `loss`; its parts `time_nll` and `mark_nll`; `accuracy`, how often the likeliest mark is the next; and
      `rmse`, the squared error of the expected time, of which the root is taken after division by the count.
    """
    weights, (times, marks) = batch["weights"], jnp.moveaxis(batch["targets"], -1, 0)
    parameters, logits = jnp.split(outputs, [outputs.shape[-1] - num_marks], axis=-1)
    mixture = LogNormalMixture.of(parameters, log_mean, log_std)
    times = jnp.where(weights > 0, times, 1.0)  # padding has none
    of_marks = softmax_cross_entropy(logits, marks.astype(jnp.int32), weights)
    (mark_nll, count), time_nll = of_marks["loss"], _weighted_sum(-mixture.log_density(times), weights)
    return {
        "loss": (time_nll + mark_nll, count),
        "time_nll": (time_nll, count),
        "mark_nll": (mark_nll, count),
        "accuracy": of_marks["accuracy"],
        "rmse": squared_error(mixture.mean(), times, weights)["loss"],
    }


def in_window(outputs: Array | Window, batch: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
    """Outputs, and of a batch's arrays over tokens, `[B, L, ...]`, the part at the positions that have outputs."""
    if not isinstance(outputs, Window):
        return outputs, batch
    shape, length = batch["inputs"].shape[:2], outputs.outputs.shape[1]
    cut = lambda a: jax.lax.dynamic_slice_in_dim(a, outputs.start, length, axis=1)
    return outputs.outputs, {name: cut(a) if a.shape[:2] == shape else a for name, a in batch.items()}


def loss_of(task: Any) -> Loss:
    """The loss of a task: its own `loss(outputs, batch)` where it has one, else by its head or the kind of its targets.

    Where `task.scores_rows`, it says too how many rows are right from end to end, under `row_accuracy`.
    """
    loss = getattr(task, "loss", None) or by_targets
    if getattr(task, "head", None) == "point_process":
        units = {"log_mean": task.log_mean, "log_std": task.log_std}
        loss = functools.partial(event_likelihood, num_marks=task.output_dim, **units)
    if not getattr(task, "scores_rows", False):
        return loss
    return lambda outputs, batch: {**loss(outputs, batch), "row_accuracy": row_accuracy(outputs, batch)}


def row_accuracy(logits: Float[Array, "B L V"], batch: dict[str, Array]) -> tuple[Array, Array]:
    """In how many rows the largest logit is the target wherever it counts; and how many rows have such places."""
    counted = batch["weights"] != 0
    right = jnp.all((jnp.argmax(logits, axis=-1) == batch["targets"]) | ~counted, axis=-1)
    rows = jnp.any(counted, axis=-1)
    return jnp.sum(right & rows, dtype=jnp.float32), jnp.sum(rows, dtype=jnp.float32)


def by_targets(outputs: Array, batch: dict[str, Array]) -> Sums:
    """Cross-entropy for integer targets, squared error for floats."""
    integers = jnp.issubdtype(batch["targets"].dtype, jnp.integer)
    return (softmax_cross_entropy if integers else squared_error)(outputs, batch["targets"], batch.get("weights"))


def _weights_like(values: Array, weights: Array | None) -> Array:
    if weights is None:
        return jnp.ones(values.shape, values.dtype)
    weights = weights.reshape(weights.shape + (1,) * (values.ndim - weights.ndim))
    return jnp.broadcast_to(weights.astype(values.dtype), values.shape)


def _weighted_sum(values: Array, weights: Array) -> Array:
    """The sum, in which a value of weight 0 counts nothing even if it is infinite."""
    return jnp.sum(jnp.where(weights == 0, 0.0, values * weights))
