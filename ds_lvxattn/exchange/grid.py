"""The ranks of a group as a grid: inner groups of consecutive ranks, one a node, and outer groups across the nodes.

Rank ``r`` is rank ``r % inner_size`` of inner group ``r // inner_size``; an outer group holds the ranks of equal place
on all nodes. Every rank is in one group of either level; each level counts into the communicator of the whole group.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import NamedTuple

import torch.distributed as dist

from ds_lvxattn.exchange.comm import Communicator, communicator_of_level


class Grid(NamedTuple):
    """Both levels of one rank.

    Attributes:
        inner: this rank's node; a single rank where nodes have but one.
        outer: the ranks of the same place on all nodes; a single rank where there is but one node.
    """

    inner: Communicator
    outer: Communicator


def grid_of(comm: Communicator, inner_size: int) -> Grid:
    """The grid of ``comm`` with inner groups of ``inner_size`` ranks, made at its first use by all ranks of the group.

    Where the group is not the whole world, the groups of its levels are made by their members alone.

    Raises:
        ValueError: ``inner_size`` does not divide the ranks.
    """
    n = comm.ranks
    if inner_size < 1 or n % inner_size:
        raise ValueError(f"inner_size is {inner_size}, which does not divide the {n} ranks of the group")
    if inner_size not in comm.levels:
        if inner_size == n:
            inner, outer = comm, Communicator(None)
        elif inner_size == 1:
            inner, outer = Communicator(None), comm
        else:
            inner = _level(comm, [range(i, i + inner_size) for i in range(0, n, inner_size)])
            outer = _level(comm, [range(i, n, inner_size) for i in range(inner_size)])
            outer.node_size = 1
        comm.levels[inner_size] = inner, outer
    return Grid(*comm.levels[inner_size])


def _level(comm: Communicator, partition: Sequence[range]) -> Communicator:
    """Make the groups of a partition of the ranks; the communicator of the one that this rank is in."""
    assert comm.group is not None
    everyone = comm.ranks == dist.get_world_size()
    mine = None
    for members in partition:
        if everyone or comm.rank in members:
            ranks = [dist.get_global_rank(comm.group, member) for member in members]
            group = dist.new_group(ranks, use_local_synchronization=not everyone)
            mine = group if comm.rank in members else mine
    assert mine is not None
    return communicator_of_level(mine, comm)


def node_size(comm: Communicator) -> int:
    """Ranks of a node, by the hosts of the ranks; see ``largest_block``. A collective at the first call, of objects."""
    if comm.group is None:
        return 1
    if comm.name not in _node_sizes:
        hosts: list[str] = [""] * comm.ranks
        # What NCCL goes by where it is told to take some ranks of a host for another host.
        dist.all_gather_object(hosts, os.environ.get("NCCL_HOSTID") or socket.gethostname(), group=comm.group)
        _node_sizes[comm.name] = largest_block(hosts)
    return _node_sizes[comm.name]


_node_sizes: dict[str, int] = {}


def largest_block(hosts: Sequence[str]) -> int:
    """The largest divisor ``d`` of the number of ranks such that each run of ``d`` ranks from a multiple of it shares
    one host."""
    n = len(hosts)
    divisors = (d for d in range(n, 0, -1) if n % d == 0)
    return next(d for d in divisors if all(len({*hosts[i : i + d]}) == 1 for i in range(0, n, d)))
