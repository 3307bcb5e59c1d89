"""Time of one collective on a group: from measured points where there are any, else from latency and bandwidth.

Groups are runs of consecutive ranks, so a group of ``n`` fills its nodes one after another. A collective among nodes
is as fast as the slower of what comes in over the node's own links and what comes in from other nodes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from ds_lvxattn.plan.profile import Curve, Link, Profile


def all_gather(profile: Profile, ranks: int, own_bytes: float) -> float:
    """Seconds until every rank has the ``own_bytes`` of every rank; a ring, so each link carries all of them."""
    received = own_bytes * (ranks - 1)
    if ranks == 1 or received <= 0:
        return 0.0
    curve = profile.curve("all_gather", ranks)
    if curve is not None:
        return interpolate(curve.points, received)
    node, nodes = nodes_of(profile, ranks)
    wait = (ranks - nodes - 1) * profile.intra.message
    if nodes == 1:
        return profile.intra.latency + wait + received / profile.intra.bandwidth
    wait += nodes * profile.inter.message
    slowest = node_bandwidth(profile.inter, node)
    if node > 1:
        slowest = min(slowest, profile.intra.bandwidth)
    return profile.inter.latency + wait + received / slowest


def all_to_all(profile: Profile, ranks: int, own_bytes: float) -> float:
    """Seconds to send each rank its ``1/ranks`` of ``own_bytes``: a message to every other rank."""
    if ranks == 1 or own_bytes <= 0:
        return 0.0
    curve = profile.curve("all_to_all", ranks)
    if curve is not None:
        return interpolate(curve.points, own_bytes * (ranks - 1) / ranks)
    node, nodes = nodes_of(profile, ranks)
    a_message = own_bytes / ranks
    near = (node - 1) * (profile.intra.message + a_message / profile.intra.bandwidth)
    if nodes == 1:
        return profile.intra.latency + near
    far_bandwidth = node_bandwidth(profile.inter, node) / node
    far = (ranks - node) * (profile.inter.message + a_message / far_bandwidth)
    return profile.inter.latency + max(near, far)


def all_reduce(profile: Profile, ranks: int, size: float) -> float:
    """Seconds until every rank has the sum of the ``size`` bytes of every rank.

    Inside a node a ring; between nodes each node's sum crosses once, over all of its links.
    """
    if ranks == 1 or size <= 0:
        return 0.0
    received = 2 * size * (ranks - 1) / ranks
    curve = profile.curve("all_reduce", ranks)
    if curve is not None:
        return interpolate(curve.points, received)
    node, nodes = nodes_of(profile, ranks)
    inside = profile.intra.latency + 2 * (ranks - 2) * profile.intra.message + received / profile.intra.bandwidth
    if nodes == 1:
        return inside
    across = profile.inter.latency + nodes * profile.inter.message + size / node_bandwidth(profile.inter, node)
    return max(inside if node > 1 else 0.0, across)


def send(profile: Profile, ranks: int, size: float) -> float:
    """Seconds of one step of a ring: ``size`` bytes to the next rank while as many come from the one before."""
    if ranks == 1 or size <= 0:
        return 0.0
    curve = profile.curve("send", ranks)
    if curve is not None:
        return interpolate(curve.points, size)
    near = profile.intra.latency + size / profile.intra.bandwidth
    node, nodes = nodes_of(profile, ranks)
    if nodes == 1:
        return near
    # One message crosses each border of a node, so it does not share the node's way out. All wait for the slowest.
    far = profile.inter.latency + size / node_bandwidth(profile.inter, 1)
    return far if node == 1 else max(near, far)


@lru_cache(maxsize=64)
def inner_level(profile: Profile, size: int) -> Profile:
    """The machine as a group of ``size`` consecutive ranks sees it, while all such groups do the same."""
    return replace(profile, curves=_curves(profile, "inner"))


@lru_cache(maxsize=64)
def outer_level(profile: Profile, size: int) -> Profile:
    """The machine as a group of every ``size``-th rank sees it, while all such groups do the same.

    On each node so many ranks share what comes in from other nodes.
    """
    near = max(profile.gpus_per_node // size, 1)
    here = min(size, profile.gpus_per_node)
    each = min(profile.inter.bandwidth, node_bandwidth(profile.inter, here * near) / (here * near))
    link = replace(profile.inter, bandwidth=each, shared=None)
    return replace(profile, gpus_per_node=near, inter=link, curves=_curves(profile, "outer"))


def _curves(profile: Profile, level: str) -> tuple[Curve, ...]:
    return tuple(replace(curve, level="group") for curve in profile.curves if curve.level == level)


def nodes_of(profile: Profile, ranks: int) -> tuple[int, int]:
    """GPUs of a group in one node, and nodes."""
    node = min(profile.gpus_per_node, ranks)
    return node, -(-ranks // node)


def node_bandwidth(link: Link, gpus: int) -> float:
    """Bytes a second that ``gpus`` of a node can receive together."""
    each = link.bandwidth * gpus
    return each if link.shared is None else min(each, link.shared)


def interpolate(points: Sequence[tuple[int, float]], size: float) -> float:
    """Seconds for ``size`` bytes: straight between measured points, at the last bandwidth beyond them."""
    sizes = [b for b, _ in points]
    if size <= sizes[0]:
        return points[0][1]
    right = min(bisect_left(sizes, size), len(points) - 1)
    (b0, t0), (b1, t1) = points[right - 1], points[right]
    slope = max((t1 - t0) / (b1 - b0), 0.0)
    return t0 + (size - b0) * slope if size <= b1 else max(t1, t0) + (size - b1) * slope
