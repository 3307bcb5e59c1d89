"""How the backward pass divides its work: chunks of keys, runs of query rows.

``dS`` of a chunk of keys against a run of rows has to fit a bounded workspace, and a chunk has to have key blocks
enough to fill the chip. The longer the run, the fewer key blocks fit: many rows are therefore taken in several runs,
whose gradients of K and V are added up in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ds_lvxattn.kernels.triton.tiles import BackwardConfig

WORKSPACE_BYTES = 2 << 30
# Full rounds of programs that a chunk should have: with fewer, the last round leaves too much of the chip idle.
ROUNDS = 2
# Of a run if all is visible, at least: what a mask hides the host does not know, and each run takes it a millisecond.
RUN_OPERATIONS = 1e12
LEAST_TILES = 2  # of rows at once, however small the workspace
RUN_GRANULE = 64  # runs begin at addresses that the compiler takes for aligned, as it does the whole tensors'


class ChunkPlan(NamedTuple):
    """How the keys are taken in chunks whose ``dS`` fits the workspace.

    Args:
        chunks: launches that suffice whatever the mask; chunks past the last key block are empty.
        blocks: key blocks a chunk when every key is visible; else the fewest that fill one.
        slots: blocks of ``dS`` that the workspace holds for one key/value head.
        edges: int32 ``[chunks + 1]``, first key block of each chunk; None when every key is visible.
        base: int32 ``[chunks, B, tiles]``; key block ``n`` and tile ``t`` have slot ``base[t] + n``.
    """

    chunks: int
    blocks: int
    slots: int
    edges: Tensor | None
    base: Tensor | None

    def launched_blocks(self, chunk: int, blocks: int) -> int:
        """Key blocks, of ``blocks`` in all, that the launch of ``chunk`` has to allow for.

        With a mask only the device knows the edges, and the host does not wait for them: it allows for all blocks
        that the chunks before cannot have taken. The programs past the edge, or of a chunk past the last block,
        end at once (16 microseconds a launch over 16,384 programs on an H200).
        """
        left = blocks - chunk * self.blocks
        return min(self.blocks, left) if self.edges is None else left


def plan_dense(blocks: int, batch: int, heads_kv: int, tiles: int, room: int, programs: int) -> ChunkPlan:
    """Equal chunks: the key blocks that ``room`` slots hold, rounded down to full rounds of programs."""
    fit = max(1, min(blocks, room // (batch * tiles)))
    rounds = fit * batch * heads_kv // programs
    if fit < blocks and rounds > 0:
        fit = max(1, rounds * programs // (batch * heads_kv))
    return ChunkPlan(-(-blocks // fit), fit, fit * batch * tiles, None, None)


def plan_masked(bounds: Tensor, count: Tensor, block_n: int, room: int) -> ChunkPlan:
    """Chunks of about equal visible work, found on the device: only visible (block, tile) pairs take a slot.

    Args:
        bounds: int32 ``[B, 4, tiles]`` of ``pack_rows_kernel``.
        count: int32 ``[B, key blocks, 2]`` of ``seen_tiles_kernel``.
        block_n: keys a block.
        room: slots of the workspace a key/value head.
    """
    batch, blocks, _ = count.shape
    tiles = bounds.shape[2]
    # A chunk ends after the block that fills it, so one block's worth of slots is kept back.
    fill = max(1, room - batch * tiles)
    chunks = -(-blocks * batch * tiles // fill)
    per_block = count.sum((0, 2), dtype=torch.int32)
    before = per_block.cumsum(0, dtype=torch.int32) - per_block
    marks = torch.arange(chunks + 1, dtype=torch.int32, device=count.device) * fill
    edges = torch.searchsorted(before, marks, out_int32=True)
    edges[-1:].fill_(blocks)  # an assignment would copy from the host, and wait for it
    last = (bounds[:, 1] + block_n - 1) // block_n
    first = torch.minimum(bounds[:, 0] // block_n, last)
    low = torch.maximum(first, edges[:-1, None, None])
    length = (torch.minimum(last, edges[1:, None, None]) - low).clamp_(min=0).flatten(1)
    base = (length.cumsum(1, dtype=torch.int32) - length).view_as(low) - low
    return ChunkPlan(chunks, fill // (batch * tiles), fill + batch * tiles, edges, base)


def rows_at_once(
    rows: int, keys: int, group: int, batch: int, heads_kv: int, head_dims: tuple[int, int], config: BackwardConfig,
    room: int, units: int,
) -> int:  # fmt: skip
    """Query rows of a run, at most, so that a chunk of keys has programs for ``ROUNDS`` rounds over the chip.

    Args:
        rows, keys: query rows and keys in all.
        group: query heads of a key head.
        batch, heads_kv, head_dims: sequences, key heads, head sizes of keys and of values.
        config: the tiles.
        room: slots of the workspace a key/value head.
        units: multiprocessors.
    """
    wanted = -(-ROUNDS * units * config.resident // (batch * heads_kv))
    blocks = 1 + min(wanted, -(-keys // config.block_n))  # one more is kept back, see ``plan_masked``
    tiles = max(room // (batch * blocks), LEAST_TILES)
    runs = -(-rows // max(tiles * config.tile // group, 1))
    key, value = head_dims
    operations = 2.0 * (3 * key + 2 * value) * batch * heads_kv * group * rows * keys
    runs = max(min(runs, int(operations / RUN_OPERATIONS)), 1)
    run = -(-rows // (runs * RUN_GRANULE)) * RUN_GRANULE
    return min(run, rows)
