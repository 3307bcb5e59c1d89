"""Which samples of a micro-batch share a row of it, and where in the row each lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """The tokens ``[start, stop)`` of a row."""

    row: int
    start: int
    stop: int

    @property
    def place(self) -> tuple[int, slice]:
        """What takes them out of an array ``[B, S]``."""
        return self.row, slice(self.start, self.stop)


def first_fit(lengths: Sequence[int], budget: int | None) -> tuple[Span, ...]:
    """Where samples of ``lengths`` tokens lie: each in the first row that has room for it.

    Args:
        budget: tokens of a row that samples share; a longer sample has a row of its own. None: every sample has.
    """
    spans: list[Span] = []
    filled: list[int] = []  # tokens of each row
    for length in lengths:
        row = len(filled)
        if budget is not None:
            row = next((row for row, tokens in enumerate(filled) if tokens + length <= budget), row)
        if row == len(filled):
            filled.append(0)
        spans.append(Span(row, filled[row], filled[row] + length))
        filled[row] += length
    return tuple(spans)


def samples_of_rows(spans: Sequence[Span]) -> list[list[int]]:
    """The samples of each row, in the order in which they lie there; ``first_fit`` places later ones behind."""
    rows: list[list[int]] = [[] for _ in range(max(span.row for span in spans) + 1)]
    for sample, span in enumerate(spans):
        rows[span.row].append(sample)
    return rows
