"""Batched generation from a carried state: one compiled program for the prompt and all new tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from seqjax.config import ConfigError
from seqjax.generation.diffusion_forcing import DiffusionForcing
from seqjax.generation.sampling import Sampler
from seqjax.generation.streaming import send, streaming

PAD_SEGMENT, PROMPT_SEGMENT = 0, 1


def generate(
    model: nn.Module,
    variables: Any,
    prompts: Sequence[Sequence[int]] | Array | np.ndarray,
    num_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos: int | None = None,
    key: Array | None = None,
    *,
    stream: Callable[[np.ndarray], None] | None = None,
    parallel: DiffusionForcing | None = None,
) -> Int[Array, "B T"]:
    """Continue each prompt by `num_tokens` tokens.

    Args:
      model: any model with a language-model head that carries a state.
      variables: its variables, boxed or not.
      prompts: `[B, L]` tokens, or B sequences of unequal length, which are left-padded; the pads are a segment of their
        own, so they change nothing.
      num_tokens: how many tokens to add to each.
      temperature: 0 takes the most likely token; above 0 samples, and needs a `key`.
      top_k, top_p: see `Sampler`.
      eos: a row that produces this token is done and repeats it to the end; the loop stops when all rows are done.
      key: a JAX PRNG key.
      stream: called on the host with the `[B]` tokens of each step, in order, while the loop runs.
      parallel: several tokens at once, for models of recurrent depth; None makes one after the other.
    Returns:
      The new tokens, `[B, num_tokens]` int32.
    Raises:
      ConfigError: an empty prompt, a token outside the vocabulary, no key for sampling, a model without a state,
        or one that `parallel` does not serve.
    """
    tokens, segment_ids = pad_left(prompts, model.vocab_size)
    if num_tokens < 1:
        raise ConfigError(f"num_tokens={num_tokens} adds nothing; allowed: 1 and above.")
    sampler = Sampler.create(temperature, top_k, top_p)
    if key is None:
        if sampler.temperature is not None:
            raise ConfigError(f"temperature={temperature} samples, which needs key=jax.random.key(seed).")
        key = jax.random.key(0)
    model.check_state(tokens.shape[1] + num_tokens)
    if parallel is not None:
        parallel.check(model)
    with streaming(stream) as stream_id:
        arguments = (model, nn.unbox(variables), tokens, segment_ids, num_tokens, sampler, eos, key, stream_id)
        new = _generate(*arguments) if parallel is None else parallel.generate(*arguments)
        if stream is not None:
            jax.effects_barrier()
    return new


def pad_left(prompts: Any, vocab_size: int) -> tuple[np.ndarray, np.ndarray | None]:
    """`[B, L]` tokens with pads on the left, and their segment ids (None where no row is padded)."""
    rows = [np.asarray(prompt) for prompt in prompts]
    if not rows:
        raise ConfigError("prompts is empty; give at least one prompt of at least one token.")
    for i, row in enumerate(rows):
        if row.ndim != 1 or row.size == 0 or not np.issubdtype(row.dtype, np.integer):
            raise ConfigError(f"prompt {i} has shape {row.shape}, {row.dtype}; allowed: [L] integers, L at least 1.")
        if row.min() < 0 or row.max() >= vocab_size:
            raise ConfigError(f"prompt {i} holds tokens {row.min()}..{row.max()}; allowed: 0..{vocab_size - 1}.")
    longest = max(row.size for row in rows)
    tokens = np.stack([np.pad(row, (longest - row.size, 0)) for row in rows]).astype(np.int32)
    if all(row.size == longest for row in rows):
        return tokens, None
    pads = np.array([longest - row.size for row in rows])
    return tokens, np.where(np.arange(longest) < pads[:, None], PAD_SEGMENT, PROMPT_SEGMENT).astype(np.int32)


@functools.partial(jax.jit, static_argnames=("model", "num_tokens"))
def _generate(
    model: nn.Module,
    variables: Any,
    tokens: Array,
    segment_ids: Array | None,
    num_tokens: int,
    sampler: Sampler,
    eos: Array | None,
    key: Array,
    stream_id: Array | None,
) -> Array:
    variables = model.prepare(variables)
    batch_size, length = tokens.shape
    state = model.init_state(batch_size, length + num_tokens)
    logits, state = model.apply(variables, tokens, state, segment_ids=segment_ids)

    def emit(i, logits, done, new):
        token = sampler.sample(logits[:, -1], jax.random.fold_in(key, i))
        if eos is not None:
            token = jnp.where(done, eos, token)
            done = done | (token == eos)
        send(stream_id, token)
        return token, done, jax.lax.dynamic_update_slice_in_dim(new, token[:, None], i, axis=1)

    def step(carry):
        i, token, done, new, state = carry
        logits, state = model.apply(variables, token[:, None], state)
        return i + 1, *emit(i, logits, done, new), state

    def unfinished(carry):
        return (carry[0] < num_tokens) & ~jnp.all(carry[2])

    blank = jnp.full((batch_size, num_tokens), 0 if eos is None else eos, jnp.int32)
    first = emit(0, logits, jnp.zeros((batch_size,), bool), blank)
    return jax.lax.while_loop(unfinished, step, (1, *first, state))[3]
