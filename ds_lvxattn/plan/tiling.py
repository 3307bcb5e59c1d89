"""Rows that a feed-forward part, or the layer of logits, takes at once. No torch."""

from __future__ import annotations

from typing import Literal

Tiles = int | Literal["auto"] | None

# Values of a tile, in rows times inner size or vocabulary, where their number follows from the sizes: matrix products
# of so many rows are as fast as larger ones, and what they make is small beside what a layer keeps of a long text.
FEED_FORWARD_VALUES = 1 << 26
LOGITS_VALUES = 1 << 27


def rows_of_tile(rows: int, width: int, tiles: Tiles, values: int) -> int:
    """Rows of a tile, at least 1; all ``rows`` where there is one tile.

    Args:
        rows: of the rank, over its sequences.
        width: inner size of the feed-forward part, or the vocabulary.
        tiles: their number; ``auto``: tiles of about ``values`` values; None: one.
    """
    if tiles is None:
        return max(rows, 1)
    if tiles == "auto":
        return max(min(rows, values // max(width, 1)), 1)
    return max(-(-rows // tiles), 1)
