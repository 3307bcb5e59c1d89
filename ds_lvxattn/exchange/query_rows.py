"""Query rows on the wire: sequence first and padded to the longest shard, so that every rank sends alike.

Sequence-first storage makes the rows of all ranks one ``[n * s_max, B, H, D]`` tensor whose attention layout
``[B, H, n * s_max, D]`` is a view. Padding rows are zeros: they add nothing to any gradient and are dropped
by their owner.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ds_lvxattn.exchange.comm import Communicator, Part, Transfer


def gather_buffer(x: Tensor, comm: Communicator, rows: int) -> Tensor:
    """Where ``[B, H, s, ...]`` of every rank is gathered, padded to ``rows``: ``[n * rows, B, H, ...]``."""
    batch, heads, _, *rest = x.shape
    return x.new_empty((comm.ranks * rows, batch, heads, *rest))


def start_gather(sent: Sequence[tuple[str, Tensor, Tensor]], comm: Communicator) -> Transfer:
    """Start gathering ``[B, H, s, ...]`` of every rank, several tensors in one launch.

    Args:
        sent: for each tensor the name of its contents, the tensor, and its ``gather_buffer``.
    """
    buffers = []
    for what, x, gathered in sent:
        buffer = gathered.unflatten(0, (comm.ranks, -1))
        slot, own = buffer[comm.rank], x.shape[2]
        slot[:own].copy_(x.movedim(2, 0))
        slot[own:].zero_()
        buffers.append((what, buffer))
    return comm.start_all_gather(buffers)


def start_return(computed: Sequence[tuple[str, Tensor]], comm: Communicator, own: int) -> tuple[list[Tensor], Transfer]:
    """Start sending ``[B, H, n * rows, ...]``, computed for all ranks, to the owners of the rows; in one launch.

    Returns:
        ``[n, B, H, own, ...]`` for each tensor, what every rank computed for this rank's own rows, and the handle to
        wait for before reading them.
    """
    parts = []
    for what, x in computed:
        wire = x.movedim(2, 0).contiguous()
        parts.append(Part(what, wire, torch.empty_like(wire)))
    transfer = comm.start_all_to_all(parts)
    arriving = [part.receive.unflatten(0, (comm.ranks, -1))[:, :own].movedim(1, 3) for part in parts]
    return arriving, transfer


def attention_layout(wire: Tensor) -> Tensor:
    """``[S, B, H, ...]`` as ``[B, H, S, ...]``, a view."""
    return wire.movedim(0, 2)
