"""What the schedules of query exchange have in common: bytes, and what their operators return and save."""

from __future__ import annotations

from ds_lvxattn.plan.layer_sizes import LayerSizes
from ds_lvxattn.plan.modes.mode import own_inputs, own_results
from ds_lvxattn.plan.pipeline import keeps_queries
from ds_lvxattn.plan.traffic import LayerShape


def exchanged(shape: LayerShape, sent: int, returned: int, queries_again: bool) -> tuple[int, int]:
    """Bytes of both passes: ``sent`` rows of other ranks come in; results for this rank's rows come back, ``returned``.

    The main terms are those of LV-XAttn (arXiv 2502.02406), table 1, generalised to GQA and uneven shards.
    """
    query, output = (shape.heads * size * shape.element for size in shape.head_dims)
    statistic = shape.heads * shape.statistic
    forward = sent * query + returned * (output + statistic)
    # Coming in: dO, L and delta. Coming back: dQ.
    backward = sent * (output + 2 * statistic) + returned * query
    return forward, backward + (sent * query if queries_again else 0)


def keeps_gathered(sizes: LayerSizes) -> bool:
    """Whether other ranks' queries are kept; ``routed`` keeps those that it received, at most all of them."""
    if sizes.ranks == 1:
        return False
    return keeps_queries(sizes.heads, sizes.kv_heads, (sizes.longest_rows,) * sizes.ranks, (sizes.keys,))


def returned(sizes: LayerSizes) -> int:
    """Output and log-sum-exp, and the queries of all ranks where they are kept."""
    return own_results(sizes) + (sizes.query_bytes(sizes.ranks * sizes.longest_rows) if keeps_gathered(sizes) else 0)


def inputs(sizes: LayerSizes) -> int:
    """K and V, and the own queries unless they are among those that are kept."""
    return own_inputs(sizes) - (sizes.query_bytes(sizes.rows) if keeps_gathered(sizes) else 0)
