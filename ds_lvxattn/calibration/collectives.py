"""Times of the collectives that the strategies use, on the real group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from ds_lvxattn.calibration.clock import Clock, slowest_of
from ds_lvxattn.calibration.extent import Extent
from ds_lvxattn.exchange.comm import AllToAllTensor, Communicator, Message, Transfer
from ds_lvxattn.exchange.grid import grid_of, node_size
from ds_lvxattn.plan.profile import Curve, Link, Profile


def collective_curves(comm: Communicator, clock: Clock, extent: Extent, device: torch.device) -> tuple[Curve, ...]:
    """Times of the collectives that the strategies use, by the bytes that a rank receives."""
    n = comm.ranks
    if n == 1:
        return ()
    following, before = (comm.rank + 1) % n, (comm.rank - 1) % n

    def all_gather(size: int) -> tuple[int, Callable[[], object]]:
        buffer = torch.zeros((n, max(size // (n - 1), 1)), dtype=torch.uint8, device=device)
        return (n - 1) * buffer.shape[1], lambda: _gather(comm, buffer).wait()

    def all_to_all(size: int) -> tuple[int, Callable[[], object]]:
        there = torch.zeros((n, max(size // (n - 1), 1)), dtype=torch.uint8, device=device)
        back = torch.empty_like(there)
        part = AllToAllTensor("calibration", there, back)
        return (n - 1) * there.shape[1], lambda: comm.start_all_to_all([part]).wait()

    def send(size: int) -> tuple[int, Callable[[], object]]:
        out, arriving = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
        message = Message("calibration", out, following, arriving, before)
        return size, lambda: comm.exchange([message]).wait()

    def all_reduce(size: int) -> tuple[int, Callable[[], object]]:  # of gradients, in float32
        numbers = torch.zeros(max(size * n // (8 * (n - 1)), 1), device=device)
        return 8 * numbers.numel() * (n - 1) // n, lambda: dist.all_reduce(numbers, group=comm.group)

    curves = []
    operations = ("all_gather", all_gather), ("all_to_all", all_to_all), ("send", send), ("all_reduce", all_reduce)
    for op, make in operations:
        sizes, times = [], []
        for size in extent.messages:
            received, call = make(size)
            dist.barrier()
            sizes.append(received)
            times.append(clock.seconds(call, many=size <= 1 << 20))
        curves.append(Curve(op, n, tuple(zip(sizes, slowest_of(times, device), strict=True))))
    return tuple(curves)


def level_curves(
    comm: Communicator, clock: Clock, extent: Extent, device: torch.device, inner_size: int | None = None
) -> tuple[Curve, ...]:
    """The same on both levels of the group's grid, all groups of a level at once; none where it has but one level.

    Args:
        comm: the group's own communicator, whose counts stay as they are.
        inner_size: ranks of a node; None: those of a host.
    """
    size = inner_size or node_size(comm)
    if size in (1, comm.ranks):
        return ()
    counts = comm.received.copy(), comm.between.copy()
    curves = [
        replace(curve, level=level)
        for level, group in zip(("inner", "outer"), grid_of(comm, size), strict=True)
        for curve in collective_curves(group, clock, extent, device)
    ]
    comm.reset()
    comm.received.update(counts[0])
    comm.between.update(counts[1])
    return tuple(curves)


def with_links(profile: Profile, known: Profile, curves: Sequence[Curve], ranks: int) -> Profile:
    """The links that the group uses, from its curves, for groups of other sizes; the other link as known."""
    levels = {level: [curve for curve in curves if curve.level == level] for level in ("group", "inner", "outer")}
    if not levels["group"]:
        return profile
    if levels["outer"]:
        intra = _link(levels["inner"], profile.intra)
        inter = _link(levels["outer"], profile.inter)
        # All ranks of a node were receiving at once.
        node = ranks // levels["outer"][0].ranks
        return replace(profile, intra=intra, inter=replace(inter, shared=node * inter.bandwidth), gpus_per_node=node)
    link = _link(levels["group"], known.intra)
    if ranks <= profile.gpus_per_node:
        return replace(profile, intra=link, source=f"{profile.source}; between nodes as in '{known.name}'")
    return replace(profile, inter=link, source=f"{profile.source}; inside a node as in '{known.name}'")


def _link(curves: Sequence[Curve], known: Link) -> Link:
    gather, hop = (next(curve for curve in curves if curve.op == op) for op in ("all_gather", "send"))
    ranks = gather.ranks
    latency = min(gather.points[0][1], hop.points[0][1])
    message = max(gather.points[0][1] - latency, 0.0) / max(ranks - 2, 1) if ranks > 2 else known.message
    (small, quick), (large, slow) = gather.points[-2:]
    return Link(latency, message, (large - small) / max(slow - quick, 1e-9))


def _gather(comm: Communicator, buffer: Tensor) -> Transfer:
    return comm.start_all_gather([("calibration", buffer)])
