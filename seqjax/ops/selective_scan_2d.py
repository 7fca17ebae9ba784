"""Recurrences on a grid of time and variates: each point continues from the one before in time and from the one above it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from seqjax.ops.recurrence import recurrence, reset, sum_modes
from seqjax.ops.scan import AFFINE, prefix_scan

Tree = Any
MOST_UNROLLED = 16
"""Variates that one time step passes through without a loop."""


class Axes(NamedTuple):
    """The two states of a point of the grid, or something for each: one goes from token to token, one from row to row."""

    time: Array
    variate: Array


class Transition(NamedTuple):
    """What reaches the state in time from the last token's two states, and the state in variates from the row above."""

    a1: Array  # time from time
    a2: Array  # time from variate
    a3: Array  # variate from time
    a4: Array  # variate from variate


def linear_scan_2d(
    transition: Transition,
    inputs: Axes,
    h0: Axes | None = None,
    *,
    starts: Bool[Array, "B L"] | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[Axes, Axes]:
    """The states of a diagonal two-dimensional recurrence (the model of Roesser 1975) with given coefficients.

    `h1[t, v] = a1 h1[t-1, v] + a2 h2[t-1, v] + x1[t, v]`, `h2[t, v] = a3 h1[t, v-1] + a4 h2[t, v-1] + x2[t, v]`, where the
    coefficients are those at `[t, v]` and states above the first row are 0.

    Args:
      transition: a1 to a4, float `[B, L, V, E]`.
      inputs: x1 (`time`) and x2 (`variate`), the same shape.
      h0: both states before the first token, `[B, V, E]`; zeros by default.
      starts, chunk_size, implementation: as `selective_scan_2d`.
    Returns:
      h1 and h2 `[B, L, V, E]`, and those of the last token `[B, V, E]`; at least float32. Differentiable in reverse mode.
    Raises:
      ValueError: the implementation is unknown.
    """
    dtype = jnp.result_type(jnp.float32, *transition, *inputs)
    transition, inputs, h0 = jax.tree.map(lambda a: a.astype(dtype), (transition, inputs, h0))
    first = inputs.time[:, 0]
    h0 = Axes(jnp.zeros_like(first), jnp.zeros_like(first)) if h0 is None else h0
    h0 = jax.tree.map(lambda a: a[:, None], h0)
    given = {"transition": transition, "inputs": inputs}
    states, last = _run(_LINEAR, implementation, chunk_size, None, h0, given, starts)
    return states, jax.tree.map(lambda a: a[:, 0], last)


def selective_scan_2d(
    u: Float[Array, "B L V E"],
    dt: Axes,
    A: Transition,
    B: Axes,
    C: Axes,
    *,
    h0: Axes | None = None,
    starts: Bool[Array, "B L"] | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B L V E"], Axes]:
    """A two-dimensional selective state space (Behrouz et al. 2024, "Chimera"): `y = C1 h1 + C2 h2` of each feature of u.

    `linear_scan_2d` with N diagonal states per feature and axis, held over steps of d1 in time and d2 in variates:
    `a1 = exp(d1 A1)`, `a2 = g1 A2`, `x1 = g1 B1 u` with `g1 = (a1 - 1) / A1`, and `a4 = exp(d2 A4)`, `a3 = g2 A3`,
    `x2 = g2 B2 u` with `g2 = (a4 - 1) / A4`. The two states act on one another as inputs do, so that a step of size zero
    changes neither.

    Args:
      u: inputs of V variates with E features each.
      dt: d1 and d2, positive step sizes, `[B, L, V, E]`.
      A: A1 and A4 negative, A2 and A3 of any sign, `[E, N]`.
      B, C: of each state, `[B, L, V, G, N]`; feature e uses group `e // (E / G)`.
      h0: both states before the first token, `[B, N, V, E]`; zeros by default.
      starts: where a segment starts: nothing comes from the token before.
      chunk_size: tokens between states kept for the backward pass of "sequential"; None chooses.
      implementation: "sequential" (a loop over time, all variates in a step: fastest on CPU, keeps a state every
        `chunk_size` tokens), "associative" (a loop over variates, within it a scan in time of logarithmic depth, run again
        for the backward pass), or "reference" (both loops, for tests); None takes the first on CPU, the second elsewhere.
    Returns:
      y in the dtype of u, and the states of the last token, in at least float32. Differentiable in reverse mode.
    Raises:
      ValueError: the implementation is unknown, or groups do not divide the features.
    """
    features, groups = u.shape[-1], B.time.shape[-2]
    if features % groups:
        raise ValueError(f"{groups} groups do not divide {features} features.")
    dtype = jnp.result_type(jnp.float32, u, *A)
    constants, given, h0 = jax.tree.map(lambda a: a.astype(dtype), (A, {"u": u, "dt": dt, "B": B, "C": C}, h0))
    constants = jax.tree.map(lambda a: a.T[:, None], constants)  # [N, 1, E], against states [..., N, V, E]
    if h0 is None:
        zeros = jnp.zeros((u.shape[0], A.a1.shape[1], *u.shape[2:]), dtype)
        h0 = Axes(zeros, zeros)
    y, last = _run(_SELECTIVE, implementation, chunk_size, constants, h0, given, starts)
    return y.astype(u.dtype), last


class _System(NamedTuple):
    """Functions of what is given at a point, `[..., V, ...]` from the third axis on; states are `[..., N, V, E]`."""

    coefficients: Callable[[Tree, Tree], tuple[Transition, Axes]]  # constants, given -> transition, inputs
    read: Callable[[Axes, Tree], Tree]  # states, given -> outputs


def _as_given(constants: None, given: dict) -> tuple[Transition, Axes]:
    return jax.tree.map(lambda a: a[..., None, :, :], (given["transition"], given["inputs"]))


def _states(h: Axes, given: dict) -> Axes:
    return jax.tree.map(lambda a: a[..., 0, :, :], h)


def _discretized(A: Transition, given: dict) -> tuple[Transition, Axes]:
    u, dt = jax.tree.map(lambda a: a[..., None, :, :], (given["u"], given["dt"]))
    B = jax.tree.map(lambda a: _of_features(a, u.shape[-1]), given["B"])
    change_1, change_4 = jnp.expm1(dt.time * A.a1), jnp.expm1(dt.variate * A.a4)
    g1, g2 = change_1 / A.a1, change_4 / A.a4
    return Transition(change_1 + 1, g1 * A.a2, g2 * A.a3, change_4 + 1), Axes(g1 * B.time * u, g2 * B.variate * u)


def _read(h: Axes, given: dict) -> Array:
    C = jax.tree.map(lambda a: _of_features(a, h.time.shape[-1]), given["C"])
    return sum_modes(jnp.moveaxis(h.time * C.time + h.variate * C.variate, -3, 1))


def _of_features(weights: Float[Array, "*L V G N"], features: int) -> Float[Array, "*L N V E"]:
    """The weights of each feature's group."""
    return jnp.repeat(jnp.moveaxis(weights, -1, -3), features // weights.shape[-2], axis=-1)


_LINEAR = _System(_as_given, _states)
_SELECTIVE = _System(_discretized, _read)


def _run(
    system: _System,
    implementation: str | None,
    chunk_size: int | None,
    constants: Tree,
    h0: Axes,
    given: Tree,
    starts: Array | None,
) -> tuple[Tree, Axes]:
    """Outputs and the last states of a system; given leaves `[B, L, V, ...]`, states `[B, N, V, E]`."""
    run = lambda name: functools.partial(IMPLEMENTATIONS[name], system, chunk_size)
    if implementation is not None:
        if implementation not in IMPLEMENTATIONS:
            raise ValueError(f"implementation={implementation!r} is unknown; allowed: None, {', '.join(IMPLEMENTATIONS)}.")
        return run(implementation)(constants, h0, given, starts)
    if jax.tree.leaves(given)[0].shape[1] == 1:  # decoding has no time to scan
        return run("sequential")(constants, h0, given, starts)
    ways = {"cpu": run("sequential"), "default": run("associative")}
    return jax.lax.platform_dependent(constants, h0, given, starts, **ways)


def _in_time(
    system: _System, chunk_size: int | None, constants: Tree, h0: Axes, given: Tree, starts: Array | None
) -> tuple[Tree, Axes]:
    return recurrence(STEPS[system], constants, h0, given, starts=starts, chunk_size=chunk_size, elementwise=True)


def _step(system: _System, constants: Tree, h: Axes, given: Tree) -> tuple[Axes, Tree]:
    """All variates of one token."""
    a, x = system.coefficients(constants, given)
    time = a.a1 * h.time + a.a2 * h.variate + x.time
    above = jnp.pad(time[:, :, :-1], [(0, 0), (0, 0), (1, 0), (0, 0)])
    h = Axes(time, _down_rows(a.a4, a.a3 * above + x.variate))
    return h, system.read(h, given)


STEPS = {system: functools.partial(_step, system) for system in (_LINEAR, _SELECTIVE)}
"""One object for each: `recurrence` knows a step by identity."""


def _down_rows(decay: Float[Array, "B N V E"], inputs: Float[Array, "B N V E"]) -> Float[Array, "B N V E"]:
    """`h_v = decay_v h_(v-1) + inputs_v`."""

    def row(h: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
        h = now[0] * h + now[1]
        return h, h

    rows = jax.tree.map(lambda a: jnp.moveaxis(a, 2, 0), (decay, inputs))
    _, states = jax.lax.scan(row, jnp.zeros_like(inputs[:, :, 0]), rows, unroll=min(inputs.shape[2], MOST_UNROLLED))
    return jnp.moveaxis(states, 0, 2)


def _by_rows(
    system: _System, chunk_size: int | None, constants: Tree, h0: Axes, given: Tree, starts: Array | None
) -> tuple[Tree, Axes]:
    """Row v needs row v - 1 alone, at all times: `variate` follows at once, and then `time` is a scan of one axis."""
    del chunk_size

    @jax.checkpoint
    def row(above: Axes, now: tuple[Axes, Tree]) -> tuple[Axes, tuple[Tree, Axes]]:
        before, given = now
        a, x = system.coefficients(constants, given)  # [B, L, N, 1, E]
        variate = a.a3 * above.time + a.a4 * above.variate + x.variate
        last = jnp.concatenate([before.variate[:, None], variate[:, :-1]], axis=1)
        last = last if starts is None else jnp.where(starts.reshape(*starts.shape, 1, 1, 1), 0, last)
        start = (jnp.ones_like(before.time), before.time)
        elements = (a.a1, a.a2 * last + x.time)
        (_, time), _ = prefix_scan(AFFINE, elements, initial=start, starts=starts, implementation="associative")
        h = Axes(time, variate)
        return h, (system.read(h, given), jax.tree.map(lambda a: a[:, -1], h))

    length = jax.tree.leaves(given)[0].shape[1]
    rows = jax.tree.map(lambda a: jnp.moveaxis(a, 2, 0)[:, :, :, None], (h0, given))
    none = jax.tree.map(lambda a: jnp.zeros((a.shape[0], length, *a.shape[1:2], 1, *a.shape[3:]), a.dtype), h0)
    _, (outputs, last) = jax.lax.scan(row, none, rows)
    return jax.tree.map(lambda a: jnp.moveaxis(a[:, :, :, 0], 0, 2), (outputs, last))


def _reference(
    system: _System, chunk_size: int | None, constants: Tree, h0: Axes, given: Tree, starts: Array | None
) -> tuple[Tree, Axes]:
    """Token after token, row after row, differentiated by JAX."""
    del chunk_size
    h, outputs = h0, []
    for t in range(jax.tree.leaves(given)[0].shape[1]):
        now = jax.tree.map(lambda a: a[:, t], given)  # noqa: B023
        a, x = system.coefficients(constants, now)
        h = reset(h, None if starts is None else starts[:, t])
        above = jax.tree.map(lambda a: jnp.zeros_like(a[:, :, 0]), h)
        rows = []
        for v in range(h.time.shape[2]):
            here = lambda array: array[:, :, v]  # noqa: B023
            time = here(a.a1) * here(h.time) + here(a.a2) * here(h.variate) + here(x.time)
            above = Axes(time, here(a.a3) * above.time + here(a.a4) * above.variate + here(x.variate))
            rows.append(above)
        h = jax.tree.map(lambda *a: jnp.stack(a, axis=2), *rows)
        outputs.append(system.read(h, now))
    return jax.tree.map(lambda *a: jnp.stack(a, axis=1), *outputs), h


IMPLEMENTATIONS = {"sequential": _in_time, "associative": _by_rows, "reference": _reference}
