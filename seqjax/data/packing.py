"""Documents into rows of one length: a plan made once, so that any row is found without reading the rows before it."""

from __future__ import annotations

import bisect
import dataclasses

import numpy as np

from seqjax.config import ConfigError, choose


@dataclasses.dataclass(frozen=True)
class PackingPlan:
    """Which pieces of which documents make up each row.

    Row `r` is the pieces `row_starts[r]` to `row_starts[r + 1] - 1`, side by side, each starting at the next multiple of
    `alignment`; what they leave of it is padding.

    Attributes:
      row_length: tokens in a row.
      row_starts: `[R + 1]` int64, first piece of each row.
      document: `[P]` int64, the document each piece is of.
      start: `[P]` int64, where in its document the piece starts.
      length: `[P]` int64, tokens of the piece, at least 1.
      alignment: of the pieces' starts within their row.
    """

    row_length: int
    row_starts: np.ndarray
    document: np.ndarray
    start: np.ndarray
    length: np.ndarray
    alignment: int = 1

    @property
    def num_rows(self) -> int:
        return len(self.row_starts) - 1

    def pieces(self, row: int) -> list[tuple[int, int, int]]:
        """`(document, start, length)` of the pieces of a row, in their order."""
        here = slice(self.row_starts[row], self.row_starts[row + 1])
        return list(zip(self.document[here].tolist(), self.start[here].tolist(), self.length[here].tolist()))


def plan_packing(lengths: np.ndarray, row_length: int, strategy: str = "split", alignment: int = 1) -> PackingPlan:
    """Plan rows that hold every token of every document exactly once.

    Args:
      lengths: `[D]` token counts of the documents; empty ones take no room.
      row_length: tokens in a row.
      strategy: "split" joins the documents in order and cuts the stream at row ends: no padding but in the last row.
        "best_fit" keeps documents that fit a row whole: longer ones give full rows and a remainder, then the longest
        piece first takes the fullest row that has room for it (best-fit-decreasing, Ding et al. 2024, "Fewer
        Truncations Improve Language Modeling", section 3).
      alignment: documents start at multiples of it in their row, behind padding; a divisor of `row_length`.
    Raises:
      ValueError: a negative length, or `row_length` below 1.
      ConfigError: unknown strategy, or an alignment that does not divide the row.
    """
    lengths = np.asarray(lengths, np.int64)
    if row_length < 1 or (lengths < 0).any():
        raise ValueError(f"row_length={row_length} and every document length must be 1 or more, and 0 or more.")
    check_alignment(row_length, alignment)
    padded = -(-lengths // alignment) * alignment
    row, document, start, length = choose(STRATEGIES, strategy, "data.packing")(padded, row_length)
    length = np.minimum(length, lengths[document] - start)  # without the padding
    num_rows = int(row[-1]) + 1 if row.size else 0
    return PackingPlan(row_length, np.searchsorted(row, np.arange(num_rows + 1)), document, start, length, alignment)


def pack_row(plan: PackingPlan, row: int, tokens: np.ndarray, offsets: np.ndarray, bos_id: int) -> dict[str, np.ndarray]:
    """One row as a language-modelling example: each token is predicted from those before it in its own document.

    The input at the first token of a document is `bos_id`; where a row end cut a document, the next piece's first input
    is the document's previous token, so that no token goes unpredicted.

    Args:
      plan: made from the lengths of the documents, `np.diff(offsets)`.
      tokens: `[N]` integers, all documents end to end.
      offsets: `[D + 1]`, where in `tokens` each document begins.
    Returns:
      `inputs`, `targets`, `segment_ids` `[row_length]` int32 and `weights` `[row_length]` float32; padding is all 0, but
      that between documents, and what aligns the end of the last, has the segment id of the document before it.
    """
    inputs, targets, segment_ids = np.zeros((3, plan.row_length), np.int32)
    weights = np.zeros(plan.row_length, np.float32)
    place = 0
    for segment, (document, start, length) in enumerate(plan.pieces(row), 1):
        end = place + length
        first = offsets[document] + start
        targets[place:end] = tokens[first : first + length]
        inputs[place + 1 : end] = targets[place : end - 1]
        inputs[place] = tokens[first - 1] if start else bos_id
        weights[place:end] = 1
        aligned_end = -(-end // plan.alignment) * plan.alignment
        # A segment that started where the document ends would start within its last patch.
        segment_ids[place:aligned_end] = segment
        place = aligned_end
    return {"inputs": inputs, "targets": targets, "weights": weights, "segment_ids": segment_ids}


def check_alignment(row_length: int, alignment: int) -> None:
    """Raise a ConfigError unless segments can start at multiples of `alignment` in rows of `row_length`."""
    if alignment < 1 or row_length % alignment:
        raise ConfigError(
            f"data.segment_alignment={alignment} does not divide rows of {row_length} tokens; a model that reads patches "
            "asks for its patch size. Allowed: divisors of the row's length."
        )


def _split(lengths: np.ndarray, row_length: int) -> tuple[np.ndarray, ...]:
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    # A piece begins where a document or a row begins; `unique` drops documents without tokens.
    begins = np.unique(np.concatenate([(ends - lengths)[lengths > 0], np.arange(0, total, row_length)]))
    document = np.searchsorted(ends, begins, side="right")
    start = begins - (ends - lengths)[document]
    return begins // row_length, document, start, np.diff(begins, append=total)


def _best_fit(lengths: np.ndarray, row_length: int) -> tuple[np.ndarray, ...]:
    pieces = -(-lengths // row_length)
    document = np.repeat(np.arange(len(lengths)), pieces)
    start = (np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * row_length
    length = np.minimum(row_length, lengths[document] - start)
    row = _best_fit_rows(length, row_length)
    order = np.argsort(row, kind="stable")
    return row[order], document[order], start[order], length[order]


def _best_fit_rows(length: np.ndarray, row_length: int) -> np.ndarray:
    """`[P]`: the row of each piece, longest pieces placed first."""
    rows = np.empty(len(length), np.int64)
    with_room: dict[int, list[int]] = {}  # free tokens -> rows with just that many
    rooms: list[int] = []  # the keys of with_room, sorted
    num_rows = 0
    for piece in np.argsort(-length, kind="stable").tolist():
        size = int(length[piece])
        place = bisect.bisect_left(rooms, size)
        if place == len(rooms):
            room, row, num_rows = row_length, num_rows, num_rows + 1
        else:
            room = rooms[place]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[place]
        rows[piece] = row
        if room > size:
            if room - size not in with_room:
                bisect.insort(rooms, room - size)
            with_room.setdefault(room - size, []).append(row)
    return rows


STRATEGIES = {"split": _split, "best_fit": _best_fit}
