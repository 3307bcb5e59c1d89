"""Which query rows travel to which ranks when masks are intervals: made once a batch, shared by all layers.

A row is sent to the ranks that hold a key it sees, and to no other (schedule ``routed`` of query exchange). Every rank
has the batch's intervals, so every rank computes the same routes on the host and no collective is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_lvxattn.exchange.interval import clip_to_rank
from ds_lvxattn.exchange.shards import SequenceShards, ShardLayout


@dataclass(frozen=True)
class Routes:
    """The routes of one rank's rows, and of the rows that it computes for others.

    Rows are counted over the batch: row ``i`` of sequence ``b`` is ``b * s_q + i``.

    Attributes:
        sent: own rows to send to each rank; its own place counts the rows that need not travel.
        received: rows that come from each rank.
        send_rows: int64 ``[sum(sent)]``, the own rows in the order in which they are sent, rank by rank.
        slots: int64 ``[sum(received)]``, where each row that arrives is put in the ``B * r`` rows that are computed,
            ``r`` the most rows of a sequence; or None when they are computed in the order of their arrival.
        start, stop: int32 ``[B, r, ...]``, their ranges of local keys; empty where nothing was put.
        returns: int64 ``[p, B * s_q]``, for each own row the places of its at most ``p`` partial results among those
            that come back; ``sum(sent)`` stands for none.
    """

    sent: tuple[int, ...]
    received: tuple[int, ...]
    send_rows: Tensor
    slots: Tensor | None
    start: Tensor
    stop: Tensor
    returns: Tensor

    @classmethod
    def build(
        cls, start: Tensor, stop: Tensor, layout: ShardLayout, rank: int, device: torch.device | None = None
    ) -> Routes:
        """The routes of ``rank``.

        Args:
            start, stop: int32 ``[n, B, s_max, ...]`` on the CPU, global key ranges of the rows of every rank.
            layout: shards of queries and keys.
            rank: rank in the sequence-parallel group.
            device: where the tensors go.
        """
        ranks, batch = layout.q.ranks, start.shape[1]
        own = layout.q.lengths[rank]
        needed = _visible(start[rank : rank + 1], stop[rank : rank + 1], layout, range(ranks))[:, 0, :, :own]
        flat = needed.flatten(1)
        to, send_rows = flat.nonzero(as_tuple=True)
        first, last = clip_to_rank(start, stop, layout.kv, rank)
        arriving = _visible(start, stop, layout, [rank])[0]
        _, sequence, _ = where = arriving.nonzero(as_tuple=True)
        counts = torch.bincount(sequence, minlength=batch)
        rows = int(counts.max()) if counts.numel() else 0
        # Within its sequence a row keeps the order of arrival.
        order = torch.argsort(sequence, stable=True)
        before = torch.cumsum(counts, 0) - counts
        slots = torch.empty_like(sequence)
        slots[order] = torch.arange(len(sequence)) - before[sequence[order]] + sequence[order] * rows
        bounds = torch.zeros((2, batch * rows, *start.shape[3:]), dtype=torch.int32)
        bounds[0, slots], bounds[1, slots] = first[where], last[where]
        tensors = (
            send_rows,
            slots,
            *bounds.unflatten(1, (batch, rows)),
            _places(flat, to, send_rows),
        )
        send_rows, slots, first, last, returns = (x.to(device, non_blocking=True) for x in tensors)
        return cls(
            tuple(flat.sum(dim=1).tolist()), tuple(arriving.sum(dim=(1, 2)).tolist()),
            send_rows, slots if batch > 1 else None, first, last, returns,
        )  # fmt: skip


def _visible(start: Tensor, stop: Tensor, layout: ShardLayout, ranks: Sequence[int]) -> Tensor:
    """bool ``[len(ranks), n', B, s_max]``: which rows of the ``n'`` ranks given see a key of each of ``ranks``."""
    seen = []
    for rank in ranks:
        first, last = clip_to_rank(start, stop, layout.kv, rank)
        some = last > first
        seen.append(some if some.dim() == 3 else some.any(dim=-1))
    visible = torch.stack(seen)
    if start.shape[0] == layout.q.ranks:
        # What pads a shorter shard is no row.
        row = torch.arange(start.shape[2])
        visible &= (row < torch.tensor(layout.q.lengths)[:, None])[:, None]
    return visible


def _places(needed: Tensor, to: Tensor, rows: Tensor) -> Tensor:
    """``Routes.returns`` from which own rows each rank needs, bool ``[n, B * s_q]``, and their order."""
    sent = len(rows)
    most = max(int(needed.sum(dim=0).max()), 1) if needed.numel() else 1
    # The how-manieth result of its row each one is, in the order of the ranks.
    turn = (torch.cumsum(needed, dim=0) - 1)[to, rows]
    places = torch.full((most, needed.shape[1]), sent)
    places[turn, rows] = torch.arange(sent)
    return places


def routed_rows(start: Tensor, stop: Tensor, layout: ShardLayout) -> tuple[tuple[int, ...], ...]:
    """Rows that each rank sends to each rank, over the batch: ``[from][to]``; rows that stay count on the diagonal.

    Args:
        start, stop: int32 ``[n, B, s_max, ...]``, global key ranges of the rows of every rank.
        layout: shards of queries and keys.
    """
    visible = _visible(start, stop, layout, range(layout.kv.ranks))
    return tuple(tuple(row) for row in visible.sum(dim=(2, 3)).T.tolist())


def visible_work(start: Tensor, stop: Tensor, kv: SequenceShards) -> tuple[int, ...]:
    """Visible pairs of a query row and a key on each rank: what its kernel computes for one head.

    Args:
        start, stop: int32 of any shape, global key ranges of all rows; padding rows are empty ranges.
        kv: shards of the key sequence.
    """
    work = []
    for rank in range(kv.ranks):
        first, last = clip_to_rank(start, stop, kv, rank)
        work.append(int((last - first).sum(dtype=torch.int64)))
    return tuple(work)
