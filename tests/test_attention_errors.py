"""Bad input: every error names the value and says what to do, on every rank, without a hang."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ds_lvxattn import KVInterval, SequenceShards, ShardLayout, merge_attention, sp_attention
from tests.support.distributed import device, run


def qkv(
    heads: int = 2,
    kv_heads: int = 2,
    rows: int = 3,
    keys: int = 5,
    dtype: torch.dtype = torch.float32,
    requires_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(1, heads, rows, 8, device=device()).to(dtype).requires_grad_(requires_grad)
    k, v = (torch.randn(1, kv_heads, keys, 8, device=device()).to(dtype) for _ in range(2))
    return q, k, v


def ranges(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device())


def layout(q: tuple[int, ...], kv: tuple[int, ...]) -> ShardLayout:
    return ShardLayout(SequenceShards(q), SequenceShards(kv))


ONE_RANK: dict[str, tuple[Callable[[], Any], str]] = {
    "shapes": (
        lambda: sp_attention(torch.ones(2, 3), *qkv()[1:]),
        r"q, k, v have shapes \(2, 3\).*give \[B, H_q, s_q, D\]",
    ),
    "k unlike v": (
        lambda: sp_attention(*qkv()[:2], qkv(keys=4)[2]),
        r"\(1, 2, 5, 8\), \(1, 2, 4, 8\); give",
    ),
    "head size": (
        lambda: sp_attention(qkv()[0][..., :4], *qkv()[1:]),
        r"q \(1, 2, 3, 4\) does not fit k \(1, 2, 5, 8\): batch and head size must be equal",
    ),
    "heads of v": (
        lambda: sp_attention(*qkv()[:2], qkv(kv_heads=1)[2]),
        r"\(1, 2, 5, 8\), \(1, 1, 5, 8\); give .* \[B, H_kv, s_kv, D_v\]",
    ),
    "heads": (lambda: sp_attention(*qkv(3, 2)), r"q \(1, 3, 3, 8\) does not fit.*H_q a multiple of H_kv"),
    "dtypes": (
        lambda: sp_attention(qkv()[0].double(), *qkv()[1:]),
        r"dtypes torch.float64, torch.float32, torch.float32; give one floating dtype",
    ),
    "integers": (lambda: sp_attention(*qkv(dtype=torch.int32)), r"dtypes torch.int32.*floating"),
    "no heads": (lambda: sp_attention(*qkv(0, 0)), r"\(1, 0, 5, 8\); give heads, and numbers in each"),
    "heads of no numbers": (
        lambda: sp_attention(*(x[..., :0] for x in qkv())),
        r"\(1, 2, 5, 0\); give heads, and numbers in each",
    ),
    "no numbers": (lambda: sp_attention(*(x.to("meta") for x in qkv())), r"device 'meta', which has no numbers"),
    "devices": (
        lambda: sp_attention(*qkv(), interval=KVInterval(*[ranges(1, 3).to("meta")] * 2)),
        r"q, k, v and start and stop of the interval are on the devices c.*, meta, meta; move them to one",
    ),
    "queries": (
        lambda: sp_attention(*qkv(), queries="split"),
        r"queries is 'split'; choose 'sharded' or 'replicated'",
    ),
    "softcap": (lambda: sp_attention(*qkv(), softcap=0.0), r"softcap is 0.0; give a positive one"),
    "gradients": (lambda: sp_attention(*qkv(), gradients="sums"), r"gradients is 'sums'; choose 'whole', or 'parts'"),
    "parts of sharded queries": (
        lambda: sp_attention(*qkv(), gradients="parts"),
        r"'parts' with queries='replicated' \(now 'sharded'\)",
    ),
    "strategy": (
        lambda: sp_attention(*qkv(), strategy="megatron"),
        r"strategy is 'megatron'; choose one of \['hybrid', 'lv_xattn', 'ring',.* 'ulysses'",
    ),
    "schedule": (
        lambda: sp_attention(*qkv(), schedule="tree"),
        r"schedule is 'tree'; strategy 'lv_xattn' has \('auto', 'gather', 'ring'",
    ),
    "schedule of another strategy": (
        lambda: sp_attention(*qkv(), strategy="ulysses", schedule="gather"),
        r"schedule is 'gather'; strategy 'ulysses' has \('auto',\)",
    ),
    "kernel": (
        lambda: sp_attention(*qkv(), kernel="fast"),
        r"kernel is 'fast'; choose one of \('auto', .*'math'",
    ),
    "kernel that cannot": (
        lambda: sp_attention(*qkv(), kernel="flash", interval=KVInterval(ranges(1, 3), ranges(1, 3))),
        r"kernel 'flash' cannot do this call: it has no interval mask; use 'auto' or one of",
    ),
    "kernel of another dtype": (
        lambda: sp_attention(*qkv(dtype=torch.float64), kernel="cudnn"),
        r"kernel 'cudnn' cannot do this call: it .*; use 'auto' or one of",
    ),
    "ranks of shards": (
        lambda: sp_attention(*qkv(), shards=layout((3, 3), (5, 5))),
        r"shards describes 2 ranks, the group has 1",
    ),
    "lengths of shards": (
        lambda: sp_attention(*qkv(), shards=layout((3,), (7,))),
        r"rank 0 passes 3 query rows and 5 keys, but shards says 3 and 7",
    ),
    "interval rows": (
        lambda: sp_attention(*qkv(), interval=KVInterval(ranges(1, 4), ranges(1, 4))),
        r"interval has shape \(1, 4\); this call needs \(1, 3\)",
    ),
    "interval rows of all ranks": (
        lambda: sp_attention(*qkv(), interval=KVInterval(ranges(2, 1, 3), ranges(2, 1, 3))),
        r"interval has shape \(2, 1, 3\); this call needs \(1, 1, 3\)",
    ),
    "interval start and stop": (
        lambda: KVInterval(ranges(1, 3), ranges(1, 4)),
        r"start has shape \(1, 3\) and stop \(1, 4\); give one start and one stop",
    ),
    "interval dimensions": (
        lambda: KVInterval(ranges(3), ranges(3)),
        r"start has shape \(3,\); give \[B, s_q\].*or \[n, B, s_max\]",
    ),
    "interval dtype": (
        lambda: KVInterval(ranges(1, 3), ranges(1, 3, dtype=torch.int64)),
        r"stop has dtype torch.int64; convert it to torch.int32",
    ),
    "negative shard": (lambda: SequenceShards((3, -1)), r"shard lengths are \(3, -1\); give one length >= 0"),
    "no shard": (lambda: SequenceShards(()), r"shard lengths are \(\); give one length >= 0 for each rank"),
    "stripe": (lambda: SequenceShards((3, 1), stripe=-2), r"stripe is -2; give 0 \(contiguous\)"),
    "lengths that are not striped": (
        lambda: SequenceShards((1, 5), stripe=2),
        r"shard lengths \(1, 5\) are not those of units of 2 tokens dealt in turn to 2 ranks",
    ),
    "ranks of queries and keys": (
        lambda: layout((3,), (5, 5)),
        r"queries are divided over 1 ranks, keys over 2",
    ),
    "nothing to merge": (lambda: merge_attention([]), r"needs at least one \(out, lse\) pair"),
    "merge of different rows": (
        lambda: merge_attention([sp_attention(*qkv(rows=3)), sp_attention(*qkv(rows=4))]),
        r"partials of one shape, not .*\(1, 2, 3, 8\).*\(1, 2, 4, 8\)",
    ),
}


@pytest.mark.parametrize(("call", "message"), ONE_RANK.values(), ids=ONE_RANK.keys())
def test_one_rank(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def errors_of(sizes: list[dict[str, Any]], options: list[dict[str, Any]], masked: list[bool]) -> str:
    """The message of this rank's ValueError; each list holds one item a rank, or one for all."""
    rank = dist.get_rank()

    def own(items: list[Any]) -> Any:
        return items[rank % len(items)]

    q, k, v = qkv(**own(sizes))
    interval = KVInterval(ranges(1, q.shape[2]), ranges(1, q.shape[2])) if own(masked) else None
    with pytest.raises(ValueError) as error:
        sp_attention(q, k, v, group=dist.group.WORLD, interval=interval, **own(options))
    return str(error.value)


