"""Rows ``[B, H, S]`` in the order in which they lie in memory, for kernels that pass over rows once.

A row is the ``D`` values of one head and position. Exchanges store rows sequence first, projections head by head; a
program that takes neighbours in memory reads whole pages either way.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def row_offset(row, size_1, size_2, stride_0, stride_1, stride_2):
    """Offset (int64, in elements) of the rows with running number ``row``; see ``row_sizes``, ``row_strides``."""
    rest = row // size_2
    return (
        (rest // size_1).to(tl.int64) * stride_0
        + (rest % size_1).to(tl.int64) * stride_1
        + (row % size_2).to(tl.int64) * stride_2
    )


def row_order(x: Tensor) -> list[int]:
    """The dimensions of ``x [B, H, S, ...]`` that count rows, the one of widest stride first."""
    return sorted(range(3), key=lambda dim: (x.stride(dim), x.shape[dim]), reverse=True)


def row_sizes(x: Tensor, order: list[int]) -> tuple[int, int]:
    """Sizes of the two inner row dimensions, as ``row_offset`` takes them."""
    return x.shape[order[1]], x.shape[order[2]]


def row_strides(x: Tensor, order: list[int]) -> list[int]:
    """Strides of ``x [B, H, S, ...]`` in the order of ``row_order``."""
    return [x.stride(dim) for dim in order]
