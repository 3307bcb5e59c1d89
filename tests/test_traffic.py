"""Bytes that a rank receives: the communicator's count, what really moves, and the formulas of the design."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.distributed as dist

from ds_lvxattn import KVInterval, SequenceShards, ShardLayout, sp_attention
from ds_lvxattn.exchange.comm import communicator
from ds_lvxattn.plan.head_shards import divides_heads, head_shards
from ds_lvxattn.plan.modes import eligible_modes
from tests.support.distributed import device, run
from tests.support.traffic import Layer, traffic_of

GATHER = ("lv_xattn", "gather", "sharded")
QUERY_RING = ("lv_xattn", "ring", "sharded")
ROUTED = ("lv_xattn", "routed", "sharded")
REPLICATED = ("lv_xattn", "auto", "replicated")
ULYSSES = ("ulysses", "auto", "sharded")
KV_RING = ("ring", "ring", "sharded")
MODES = (*((*mode.key, "sharded") for mode in eligible_modes() if not mode.two_levels), REPLICATED)


def rows_seen(layer: Layer) -> list[list[int]]:
    """How many rows of each rank see a key of each rank, row by row and key by key."""
    start, stop = (bound.tolist() for bound in layer.ranges)
    return [
        [
            sum(
                any(start[of][b][i] <= key < stop[of][b][i] for key in layer.shards.kv.positions(on))
                for b in range(layer.batch)
                for i in range(layer.q_lengths[of])
            )
            for on in range(layer.ranks)
        ]
        for of in range(layer.ranks)
    ]


def formulas(layer: Layer, mode: tuple[str, str, str], rank: int) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of the forward and of the backward pass, by kind, for shards of any lengths.

    Collectives pad to the longest shard; point-to-point messages do not.
    """
    n, size, wide = layer.ranks, layer.dtype.itemsize, 8 if layer.dtype == torch.float64 else 4
    row, out = (layer.batch * layer.heads * of * size for of in layer.head_dims)
    stat = layer.batch * layer.heads * wide
    total, own = sum(layer.q_lengths), layer.q_lengths[rank]
    sent, returned = total - own, (n - 1) * own
    if mode == GATHER or (mode == ROUTED and not layer.masked):
        sent = returned = (n - 1) * max(layer.q_lengths)
    elif mode == ROUTED:
        # Rows count over the batch here.
        row, out, stat = row // layer.batch, out // layer.batch, stat // layer.batch
        seen = rows_seen(layer)
        sent = sum(seen[other][rank] for other in range(n)) - seen[rank][rank]
        returned = sum(seen[rank]) - seen[rank][rank]
    if mode in (GATHER, QUERY_RING, ROUTED):
        forward = {"queries": sent * row, "outputs": returned * out, "lse": returned * stat}
        kept = layer.keep_queries
        if kept is None:
            kept = n * max(layer.q_lengths) * layer.heads <= 2 * max(layer.kv_lengths) * layer.kv_heads
        queries_again = {} if kept and mode != QUERY_RING else {"queries": sent * row}
        return forward, {
            "output gradients": sent * out,
            "query gradients": returned * row,
            "lse": 2 * sent * stat,
            **queries_again,
        }
    if mode == REPLICATED:
        forward = {"outputs": (n - 1) * total * (out + stat)}
        return forward, {"query gradients": 2 * (n - 1) * total * row // size * wide // n}
    if mode == ULYSSES:
        if not divides_heads(layer.heads, layer.kv_heads, n):
            return uneven_ulysses(layer, rank, row // layer.heads, out // layer.heads, stat // layer.heads)
        kv_row = layer.batch * max(layer.kv_heads, n) * sum(layer.head_dims) * size
        rows, keys = (n - 1) * max(layer.q_lengths), (n - 1) * max(layer.kv_lengths)
        forward = {
            "queries": rows * row // n,
            "outputs": rows * out // n,
            "keys and values": keys * kv_row // n,
            "lse": rows * stat // n,
        }
        # Each gradient goes back the way of what it is of.
        return forward, forward if layer.lse_in_loss else {k: b for k, b in forward.items() if k != "lse"}
    assert mode == KV_RING, f"write down what {mode} receives"
    key = layer.batch * layer.kv_heads * sum(layer.head_dims)
    keys = sum(layer.kv_lengths)
    visiting = (keys - layer.kv_lengths[rank]) * key * size
    # The gradients of all keys arrive here, its own last, but for those of the rank before.
    gradients = (keys - layer.kv_lengths[rank - 1]) * key * wide
    return {"keys and values": visiting}, {"keys and values": visiting, "key and value gradients": gradients}


def uneven_ulysses(layer: Layer, rank: int, key: int, value: int, stat: int) -> tuple[dict[str, int], dict[str, int]]:
    """``formulas`` of heads that the ranks do not divide; ``key``, ``value``, ``stat``: bytes of a row of one head."""
    shards = head_shards(layer.heads, layer.kv_heads, layer.ranks)
    others = [other for other in range(layer.ranks) if other != rank]
    rows, keys = (sum(lengths[other] for other in others) for lengths in (layer.q_lengths, layer.kv_lengths))
    heads, kv_heads = (sum(len(getattr(shards[other], kind)) for other in others) for kind in ("queries", "keys"))
    own_rows, own_keys = layer.q_lengths[rank], layer.kv_lengths[rank]
    to_heads, to_rows = rows * len(shards[rank].queries), own_rows * heads
    forward = {
        "queries": to_heads * key,
        "outputs": to_rows * value,
        "lse": to_rows * stat,
        "keys and values": keys * len(shards[rank].keys) * (key + value),
    }
    backward = {
        "outputs": to_heads * value,
        "queries": to_rows * key,
        "keys and values": own_keys * kv_heads * (key + value),
    }
    if layer.lse_in_loss:
        backward["lse"] = rows * len(shards[rank].queries) * stat
    return forward, backward


LAYERS = {
    "even": Layer((6, 6), (40, 40)),
    "other values": Layer((6, 4), (40, 30), head_dim=24, value_dim=16, keep_queries=False, masked=True, seed=1),
    "kernel that takes the output": Layer((6, 6), (40, 40), kernel="flash", lse_in_loss=False),
    "head groups, queries again": Layer((6, 5), (40, 30), head_groups=(4, 2), keep_queries=False, lse_in_loss=False),
    "head groups, masked": Layer((6, 6), (40, 40), head_groups=(2, 4), keep_queries=True, masked=True, seed=1),
    "masked": Layer((5, 9), (31, 8), masked=True, keep_queries=False, batch=1, seed=2),
    "masked, three ranges a row": Layer((5, 9), (31, 8), masked=True, keep_queries=False, batch=1, seed=2, pieces=3),
    "uneven": Layer((5, 2), (31, 8), dtype=torch.float32),
    "empty": Layer((0, 3), (7, 0), dtype=torch.float64),
    "3 ranks, heads that they do not divide": Layer((5, 2, 4), (31, 8, 0), value_dim=24),
    "4 ranks": Layer((4, 4, 4, 4), (24, 24, 24, 24)),
    "4 ranks, uneven, fewer key heads": Layer((5, 0, 2, 1), (9, 31, 0, 12), kv_heads=2, dtype=torch.float16),
    "4 ranks, masked": Layer((5, 0, 2, 1), (9, 31, 0, 12), kv_heads=2, dtype=torch.float32, masked=True, seed=3),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_count_equals_formulas_and_measurement(layer: Layer) -> None:
    for rank, results in enumerate(run(layer.ranks, traffic_of, layer, MODES)):
        for mode, result in zip(MODES, results, strict=True):
            forward, backward = formulas(layer, mode, rank)
            assert +result.forward == +Counter(forward), (mode, rank, "forward")
            assert +result.backward == +Counter(backward), (mode, rank, "backward")
            assert result.measured_forward == sum(forward.values()), (mode, rank)
            assert result.measured_backward == sum(backward.values()), (mode, rank)


@pytest.mark.parametrize("ranks", [2, 4])
def test_even_shards_receive_what_the_table_of_the_design_says(ranks: int) -> None:
    layer = Layer((8,) * ranks, (40,) * ranks, keep_queries=True)
    n, size = ranks, layer.dtype.itemsize
    queries = sum(layer.q_lengths) * layer.heads * layer.head_dim * layer.batch
    keys = sum(layer.kv_lengths) * layer.kv_heads * layer.head_dim * layer.batch
    exchange = (n - 1) * 2 * queries * size // n
    all_to_all = (n - 1) * (2 * queries + 2 * keys) * size // n**2
    ring = (n - 1) * 2 * keys * size // n
    ring_gradients = (n - 1) * 2 * keys * 4 // n
    table = {
        GATHER: (exchange, exchange),
        QUERY_RING: (exchange, exchange + exchange // 2),  # Q is sent again
        ROUTED: (exchange, exchange),  # nothing is masked
        ULYSSES: (all_to_all, all_to_all),
        KV_RING: (ring, ring + ring_gradients),
    }
    for results in run(ranks, traffic_of, layer, tuple(table)):
        for (mode, (forward, backward)), result in zip(table.items(), results, strict=True):
            assert result.forward.total() - result.forward["lse"] == forward, mode
            assert result.backward.total() - result.backward["lse"] == backward, mode


def metadata_traffic(interval_of_all_ranks: bool, shards_given: bool) -> Counter[str]:
    comm = communicator(dist.group.WORLD)
    q = torch.randn(2, 2, 3, 8, device=device())
    shape = (comm.ranks, 2, 3) if interval_of_all_ranks else (2, 3)
    bound = torch.zeros(shape, dtype=torch.int32, device=device())
    lengths = SequenceShards((3,) * comm.ranks)
    comm.reset()
    sp_attention(
        q, q, q, group=comm.group, interval=KVInterval(bound, bound + 4),
        shards=ShardLayout(lengths, lengths) if shards_given else None,
    )  # fmt: skip
    return Counter({what: comm.received[what] for what in ("intervals", "shard lengths")})


def test_metadata_travels_only_when_the_caller_does_not_give_it() -> None:
    assert all(not +seen for seen in run(2, metadata_traffic, True, True))
    for seen in run(2, metadata_traffic, False, False):
        assert seen["intervals"] == 2 * 2 * 3 * 4  # start and stop, batch 2, 3 rows, int32
        assert seen["shard lengths"] > 0
