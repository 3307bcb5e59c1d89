"""Query exchange where a row travels only to where it sees a key; see ``exchange/strategies/routed.py``."""

from __future__ import annotations

from collections.abc import Sequence

from ds_lvxattn.plan import network
from ds_lvxattn.plan.cost import Layer, Pass, Passes, kernel_times, moved, seen_on_a_rank
from ds_lvxattn.plan.modes import gather, query_exchange
from ds_lvxattn.plan.modes.mode import Mode
from ds_lvxattn.plan.profile import Profile
from ds_lvxattn.plan.traffic import LayerShape, Traffic, from_sources


def traffic(shape: LayerShape, rank: int) -> Traffic:
    """Only rows that see something, to where they see it; without a mask it is ``gather``."""
    rows = shape.routed_rows
    if rows is None:
        return gather.traffic(shape, rank)

    def received(sources: Sequence[int]) -> tuple[int, int]:
        sent, returned = (sum(rows[source][rank] for source in sources), sum(rows[rank][source] for source in sources))
        return query_exchange.exchanged(shape, sent, returned, not shape.keeps_queries)

    return from_sources(shape, rank, received)


def passes(layer: Layer, profile: Profile) -> Passes:
    """One exchange each way, which nothing overlaps."""
    shape = layer.shape
    n, own = shape.ranks, max(shape.q_lengths)
    rows = layer.mask.rows_seen * n * own
    seen, drift = seen_on_a_rank(layer)
    seen_by_those = seen / layer.mask.rows_seen if layer.mask.rows_seen else 0.0
    kernels = kernel_times(layer, profile, rows, max(shape.kv_lengths), seen_by_those, drift)
    travelling, returning = shape.query_bytes(round(rows)), shape.output_bytes(round(rows))
    statistic = shape.statistic_bytes(round(rows))
    again = 0 if shape.keeps_queries else travelling
    # Each own row comes back from as many ranks as it was sent to: on average the rows that a rank computes.
    forward = Pass(
        kernels.forward,
        moved(profile, 2 * travelling) + moved(profile, returning + statistic + shape.output_bytes(own)),
        network.all_to_all(profile, n, travelling) + network.all_to_all(profile, n, returning + statistic),
    )
    backward = Pass(
        kernels.backward,
        moved(profile, 2 * (travelling + returning)) + moved(profile, travelling + shape.query_bytes(own)),
        network.all_to_all(profile, n, returning + 2 * statistic + again) + network.all_to_all(profile, n, travelling),
    )
    return Passes(forward, backward)


def workspace(layer: Layer, profile: Profile) -> float:
    shape, rows = layer.shape, layer.shape.ranks * max(layer.shape.q_lengths)
    return layer.mask.rows_seen * (3 * shape.query_bytes(rows) + 2 * shape.output_bytes(rows))


ROUTED = Mode(
    strategy="lv_xattn",
    schedule="routed",
    implementation="ds_lvxattn.exchange.strategies.routed:routed_attention",
    operators=("ds_lvxattn::query_routed",),
    traffic=traffic,
    passes=passes,
    workspace=workspace,
    returned=query_exchange.returned,
    inputs=query_exchange.inputs,
    colour="#7fbf7b",
    routes_by_mask=True,
)
