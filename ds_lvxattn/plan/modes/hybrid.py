"""Two levels: heads inside a node, queries or keys and values between nodes; see ``exchange/strategies/hybrid.py``.

Between nodes runs a flat mode, on this rank's share of the heads and with a node's rows and keys as one rank's: its own
formulas give bytes, time and memory of that level, on the links between nodes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from ds_lvxattn.plan import network
from ds_lvxattn.plan.cost import Layer, Pass, Passes
from ds_lvxattn.plan.head_shards import busiest_shard, head_shards
from ds_lvxattn.plan.layer_sizes import LayerSizes
from ds_lvxattn.plan.modes import ulysses
from ds_lvxattn.plan.modes.gather import GATHER
from ds_lvxattn.plan.modes.kv_gather import KV_GATHER
from ds_lvxattn.plan.modes.kv_ring import KV_RING
from ds_lvxattn.plan.modes.mode import Mode
from ds_lvxattn.plan.modes.query_ring import QUERY_RING
from ds_lvxattn.plan.modes.routed import ROUTED
from ds_lvxattn.plan.profile import Profile
from ds_lvxattn.plan.traffic import LayerShape, Traffic


def obstacle(heads: int, kv_heads: int, ranks: int, inner_size: int) -> str | None:
    """Heads limit the ranks of a node alone."""
    why = ulysses.obstacle(heads, kv_heads, inner_size, inner_size)
    return None if why is None else why.replace("ranks;", "ranks of a node;")


def between_nodes(shape: LayerShape, heads: int, kv_heads: int) -> LayerShape:
    """The layer, with those heads, as the ranks of equal place on all nodes see it."""
    size = shape.inner
    nodes = [slice(i, i + size) for i in range(0, shape.ranks, size)]
    work = shape.visible_work
    return replace(
        shape,
        heads=heads,
        kv_heads=kv_heads,
        q_lengths=tuple(sum(shape.q_lengths[node]) for node in nodes),
        kv_lengths=tuple(sum(shape.kv_lengths[node]) for node in nodes),
        routed_rows=shape.routed_between,
        visible_work=None if work is None else tuple(sum(work[node]) for node in nodes),
        inner_size=1,
        routed_between=None,
    )


def inside_node(shape: LayerShape, rank: int) -> LayerShape:
    """The layer as the ranks of the node of ``rank`` see it."""
    first = rank // shape.inner * shape.inner
    node = slice(first, first + shape.inner)
    return replace(
        shape, q_lengths=shape.q_lengths[node], kv_lengths=shape.kv_lengths[node], routed_rows=None, visible_work=None,
        inner_size=None, routed_between=None,
    )  # fmt: skip


def busiest_parts(sizes: LayerShape | LayerSizes) -> tuple[tuple[int, int], ...]:
    """The heads that the busiest rank of a node has, in the runs that cross between nodes one after another."""
    return busiest_shard(sizes.heads, sizes.kv_heads, sizes.inner).parts


def sizes_between(sizes: LayerSizes) -> list[LayerSizes]:
    """``between_nodes`` of what a decoder layer keeps, of even shards, for the heads of the busiest rank."""
    inner = sizes.inner
    return [
        replace(
            sizes,
            ranks=sizes.ranks // inner,
            rows=inner * sizes.rows,
            longest_rows=inner * sizes.longest_rows,
            keys=inner * sizes.keys,
            heads=heads,
            kv_heads=kv_heads,
            inner_size=1,
        )
        for heads, kv_heads in busiest_parts(sizes)
    ]


@dataclass(frozen=True)
class _TwoLevels:
    """The formulas of the mode that redistributes heads inside a node and runs ``flat`` between nodes.

    Where nothing lies on two levels, they are those of the flat mode, or of Ulysses.
    """

    flat: Mode

    def traffic(self, shape: LayerShape, rank: int) -> Traffic:
        """Exact."""
        if shape.inner == 1:
            return self.flat.traffic(shape, rank)
        if shape.nodes == 1:
            return ulysses.traffic(shape, rank)
        inside = ulysses.traffic(inside_node(shape, rank), rank % shape.inner)
        own = head_shards(shape.heads, shape.kv_heads, shape.inner)[rank % shape.inner]
        across = [self.flat.traffic(between_nodes(shape, *part), rank // shape.inner) for part in own.parts]
        return Traffic(
            inside.forward + sum(each.forward for each in across),
            inside.backward + sum(each.backward for each in across),
            sum(each.total for each in across),
        )

    def passes(self, layer: Layer, profile: Profile) -> Passes:
        """Both levels after each other; only the outer one overlaps kernels."""
        if layer.shape.inner == 1:
            return self.flat.passes(layer, profile)
        if layer.shape.nodes == 1:
            return ulysses.passes(layer, profile)
        levels, links = _outer(layer, profile)
        across = [self.flat.passes(level, links) for level in levels]
        inside = ulysses.redistribution(layer.shape, network.inner_level(profile, layer.shape.inner), layer.shape.inner)
        return Passes(
            _sum(inside.forward, *(each.forward for each in across)),
            _sum(inside.backward, *(each.backward for each in across)),
            inside.repeated,
        )

    def workspace(self, layer: Layer, profile: Profile) -> float:
        levels, links = _outer(layer, profile)
        return ulysses.held(layer.shape, layer.shape.inner) + max(self.flat.workspace(level, links) for level in levels)

    def returned(self, sizes: LayerSizes) -> int:
        if sizes.inner == sizes.ranks:
            return ulysses.returned(sizes)
        return sum(self.flat.returned(level) for level in sizes_between(sizes))

    def inputs(self, sizes: LayerSizes) -> int:
        """Its share of the heads, as the flat mode saves it, and the output on its way back."""
        if sizes.inner == sizes.ranks:
            return ulysses.inputs(sizes)
        if sizes.inner == 1:
            return self.flat.inputs(sizes)
        return sum(self.flat.inputs(level) + level.output_bytes(level.rows) for level in sizes_between(sizes))

    def pipeline(self, layer: Layer, profile: Profile) -> tuple[int, int]:
        """Groups of the largest run of heads, as far as they are groups of all heads too, which a plan counts."""
        assert self.flat.pipeline is not None
        levels, links = _outer(layer, profile)
        groups = self.flat.pipeline(max(levels, key=lambda level: level.shape.heads), links)
        return math.gcd(groups[0], layer.shape.kv_heads), math.gcd(groups[1], layer.shape.kv_heads)


def _outer(layer: Layer, profile: Profile) -> tuple[list[Layer], Profile]:
    """The layers, one a run of heads, that the busiest rank computes between nodes, and the links there."""
    size, groups = layer.shape.inner, layer.groups
    seen = replace(layer.mask, rows_seen=min(layer.mask.rows_seen * size, 1.0))
    level = replace(layer, mask=seen, features=0)
    levels = [
        replace(
            level,
            shape=between_nodes(layer.shape, heads, kv_heads),
            groups=None if groups is None else (math.gcd(groups[0], kv_heads), math.gcd(groups[1], kv_heads)),
        )
        for heads, kv_heads in busiest_parts(layer.shape)
    ]
    return levels, network.outer_level(profile, size)


def two_levels(flat: Mode, schedule: str, implementation: str, colour: str) -> Mode:
    """The mode that redistributes heads inside a node and runs ``flat`` between nodes."""
    both = _TwoLevels(flat)
    return Mode(
        strategy="hybrid",
        schedule=schedule,
        implementation=f"ds_lvxattn.exchange.strategies.hybrid:{implementation}",
        operators=flat.operators,
        traffic=both.traffic,
        passes=both.passes,
        workspace=both.workspace,
        returned=both.returned,
        inputs=both.inputs,
        colour=colour,
        obstacle=obstacle,
        routes_by_mask=flat.routes_by_mask,
        pipeline=both.pipeline if flat.pipeline else None,
        step_a_rank=flat.step_a_rank,
        two_levels=True,
        head_ranks=lambda shape: shape.inner,
        host_like=(ulysses.ULYSSES, GATHER if flat is KV_GATHER else flat),
    )


def _sum(*passes: Pass) -> Pass:
    return Pass(*(sum(getattr(each, part.name) for each in passes) for part in fields(Pass)))


HYBRID_GATHER = two_levels(GATHER, "gather", "gather_between_nodes", "#b35806")
HYBRID_KV_RING = two_levels(KV_RING, "kv_ring", "kv_ring_between_nodes", "#f1a340")
HYBRID_KV_GATHER = two_levels(KV_GATHER, "kv_gather", "kv_gather_between_nodes", "#8c510a")
HYBRID_RING = two_levels(QUERY_RING, "ring", "ring_between_nodes", "#fdb863")
HYBRID_ROUTED = two_levels(ROUTED, "routed", "routed_between_nodes", "#e08214")
