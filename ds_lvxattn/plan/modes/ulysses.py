"""DeepSpeed-Ulysses: heads are redistributed; see ``exchange/strategies/ulysses.py``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ds_lvxattn.plan import network
from ds_lvxattn.plan.cost import Layer, Pass, Passes, kernel_times, moved
from ds_lvxattn.plan.layer_sizes import LayerSizes
from ds_lvxattn.plan.modes.mode import LOCAL_OPERATOR, Mode
from ds_lvxattn.plan.profile import Profile
from ds_lvxattn.plan.traffic import LayerShape, Traffic, from_sources


def obstacle(heads: int, kv_heads: int, ranks: int, inner_size: int) -> str | None:
    """Query heads that the ranks divide, and key heads that they divide or multiply."""
    if heads % ranks:
        return f"{heads} query heads do not divide over {ranks} ranks; use lv_xattn, which has no such limit"
    if kv_heads % ranks and ranks % kv_heads:
        return f"{kv_heads} key heads do not fit {ranks} ranks; use lv_xattn, which has no such limit"
    return None


def traffic(shape: LayerShape, rank: int) -> Traffic:
    """q, k, v and the output change hands, each gradient the same way back; the statistic forward only.

    Key heads fewer than ranks are repeated until each rank has one.
    """
    n = shape.ranks
    rows, keys = n * max(shape.q_lengths), n * max(shape.kv_lengths)
    kv_heads = max(shape.kv_heads, n)
    kv_bytes = shape.batch * keys * kv_heads * shape.head_dim * shape.element

    def received(sources: Sequence[int]) -> tuple[int, int]:
        share = len(sources) / n**2
        exchanged = round(share * 2 * (shape.query_bytes(rows) + kv_bytes))
        forward = exchanged + round(share * shape.statistic_bytes(rows))
        # DeepSpeed's exchange is no operator that checkpointing can keep: all of it runs again, whatever is recomputed.
        return forward, exchanged + (forward if shape.recompute != "none" else 0)

    return from_sources(shape, rank, received)


def passes(layer: Layer, profile: Profile) -> Passes:
    """All-to-all of q, k and v, all rows and keys with ``1/n`` of the heads, and back."""
    shape, mask = layer.shape, layer.mask
    n = shape.ranks
    rows, keys = n * max(shape.q_lengths), n * max(shape.kv_lengths)
    kernels = kernel_times(layer, profile, rows, keys, mask.share * keys, mask.drift, divide=n)
    forward, backward, repeated = redistribution(shape, profile, n)
    delta = 0.0 if kernels.takes_out else moved(profile, 2 * shape.query_bytes(max(shape.q_lengths)))
    return Passes(
        replace(forward, kernel=kernels.forward),
        replace(backward, kernel=kernels.backward, passes=backward.passes + delta),
        repeated,
    )


def redistribution(shape: LayerShape, profile: Profile, ranks: int) -> Passes:
    """Heads of a rank's rows and keys divided over ``ranks`` ranks, and the output's put together again.

    What the attention operator returned is kept where layers are recomputed; this exchange is repeated.
    """
    query = shape.query_bytes(max(shape.q_lengths))
    copies = max(ranks // shape.kv_heads, 1)  # key heads fewer than ranks are repeated
    one_key = copies * shape.kv_bytes(max(shape.kv_lengths)) / 2
    statistic = shape.statistic_bytes(max(shape.q_lengths))

    def exchange(sizes: tuple[float, ...]) -> tuple[float, float]:
        """Transposed into parts, sent, transposed back: a copy on either side."""
        copied = sum(moved(profile, 4 * size, 2) for size in sizes)
        return copied, sum(network.all_to_all(profile, ranks, size) for size in sizes)

    repeat = moved(profile, 2 * (one_key / copies + one_key), 2) if copies > 1 else 0.0
    copied, sent = exchange((query, one_key, one_key, query, statistic))
    forward = Pass(0.0, copied + repeat + moved(profile, 2 * query), sent)
    copied, sent = exchange((query, one_key, one_key, query))
    return Passes(forward, Pass(0.0, copied + repeat, sent), forward)


def workspace(layer: Layer, profile: Profile) -> float:
    shape = layer.shape
    copies = max(shape.ranks // shape.kv_heads, 1)
    return 3 * (2 * shape.query_bytes(max(shape.q_lengths)) + copies * shape.kv_bytes(max(shape.kv_lengths)))


def returned(sizes: LayerSizes) -> int:
    """This rank's share of the heads, for all rows."""
    return sizes.query_bytes(sizes.total_rows) // sizes.ranks + sizes.statistic_bytes(sizes.total_rows) // sizes.ranks


def inputs(sizes: LayerSizes) -> int:
    """Its share of the heads of q, k and v, and the output on its way back; key heads are repeated until each rank has
    one."""
    heads = max(sizes.kv_heads, sizes.ranks)
    keys = sizes.batch * sizes.total_keys * heads * sizes.head_dim * sizes.element // sizes.ranks
    queries = sizes.query_bytes(sizes.rows) + sizes.query_bytes(sizes.total_rows) // sizes.ranks
    return queries + 2 * keys


ULYSSES = Mode(
    strategy="ulysses",
    schedule="auto",
    implementation="ds_lvxattn.exchange.strategies.ulysses:ulysses_attention",
    operators=(LOCAL_OPERATOR,),
    traffic=traffic,
    passes=passes,
    workspace=workspace,
    returned=returned,
    inputs=inputs,
    colour="#2166ac",
    obstacle=obstacle,
)
