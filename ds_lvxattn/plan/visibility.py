"""What an interval mask leaves to compute, and how evenly it lies on the ranks: a few numbers for the cost model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MASKS = ("full", "growing", "frame")


@dataclass(frozen=True)
class Visibility:
    """A mask, summed up.

    Attributes:
        masked: whether rows have intervals at all (it decides the kernel).
        share: visible (row, key) pairs over all pairs.
        busiest_keys: pairs on the keys of the rank that has most, over the mean: the load where queries travel.
        busiest_step: pairs of the rank that has most, summed over the steps of a ring, over the mean: the load where
            ranks wait for each other at each step.
        drift: keys by which the two ends of a row's range move from a row to the next, both added; a tile of rows
            computes what any of its rows sees.
        rows_seen: rows that see something on a rank, on the rank that most see, over all rows.
    """

    masked: bool = False
    share: float = 1.0
    busiest_keys: float = 1.0
    busiest_step: float = 1.0
    drift: float = 0.0
    rows_seen: float = 1.0


FULL = Visibility()


def growing(queries: int, keys: int, ranks: int) -> Visibility:
    """Row ``i`` sees the keys up to its own place: causal self-attention, or all frames so far."""
    uneven = 2 - 1 / ranks  # the first rank's keys are seen by nearly all rows; at each step of a ring some rank has all
    return Visibility(True, 0.5, uneven, uneven, keys / max(queries, 1), 1.0)


def one_frame(queries: int, keys: int, ranks: int, frame_keys: int) -> Visibility:
    """Every row sees one frame, the rows evenly spread over the frames (OpenFlamingo's immediate media)."""
    return Visibility(True, min(frame_keys / max(keys, 1), 1.0), 1.0, 1.0, 2 * keys / max(queries, 1), 1 / ranks)


def of_mask(name: str, queries: int, keys: int, ranks: int, frame_keys: int) -> Visibility:
    """A mask by its name: ``full``, ``growing`` or ``frame``."""
    if name == "full":
        return Visibility(masked=True)
    return growing(queries, keys, ranks) if name == "growing" else one_frame(queries, keys, ranks, frame_keys)


def of_bounds(start: Any, stop: Any, q_lengths: Sequence[int], local: Sequence[tuple[Any, Any]]) -> Visibility:
    """The mask of a batch.

    Args:
        start, stop: integer arrays ``[B, S_q]``, global key range of every row.
        q_lengths: rows of every rank, contiguous in rank order.
        local: for every rank, ``start, stop`` clipped to its own keys, like ``start`` and ``stop``.
    """
    import numpy as np

    ranks, rows = len(q_lengths), start.shape[1]
    edges = np.concatenate(([0], np.cumsum(q_lengths)))
    width = np.stack([np.maximum(b - a, 0) for a, b in local])  # [n, B, S_q]
    pairs = width.sum(1)  # [n, S_q]
    blocks = np.stack([pairs[:, a:b].sum(1) for a, b in zip(edges[:-1], edges[1:], strict=True)])  # rows of, keys of
    total, keys = int(pairs.sum()), int(max(np.max(stop, initial=0), 1))
    if total == 0:
        return Visibility(True, 0.0, 1.0, 1.0, 0.0, 0.0)
    rank = np.arange(ranks)
    steps = sum(int(blocks[rank, (rank - step) % ranks].max()) for step in range(ranks))
    moved = np.abs(np.diff(start, axis=1)).mean() + np.abs(np.diff(stop, axis=1)).mean() if rows > 1 else 0.0
    return Visibility(
        masked=True,
        share=total / (start.size * keys),
        busiest_keys=float(blocks.sum(0).max()) * ranks / total,
        busiest_step=steps * ranks / total,
        drift=float(min(moved, keys)),
        rows_seen=float((width > 0).any(1).sum(1).max()) / rows,
    )
