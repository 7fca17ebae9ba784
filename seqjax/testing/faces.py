"""A module's faces as a few compiled programs, so that a whole conformance run costs seconds.

A chunk of each length is compiled once, together with its vector-Jacobian product. Any split into those lengths is then a
chain of calls forward and, for gradients, a chain of calls back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

LENGTH = 14
BATCH = 2
MAX_LENGTH = 24


@dataclasses.dataclass(frozen=True)
class Run:
    """What one evaluation gave: outputs, state after it, gradients by what they are taken with respect to."""

    outputs: np.ndarray
    state: Any
    gradients: dict[str, Any]


class Faces:
    """A module with variables, called in parallel and in chunks, at one precision.

    Attributes:
      module: a mixer or a model: `module(x, state, segment_ids=...) -> (y, state)`.
      variables: unboxed.
      output_width: of the outputs, `[B, L, output_width]`.
      traces: how often a chunk program was traced; decoding must not raise it.
    """

    def __init__(self, module: nn.Module, variables: Any, output_width: int, inputs_differentiable: bool, x64: bool) -> None:
        self.module, self.variables, self.output_width, self.x64 = module, variables, output_width, x64
        self.inputs_differentiable = inputs_differentiable
        self.traces = 0
        self._program = jax.jit(self._forward_and_back)
        self._forward_program = jax.jit(self._forward)

    def init_state(self, batch_size: int = BATCH, max_length: int = MAX_LENGTH) -> Any:
        with jax.enable_x64(self.x64):
            return self.module.init_state(batch_size, max_length)

    def forward(self, x: np.ndarray, state: Any, segment_ids: np.ndarray | None) -> tuple[np.ndarray, Any]:
        """Outputs and next state, without gradients."""
        with jax.enable_x64(self.x64):
            return self._forward_program(self.variables, jnp.asarray(x), state, segment_ids)

    def parallel(self, x: np.ndarray, segment_ids: np.ndarray, cotangent: np.ndarray | None = None) -> Run:
        """One call without a state; gradients of `sum(outputs * cotangent)`."""
        return self.chain(x, None, segment_ids, [x.shape[1]], cotangent)

    def chain(
        self,
        x: np.ndarray,
        state: Any,
        segment_ids: np.ndarray,
        split: Sequence[int],
        cotangent: np.ndarray | None = None,
        state_cotangent: Any = None,
    ) -> Run:
        """Call chunk after chunk, then back through them; gradients of `<outputs, cotangent> + <state, state_cotangent>`."""
        with jax.enable_x64(self.x64):
            return self._chain(x, state, segment_ids, split, cotangent, state_cotangent)

    def _chain(self, x, state, segment_ids, split, cotangent, state_cotangent) -> Run:
        edges = np.concatenate([[0], np.cumsum(split)])
        pieces = [slice(a, b) for a, b in zip(edges[:-1], edges[1:])]
        states, outputs = [state], []
        for piece in pieces:
            y, after, _ = self._call(x[:, piece], states[-1], segment_ids[:, piece], None, None)
            outputs.append(y)
            states.append(after)
        y = np.concatenate(outputs, axis=1)
        if cotangent is None:
            return Run(y, states[-1], {})
        by_variables, by_inputs, by_state = None, [], state_cotangent
        for i in reversed(range(len(pieces))):
            piece = pieces[i]
            inputs = (x[:, piece], states[i], segment_ids[:, piece])
            _, _, gradients = self._call(*inputs, cotangent[:, piece], by_state)
            of_variables, of_inputs, by_state = gradients
            by_variables = of_variables if by_variables is None else jax.tree.map(jnp.add, by_variables, of_variables)
            by_inputs.insert(0, of_inputs)
        found = {"variables": by_variables}
        if self.inputs_differentiable:
            found["inputs"] = np.concatenate(by_inputs, axis=1)
        if by_state:
            found["initial state"] = by_state
        return Run(y, states[-1], jax.tree.map(np.asarray, found))

    def _call(self, x, state, segment_ids, cotangent, state_cotangent):
        """One program serves forward and backward: without a cotangent, zeros stand for it."""
        dtype = np.float64 if self.x64 else np.float32
        if cotangent is None:
            cotangent = np.zeros((*x.shape[:2], self.output_width), dtype)
        if state_cotangent is None:  # by contract the next state is like the one before
            state_cotangent = [np.zeros(a.shape, a.dtype) for a in _floats(state)]
        x, cotangent = jnp.asarray(x), jnp.asarray(cotangent, dtype)
        return self._program(self.variables, x, state, jnp.asarray(segment_ids), cotangent, state_cotangent)

    def _forward(self, variables, x, state, segment_ids):
        self.traces += 1
        return self.module.apply(variables, x, state, segment_ids=segment_ids)

    def _forward_and_back(self, variables, x, state, segment_ids, cotangent, state_cotangent):
        floats, rebuild = _split_floats(state)

        def call(variables, x, floats):
            y, after = self._forward(variables, x, rebuild(floats), segment_ids)
            return (y, _floats(after)), after

        if not self.inputs_differentiable:
            inner = lambda v, f: call(v, x, f)
            (y, _), pull, after = jax.vjp(inner, variables, floats, has_aux=True)
            of_variables, of_state = pull((cotangent, state_cotangent))
            return y, after, (of_variables, None, of_state)
        (y, _), pull, after = jax.vjp(call, variables, x, floats, has_aux=True)
        return y, after, pull((cotangent, state_cotangent))


def _floats(state: Any) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.inexact)]


def _split_floats(state: Any) -> tuple[list[Any], Any]:
    """The differentiable leaves of a state, and how to put others in their place."""
    leaves, structure = jax.tree.flatten(state)
    at = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)]

    def rebuild(floats: list[Any]) -> Any:
        new = list(leaves)
        for i, leaf in zip(at, floats):
            new[i] = leaf
        return jax.tree.unflatten(structure, new)

    return [leaves[i] for i in at], rebuild


def relative_error(got: Any, want: Any) -> float:
    """Largest difference between two trees, each leaf of scale its largest entry (at least 1e-3 of the tree's)."""
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    assert len(got) == len(want), f"{len(got)} arrays where {len(want)} are expected"
    pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in zip(got, want)]
    tops = [np.max(np.abs(b), initial=0.0) for _, b in pairs]
    floor = 1e-3 * max(tops, default=0.0) or 1.0
    errors = []
    for (a, b), top in zip(pairs, tops):
        assert a.shape == b.shape, f"shape {a.shape} where {b.shape} is expected"
        error = np.max(np.abs(a - b), initial=0.0) / max(top, floor)
        errors.append(np.inf if np.isnan(error) else error)
    return max(errors, default=0.0)
