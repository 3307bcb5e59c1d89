"""Query exchange by collectives, pipelined over groups of heads; see ``exchange/strategies/gather.py``."""

from __future__ import annotations

from collections.abc import Sequence

from ds_lvxattn.plan import network
from ds_lvxattn.plan.cost import Layer, Pass, Passes, kernel_times, moved, overlapped, seen_on_a_rank
from ds_lvxattn.plan.modes import query_exchange
from ds_lvxattn.plan.modes.mode import Mode
from ds_lvxattn.plan.profile import Profile
from ds_lvxattn.plan.traffic import LayerShape, Traffic, from_sources


def traffic(shape: LayerShape, rank: int) -> Traffic:
    """Shards are padded to the longest."""

    def received(sources: Sequence[int]) -> tuple[int, int]:
        rows = shape.batch * len(sources) * max(shape.q_lengths)
        return query_exchange.exchanged(shape, rows, rows, not shape.keeps_queries)

    return from_sources(shape, rank, received)


def passes(layer: Layer, profile: Profile) -> Passes:
    """All-gather the queries, attend, all-to-all the results; groups of heads follow each other in a pipeline."""
    shape = layer.shape
    n, own, keys = shape.ranks, max(shape.q_lengths), max(shape.kv_lengths)
    rows = n * own
    query, output = shape.query_bytes(own), shape.output_bytes(own)
    all_queries, all_outputs = shape.query_bytes(rows), shape.output_bytes(rows)

    def pipeline(groups: int, kernel: float, elementwise: float, sent: float, returned: float) -> Pass:
        come = network.all_gather(profile, n, sent / groups)
        go = network.all_to_all(profile, n, returned / groups)
        work = groups * kernel + elementwise
        total = come + go + overlapped(profile, work, (groups - 1) * (come + go))
        return Pass(groups * kernel, elementwise, total - work)

    groups, later = layer.head_groups(profile)
    kernels = kernel_times(layer, profile, rows, keys, *seen_on_a_rank(layer), divide=groups)
    elementwise = moved(profile, 2 * query, groups)
    elementwise += moved(profile, (n + 1) * output + n * shape.statistic_bytes(own), groups)  # the merge
    forward = pipeline(groups, kernels.forward, elementwise, query, all_outputs + shape.statistic_bytes(rows))

    kernels = kernel_times(layer, profile, rows, keys, *seen_on_a_rank(layer), divide=later)
    sent = output + 2 * shape.statistic_bytes(own)
    if not shape.keeps_queries:
        sent += query
    elementwise = moved(profile, 2 * output) + moved(profile, 2 * output, later)  # delta; what is sent, into its place
    elementwise += moved(profile, (n + 1) * query, later)  # the sum of the parts of dQ
    if kernels.takes_out:
        elementwise += moved(profile, 2 * all_outputs, later)  # the output that stands in for delta
    if later > 1:
        elementwise += moved(profile, 2 * shape.kv_bytes(keys), 2 * later)  # dK, dV of a group into their place
    return Passes(forward, pipeline(later, kernels.backward, elementwise, sent, all_queries))


def workspace(layer: Layer, profile: Profile) -> float:
    """Backward: all queries, and of two groups in flight dO, its stand-in and the parts of dQ, out and back."""
    shape, groups = layer.shape, layer.head_groups(profile)[1]
    rows = shape.ranks * max(shape.q_lengths)
    in_flight = 2 * (shape.query_bytes(rows) + shape.output_bytes(rows))
    return shape.query_bytes(rows) + in_flight * min(2, groups) / groups


GATHER = Mode(
    strategy="lv_xattn",
    schedule="gather",
    implementation="ds_lvxattn.exchange.strategies.gather:gather_attention",
    operators=("ds_lvxattn::query_gather",),
    traffic=traffic,
    passes=passes,
    workspace=workspace,
    returned=query_exchange.returned,
    inputs=query_exchange.inputs,
    colour="#1b7837",
    pipeline=lambda layer, profile: layer.head_groups(profile),
)
