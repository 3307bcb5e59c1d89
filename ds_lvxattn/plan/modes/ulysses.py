"""DeepSpeed-Ulysses: heads are redistributed; see ``exchange/strategies/ulysses.py``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ds_lvxattn.plan import network
from ds_lvxattn.plan.cost import Layer, Pass, Passes, kernel_times, moved
from ds_lvxattn.plan.head_shards import busiest_shard, divides_heads, head_shards
from ds_lvxattn.plan.layer_sizes import LayerSizes
from ds_lvxattn.plan.modes.mode import LOCAL_OPERATOR, Mode
from ds_lvxattn.plan.profile import Profile
from ds_lvxattn.plan.traffic import LayerShape, Traffic, from_sources


def obstacle(heads: int, kv_heads: int, ranks: int, inner_size: int) -> str | None:
    """A query head for every rank: others would have nothing to do."""
    if heads < ranks:
        return f"{heads} query heads are fewer than {ranks} ranks; use lv_xattn, which has no such limit"
    return None


def traffic(shape: LayerShape, rank: int) -> Traffic:
    """q, k, v and the output change hands, each gradient the same way back; the statistic forward only.

    Key heads go to every rank that reads them. Where the ranks divide the heads, shards are padded to the longest.
    """
    n = shape.ranks
    heads = head_shards(shape.heads, shape.kv_heads, n)
    q_lengths, kv_lengths = shape.q_lengths, shape.kv_lengths
    if divides_heads(shape.heads, shape.kv_heads, n):
        q_lengths, kv_lengths = (max(q_lengths),) * n, (max(kv_lengths),) * n
    key, value = (shape.batch * size * shape.element for size in shape.head_dims)  # bytes of one of a head
    queries, keys = len(heads[rank].queries), len(heads[rank].keys)

    def received(sources: Sequence[int]) -> tuple[int, int]:
        rows, visual = (sum(lengths[source] for source in sources) for lengths in (q_lengths, kv_lengths))
        heads_of_own = q_lengths[rank] * sum(len(heads[source].queries) for source in sources)
        keys_of_own = kv_lengths[rank] * sum(len(heads[source].keys) for source in sources)
        # In the backward pass dO as q before, dQ as the output, dK and dV from where K and V went.
        forward = key * rows * queries + value * heads_of_own + (key + value) * visual * keys
        forward += heads_of_own * shape.batch * shape.statistic
        backward = value * rows * queries + key * heads_of_own + (key + value) * keys_of_own
        # Neither exchange is an operator that checkpointing can keep: all of it runs again, whatever is recomputed.
        return forward, backward + (forward if shape.recompute != "none" else 0)

    return from_sources(shape, rank, received)


def passes(layer: Layer, profile: Profile) -> Passes:
    """All-to-all of q, k and v, all rows and keys with a rank's share of the heads, and back."""
    shape, mask = layer.shape, layer.mask
    n = shape.ranks
    rows, keys = n * max(shape.q_lengths), n * max(shape.kv_lengths)
    kernels = [
        kernel_times(
            replace(layer, shape=replace(shape, heads=heads, kv_heads=kv_heads)),
            profile, rows, keys, mask.share * keys, mask.drift,
        )
        for heads, kv_heads in busiest_shard(shape.heads, shape.kv_heads, n).parts
    ]  # fmt: skip
    forward, backward, repeated = redistribution(shape, profile, n)
    takes_out = all(each.takes_out for each in kernels)
    delta = 0.0 if takes_out else moved(profile, 2 * shape.output_bytes(max(shape.q_lengths)))
    return Passes(
        replace(forward, kernel=sum(each.forward for each in kernels)),
        replace(backward, kernel=sum(each.backward for each in kernels), passes=backward.passes + delta),
        repeated,
    )


def redistribution(shape: LayerShape, profile: Profile, ranks: int) -> Passes:
    """Heads of a rank's rows and keys divided over ``ranks`` ranks, and the output's put together again.

    As if every rank had the heads of the busiest one. What the attention operator returned is kept where layers are
    recomputed; this exchange is repeated.
    """
    share, copies = _stretched(shape.heads, shape.kv_heads, ranks)
    query = share * shape.query_bytes(max(shape.q_lengths))
    output = share * shape.output_bytes(max(shape.q_lengths))
    key, value = (copies * shape.kv_bytes(max(shape.kv_lengths)) * x / sum(shape.head_dims) for x in shape.head_dims)
    statistic = share * shape.statistic_bytes(max(shape.q_lengths))

    def exchange(sizes: tuple[float, ...]) -> tuple[float, float]:
        """Transposed into parts, sent, transposed back: a copy on either side."""
        copied = sum(moved(profile, 4 * size, 2) for size in sizes)
        return copied, sum(network.all_to_all(profile, ranks, size) for size in sizes)

    repeat = moved(profile, (key + value) * (1 + 1 / copies), 2) if copies > 1 else 0.0
    copied, sent = exchange((query, key, value, output, statistic))
    forward = Pass(0.0, copied + repeat + moved(profile, 2 * output), sent)
    copied, sent = exchange((query, key, value, output))
    return Passes(forward, Pass(0.0, copied + repeat, sent), forward)


def workspace(layer: Layer, profile: Profile) -> float:
    return held(layer.shape, layer.shape.ranks)


def held(shape: LayerShape, ranks: int) -> float:
    """Bytes of q, k, v and out on their way, as they are packed, sent and unpacked."""
    share, copies = _stretched(shape.heads, shape.kv_heads, ranks)
    rows = max(shape.q_lengths)
    travelling = share * (shape.query_bytes(rows) + shape.output_bytes(rows))
    return 3 * (travelling + copies * shape.kv_bytes(max(shape.kv_lengths)))


def _stretched(heads: int, kv_heads: int, ranks: int) -> tuple[float, float]:
    """Query heads and key heads of all ranks if each had as many as the busiest, to those that there are."""
    shard = busiest_shard(heads, kv_heads, ranks)
    return ranks * len(shard.queries) / heads, ranks * len(shard.keys) / kv_heads


def returned(sizes: LayerSizes) -> int:
    """The busiest rank's share of the heads, for all rows."""
    share = _of_busiest(sizes)
    return share.output_bytes(sizes.total_rows) + share.statistic_bytes(sizes.total_rows)


def inputs(sizes: LayerSizes) -> int:
    """Its share of the heads of q, k and v, and the output on its way back."""
    share = replace(_of_busiest(sizes), keys=sizes.total_keys)
    return sizes.output_bytes(sizes.rows) + share.query_bytes(sizes.total_rows) + share.kv_bytes


def _of_busiest(sizes: LayerSizes) -> LayerSizes:
    shard = busiest_shard(sizes.heads, sizes.kv_heads, sizes.ranks)
    return replace(sizes, heads=len(shard.queries), kv_heads=len(shard.keys))


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
    head_ranks=lambda shape: shape.ranks,
)
