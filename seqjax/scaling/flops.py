"""Counting the floating-point operations of a traced function, without compiling or running it.

XLA's own count (`compiled.cost_analysis()`) takes a loop's body once, however often it runs; this one multiplies.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

REDUCTIONS = {"reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "cumsum", "cumlogsumexp", "cummax", "argmax"}
FREE = {
    "broadcast_in_dim", "reshape", "transpose", "convert_element_type", "slice", "dynamic_slice", "squeeze", "iota",
    "dynamic_update_slice", "concatenate", "pad", "gather", "copy", "copy_p", "stop_gradient", "rev", "bitcast_convert_type",
    "select_n", "split", "stack", "unstack", "device_put", "sharding_constraint", "real", "imag", "complex", "expand_dims",
}  # fmt: skip
"""Primitives that move or choose numbers and compute none."""


def count_flops(function: Callable[..., Any], *args: Any) -> int:
    """Floating-point operations of `function(*args)`: a multiply-add is 2, any other arithmetic on an element is 1.

    Args:
      function: traceable by JAX.
      args: arrays, or `ShapeDtypeStruct`s.
    Returns:
      The count; a `while` loop of unknown length counts once, a `cond` as its dearest branch, a choice by platform as its
      default, which accelerators take.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr: Any) -> int:
    return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation: Any) -> int:
    name, parameters = equation.primitive.name, equation.params
    inner = [_count(j) for j in _inner_jaxprs(parameters)]
    if name == "scan":
        return parameters["length"] * sum(inner)
    if name == "cond":
        platforms = parameters.get("branches_platforms") or ()
        return inner[platforms.index(None)] if None in platforms else max(inner)
    if inner:
        # custom_jvp/vjp calls hold rules beside the function itself; only the first is run.
        return sum(inner) if name == "while" else inner[0]
    out = equation.outvars[0].aval if equation.outvars else None
    if name in FREE or out is None or not _inexact(out):
        return 0
    if name == "dot_general":
        (contracted, _), _ = parameters["dimension_numbers"]
        depth = math.prod(equation.invars[0].aval.shape[d] for d in contracted)
        return (8 if _complex(out) else 2) * depth * out.size
    if name == "triangular_solve":
        return equation.invars[0].aval.shape[-1] * out.size
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval
        return 2 * out.size * kernel.size // kernel.shape[parameters["dimension_numbers"].rhs_spec[0]]
    if name == "fft":
        length = math.prod(parameters["fft_lengths"])
        return int(2.5 * max(out.size, equation.invars[0].aval.size) * np.log2(max(length, 2)))
    if name in REDUCTIONS:
        return equation.invars[0].aval.size
    return out.size


def _inner_jaxprs(parameters: dict[str, Any]) -> list[Any]:
    """The programs that an equation contains (of a loop, a branch, a call), opened."""
    found = []
    for value in parameters.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                found.append(item)
    return found


def _inexact(aval: Any) -> bool:
    return hasattr(aval, "dtype") and jnp.issubdtype(aval.dtype, jnp.inexact)


def _complex(aval: Any) -> bool:
    return jnp.issubdtype(aval.dtype, jnp.complexfloating)
