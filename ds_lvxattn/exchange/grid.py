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

    Where the group is not the whole world, its members alone make the groups of its levels. NCCL splits them off the
    world's communicator, for which it waits for all ranks: then all groups of the world must come here for the same
    call, or have come to ``make_grids`` before.

    Raises:
        ValueError: ``inner_size`` does not divide the ranks.
    """
    n = comm.ranks
    if inner_size < 1 or n % inner_size:
        raise ValueError(f"inner_size is {inner_size}, which does not divide the {n} ranks of the group")
    if inner_size not in comm.levels:
        if inner_size == n:
            comm.levels[inner_size] = comm, Communicator(None)
        elif inner_size == 1:
            comm.levels[inner_size] = Communicator(None), comm
        else:
            assert comm.group is not None
            members = [dist.get_global_rank(comm.group, rank) for rank in range(n)]
            _make(comm, inner_size, [members])
    return Grid(*comm.levels[inner_size])


def make_grids(comm: Communicator, inner_size: int) -> None:
    """Make ``grid_of(comm, inner_size)`` ahead of its use; all ranks of the world call it.

    ``comm`` is of one of the groups of ``comm.ranks`` consecutive ranks that the world consists of, as those of
    sequence parallelism are. Later some of them may plan for two levels and others not.
    """
    if inner_size in (1, comm.ranks) or inner_size in comm.levels:
        return
    world = range(dist.get_world_size())
    _make(comm, inner_size, [world[first : first + comm.ranks] for first in world[:: comm.ranks]])


def _make(comm: Communicator, inner_size: int, groups: Sequence[Sequence[int]]) -> None:
    """Make both levels of ``groups``, of global ranks each, of which one is that of ``comm``."""
    inner = [group[i : i + inner_size] for group in groups for i in range(0, comm.ranks, inner_size)]
    outer = [group[i::inner_size] for group in groups for i in range(inner_size)]
    levels = _level(comm, inner), _level(comm, outer)
    levels[1].node_size = 1
    comm.levels[inner_size] = levels


def _level(comm: Communicator, partition: Sequence[Sequence[int]]) -> Communicator:
    """Make the groups of a partition of some ranks of the world; the communicator of the one that this rank is in."""
    everyone = sum(map(len, partition)) == dist.get_world_size()
    mine = None
    for ranks in partition:
        member = dist.get_rank() in ranks
        if everyone or member:
            group = dist.new_group(list(ranks), use_local_synchronization=not everyone)
            mine = group if member else mine
    assert mine is not None
    return communicator_of_level(mine, comm)


def node_size(comm: Communicator, of_world: bool = False) -> int:
    """Ranks of a node, by the hosts of the ranks; see ``largest_block``. A collective at the first call, of objects.

    Args:
        of_world: the same for all groups of ``comm.ranks`` consecutive ranks that the world consists of, by the hosts
            of all ranks, all of which call.
    """
    if comm.group is None:
        return 1
    if comm.host_ranks is None:
        # What NCCL goes by where it is told to take some ranks of a host for another host.
        host = os.environ.get("NCCL_HOSTID") or socket.gethostname()
        hosts: list[str] = [""] * (dist.get_world_size() if of_world else comm.ranks)
        dist.all_gather_object(hosts, host, group=None if of_world else comm.group)
        comm.host_ranks = largest_block(hosts, comm.ranks)
    return comm.host_ranks


def largest_block(hosts: Sequence[str], ranks: int) -> int:
    """The largest divisor ``d`` of ``ranks`` such that each run of ``d`` ranks from a multiple of it shares one host.

    Nodes of unequal size are so divided into equal parts, or have one level.
    """
    divisors = (d for d in range(ranks, 0, -1) if ranks % d == 0)
    return next(d for d in divisors if all(len({*hosts[i : i + d]}) == 1 for i in range(0, len(hosts), d)))
