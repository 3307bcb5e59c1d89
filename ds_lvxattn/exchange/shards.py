"""Which rank holds which tokens of a sequence: lengths and placement of every rank's shard."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ds_lvxattn.kernels.settled import settled_tables

# Largest unit in which a sequence of queries is dealt: the rows that a kernel takes at once. Rows of one unit see the
# same keys of every other rank, so that a tile has no partly visible keys but on its own rank.
TILE = 128


@dataclass(frozen=True)
class SequenceShards:
    """One sequence, divided over the ranks of a sequence-parallel group.

    Args:
        lengths: tokens that each rank holds, in rank order; shards may be uneven or empty.
        stripe: 0 when each rank holds one contiguous run, in rank order. Otherwise the sequence is cut into
            units of ``stripe`` tokens (the tokens of a frame), which are dealt in turn: to the ranks in their order,
            then in reverse order, and so on. Striped tokens balance masks that grow along the sequence, and turning
            back makes up for the lead that later ranks have in each round.
        units: ``(tokens, rank)`` of the units that the sequence is cut into, in its order, where they are of unequal
            sizes or dealt in another way; empty otherwise. Make such shards with ``dealt``.

    Raises:
        ValueError: a length is negative, striped lengths are not those of a round-robin deal, or the units are not of
            these lengths.
    """

    lengths: tuple[int, ...]
    stripe: int = 0
    units: tuple[tuple[int, int], ...] = ()

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        """Layers find what they share by their shards, which may consist of hundreds of units."""
        return hash((self.lengths, self.stripe, self.units))

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 0:
            raise ValueError(f"shard lengths are {self.lengths}; give one length >= 0 for each rank")
        if self.stripe < 0:
            raise ValueError(f"stripe is {self.stripe}; give 0 (contiguous) or the tokens of a unit")
        if self.stripe and self.lengths != self.striped(self.total, len(self.lengths), self.stripe).lengths:
            raise ValueError(
                f"shard lengths {self.lengths} are not those of units of {self.stripe} tokens dealt in turn to "
                f"{len(self.lengths)} ranks; make them with SequenceShards.striped"
            )
        if self.units and (self.stripe or self.lengths != _lengths(self.units, self.ranks)):
            raise ValueError(
                f"shard lengths {self.lengths} (stripe {self.stripe}) are not those of the units that are dealt to "
                "them; make them with SequenceShards.dealt"
            )

    @classmethod
    def dealt(cls, units: Sequence[tuple[int, int]], ranks: int) -> SequenceShards:
        """A sequence of ``units``, ``(tokens, rank)`` each. Contiguous shards are told as such."""
        merged: list[tuple[int, int]] = []
        for tokens, rank in units:
            if merged and merged[-1][1] == rank:
                tokens += merged.pop()[0]
            if tokens:
                merged.append((tokens, rank))
        owners = [rank for _, rank in merged]
        contiguous = all(a < b for a, b in itertools.pairwise(owners))
        return cls(_lengths(merged, ranks), units=() if contiguous else tuple(merged))

    @classmethod
    def contiguous(cls, total: int, ranks: int) -> SequenceShards:
        """``total`` tokens in contiguous runs that differ by at most one token."""
        return cls(split_evenly(total, ranks))

    @classmethod
    def striped(cls, total: int, ranks: int, stripe: int) -> SequenceShards:
        """``total`` tokens in units of ``stripe``; see the class."""
        units, rest = divmod(total, stripe)
        rounds, more = divmod(units, ranks)
        lengths = [(rounds + (place_in_round(rank, ranks, rounds) < more)) * stripe for rank in range(ranks)]
        lengths[place_in_round(more, ranks, rounds)] += rest
        shards = object.__new__(cls)
        object.__setattr__(shards, "lengths", tuple(lengths))
        object.__setattr__(shards, "stripe", stripe)
        return shards

    @classmethod
    def balanced(cls, total: int, ranks: int) -> SequenceShards:
        """``total`` tokens striped for causal self-attention: there and back equally often, units of at most ``TILE``.

        Every rank holds a token if there are enough.
        """
        rounds = 2 * max(-(-total // (2 * ranks * TILE)), 1)
        return cls.striped(total, ranks, max(-(-total // (ranks * rounds)), 1))

    @property
    def deal(self) -> tuple[int, ...]:
        """How the sequence is dealt, as integers, which operators take: ``of_deal`` is the inverse."""
        return tuple(itertools.chain(*self.units)) or ((self.stripe,) if self.stripe else ())

    @classmethod
    def of_deal(cls, lengths: Sequence[int], deal: Sequence[int]) -> SequenceShards:
        """The shards of ``lengths`` that are dealt as ``deal`` says."""
        if len(deal) < 2:
            return cls(tuple(lengths), sum(deal))
        return cls(tuple(lengths), units=tuple(zip(deal[::2], deal[1::2], strict=True)))

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
        if self.units:
            starts, before, held = _unit_tables(self, rank, position.device)
            position = position.clamp(0, self.total)
            unit = torch.searchsorted(starts, position.to(starts.dtype), right=True) - 1
            inside = torch.minimum(position - starts[unit], held[unit])
            return (before[unit] + inside).to(position.dtype)
        if not self.stripe:
            local = position - self.offset(rank)
        else:
            unit = torch.div(position, self.stripe, rounding_mode="floor")
            rounds = torch.div(unit, self.ranks, rounding_mode="floor")
            place = torch.where(rounds % 2 == 0, rank, self.ranks - 1 - rank)
            passed = unit - rounds * self.ranks - place  # above 0: this round's unit lies before the position
            inside = torch.where(passed == 0, position - unit * self.stripe, 0)
            local = (rounds + (passed > 0)) * self.stripe + inside
        return local.clamp(0, self.lengths[rank])

    def index(self, rank: int) -> slice | np.ndarray:
        """What takes the tokens of ``rank``, ascending, out of an array along the sequence: a slice or positions."""
        if self.units:
            starts = itertools.accumulate((tokens for tokens, _ in self.units), initial=0)
            own = [np.arange(at, at + n) for at, (n, owner) in zip(starts, self.units, strict=False) if owner == rank]
            return np.concatenate(own) if own else np.zeros(0, dtype=np.int64)
        if not self.stripe:
            return slice(self.offset(rank), self.offset(rank) + self.lengths[rank])
        units = np.array(striped_units(-(-self.total // self.stripe), self.ranks, rank), dtype=np.int64)
        # Only the last unit of the sequence may be short, and it is the last of its rank.
        return (units[:, None] * self.stripe + np.arange(self.stripe)).reshape(-1)[: self.lengths[rank]]

    def positions(self, rank: int) -> range | list[int]:
        """Global positions of the tokens of ``rank``, ascending."""
        index = self.index(rank)
        return range(index.start, index.stop) if isinstance(index, slice) else index.tolist()

    def order_from_padded(self, members: range | None = None, width: int | None = None) -> np.ndarray | None:
        """Where the tokens of some consecutive ranks, ascending, lie in their rank-major sequence with padding.

        Args:
            members: the ranks; None: all.
            width: tokens of a padded shard; None: of the longest one of the members.

        Returns:
            int64 indices into a sequence of ``len(members) * width`` tokens, or None when they are the identity.
        """
        members = members or range(self.ranks)
        lengths = [self.lengths[rank] for rank in members]
        width = max(lengths) if width is None else width
        order = self.order_from_ranks(members)
        if order is None and set(lengths) == {width}:
            return None
        places = np.concatenate([place * width + np.arange(length) for place, length in enumerate(lengths)])
        return places if order is None else places[order]

    def order_from_ranks(self, members: range) -> np.ndarray | None:
        """Where the tokens of some consecutive ranks, ascending, lie when the ranks' shards follow each other; None for
        the identity."""
        if not self.stripe and not self.units:
            return None
        return np.argsort(np.concatenate([np.asarray(self.index(rank)) for rank in members]))

    def of_nodes(self, size: int) -> SequenceShards:
        """The same sequence, divided over nodes of ``size`` consecutive ranks, which hold what their ranks hold."""
        if self.units:
            return self.dealt([(tokens, rank // size) for tokens, rank in self.units], self.ranks // size)
        if self.stripe:
            # The units that the ranks of a node hold of a round lie side by side.
            return self.striped(self.total, self.ranks // size, self.stripe * size)
        return SequenceShards(tuple(sum(self.lengths[i : i + size]) for i in range(0, self.ranks, size)))


@dataclass(frozen=True)
class ShardLayout:
    """Shards of the query sequence and of the key/value sequence of one attention call."""

    q: SequenceShards
    kv: SequenceShards

    def __post_init__(self) -> None:
        if self.q.ranks != self.kv.ranks:
            raise ValueError(f"queries are divided over {self.q.ranks} ranks, keys over {self.kv.ranks}")

    def of_nodes(self, size: int) -> ShardLayout:
        """See ``SequenceShards.of_nodes``."""
        return ShardLayout(self.q.of_nodes(size), self.kv.of_nodes(size))


def _lengths(units: Sequence[tuple[int, int]], ranks: int) -> tuple[int, ...]:
    lengths = [0] * ranks
    for tokens, rank in units:
        lengths[rank] += tokens
    return tuple(lengths)


@settled_tables
def _unit_tables(shards: SequenceShards, rank: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For each unit its first position, the tokens of ``rank`` ahead of it, and those in it; int32 each."""
    tokens = np.array([tokens for tokens, _ in shards.units])
    own = np.where(np.array([owner for _, owner in shards.units]) == rank, tokens, 0)
    tables = np.stack((np.cumsum(tokens) - tokens, np.cumsum(own) - own, own)).astype(np.int32)
    starts, before, held = torch.tensor(tables, device=device).unbind()
    return starts, before, held


