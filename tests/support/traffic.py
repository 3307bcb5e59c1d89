"""Bytes that an attention layer's ranks receive: by the communicator's count, and what really moves."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_lvxattn import KVInterval, SequenceShards, ShardLayout, sp_attention
from ds_lvxattn.exchange.comm import communicator
from tests.support.distributed import device


@dataclass(frozen=True)
class Layer:
    """Sizes of one attention layer."""

    q_lengths: tuple[int, ...]
    kv_lengths: tuple[int, ...]
    batch: int = 2
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 16
    value_dim: int | None = None
    dtype: torch.dtype = torch.bfloat16
    kernel: str = "math"
    lse_in_loss: bool = True
    head_groups: tuple[int, int] | None = None
    keep_queries: bool | None = None
    masked: bool = False
    pieces: int = 1
    inner_size: int | None = None
    seed: int = 0

    @property
    def ranks(self) -> int:
        return len(self.q_lengths)

    @property
    def head_dims(self) -> tuple[int, int]:
        """Head sizes of the keys and of the values."""
        return self.head_dim, self.value_dim or self.head_dim

    @property
    def shards(self) -> ShardLayout:
        return ShardLayout(SequenceShards(self.q_lengths), SequenceShards(self.kv_lengths))

    @property
    def ranges(self) -> tuple[Tensor, Tensor]:
        """Key ranges of the rows of every rank, ``[n, B, s_max]``; some are empty."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (2, self.ranks, self.batch, max(self.q_lengths))
        start, length = torch.randint(0, sum(self.kv_lengths), shape, generator=generator, dtype=torch.int32)
        return start, start + length // 4

    @property
    def interval(self) -> KVInterval | list[KVInterval]:
        """Those ranges, cut into ``pieces`` a row."""
        start, stop = (bound.to(device()) for bound in self.ranges)
        cuts = [start + (stop - start) * part // self.pieces for part in range(self.pieces + 1)]
        pieces = [KVInterval(first, last) for first, last in itertools.pairwise(cuts)]
        return pieces if self.pieces > 1 else pieces[0]


@dataclass
class Traffic:
    """Bytes that one rank received in a forward and in a backward pass: by the count, and as measured.

    ``between``: of both, by the count, what came from other nodes.
    """

    forward: Counter[str]
    backward: Counter[str]
    measured_forward: int
    measured_backward: int
    between: int = 0


def arriving_in_all_to_all(group: Any, out: Tensor, _: Tensor, sizes: list[int], *rest: Any) -> int:
    """Bytes from other ranks; ``sizes`` are the rows from each, none when they are even."""
    if not sizes:
        return share_of_others(group, out.nbytes)
    return out.nbytes // max(sum(sizes), 1) * (sum(sizes) - sizes[group.rank()])


def share_of_others(group: Any, size: int) -> int:
    """Of ``size`` bytes that come evenly from all ranks of a group, those from others."""
    return size * (group.size() - 1) // group.size()


@contextmanager
def measured() -> Iterator[Counter[str]]:
    """Bytes that arrive from other ranks, seen where every collective enters the process group.

    Below ``torch.distributed``, so DeepSpeed's exchanges are seen too. An all-reduce counts as a ring.
    """
    seen: Counter[str] = Counter()
    arriving = {
        "all_to_all_single": arriving_in_all_to_all,
        "all_gather_single": lambda group, out, *_: share_of_others(group, out.nbytes),
        "allreduce": lambda group, tensors, *_: share_of_others(group, 2 * tensors[0].nbytes),
        "all_gather_single_coalesced": lambda group, outs, *_: share_of_others(group, sum(out.nbytes for out in outs)),
        "recv": lambda group, tensors, *_: tensors[0].nbytes,
    }
    # Releases before torch 2.13 have other names for the same.
    arriving |= {
        "allgather_into_tensor_coalesced": arriving["all_gather_single_coalesced"],
        "alltoall_base": arriving["all_to_all_single"],
        "_allgather_base": arriving["all_gather_single"],
    }
    group_type = dist.ProcessGroup
    original = {name: vars(group_type)[name] for name in arriving if name in vars(group_type)}

    def counting(name: str):
        def method(self, *args, **kwargs):
            seen[name] += arriving[name](self, *args)
            return original[name](self, *args, **kwargs)

        return method

    try:
        for name in original:
            setattr(group_type, name, counting(name))
        yield seen
    finally:
        for name, method in original.items():
            setattr(group_type, name, method)


def traffic_of(layer: Layer, modes: tuple[tuple[str, str, str], ...]) -> list[Traffic]:
    """Traffic of this rank in each mode."""
    comm = communicator(dist.group.WORLD)
    results = []
    for strategy, schedule, queries in modes:
        replicated = queries == "replicated"
        rows = sum(layer.q_lengths) if replicated else layer.q_lengths[comm.rank]
        q_lengths = (rows,) * comm.ranks if replicated else layer.q_lengths
        options: dict[str, Any] = {"dtype": layer.dtype, "device": device(), "requires_grad": True}
        q = torch.randn(layer.batch, layer.heads, rows, layer.head_dim, **options)
        k, v = (
            torch.randn(layer.batch, layer.kv_heads, layer.kv_lengths[comm.rank], size, **options)
            for size in layer.head_dims
        )
        shards = ShardLayout(SequenceShards(q_lengths), SequenceShards(layer.kv_lengths))
        interval = layer.interval if layer.masked and not replicated else None
        # The first call of a strategy may start DeepSpeed's front end, which has traffic of its own.
        inner = layer.inner_size or comm.ranks
        sp_attention(q, k, v, group=comm.group, strategy=strategy, queries=queries, shards=shards, inner_size=inner)
        comm.reset()
        comm.node_size = inner
        with measured() as forward:
            out, lse = sp_attention(
                q, k, v, group=comm.group, strategy=strategy, schedule=schedule, queries=queries, kernel=layer.kernel,
                interval=interval, shards=shards, head_groups=layer.head_groups, keep_queries=layer.keep_queries,
                inner_size=inner,
            )  # fmt: skip
        counted_forward, between = Counter(comm.received), comm.bytes_between_nodes
        comm.reset()
        with measured() as backward:
            (out.sum() + lse.sum() if layer.lse_in_loss else out.sum()).backward()
        counted = counted_forward, Counter(comm.received)
        between += comm.bytes_between_nodes
        comm.node_size = comm.ranks
        results.append(Traffic(*counted, sum(forward.values()), sum(backward.values()), between))
    return results