MISMATCHES: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]], list[bool]]] = {
    "heads": ([{"heads": 2}, {"heads": 4}], [{}], [False]),
    "key heads": ([{"kv_heads": 1}, {"kv_heads": 2}], [{}], [False]),
    "dtype of one size": ([{"dtype": torch.float16}, {"dtype": torch.bfloat16}], [{}], [False]),
    "schedule": ([{}], [{"schedule": "gather"}, {"schedule": "ring"}], [False]),
    "scale": ([{}], [{"scale": 0.5}, {"scale": 0.25}], [False]),
    "strategy": ([{}], [{"strategy": "lv_xattn"}, {"strategy": "ring"}], [False]),
    "queries": ([{}], [{"queries": "sharded"}, {"queries": "replicated"}], [False]),
    "interval on one rank only": ([{}], [{}], [True, False]),
    "gradients on one rank only": ([{"requires_grad": True}, {}], [{}], [False]),
}


@pytest.mark.parametrize(("sizes", "options", "masked"), MISMATCHES.values(), ids=MISMATCHES.keys())
def test_ranks_that_disagree_all_raise(sizes: list, options: list, masked: list) -> None:
    for message in run(2, errors_of, sizes, options, masked, timeout=30):
        assert "the ranks of the group call sp_attention with different settings; give all" in message
        assert "rank 0" in message and "rank 1" in message


TWO_RANKS: dict[str, tuple[dict[str, int], dict[str, Any], str]] = {
    "more ranks than heads": (
        {"heads": 1, "kv_heads": 1},
        {"strategy": "ulysses"},
        "1 query heads are fewer than 2 ranks; use lv_xattn",
    ),
    "more ranks of a node than heads": (
        {"heads": 1, "kv_heads": 1},
        {"strategy": "hybrid", "inner_size": 2},
        "1 query heads are fewer than 2 ranks of a node; use lv_xattn",
    ),
    "replicated queries, ulysses": (
        {},
        {"strategy": "ulysses", "queries": "replicated"},
        "it shards the queries; use lv_xattn for replicated queries",
    ),
    "replicated queries, ring": (
        {},
        {"strategy": "ring", "queries": "replicated"},
        "it shards the queries; use lv_xattn for replicated queries",
    ),
}


@pytest.mark.parametrize(("sizes", "options", "message"), TWO_RANKS.values(), ids=TWO_RANKS.keys())
def test_every_rank_says_what_a_strategy_cannot_do(sizes: dict, options: dict, message: str) -> None:
    for error in run(2, errors_of, [sizes], [options], [False], timeout=30):
        assert f"strategy '{options['strategy']}' cannot run this attention" in error and message in error


def test_replicated_queries_of_different_lengths() -> None:
    for error in run(2, errors_of, [{"rows": 3}, {"rows": 4}], [{"queries": "replicated"}], [False], timeout=30):
        assert "replicated queries must have one length on every rank, not (3, 4)" in error