def place_in_round(rank: int, ranks: int, number: int) -> int:
    """Which unit of round ``number`` a rank gets when units are dealt in turn, back and forth; its own inverse."""
    return rank if number % 2 == 0 else ranks - 1 - rank


def striped_units(units: int, ranks: int, rank: int) -> list[int]:
    """The units of ``rank``, ascending, when ``units`` units are dealt in turn, back and forth."""
    dealt = (i * ranks + place_in_round(rank, ranks, i) for i in range(-(-units // ranks)))
    return [unit for unit in dealt if unit < units]


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


def split_by_size(sizes: Sequence[int], parts: int) -> tuple[int, ...]:
    """How many of consecutive items of ``sizes`` each part takes, so that the largest part is as small as can be.

    Within that, every part is as near to an equal share as whole items allow; equal sizes are split evenly.
    """
    if len(set(sizes)) < 2:
        return split_evenly(len(sizes), parts)
    ahead = np.concatenate(([0], np.cumsum(sizes)))
    total, count = int(ahead[-1]), len(sizes)

    def reach(begin: int, limit: int) -> int:
        """Where a part of at most ``limit`` ends that begins at item ``begin``."""
        return int(np.searchsorted(ahead, ahead[begin] + limit, side="right")) - 1

    def fits(limit: int) -> bool:
        at = 0
        for _ in range(parts):
            at = reach(at, limit)
        return at == count

    low, high = max(max(sizes), -(-total // parts)), total
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    # The earliest that a part may end, if those behind it are to hold the rest.
    earliest = [count]
    for _ in range(parts - 1):
        earliest.append(int(np.searchsorted(ahead, ahead[earliest[-1]] - low, side="left")))
    cuts = [0]
    for part in range(1, parts):
        share = total * part / parts
        near = int(np.abs(ahead - share).argmin())
        first = max(cuts[-1], earliest[parts - part])
        cuts.append(min(max(near, first), reach(cuts[-1], low)))
    cuts.append(count)
    return tuple(b - a for a, b in itertools.pairwise(cuts))
