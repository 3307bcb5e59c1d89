"""Query exchange by a ring, the paper's schedule; see ``exchange/strategies/query_ring.py``."""

from __future__ import annotations

from collections.abc import Sequence

from ds_lvxattn.plan import network
from ds_lvxattn.plan.cost import Layer, Pass, Passes, kernel_times, moved, overlapped
from ds_lvxattn.plan.modes import query_exchange
from ds_lvxattn.plan.modes.mode import Mode, own_inputs, own_results
from ds_lvxattn.plan.profile import Profile
from ds_lvxattn.plan.traffic import LayerShape, Traffic, from_sources


def traffic(shape: LayerShape, rank: int) -> Traffic:
    """Exact lengths; the queries travel again in the backward pass."""

    def received(sources: Sequence[int]) -> tuple[int, int]:
        # The rank before hands all queries on; results come straight from those who computed them.
        sent = sum(shape.q_lengths) - shape.q_lengths[rank] if (rank - 1) % shape.ranks in sources else 0
        returned = len(sources) * shape.q_lengths[rank]
        return query_exchange.exchanged(shape, shape.batch * sent, shape.batch * returned, queries_again=True)

    return from_sources(shape, rank, received)


def passes(layer: Layer, profile: Profile) -> Passes:
    """Queries visit the ranks; the next ones and the last results travel while a kernel runs."""
    shape, mask = layer.shape, layer.mask
    n, own, keys = shape.ranks, max(shape.q_lengths), max(shape.kv_lengths)
    query, output, statistic = shape.query_bytes(own), shape.output_bytes(own), shape.statistic_bytes(own)
    seen = mask.share * mask.busiest_step * keys
    kernels = kernel_times(layer, profile, own, keys, seen, mask.drift / n)

    def ring(kernel: float, each_step: float, at_the_end: float, sent: float, returned: float) -> Pass:
        come, go = (network.send(profile, n, size) for size in (sent, returned))
        work = kernel + each_step
        # First step: queries only. The last step's results have nothing to hide behind.
        total = overlapped(profile, work, come) + (n - 2) * overlapped(profile, work, come + go) if n > 1 else 0.0
        total += (overlapped(profile, work, go) if n > 2 else work) + go if n > 1 else work
        return Pass(n * kernel, n * each_step + at_the_end, total - n * work)

    forward = ring(kernels.forward, 0.0, moved(profile, (n + 1) * output + n * statistic, 2), query, output + statistic)
    wide = moved(profile, 5 * shape.kv_bytes(keys), 4)  # a 2-byte part read, a float32 sum read and written
    summed = moved(profile, 2 * output) + moved(profile, (n + 1) * query)
    return Passes(forward, ring(kernels.backward, wide, summed, query + output + 2 * statistic, query))


def workspace(layer: Layer, profile: Profile) -> float:
    shape = layer.shape
    rows = max(shape.q_lengths)
    held = 3 * (shape.query_bytes(rows) + shape.output_bytes(rows)) + shape.ranks * shape.query_bytes(rows)
    return held + 2 * shape.kv_bytes(max(shape.kv_lengths))


QUERY_RING = Mode(
    strategy="lv_xattn",
    schedule="ring",
    implementation="ds_lvxattn.exchange.strategies.query_ring:ring_attention",
    operators=("ds_lvxattn::query_ring",),
    traffic=traffic,
    passes=passes,
    workspace=workspace,
    returned=own_results,
    inputs=own_inputs,
    colour="#762a83",
    step_a_rank=True,
)
