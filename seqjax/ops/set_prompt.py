"""Set-based prompting: prompts with sets of sub-sequences whose order cannot matter (McIlroy-Young et al. 2024).

Every sub-sequence of a set stands at the same positions, behind what comes before the set, and does not see its siblings; what
comes behind starts after the longest, and sees them all. Attention and positions are all that is told apart, no weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from seqjax.ops.segments import Segments, SegmentState


class SetOrder(NamedTuple):
    """Where tokens stand that are not in one row.

    Attributes:
      positions: from the first token of the call or of the segment on.
      sets: which set a token is in; 0 for none.
      members: which sub-sequence of the set.
    """

    positions: Int[Array, "#B L"]
    sets: Int[Array, "#B L"]
    members: Int[Array, "#B L"]

    def masks(self, num_keys: int, index: int | Int[Array, ""]) -> dict[str, Any]:
        """Arguments of `flash_attention`: of queries which are the keys from `index` on."""
        return {"bias": sibling_bias(self, num_keys, index)}


def set_order(parts: Sequence[int | Sequence[int]]) -> SetOrder:
    """The order of a prompt, for one row.

    Args:
      parts: in turn, the number of tokens of plain text, or of each sub-sequence of a set: `[3, (2, 4, 1), 2]`.
    Raises:
      ValueError: a part without a token.
    """
    columns, at, sets = [], 0, 0
    for part in parts:
        plain = isinstance(part, int | np.integer)
        lengths = [int(part)] if plain else [int(length) for length in part]
        if not lengths or min(lengths) < 1:
            raise ValueError(f"part {part!r} of a prompt has no token; allowed: lengths of 1 and above.")
        sets += not plain
        for member, length in enumerate(lengths):
            ids = np.full((2, length), [[0 if plain else sets], [member]])
            columns.append(np.concatenate([at + np.arange(length)[None], ids]))
        at += max(lengths)
    return SetOrder(*(jnp.asarray(a[None], jnp.int32) for a in np.concatenate(columns, axis=1)))


def reordered(found: Segments, before: SegmentState, after: SegmentState, order: SetOrder) -> tuple[Segments, SegmentState]:
    """Segments and the state after them, with the order's positions in place of those of a row."""
    continued = found.runs == before.run[:, None]
    positions = order.positions + jnp.where(continued, before.position[:, None], 0)
    last = found.runs == after.run[:, None]
    return found._replace(positions=positions), after._replace(position=jnp.where(last, positions, -1).max(axis=1) + 1)


def sibling_bias(order: SetOrder, num_keys: int, index: int | Int[Array, ""] = 0) -> Float[Array, "#B 1 L S"]:
    """What attention adds to its logits: -inf where a token would see one of another sub-sequence of its set, else 0.

    Args:
      order: of the queries, which are the keys from `index` on; earlier keys are in no set.
    """
    placed = lambda a: jax.lax.dynamic_update_slice_in_dim(jnp.zeros((a.shape[0], num_keys), a.dtype), a, index, axis=1)
    same_set = (order.sets[..., None] == placed(order.sets)[:, None]) & (order.sets[..., None] > 0)
    siblings = same_set & (order.members[..., None] != placed(order.members)[:, None])
    return jnp.where(siblings, -jnp.inf, 0.0)[:, None]
