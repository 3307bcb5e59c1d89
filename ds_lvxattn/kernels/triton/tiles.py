"""Tiles of the kernels by head size, pattern of the ranges and chip: every number that was tuned, in one place.

``benchmarks/tiles.py`` measures others. Nothing is tuned at run time.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from ds_lvxattn.kernels.pattern import FRAME, SLIDING


class ForwardConfig(NamedTuple):
    """Tile of one program and how many programs a multiprocessor holds at once."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    resident: int


class BackwardConfig(NamedTuple):
    """Tiles of the kernels.

    Args:
        tile: rows that the mask is resolved to, a multiple of ``block_m``; also the rows of a ``dQ`` program.
        block_m, block_n: rows and keys of one step.
        num_warps, num_stages, max_registers: of the kernel that owns keys.
        resident: its programs that a multiprocessor holds at once.
        query_warps, query_stages: of the kernel that owns rows.
        query_registers: of the same, where ``dQ`` comes from the workspace.
        keep_ds: with a mask, whether ``dQ`` comes from the workspace or from scores computed again.
        together: of the latter, whether both kernels are one; ``tile`` is ``block_m`` then, and the warps and stages of
            both are the first's.
    """

    tile: int
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    resident: int
    query_warps: int
    query_stages: int
    max_registers: int | None = None
    query_registers: int | None = None
    keep_ds: bool = True
    together: bool = False


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Whether tiles may be sized for compute capability 9.0's matrix units and shared memory."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def split_head(head_dim: int) -> tuple[int, int]:
    """A head size as two blocks of columns, powers of two that hold it; the second is 0 where one fits well.

    Sizes of vision encoders: 72 and 80 are 64 + 16, 88 and 96 are 64 + 32, where 128 would compute up to 1.8 times as
    much. Keys of latent attention: 192 is 128 + 64, where 256 would compute a third more.
    """
    if 64 < head_dim <= 96:
        return 64, 16 if head_dim <= 80 else 32
    if 128 < head_dim <= 192:
        return 128, 32 if head_dim <= 160 else 64
    return 1 << (head_dim - 1).bit_length(), 0


def split_head_backward(head_dim: int) -> tuple[int, int]:
    """As ``split_head``, for the backward pass: above 128 one block, because 128 + 32 columns end in an illegal memory
    access on Hopper."""
    return split_head(head_dim) if head_dim <= 128 else (256, 0)


def forward_config(head_dims: tuple[int, int], itemsize: int, pattern: str | None, hopper: bool) -> ForwardConfig:
    """Tiles of the forward pass, for head sizes of keys and of values; ``pattern`` is None where all is visible."""
    head_dim = max(head_dims)
    if itemsize == 4:
        return ForwardConfig(32, 32, 4, 1, 1)
    if not hopper:
        if head_dim <= 64:
            return ForwardConfig(128, 64, 8, 2, 1)
        return ForwardConfig(128, 32, 8, 2, 1) if head_dim <= 128 else ForwardConfig(64, 32, 8, 1, 1)
    if head_dim <= 64:
        return ForwardConfig(128, 64, 4, 3, 2) if pattern is None else ForwardConfig(64, 64, 4, 2, 2)
    if head_dim <= 96:
        return ForwardConfig(128, 64, 4, 3, 3)
    if head_dim <= 128:
        return ForwardConfig(64, 64, 4, 3, 2) if pattern in (SLIDING, FRAME) else ForwardConfig(128, 64, 4, 2, 2)
    if head_dims[0] <= 192 and head_dims[1] <= 128:  # 128 KiB of shared memory: Q, and two stages of K and V
        return ForwardConfig(128, 64, 8, 2, 1)
    return ForwardConfig(128, 32, 8, 2, 1)


def backward_config(head_dims: tuple[int, int], itemsize: int, pattern: str | None, hopper: bool) -> BackwardConfig:
    """Tiles of the backward pass, for head sizes of keys and of values; ``pattern`` is None where all is visible."""
    head_dim = max(head_dims)
    if itemsize == 4:
        return BackwardConfig(32, 32, 32, 4, 1, 1, 4, 1, keep_ds=head_dim > 64)
    if not hopper:
        if head_dim <= 64:
            return BackwardConfig(64, 32, 64, 8, 2, 1, 8, 2, keep_ds=False)
        if head_dim <= 128:
            return BackwardConfig(64, 32, 64, 8, 2, 1, 8, 2)
        return BackwardConfig(32, 32, 32, 8, 1, 1, 8, 1)
    if head_dim <= 64:
        if pattern == FRAME:  # too small for Hopper's matrix units, whose tiles would compute far more that is hidden
            return BackwardConfig(16, 16, 64, 4, 3, 3, 4, 3, keep_ds=False, together=True)
        if pattern is not None:
            # 168 registers let three programs share a multiprocessor, which hides the start of short visits.
            return BackwardConfig(64, 64, 64, 4, 2, 3, 4, 3, max_registers=168, keep_ds=False)
        return BackwardConfig(128, 64, 64, 4, 2, 3, 8, 4, max_registers=168, query_registers=128)
    if head_dim <= 128:  # 128 registers let two programs of dQ share a multiprocessor; wider heads need more to compile
        return BackwardConfig(128, 64, 64, 4, 2, 2, 8, 4, query_registers=128)
    if head_dims[0] <= 192 and head_dims[1] <= 128:  # 153 KiB: K, V, two stages of Q and dO, and a tile of dS
        return BackwardConfig(128, 64, 64, 8, 2, 1, 8, 3)
    return BackwardConfig(64, 32, 64, 8, 1, 1, 8, 2)
