"""Two levels: heads inside a node, queries or keys and values between nodes; see ``exchange/strategies/hybrid.py``.

Between nodes runs a flat mode, on this rank's share of the heads and with a node's rows and keys as one rank's: its own
formulas give bytes, time and memory of that level, on the links between nodes.
"""

from __future__ import annotations

import math
from dataclasses import replace

from ds_lvxattn.plan import network
from ds_lvxattn.plan.cost import Layer, Pass, Passes
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


def between_nodes(shape: LayerShape) -> LayerShape:
    """The layer as the ranks of equal place on all nodes see it."""
    size = shape.inner
    nodes = [slice(i, i + size) for i in range(0, shape.ranks, size)]
    work = shape.visible_work
    return replace(
        shape,
        heads=max(shape.heads // size, 1),
        kv_heads=max(shape.kv_heads // size, 1),
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


def sizes_between(sizes: LayerSizes) -> LayerSizes:
    """``between_nodes`` of what a decoder layer keeps, of even shards."""
    inner = sizes.inner_size or 1
    return replace(
        sizes,
        ranks=sizes.ranks // inner,
        rows=inner * sizes.rows,
        longest_rows=inner * sizes.longest_rows,
        keys=inner * sizes.keys,
        heads=max(sizes.heads // inner, 1),
        kv_heads=max(sizes.kv_heads // inner, 1),
        inner_size=1,
    )


def two_levels(flat: Mode, schedule: str, implementation: str, colour: str) -> Mode:
    """The mode that redistributes heads inside a node and runs ``flat`` between nodes."""

    def traffic(shape: LayerShape, rank: int) -> Traffic:
        """Exact. Where nothing lies on two levels, it is the flat mode, or Ulysses."""
        if shape.inner == 1:
            return flat.traffic(shape, rank)
        if shape.nodes == 1:
            return ulysses.traffic(shape, rank)
        inside = ulysses.traffic(inside_node(shape, rank), rank % shape.inner)
        outside = flat.traffic(between_nodes(shape), rank // shape.inner)
        return Traffic(inside.forward + outside.forward, inside.backward + outside.backward, outside.total)

    def outer(layer: Layer, profile: Profile) -> tuple[Layer, Profile]:
        size = layer.shape.inner
        seen = replace(layer.mask, rows_seen=min(layer.mask.rows_seen * size, 1.0))
        level = replace(layer, shape=between_nodes(layer.shape), mask=seen, features=0)
        if level.groups is not None:
            kv_heads = level.shape.kv_heads
            level = replace(level, groups=(math.gcd(level.groups[0], kv_heads), math.gcd(level.groups[1], kv_heads)))
        return level, network.outer_level(profile, size)

    def passes(layer: Layer, profile: Profile) -> Passes:
        """Both levels after each other; only the outer one overlaps kernels."""
        if layer.shape.inner == 1:
            return flat.passes(layer, profile)
        if layer.shape.nodes == 1:
            return ulysses.passes(layer, profile)
        across = flat.passes(*outer(layer, profile))
        inside = ulysses.redistribution(layer.shape, network.inner_level(profile, layer.shape.inner), layer.shape.inner)
        return Passes(_sum(across.forward, inside.forward), _sum(across.backward, inside.backward), inside.repeated)

    def workspace(layer: Layer, profile: Profile) -> float:
        shape = layer.shape
        copies = max(shape.inner // shape.kv_heads, 1)
        held = 2 * shape.query_bytes(max(shape.q_lengths)) + copies * shape.kv_bytes(max(shape.kv_lengths))
        return 3 * held + flat.workspace(*outer(layer, profile))

    def returned(sizes: LayerSizes) -> int:
        if sizes.inner_size in (None, sizes.ranks):
            return ulysses.returned(sizes)
        return flat.returned(sizes_between(sizes))

    def inputs(sizes: LayerSizes) -> int:
        """Its share of the heads, as the flat mode saves it, and the output on its way back."""
        if sizes.inner_size in (None, sizes.ranks):
            return ulysses.inputs(sizes)
        if sizes.inner_size == 1:
            return flat.inputs(sizes)
        level = sizes_between(sizes)
        return flat.inputs(level) + level.query_bytes(level.rows)

    def pipeline(layer: Layer, profile: Profile) -> tuple[int, int]:
        assert flat.pipeline is not None
        return flat.pipeline(*outer(layer, profile))

    return Mode(
        strategy="hybrid",
        schedule=schedule,
        implementation=f"ds_lvxattn.exchange.strategies.hybrid:{implementation}",
        operators=flat.operators,
        traffic=traffic,
        passes=passes,
        workspace=workspace,
        returned=returned,
        inputs=inputs,
        colour=colour,
        obstacle=obstacle,
        routes_by_mask=flat.routes_by_mask,
        pipeline=pipeline if flat.pipeline else None,
        step_a_rank=flat.step_a_rank,
        two_levels=True,
        host_like=(ulysses.ULYSSES, GATHER if flat is KV_GATHER else flat),
    )


def _sum(a: Pass, b: Pass) -> Pass:
    return Pass(a.kernel + b.kernel, a.passes + b.passes, a.exchange + b.exchange)


HYBRID_GATHER = two_levels(GATHER, "gather", "gather_between_nodes", "#b35806")
HYBRID_KV_RING = two_levels(KV_RING, "kv_ring", "kv_ring_between_nodes", "#f1a340")
HYBRID_KV_GATHER = two_levels(KV_GATHER, "kv_gather", "kv_gather_between_nodes", "#8c510a")
HYBRID_RING = two_levels(QUERY_RING, "ring", "ring_between_nodes", "#fdb863")
HYBRID_ROUTED = two_levels(ROUTED, "routed", "routed_between_nodes", "#e08214")
