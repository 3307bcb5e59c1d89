"""Rows ``[B, H, S]`` in the order in which they lie in memory, for kernels that pass over rows once.

A row is the ``D`` values of one head and position. Exchanges store rows sequence first, projections head by head; a
program that takes neighbours in memory reads whole pages either way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl


@triton.jit
def row_offset(row, size_1, size_2, stride_0, stride_1, stride_2, DIMS: tl.constexpr):
    """Offset (int64, in elements) of the rows with running number ``row``, by a ``RowOrder``."""
    if DIMS == 1:
        return row.to(tl.int64) * stride_2
    rest = row // size_2
    inner = (row - rest * size_2).to(tl.int64) * stride_2
    if DIMS == 2:
        return inner + rest.to(tl.int64) * stride_1
    outer = rest // size_1
    return inner + (rest - outer * size_1).to(tl.int64) * stride_1 + outer.to(tl.int64) * stride_0


class RowOrder(NamedTuple):
    """How to number the rows of some tensors alike.

    Args:
        sizes: of the two inner dimensions.
        strides: of each tensor, outermost dimension first.
        dims: dimensions left after those that are one run of memory in every tensor were joined; integer division
            takes more time than reading a row, so kernels are compiled for each count.
    """

    sizes: tuple[int, int]
    strides: list[tuple[int, int, int]]
    dims: int


def row_order(sizes: Sequence[int], *strides: Sequence[int]) -> RowOrder:
    """The order in which the rows of the first tensor lie in memory; all are ``[B, H, S, ...]`` of ``sizes``."""
    dims: list[tuple[int, list[int]]] = []
    for dim in sorted(range(3), key=strides[0].__getitem__, reverse=True):
        size, steps = sizes[dim], [of_tensor[dim] for of_tensor in strides]
        if size == 1:
            continue
        if dims and all(outer == size * inner for outer, inner in zip(dims[-1][1], steps, strict=True)):
            dims[-1] = (dims[-1][0] * size, steps)
        else:
            dims.append((size, steps))
    count = max(1, len(dims))
    dims = [(1, [0] * len(strides))] * (3 - len(dims)) + dims
    by_tensor = [(dims[0][1][i], dims[1][1][i], dims[2][1][i]) for i in range(len(strides))]
    return RowOrder((dims[1][0], dims[2][0]), by_tensor, count)
