"""Query exchange where every rank holds all the queries; see ``exchange/strategies/replicated.py``.

Decoding and learned queries, which are not planned: nothing else can run them; and text that is on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence

from ds_lvxattn.plan import network
from ds_lvxattn.plan.cost import Layer, Pass, Passes, kernel_times, moved, seen_on_a_rank
from ds_lvxattn.plan.modes.gather import GATHER
from ds_lvxattn.plan.modes.mode import Mode, own_inputs, own_results
from ds_lvxattn.plan.profile import Profile
from ds_lvxattn.plan.traffic import LayerShape, Traffic, from_sources


def traffic(shape: LayerShape, rank: int) -> Traffic:
    """Partial results come in, their message filled up to 8 bytes; the gradient of the queries is summed as a ring."""
    n, rows = shape.ranks, max(shape.q_lengths)
    message = shape.output_bytes(rows) + shape.statistic_bytes(rows)
    summed = shape.query_bytes(rows) // shape.element * shape.statistic

    def received(sources: Sequence[int]) -> tuple[int, int]:
        from_before = 2 * (n - 1) * summed // n if (rank - 1) % n in sources else 0
        return len(sources) * (message + -message % 8), from_before

    return from_sources(shape, rank, received)


def passes(layer: Layer, profile: Profile) -> Passes:
    """All queries over the rank's own keys, one exchange of the results, one sum of the gradient."""
    shape = layer.shape
    rows = max(shape.q_lengths)
    kernels = kernel_times(layer, profile, rows, max(shape.kv_lengths), *seen_on_a_rank(layer))
    delta = 0.0 if kernels.takes_out else moved(profile, 2 * shape.output_bytes(rows))
    result = shape.output_bytes(rows) + shape.statistic_bytes(rows)
    summed = shape.query_bytes(rows) / shape.element * shape.statistic
    merge = moved(profile, shape.ranks * result + shape.output_bytes(rows))
    sum_time = 2 * network.all_gather(profile, shape.ranks, summed / shape.ranks)
    return Passes(
        Pass(kernels.forward, merge, network.all_gather(profile, shape.ranks, result)),
        Pass(kernels.backward, delta, sum_time),
    )


def workspace(layer: Layer, profile: Profile) -> float:
    shape, rows = layer.shape, max(layer.shape.q_lengths)
    return (shape.ranks + 1) * (shape.output_bytes(rows) + shape.statistic_bytes(rows))


REPLICATED = Mode(
    strategy="lv_xattn",
    schedule="replicated",
    implementation="ds_lvxattn.exchange.strategies.replicated:replicated_attention",
    operators=("ds_lvxattn::query_replicated",),
    traffic=traffic,
    passes=passes,
    workspace=workspace,
    returned=own_results,
    inputs=own_inputs,
    colour="#a6dba0",
    queries="replicated",
    host_like=(GATHER,),
    eligible=False,
)
