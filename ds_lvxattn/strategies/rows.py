"""Query rows on the wire: sequence first and padded to the longest shard, so that every rank sends alike.

Sequence-first storage makes the rows of all ranks one ``[n * s_max, B, H, D]`` tensor whose attention layout
``[B, H, n * s_max, D]`` is a view. Padding rows are zeros: they add nothing to any gradient and are dropped
by their owner.
"""

from __future__ import annotations

from torch import Tensor

from ds_lvxattn.comm import Communicator
from ds_lvxattn.interval import clip_to_rank
from ds_lvxattn.shards import SequenceShards


def to_wire(x: Tensor, rows: int) -> Tensor:
    """``[B, H, s, ...]`` to contiguous ``[rows, B, H, ...]``, zeros behind the ``s`` real rows."""
    x = x.movedim(2, 0)
    if x.shape[0] == rows:
        return x.contiguous()
    padded = x.new_zeros((rows, *x.shape[1:]))
    padded[: x.shape[0]] = x
    return padded


def gather_rows(x: Tensor, comm: Communicator, rows: int, what: str) -> Tensor:
    """``[B, H, s, ...]`` of each rank to all rows, ``[n * rows, B, H, ...]``."""
    return comm.all_gather(to_wire(x, rows), what).flatten(0, 1)


def return_rows(x: Tensor, comm: Communicator, own: int, what: str) -> Tensor:
    """Send ``[B, H, n * rows, ...]`` computed for all ranks to the owners of the rows.

    Returns:
        ``[n, B, H, own, ...]``: what each rank computed for this rank's own rows.
    """
    received = comm.all_to_all(x.movedim(2, 0).unflatten(0, (comm.ranks, -1)), what)
    return received[:, :own].movedim(1, 3)


def attention_layout(wire: Tensor) -> Tensor:
    """``[S, B, H, ...]`` as ``[B, H, S, ...]``, a view."""
    return wire.movedim(0, 2)


def local_ranges(
    start: Tensor | None, stop: Tensor | None, kv: SequenceShards, rank: int
) -> tuple[Tensor | None, Tensor | None]:
    """Key ranges of all rows, ``[n, B, s_max]`` global, to ``[B, n * s_max]`` local to ``rank``."""
    if start is None or stop is None:
        return None, None
    first, last = clip_to_rank(start, stop, kv, rank)
    return first.transpose(0, 1).flatten(1), last.transpose(0, 1).flatten(1)
