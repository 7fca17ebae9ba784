"""Generation with recurrent depth: the next tokens are begun while the last ones still take their steps in depth."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from seqjax.config import ConfigError
from seqjax.generation.sampling import Sampler
from seqjax.generation.streaming import send
from seqjax.mixers.attention import AttentionState
from seqjax.mixers.base import State
from seqjax.models.universal_transformer import UniversalTransformer, UniversalTransformerState, Wavefront
from seqjax.ops.segments import SegmentState


@dataclasses.dataclass(frozen=True)
class DiffusionForcing:
    """The diffusion-forcing sampler of recurrent-depth models (Geiping et al. 2025, "Efficient Parallel Samplers for
    Recurrent-Depth Models and Their Connection to Diffusion Language Models"), for a `universal_transformer` of attention and
    feed-forwards with a fixed number of steps.

    Each pass takes a wavefront of positions `inner_steps` further in depth, all at once, and reads a token out of each.
    Behind the last position that token is a draft, and begins the next position; behind the others it confirms the draft
    there or revises it. A position that has taken all steps freezes: what is read out of it is final. A frozen position keeps
    its keys and values at every step, and a later one attends at each of its steps to those of the same step.

    A Universal Transformer takes a token in once, before the first step, where the paper's models take it in at every
    recurrence. So behind a revised draft the wavefront begins anew. Then nothing is approximate: for any `inner_steps`, with
    `threshold` 0, the tokens are those of plain decoding, and the drafts save passes only. With N tokens and T steps they
    are `N + T / inner_steps - 2` if no draft is revised, and never more than the `(N - 1) T / inner_steps` of plain
    decoding. With all steps in one pass it is plain decoding. A pass works as much as plain decoding does for a token, in
    fewer steps one after another: it pays where one token leaves a device idle.

    Attributes:
      inner_steps: steps in depth per pass, a divisor of the model's.
      threshold: a position also freezes when a pass changes its vector by less than this, relative to its norm, and all before
        it are frozen; where it took no step its keys and values are those of its last. 0 freezes none early; the tokens of
        plain decoding are not promised above it.
      report: called on the host, at the end, with how many passes each row took, `[B]`, the prompt's own not counted.
    """

    inner_steps: int = 1
    threshold: float = 0.0
    report: Callable[[np.ndarray], None] | None = None

    def __post_init__(self) -> None:
        if self.threshold < 0:
            raise ConfigError(f"threshold={self.threshold} is negative; allowed: 0.0 (freeze none early) and above.")

    def check(self, model: nn.Module) -> None:
        """Raise a ConfigError for a model that this sampler does not serve."""
        if not isinstance(model, UniversalTransformer):
            raise ConfigError(
                f"diffusion forcing needs one block that is repeated in depth, and this is a {type(model).__name__}; "
                "allowed: model.name='universal_transformer'."
            )
        if model.adaptive:
            raise ConfigError(
                f"diffusion forcing with model.halting={model.halting!r} is not served, for a position's output is then a mean "
                "over its steps; allowed: 'none'."
            )
        steps = model.num_steps
        if self.inner_steps < 1 or steps % self.inner_steps:
            fits = ", ".join(str(n) for n in range(1, steps + 1) if steps % n == 0)
            raise ConfigError(f"inner_steps={self.inner_steps} does not divide model.num_steps={steps}; allowed: {fits}.")
        if model.sublayers_in_order:
            raise ConfigError(
                f"diffusion forcing goes back to earlier positions, which {', '.join(model.sublayers_in_order)} in "
                "model.pattern cannot; allowed: attention with window=None, and feed-forwards."
            )

    def generate(self, model: UniversalTransformer, *arguments: Any) -> Int[Array, "B N"]:
        """New tokens; arguments as `decode` has them."""
        threshold = None if self.threshold == 0 else jnp.float32(self.threshold)
        new, passes = decode(model, *arguments, self.inner_steps, threshold)
        if self.report is not None:
            self.report(np.asarray(passes))
        return new


def _is_cache(part: Any) -> bool:
    return isinstance(part, AttentionState)


class Wave(NamedTuple):
    """What a pass leaves to the next. M stages of `inner_steps`; of N new tokens all but the last are inputs.

    Attributes:
      numbers: which new token is the input at each stage; -1 for none. Later tokens are at earlier stages.
      latents: what enters each stage.
      caches: states of the block, leaves `[inner_steps, M * B, 1, ...]`.
      tokens: read out so far; those up to and including number `frozen` are final.
      origins: from which the prompt's last position, then each new one counts; None where all count from their start.
      frozen: how many inputs are.
      passes: so far, of rows that were not done.
    """

    numbers: Int[Array, "M B"]
    latents: Float[Array, "M B D"]
    caches: State
    tokens: Int[Array, "B N"]
    origins: Int[Array, "B N"] | None
    frozen: Int[Array, "B"]
    passes: Int[Array, "B"]

    @classmethod
    def fresh(
        cls, model: UniversalTransformer, state: UniversalTransformerState, first: Array, num_tokens: int, stages: int
    ) -> Wave:
        """Behind a prompt: its last token's read-out alone is there, number 0."""
        zeros, batch_size = jnp.zeros_like(first), first.shape[0]
        blank = jnp.zeros((batch_size, num_tokens), jnp.int32)
        wave = cls(
            numbers=jnp.full((stages, batch_size), -1, jnp.int32),
            latents=jnp.zeros((stages, batch_size, model.embed_dim), model.dtype),
            caches=jax.tree.map(lambda part: _by_stage(part, stages), state.steps, is_leaf=_is_cache),
            tokens=blank.at[:, 0].set(first),
            origins=None if state.origin is None else blank.at[:, 0].set(state.origin),
            frozen=zeros,
            passes=zeros,
        )
        return wave.entered(zeros, model, state.segment)

    def positions(self, start: SegmentState) -> Int[Array, "M B"]:
        """In the segment; `start` is that of number 0."""
        return start.position + jnp.maximum(self.numbers, 0)

    def entered(self, number: Int[Array, "B"], model: UniversalTransformer, start: SegmentState) -> Wave:
        """With this token at the first stage; none where it is not an input."""
        rows, last = jnp.arange(number.shape[0]), self.tokens.shape[1] - 1
        numbers = self.numbers.at[0].set(jnp.where(number < last, number, -1))
        origins = self.origins
        if origins is not None:
            restarts = _at(self.tokens, number) == model.position_restart
            now = jnp.where(restarts, start.position + number, _at(origins, number))
            origins = origins.at[rows, number + 1].set(now, mode="drop")
        return self._replace(numbers=numbers, origins=origins)

    def advanced(self, drawn: Int[Array, "M B"], ready: Bool[Array, "M B"]) -> tuple[Wave, Array, Bool[Array, "M B"]]:
        """Read-outs replace drafts, and every position moves up a stage, or freezes.

        Returns:
          The wave; the number of the token that enters next in each row; which stages' positions froze.
        """
        active, absent = self.numbers >= 0, self.tokens.shape[1]
        revises = active & ((self.numbers == self.numbers.max(0)) | (drawn != _at(self.tokens, self.numbers + 1)))
        first = jnp.where(revises, self.numbers, absent).min(0)
        value = jnp.where(self.numbers == first, drawn, 0).sum(0, dtype=jnp.int32)
        tokens = self.tokens.at[jnp.arange(first.shape[0]), first + 1].set(value, mode="drop")
        kept = active & (self.numbers <= first)
        waits = jnp.flip(jax.lax.cummax(jnp.flip(active & ~ready, 0).astype(jnp.int32), axis=0), 0) > 0
        freezes = kept & ~waits
        numbers = jnp.roll(jnp.where(kept & waits, self.numbers, -1), 1, axis=0)
        frozen = self.frozen + freezes.sum(0, dtype=jnp.int32)
        latents = jnp.roll(self.latents, 1, axis=0)
        return self._replace(numbers=numbers, latents=latents, tokens=tokens, frozen=frozen), first + 1, freezes


@functools.partial(jax.jit, static_argnames=("model", "num_tokens", "inner_steps"))
def decode(
    model: UniversalTransformer,
    variables: Any,
    tokens: Int[Array, "B L"],
    segment_ids: Int[Array, "B L"] | None,
    num_tokens: int,
    sampler: Sampler,
    eos: Array | None,
    key: Array,
    stream_id: Array | None,
    inner_steps: int,
    threshold: Array | None,
) -> tuple[Int[Array, "B N"], Int[Array, "B"]]:
    """New tokens, and each row's passes; arguments as `generate` and `DiffusionForcing` have them.

    Token n of row b is drawn by the key `fold_in(fold_in(key, n), b)` in every pass, so that a draft is revised only where
    the logits ask for it.
    """
    variables = model.prepare(variables)
    (batch_size, length), stages = tokens.shape, model.num_steps // inner_steps
    spare = length + num_tokens - 1  # where stages without a position write: the last token is no input
    state = model.init_state(batch_size, length + num_tokens)
    logits, state = model.apply(variables, tokens, state, segment_ids=segment_ids)
    wavefront = Wavefront.of(model)

    def draw(logits: Array, number: Array, row: Array) -> Array:
        return sampler.sample(logits[None], jax.random.fold_in(jax.random.fold_in(key, number), row))[0]

    draw_rows = jax.vmap(draw, (0, 0, 0))
    draw_all = jax.vmap(draw_rows, (0, 0, None))
    rows = jnp.arange(batch_size)

    def run(carry):
        wave, sent = carry
        slots = jnp.where(wave.numbers >= 0, length + wave.numbers, spare)
        positions = wave.positions(state.segment)
        caches = jax.tree.map(lambda part: _placed(part, slots, positions), wave.caches, is_leaf=_is_cache)
        if wave.origins is not None:
            positions -= _at(wave.origins, wave.numbers + 1)
        entering = _at(wave.tokens, wave.numbers[0])
        logits, before, after, caches = wavefront.apply(variables, entering, wave.latents, positions, caches)
        ready = jnp.arange(stages)[:, None] == stages - 1
        if threshold is not None:
            ready |= _norm(after - before) < threshold * _norm(after)
        passes = wave.passes + ~done(wave)
        wave, number, freezes = wave._replace(latents=after, passes=passes).advanced(
            draw_all(logits, wave.numbers + 1, rows), jnp.broadcast_to(ready, slots.shape)
        )
        if threshold is not None:
            caches = jax.tree.map(lambda part: _filled(part, slots, freezes), caches, is_leaf=_is_cache)
        wave = wave._replace(caches=caches).entered(number, model, state.segment)
        return wave, send_final(wave, sent)

    def ended(wave):
        """Where a final end is at, or before, a token."""
        if eos is None:
            return jnp.zeros((batch_size, num_tokens), bool)
        ends = (wave.tokens == eos) & (jnp.arange(num_tokens) <= wave.frozen[:, None])
        return jnp.cumsum(ends, axis=1) > 0

    def done(wave):
        return (wave.frozen >= num_tokens - 1) | ended(wave)[:, -1]

    def result(wave):
        return wave.tokens if eos is None else jnp.where(ended(wave), eos, wave.tokens)

    def send_final(wave, sent):
        """Tokens that have become final in every row go to the stream; how many have gone."""
        if stream_id is None:
            return sent
        final = jnp.where(done(wave), num_tokens, wave.frozen + 1).min()

        def send_one(n):
            send(stream_id, result(wave)[:, n])
            return n + 1

        return jax.lax.while_loop(lambda n: n < final, send_one, sent)

    first = draw_rows(logits[:, -1], jnp.zeros_like(rows), rows)
    wave = Wave.fresh(model, state, first, num_tokens, stages)
    wave, _ = jax.lax.while_loop(lambda carry: ~jnp.all(done(carry[0])), run, (wave, send_final(wave, jnp.int32(0))))
    return result(wave), wave.passes


def _at(values: Int[Array, "B N"], numbers: Int[Array, "*M B"]) -> Int[Array, "*M B"]:
    """Each row's values at its numbers; any value for those that are out of range."""
    return values[jnp.arange(values.shape[0]), jnp.clip(numbers, 0, values.shape[1] - 1)]


def _norm(x: Float[Array, "M B D"]) -> Float[Array, "M B"]:
    return jnp.linalg.norm(x.astype(jnp.promote_types(x.dtype, jnp.float32)), axis=-1)


def _by_stage(cache: AttentionState, stages: int) -> AttentionState:
    """From `[T, B, ...]`, all steps' in a row, to `[T / M, M * B, 1, ...]`: rows of one token, those of all stages together."""
    steps, batch_size = cache.runs.shape[:2]

    def of(leaf):
        leaf = jnp.broadcast_to(leaf[:, None], (steps, batch_size)) if leaf.ndim == 1 else leaf[:, :, None]
        leaf = leaf.reshape(stages, steps // stages, *leaf.shape[1:]).swapaxes(0, 1)
        return leaf.reshape(steps // stages, stages * batch_size, *leaf.shape[3:])

    return jax.tree.map(of, cache)


def _placed(cache: AttentionState, slots: Int[Array, "M B"], positions: Int[Array, "M B"]) -> AttentionState:
    """The cache with its next token at these slots, which see those before them alone, and at these positions."""
    index = jnp.broadcast_to(slots.reshape(-1), cache.index.shape)
    position = jnp.broadcast_to(positions.reshape(-1, 1), cache.segment.position.shape)
    return cache.replace(index=index, segment=cache.segment._replace(position=position))


def _filled(cache: AttentionState, slots: Int[Array, "M B"], frozen: Bool[Array, "M B"]) -> AttentionState:
    """The cache where positions that froze at a stage have the keys and values of its last step at all later steps."""
    stages, batch_size = slots.shape
    rows = jnp.arange(batch_size)

    def of(leaf):
        at = leaf.reshape(leaf.shape[0], stages, batch_size, *leaf.shape[3:])
        for stage in range(stages - 1):
            later, kept = (slice(None), slice(stage + 1, None), rows, slots[stage]), frozen[stage]
            latest = at[-1, stage, rows, slots[stage]]
            kept = kept.reshape(-1, *(1,) * (latest.ndim - 1))
            at = at.at[later].set(jnp.where(kept, latest, at[later]))
        return at.reshape(leaf.shape)

    return cache.replace(keys=of(cache.keys), values=of(cache.values), runs=of(cache.runs))
