"""Query rows on the wire: sequence first and padded to the longest shard, so that every rank sends alike.

Sequence-first storage makes the rows of all ranks one ``[n * s_max, B, H, D]`` tensor whose attention layout
``[B, H, n * s_max, D]`` is a view. Padding rows are zeros: they add nothing to any gradient and are dropped
by their owner.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ds_lvxattn.exchange.comm import AllToAllTensor, Communicator, Transfer, communicator_by_name

# Parts of the same rows from several ranks, ``[k, B, H, s, ...]`` of each kind, to one, ``[B, H, s, ...]``.
Combine = Callable[[list[Tensor]], list[Tensor]]


class Waiting(Protocol):
    """Something on its way; ``wait`` orders what follows on the current stream after it."""

    def wait(self) -> None: ...


class FlatRows:
    """Rows of all ranks to every rank and results back to their owners, in one hop.

    Attributes:
        rank, ranks: in the whole group.
    """

    def __init__(self, comm: Communicator) -> None:
        self.comm, self.rank, self.ranks = comm, comm.rank, comm.ranks

    def gather(self, sent: Sequence[tuple[str, Tensor, Tensor]], rows: int) -> Waiting:
        """Start gathering ``[B, H, s, ...]``; buffers are ``[n * rows, B, H, ...]``, rank by rank."""
        return start_gather(sent, self.comm)

    def give_back(
        self, computed: Sequence[tuple[str, Tensor]], rows: int, own: int, combine: Combine
    ) -> tuple[list[Tensor], Waiting]:
        """Start sending ``[B, H, n * rows, ...]`` home; ``[k, B, H, own, ...]`` of each kind arrive."""
        return start_return(computed, self.comm, own)


class NodeRows:
    """The same in two hops: rows cross to a node once and spread inside; one combined result crosses back.

    The rows of all ranks lie by place in the node first, then by node: ``[inner_size, nodes, rows]``.
    """

    def __init__(self, inner: Communicator, outer: Communicator) -> None:
        self.inner, self.outer = inner, outer
        self.rank, self.ranks = outer.rank * inner.ranks + inner.rank, inner.ranks * outer.ranks

    def gather(self, sent: Sequence[tuple[str, Tensor, Tensor]], rows: int) -> Waiting:
        # What comes across lands where the second hop sends it from.
        across = [
            (what, x, buffer.unflatten(0, (self.inner.ranks, -1))[self.inner.rank]) for what, x, buffer in sent
        ]  # fmt: skip
        spread = [(what, buffer) for what, _, buffer in sent]
        return _Hops(start_gather(across, self.outer), lambda: self.inner.start_all_gather(spread))

    def give_back(
        self, computed: Sequence[tuple[str, Tensor]], rows: int, own: int, combine: Combine
    ) -> tuple[list[Tensor], Waiting]:
        # The links of a node are fast: the first hop is waited for, so that the slow one starts as early as it can.
        parts, inside = start_return(computed, self.inner, self.outer.ranks * rows)
        inside.wait()
        names = [what for what, _ in computed]
        return start_return(list(zip(names, combine(parts), strict=True)), self.outer, own)


class _Hops:
    """A hop that starts when the one before it has arrived.

    Not before it is waited for: a collective of the inner group that waits for the slow link would hold up the results
    of the group of heads before, which want to cross as soon as that link is free.
    """

    def __init__(self, first: Waiting, then: Callable[[], Waiting]) -> None:
        self.first, self.then = first, then

    def wait(self) -> None:
        self.first.wait()
        self.then().wait()


def rows_by_name(group: str, inner: str) -> FlatRows | NodeRows:
    """The exchange over ``group``, or over both levels of a grid: ``group`` between nodes, ``inner`` inside."""
    outer = communicator_by_name(group)
    return NodeRows(communicator_by_name(inner), outer) if inner else FlatRows(outer)


def gather_buffer(x: Tensor, ranks: int, rows: int) -> Tensor:
    """Where ``[B, H, s, ...]`` of every rank is gathered, padded to ``rows``: ``[n * rows, B, H, ...]``."""
    batch, heads, _, *rest = x.shape
    return x.new_empty((ranks * rows, batch, heads, *rest))


def start_gather(sent: Sequence[tuple[str, Tensor, Tensor]], comm: Communicator) -> Transfer:
    """Start gathering ``[B, H, s, ...]`` of every rank, several tensors in one launch.

    Args:
        sent: for each tensor the name of its contents, the tensor, and its ``gather_buffer``.
    """
    for _, x, gathered in sent:
        rows, own = gathered.shape[0] // comm.ranks, x.shape[2]
        first = comm.rank * rows
        gathered[first : first + own].copy_(_rows_first(x))
        if own < rows:
            gathered[first + own : first + rows].zero_()
    return comm.start_all_gather([(what, gathered) for what, _, gathered in sent])


def start_return(computed: Sequence[tuple[str, Tensor]], comm: Communicator, own: int) -> tuple[list[Tensor], Transfer]:
    """Start sending ``[B, H, n * rows, ...]``, computed for all ranks, to the owners of the rows; in one launch.

    Returns:
        ``[n, B, H, own, ...]`` for each tensor, what every rank computed for this rank's own rows, and the handle to
        wait for before reading them.
    """
    parts = []
    for what, x in computed:
        wire = _rows_first(x).contiguous()
        parts.append(AllToAllTensor(what, wire, torch.empty_like(wire)))
    transfer = comm.start_all_to_all(parts)
    return [_by_rank(part.receive, comm.ranks, own) for part in parts], transfer


def attention_layout(wire: Tensor) -> Tensor:
    """``[S, B, H, ...]`` as ``[B, H, S, ...]``, a view."""
    return wire.permute(1, 2, 0, *range(3, wire.dim()))


def _rows_first(x: Tensor) -> Tensor:
    """``[B, H, S, ...]`` as ``[S, B, H, ...]``, a view."""
    return x.permute(2, 0, 1, *range(3, x.dim()))


def _by_rank(wire: Tensor, ranks: int, own: int) -> Tensor:
    """Of ``[n * rows, B, H, ...]`` the first ``own`` rows of each rank as ``[n, B, H, own, ...]``, a view."""
    rows = wire.shape[0] // ranks
    by_rank = wire.view(ranks, rows, *wire.shape[1:]).permute(0, 2, 3, 1, *range(4, wire.dim() + 1))
    return by_rank if own == rows else by_rank[:, :, :, :own]
