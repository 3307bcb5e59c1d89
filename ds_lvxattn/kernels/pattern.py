"""How the key ranges of neighbouring query rows lie to each other, which tiles and kernels are chosen by.

A tile of rows computes every key that any of its rows sees: where ranges move fast from row to row, small tiles compute
less that is hidden, and where they hardly move, large ones are faster. The host knows it where it makes the ranges of a
batch; kernels are told, and never look, as they would wait for the device.
"""

from __future__ import annotations

from torch import Tensor

UNKNOWN = "unknown"  # of ranges that came as tensors alone
ALIKE = "alike"  # hundreds of rows see nearly the same keys
GROWING = "growing"  # the same, and later rows see more
SLIDING = "sliding"  # the ranges move on by their own length within some hundred rows
FRAME = "frame"  # they do so within a tile of rows, as where each row sees one frame
PATTERNS = (UNKNOWN, ALIKE, GROWING, SLIDING, FRAME)

# Rows within which ranges move on by their own length.
ROWS_OF_FRAME = 64
ROWS_OF_SLIDING = 1024
GROWN = 1.25  # keys that a row of the second half sees, over those of one of the first


def pattern_of(start: Tensor, stop: Tensor) -> str:
    """The pattern of some rows.

    Args:
        start, stop: int32 ``[..., rows]`` on the CPU, rows in the order in which a kernel takes them. Those that see
            nothing do not count.
    """
    length = (stop - start).clamp_(min=0)
    # The share of its own length by which the range of a row moves on to the next.
    step = drift_of(start, stop) / 2 / max(_mean(length), 1.0)
    if step * ROWS_OF_FRAME > 1:
        return FRAME
    if step * ROWS_OF_SLIDING > 1:
        return SLIDING
    half = length.shape[-1] // 2
    return GROWING if 0 < GROWN * _mean(length[..., :half]) < _mean(length[..., half:]) else ALIKE


def drift_of(start: Tensor, stop: Tensor) -> float:
    """Keys by which the two ends of a row's range move from a row to the next, both added, on average.

    Args:
        start, stop: as for ``pattern_of``.
    """
    sees = stop > start
    pairs = sees[..., 1:] & sees[..., :-1]
    moved = int(((start.diff().abs_() + stop.diff().abs_()) * pairs).sum())
    return moved / max(int(pairs.sum()), 1)


def in_kernel_order(start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
    """Own rows ``[B, rows]`` as they are; of ``[n, B, s_max]``, those of every rank, one rank behind the other."""
    if start.dim() == 2:
        return start, stop
    return start.transpose(0, 1).flatten(1, 2), stop.transpose(0, 1).flatten(1, 2)


def _mean(length: Tensor) -> float:
    """Over the rows that see something."""
    return int(length.sum()) / max(int((length > 0).sum()), 1)
