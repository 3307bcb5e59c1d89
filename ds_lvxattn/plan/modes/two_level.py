"""Query exchange that knows the node: rows cross to a node once and spread inside, and one merged result crosses back.

See ``NodeRows`` in ``exchange/query_rows.py``.
"""

from __future__ import annotations

from ds_lvxattn.plan import network
from ds_lvxattn.plan.cost import Layer, Pass, Passes, kernel_times, moved, overlapped, seen_on_a_rank
from ds_lvxattn.plan.modes import gather, query_exchange
from ds_lvxattn.plan.modes.mode import Mode
from ds_lvxattn.plan.profile import Profile
from ds_lvxattn.plan.traffic import LayerShape, Traffic


def traffic(shape: LayerShape, rank: int) -> Traffic:
    """The rows of a rank a node cross, each once; inside, those of all nodes. Shards are padded to the longest."""
    if 1 in (shape.inner, shape.nodes):
        return gather.traffic(shape, rank)
    rows = shape.batch * max(shape.q_lengths)
    across, inside = (shape.nodes - 1) * rows, (shape.inner - 1) * shape.nodes * rows
    again = not shape.keeps_queries
    far = query_exchange.exchanged(shape, across, across, again)
    near = query_exchange.exchanged(shape, inside, inside, again)
    return Traffic(far[0] + near[0], far[1] + near[1], sum(far))


def passes(layer: Layer, profile: Profile) -> Passes:
    """As ``gather``, in two hops, of which the one between nodes overlaps the kernels of other groups."""
    shape = layer.shape
    if 1 in (shape.inner, shape.nodes):
        return gather.passes(layer, profile)
    n, own, keys = shape.ranks, max(shape.q_lengths), max(shape.kv_lengths)
    rows, (a, b) = n * own, (shape.inner, shape.nodes)
    query, output = shape.query_bytes(own), shape.output_bytes(own)
    all_queries, all_outputs = shape.query_bytes(rows), shape.output_bytes(rows)
    near, far = network.inner_level(profile, a), network.outer_level(profile, a)

    def pipelined(groups: int, kernel: float, elementwise: float, sent: float, returned: float) -> Pass:
        across = network.all_gather(far, b, sent / groups) + network.all_to_all(far, b, returned / a / groups)
        inside = network.all_gather(near, a, b * sent / groups) + network.all_to_all(near, a, returned / groups)
        work = groups * (kernel + inside) + elementwise
        total = across + overlapped(profile, work, (groups - 1) * across)
        return Pass(groups * kernel, elementwise, total - groups * kernel - elementwise)

    groups, later = layer.head_groups(profile)
    kernels = kernel_times(layer, profile, rows, keys, *seen_on_a_rank(layer), divide=groups)
    statistic = shape.statistic_bytes(rows)
    elementwise = moved(profile, 2 * query, groups)
    # Merged inside the node, for the rows of a rank a node, and by their owner.
    elementwise += moved(profile, (1 + 1 / a) * (all_outputs + statistic), groups)
    elementwise += moved(profile, (b + 1) * output, groups)
    forward = pipelined(groups, kernels.forward, elementwise, query, all_outputs + statistic)

    kernels = kernel_times(layer, profile, rows, keys, *seen_on_a_rank(layer), divide=later)
    sent = output + 2 * shape.statistic_bytes(own) + (0 if shape.keeps_queries else query)
    elementwise = moved(profile, 2 * output) + moved(profile, 2 * output, later)
    elementwise += moved(profile, (1 + 1 / a) * all_queries, later) + moved(profile, (b + 1) * query, later)
    if kernels.takes_out:
        elementwise += moved(profile, 2 * all_outputs, later)
    if later > 1:
        elementwise += moved(profile, 2 * shape.kv_bytes(keys), 2 * later)
    return Passes(forward, pipelined(later, kernels.backward, elementwise, sent, all_queries))


TWO_LEVEL = Mode(
    strategy="lv_xattn",
    schedule="two_level",
    implementation="ds_lvxattn.exchange.strategies.gather:two_level_attention",
    operators=("ds_lvxattn::query_gather",),
    traffic=traffic,
    passes=passes,
    workspace=gather.workspace,
    returned=query_exchange.returned,
    inputs=query_exchange.inputs,
    colour="#00441b",
    pipeline=lambda layer, profile: layer.head_groups(profile),
    two_levels=True,
    host_like=(gather.GATHER,),
)
