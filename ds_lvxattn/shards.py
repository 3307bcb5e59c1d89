"""Which rank holds which tokens of a sequence: lengths and placement of every rank's shard."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SequenceShards:
    """One sequence, divided over the ranks of a sequence-parallel group.

    Args:
        lengths: tokens that each rank holds, in rank order; shards may be uneven or empty.
        stripe: 0 when each rank holds one contiguous run, in rank order. Otherwise the sequence is cut into
            units of ``stripe`` tokens (the tokens of a frame), and unit ``u`` lies on rank ``u % n``; striped
            frames balance masks that grow along the sequence.

    Raises:
        ValueError: a length is negative, or striped lengths are not those of a round-robin deal.
    """

    lengths: tuple[int, ...]
    stripe: int = 0

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 0:
            raise ValueError(f"shard lengths are {self.lengths}; give one length >= 0 for each rank")
        if self.stripe < 0:
            raise ValueError(f"stripe is {self.stripe}; give 0 (contiguous) or the tokens of a unit")
        if self.stripe and self.lengths != self.striped(self.total, len(self.lengths), self.stripe).lengths:
            raise ValueError(
                f"shard lengths {self.lengths} are not those of units of {self.stripe} tokens dealt round robin"
            )

    @classmethod
    def contiguous(cls, total: int, ranks: int) -> SequenceShards:
        """``total`` tokens in contiguous runs that differ by at most one token."""
        return cls(split_evenly(total, ranks))

    @classmethod
    def striped(cls, total: int, ranks: int, stripe: int) -> SequenceShards:
        """``total`` tokens in units of ``stripe``, unit ``u`` on rank ``u % ranks``."""
        units, rest = divmod(total, stripe)
        lengths = [split_share(units, ranks, rank) * stripe for rank in range(ranks)]
        lengths[units % ranks] += rest
        shards = object.__new__(cls)
        object.__setattr__(shards, "lengths", tuple(lengths))
        object.__setattr__(shards, "stripe", stripe)
        return shards

    @property
    def ranks(self) -> int:
        return len(self.lengths)

    @property
    def total(self) -> int:
        """Tokens of the whole sequence."""
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest shard."""
        return max(self.lengths)

    @property
    def even(self) -> bool:
        return min(self.lengths) == max(self.lengths)

    def offset(self, rank: int) -> int:
        """Tokens on the ranks before ``rank``: the start of a contiguous shard."""
        return sum(self.lengths[:rank])

    def tokens_before(self, position: Tensor, rank: int) -> Tensor:
        """How many of the tokens of ``rank`` lie before each global ``position`` (any integer dtype, kept)."""
        if not self.stripe:
            local = position - self.offset(rank)
        else:
            unit = torch.div(position, self.stripe, rounding_mode="floor")
            before = torch.div(unit - rank + self.ranks - 1, self.ranks, rounding_mode="floor")
            inside = torch.where(unit % self.ranks == rank, position - unit * self.stripe, 0)
            local = before * self.stripe + inside
        return local.clamp(0, self.lengths[rank])

    def positions(self, rank: int) -> range | list[int]:
        """Global positions of the tokens of ``rank``, ascending."""
        if not self.stripe:
            return range(self.offset(rank), self.offset(rank) + self.lengths[rank])
        step = self.ranks * self.stripe
        starts = range(rank * self.stripe, self.total, step)
        return [p for s in starts for p in range(s, min(s + self.stripe, self.total))]

    def order_from_padded(self) -> list[int] | None:
        """Where each global position lies in the rank-major sequence padded to the longest shard.

        Returns:
            ``total`` indices into a sequence of ``ranks * longest`` tokens, or None when they are the identity.
        """
        if self.even and not self.stripe:
            return None
        order = [0] * self.total
        for rank in range(self.ranks):
            for local, position in enumerate(self.positions(rank)):
                order[position] = rank * self.longest + local
        return order


@dataclass(frozen=True)
class ShardLayout:
    """Shards of the query sequence and of the key/value sequence of one attention call."""

    q: SequenceShards
    kv: SequenceShards

    def __post_init__(self) -> None:
        if self.q.ranks != self.kv.ranks:
            raise ValueError(f"queries are divided over {self.q.ranks} ranks, keys over {self.kv.ranks}")


def split_share(total: int, ranks: int, rank: int) -> int:
    """Items of ``rank`` when ``total`` items are divided with the remainder on the first ranks."""
    return total // ranks + (rank < total % ranks)


def split_evenly(total: int, ranks: int) -> tuple[int, ...]:
    """``total`` items in ``ranks`` contiguous runs that differ by at most one item."""
    return tuple(split_share(total, ranks, rank) for rank in range(ranks))


def runs(lengths: Sequence[int]) -> list[range]:
    """The consecutive index ranges that ``lengths`` cut a sequence into."""
    edges = [0]
    for length in lengths:
        edges.append(edges[-1] + length)
    return [range(a, b) for a, b in itertools.pairwise(edges)]
