"""Which blocks of keys a tile of query rows sees, as lists on the device; the host waits for nothing."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_FAR = 2**31 - 1  # above every key position


class BlockLists(NamedTuple):
    """For every line (a tile of rows, or, transposed, a block of keys) the blocks that it visits, ascending.

    Args:
        part_count: int32 ``[B, 1, lines]``, blocks of which only some (row, key) pairs are visible.
        part: int32 ``[B, 1, lines, blocks]``; those after the count mean nothing.
        whole_count, whole: likewise, blocks of which all pairs are visible.
    """

    part_count: Tensor
    part: Tensor
    whole_count: Tensor
    whole: Tensor


def padded_ranges(start: Tensor, stop: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """New ``start, stop`` with columns up to a multiple of ``rows``; what is added repeats the last row."""
    missing = -start.shape[1] % rows
    return tuple(torch.cat((x, x[:, -1:].expand(-1, missing)), dim=1) for x in (start, stop))  # type: ignore[return-value]


def block_lists(start: Tensor, stop: Tensor, keys: int, rows_of_tile: int, keys_of_block: int) -> tuple[Tensor, Tensor]:
    """``part, whole``: bool ``[B, tiles, blocks]``, blocks that a tile of rows sees in part and as a whole.

    Args:
        start, stop: int32 ``[B, S]``, ranges of the rows, ``S`` a multiple of ``rows_of_tile``; see ``padded_ranges``.
        keys: keys in all. A block that ends behind them is never whole.
        rows_of_tile, keys_of_block: rows of a tile, keys of a block.
    """
    start, stop = (x.unflatten(1, (-1, rows_of_tile)) for x in (start, stop))
    sees = start < stop
    first = torch.where(sees, start, _FAR).amin(dim=2, keepdim=True)
    last = torch.where(sees, stop, 0).amax(dim=2, keepdim=True)
    # A row that sees nothing leaves its tile no whole block: its start is no lower than its stop.
    all_first, all_last = start.amax(dim=2, keepdim=True), stop.amin(dim=2, keepdim=True)
    block = torch.arange(0, keys, keys_of_block, dtype=start.dtype, device=start.device)
    whole = (block >= all_first) & (block + keys_of_block <= all_last)
    part = (block < last) & (block + keys_of_block > first) & ~whole
    return part, whole


def as_lists(part: Tensor, whole: Tensor) -> BlockLists:
    """The lists of bool ``[B, lines, blocks]``."""
    return BlockLists(*_list_of(part), *_list_of(whole))


def _list_of(marked: Tensor) -> tuple[Tensor, Tensor]:
    count = marked.sum(dim=2, dtype=torch.int32)
    order = torch.argsort(~marked, dim=2, stable=True)
    order = order.to(torch.int32, memory_format=torch.contiguous_format)
    return count.contiguous().unsqueeze(1), order.unsqueeze(1)
