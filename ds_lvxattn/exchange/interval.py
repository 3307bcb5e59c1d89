"""The mask of every supported model: each query row sees one contiguous range of the key sequence, or a few.

Two int32 numbers a range replace a dense ``S_q x S_kv`` mask, so masks cost ``O(S_q)`` memory at any key length.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ds_lvxattn.exchange.shards import SequenceShards
from ds_lvxattn.kernels.pattern import PATTERNS, UNKNOWN, in_kernel_order, pattern_of
from ds_lvxattn.kernels.torch_internals import raise_if

T = TypeVar("T")


@dataclass(frozen=True)
class KVInterval:
    """Row ``i`` sees the global key positions ``[start_i, stop_i)``; an empty range sees nothing.

    Args:
        start: int32 ``[B, s_q]``, first visible key of each of the rank's own rows.
        stop: int32 ``[B, s_q]``, one past the last visible key.
        pattern: how the ranges of neighbouring rows lie to each other, see ``kernels/pattern.py``; kernels choose
            tiles by it, and do not look themselves, as they would wait for the device. ``from_host`` finds it.

    Where every rank already knows the rows of all ranks (the text of a batch is small), both may be
    ``[n, B, s_max]``, rank-major and padded to the longest shard; then no collective is needed to share them.

    Of several ranges a row, made by ``several``, both have a last dimension more: the ranges.

    Raises:
        ValueError: shapes differ, the dtype is not int32 or the pattern is none.
    """

    start: Tensor
    stop: Tensor
    ranges: int | None = field(default=None, kw_only=True)
    pattern: str = field(default=UNKNOWN, kw_only=True)
    _made: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.start.shape != self.stop.shape:
            raise ValueError(
                f"KVInterval: start has shape {tuple(self.start.shape)} and stop {tuple(self.stop.shape)}; "
                "give one start and one stop for each query row"
            )
        if self.start.dim() - (self.ranges is not None) not in (2, 3):
            raise ValueError(
                f"KVInterval: start has shape {tuple(self.start.shape)}; give [B, s_q] (own rows) "
                "or [n, B, s_max] (the rows of every rank)"
            )
        if self.pattern not in PATTERNS:
            raise ValueError(f"KVInterval: pattern is '{self.pattern}'; choose one of {PATTERNS}")
        for name, bound in (("start", self.start), ("stop", self.stop)):
            if bound.dtype != torch.int32:
                raise ValueError(f"KVInterval: {name} has dtype {bound.dtype}; convert it to torch.int32")

    @classmethod
    def several(cls, intervals: Sequence[KVInterval]) -> KVInterval:
        """Several ranges a row, for one exchange: a row sees the keys of all of them.

        Args:
            intervals: of one shape. The ranges of a row must not overlap, in rows that are padding neither; empty ones
                do not count.

        Raises:
            ValueError: none is given, shapes differ, or (on a CPU) ranges of a row overlap; on a GPU, which is not
                waited for, an assertion on the device fails then.
        """
        shapes = sorted({tuple(interval.start.shape) for interval in intervals})
        if len(shapes) != 1 or any(interval.ranges is not None for interval in intervals):
            raise ValueError(f"intervals have shapes {shapes}; give at least one, all of one range a row and one shape")
        if len(intervals) == 1:
            return intervals[0]
        start, stop = (torch.stack([getattr(i, bound) for i in intervals], dim=-1) for bound in ("start", "stop"))
        _refuse_overlaps(start, stop)
        patterns = {interval.pattern for interval in intervals}
        pattern = patterns.pop() if len(patterns) == 1 else UNKNOWN
        return cls(start, stop, ranges=len(intervals), pattern=pattern)

    @classmethod
    def from_host(cls, start: Tensor, stop: Tensor, device: torch.device | str) -> KVInterval:
        """The ranges ``start, stop``, which are on the CPU, on ``device``, with their pattern."""
        pattern = pattern_of(*in_kernel_order(start, stop))
        return cls(*(bound.to(device) for bound in (start, stop)), pattern=pattern)

    @classmethod
    def from_mask(cls, mask: Tensor) -> KVInterval:
        """The intervals of a dense mask, for a model that comes with one; takes a host synchronisation.

        Args:
            mask: bool ``[B, s_q, S_kv]``, true where a row sees a key.

        Raises:
            ValueError: the keys that a row sees are not contiguous.
        """
        keys = torch.arange(mask.shape[-1], device=mask.device)
        count = mask.sum(dim=-1)
        start = torch.where(mask, keys, mask.shape[-1]).amin(dim=-1)
        start = torch.where(count > 0, start, 0)
        last = torch.where(mask, keys, -1).amax(dim=-1)
        broken = (last + 1 - start != count) & (count > 0)
        if broken.any():
            sample, row = broken.nonzero()[0].tolist()
            raise ValueError(
                f"row {row} of sample {sample} sees {int(count[sample, row])} of the keys {int(start[sample, row])} to "
                f"{int(last[sample, row])}; an interval has no holes: reorder the keys, leave those that no row sees "
                "off the shard, or give several intervals, see KVInterval.pieces_of_mask"
            )
        return cls(start.int(), (start + count).int())

    @classmethod
    def pieces_of_mask(cls, mask: Tensor) -> list[KVInterval]:
        """Any dense mask as intervals of disjoint keys; takes a host synchronisation.

        ``sp_attention`` takes them together, as exactly the mask, in one exchange. On several ranks all of them must
        give equally many: fill up with empty ones.

        Args:
            mask: bool ``[B, s_q, S_kv]``, true where a row sees a key.

        Returns:
            As many as the row with most runs of adjacent keys has, at least one.
        """
        edges = torch.nn.functional.pad(mask.to(torch.int8), (1, 1)).diff(dim=-1)
        first, behind = edges == 1, edges == -1
        runs = max(int(first.sum(dim=-1).max()), 1) if mask.numel() else 1

        def bound(marks: Tensor, run: int) -> Tensor:
            """Where the run begins or ends in each row; 0 in a row that has fewer."""
            return (marks & (marks.cumsum(dim=-1) == run)).to(torch.int8).argmax(dim=-1).int()

        return [cls(bound(first, run), bound(behind, run)) for run in range(1, runs + 1)]

    @property
    def of_all_ranks(self) -> bool:
        """Whether the rows of every rank are given, ``[n, B, s_max]``."""
        return self.start.dim() - (self.ranges is not None) == 3

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """``make()``, or what it returned before for ``key``.

        The layers of a batch share its intervals. What they derive from them is the same tensor for all of them, by
        which kernels find what they derived in turn (``kernels/derived.py``). Not for what takes a collective.
        """
        if key not in self._made:
            # Made in an evaluation, it is saved for the backward pass of the next step too.
            with torch.inference_mode(False):
                self._made[key] = make()
        return self._made[key]

    def within(self, keys: int) -> KVInterval:
        """The ranges, ``[n, B, s_max, ...]`` (``n`` is 1 for own rows), clamped to ``keys`` positions."""

        def clamped() -> KVInterval:
            start, stop = (bound.clamp(0, keys) for bound in (self.start, self.stop))
            if not self.of_all_ranks:
                start, stop = start.unsqueeze(0), stop.unsqueeze(0)
            return KVInterval(start, torch.maximum(start, stop), ranges=self.ranges, pattern=self.pattern)

        return self.once(("within", keys), clamped)

    def local_to(self, kv: SequenceShards, rank: int) -> tuple[Tensor, Tensor]:
        """``start, stop`` of the rows of every rank, ``[B, n * s_max, ...]``, among the keys of ``rank``."""

        def clipped() -> tuple[Tensor, Tensor]:
            start, stop = clip_to_rank(self.start, self.stop, kv, rank)
            return start.transpose(0, 1).flatten(1, 2), stop.transpose(0, 1).flatten(1, 2)

        return self.once(("local to", kv, rank), clipped)

    def rows_of(self, rank: int, rows: int) -> tuple[Tensor, Tensor]:
        """``start, stop`` of the first ``rows`` rows of ``rank``, or of those that all ranks share."""
        shard = 0 if self.start.shape[0] == 1 else rank
        return self.once(("rows of", shard, rows), lambda: (self.start[shard, :, :rows], self.stop[shard, :, :rows]))

    def of_nodes(self, q: SequenceShards, size: int) -> KVInterval:
        """The ranges of the rows of every node of ``size`` ranks, ``[n / size, B, rows]``, in the sequence's order.

        Args:
            q: shards of the query sequence; the ranges are those of all ranks.
        """

        def of_nodes() -> KVInterval:
            nodes = range(q.ranks // size)
            rows, most = [], q.of_nodes(size).longest
            for node in nodes:
                members = range(node * size, (node + 1) * size)
                order = q.order_from_padded(members, q.longest)
                places = np.arange(size * q.longest) if order is None else order
                # What pads a shorter node repeats a row; it must only be some row, as it adds nothing anywhere.
                rows.append(node * size * q.longest + np.pad(places, (0, most - len(places))))
            index = torch.from_numpy(np.concatenate(rows)).to(self.start.device, non_blocking=True)
            start, stop = (
                bound.transpose(0, 1).flatten(1, 2).index_select(1, index).unflatten(1, (len(nodes), most))
                for bound in (self.start, self.stop)
            )
            start, stop = (bound.transpose(0, 1).contiguous() for bound in (start, stop))
            return KVInterval(start, stop, ranges=self.ranges, pattern=self.pattern)

        return self.once(("of nodes", q, size), of_nodes)


def _refuse_overlaps(start: Tensor, stop: Tensor) -> None:
    """Raise ``ValueError`` where ranges of a row, int32 ``[..., ranges]``, overlap."""
    last = torch.iinfo(start.dtype).max
    begin = torch.where(stop > start, start, last)  # empty ones lie behind the others
    order = begin.argsort(dim=-1)
    overlap = (stop.gather(-1, order)[..., :-1] > begin.gather(-1, order)[..., 1:]).any(dim=-1)
    said = "the intervals of a row overlap, whose keys would count twice; give disjoint ones"
    if overlap.device.type != "cpu":
        raise_if(overlap, said)
    elif overlap.any():
        raise ValueError(f"row {overlap.nonzero()[0].tolist()}: {said}")


def clip_to_rank(start: Tensor, stop: Tensor, kv: SequenceShards, rank: int) -> tuple[Tensor, Tensor]:
    """Global key ranges to the local positions of the keys that ``rank`` holds.

    Any placement that keeps a rank's tokens in ascending order keeps an interval an interval: count the
    rank's tokens before each bound.

    Args:
        start, stop: int32 of any shape, global key positions (values outside the sequence are clamped).
        kv: shards of the key sequence.
        rank: rank in the sequence-parallel group.

    Returns:
        int32 local ``start, stop`` with ``0 <= start <= stop <= kv.lengths[rank]``.
    """
    local_start = kv.tokens_before(start, rank)
    return local_start, torch.maximum(local_start, kv.tokens_before(stop, rank))
