"""One call of ``sp_attention`` as a case, run in every mode, and judged by float64 dense attention."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_lvxattn import KVInterval, SequenceShards, ShardLayout, sp_attention
from ds_lvxattn.plan.modes import eligible_modes
from tests.support.distributed import device
from tests.support.reference import Result, exact, loss_of, magnitudes, one_device, visible

# For a longer search than the default one, which tries the same examples every time.
EXAMPLES = int(os.environ.get("DS_LVXATTN_TEST_EXAMPLES", "0"))

SHARDED = tuple(mode.key for mode in eligible_modes())
DTYPES = {str(dtype)[6:]: dtype for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}


@dataclass(frozen=True)
class Case:
    """One attention call of a group, without its tensors: those are drawn from ``seed`` on every rank."""

    q: SequenceShards
    kv: SequenceShards
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 8
    value_dim: int | None = None
    dtype: str = "float64"
    mask: str = "none"
    pieces: int = 1
    loss: str = "out and lse"
    kernel: str = "auto"
    scale: float | None = None
    softcap: float | None = None
    lse_above_100: bool = False
    interval_of_all_ranks: bool = False
    shards_given: bool = True
    transposed: bool = False
    head_groups: tuple[int, int] | None = None
    keep_queries: bool | None = None
    inner_size: int = 1
    seed: int = 0

    @property
    def on_two_levels(self) -> bool:
        """Whether the grid has several nodes of several ranks."""
        return 1 < self.inner_size < self.q.ranks

    @property
    def modes(self) -> list[tuple[str, str, str]]:
        """Strategy, schedule and query placement of every way to run it."""
        ranks = self.q.ranks
        sharded = [
            (*mode.key, "sharded")
            for mode in eligible_modes()
            if mode.obstacle(self.heads, self.kv_heads, ranks, self.inner_size) is None
            and (not mode.two_levels or self.on_two_levels)
        ]
        return [*sharded, ("lv_xattn", "auto", "replicated")]


@dataclass
class Operands:
    """Tensors of a case, whole sequences in the global order, and the gradients of its loss."""

    q: Tensor
    k: Tensor
    v: Tensor
    start: Tensor | None
    stop: Tensor | None
    scale: float
    dout: Tensor | None
    dlse: Tensor | None
    softcap: float | None = None

    @property
    def mask(self) -> Tensor | None:
        return visible(self.start, self.stop, self.k.shape[2])

    def reference(self, attention: Any) -> Result:
        """Result of ``exact`` or ``one_device``."""
        return attention(self.q, self.k, self.v, self.mask, self.scale, self.dout, self.dlse, self.softcap)


def operands(case: Case) -> Operands:
    generator = torch.Generator().manual_seed(case.seed)
    dtype, rows, keys = DTYPES[case.dtype], case.q.total, case.kv.total

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q = normal(case.batch, case.heads, rows, case.head_dim)
    k = normal(case.batch, case.kv_heads, keys, case.head_dim)
    v = normal(case.batch, case.kv_heads, keys, case.value_dim or case.head_dim)
    dout, dlse = normal(*q.shape[:3], v.shape[3]), normal(*q.shape[:3])
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    if case.lse_above_100:
        # A direction that q and k share moves every score by the same 250.
        shift = (250 / (scale * case.head_dim)) ** 0.5
        q, k = q + shift, k + shift
    start, stop = _ranges(case, generator)
    to = device()
    return Operands(
        q=q.to(dtype).to(to),
        k=k.to(dtype).to(to),
        v=v.to(dtype).to(to),
        start=None if start is None else start.to(to),
        stop=None if stop is None else stop.to(to),
        scale=scale,
        dout=dout.to(dtype).double().to(to) if "out" in case.loss else None,
        dlse=dlse.float().double().to(to) if "lse" in case.loss else None,
        softcap=case.softcap,
    )


def _ranges(case: Case, generator: torch.Generator) -> tuple[Tensor | None, Tensor | None]:
    shape, keys = (case.batch, case.q.total), case.kv.total
    if case.mask == "none":
        return None, None
    if case.pieces > 1:
        cuts = torch.randint(0, keys + 1, (*shape, 2 * case.pieces), generator=generator).sort(dim=-1).values
        order = torch.randperm(case.pieces, generator=generator)
        return cuts[..., ::2][..., order].int(), cuts[..., 1::2][..., order].int()
    if case.mask == "growing":
        seen = (torch.arange(case.q.total) + 1) * keys // max(case.q.total, 1)
        start, stop = torch.zeros(shape), seen.expand(shape)
    else:
        # Some of these lie outside the sequence, and some end before they start: such rows see nothing.
        start, stop = (torch.randint(-1, keys + 2, shape, generator=generator) for _ in range(2))
        if case.mask == "random":
            start, stop = torch.minimum(start, stop), torch.maximum(start, stop)
    return start.int(), stop.int()


def attend(case: Case, mode: tuple[str, str, str], rank: int) -> list[Tensor]:
    """``out, lse, dq, dk, dv`` of one rank, on the CPU."""
    strategy, schedule, queries = mode
    data = operands(case)
    rows = list(case.q.positions(rank) if queries == "sharded" else range(case.q.total))
    keys = list(case.kv.positions(rank))

    def shard(x: Tensor, positions: list[int]) -> Tensor:
        x = x[:, :, positions].detach()
        if case.transposed:
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        return x.requires_grad_()

    q, k, v = shard(data.q, rows), shard(data.k, keys), shard(data.v, keys)
    q_shards = case.q if queries == "sharded" else SequenceShards((case.q.total,) * case.q.ranks)
    out, lse = sp_attention(
        q,
        k,
        v,
        group=dist.group.WORLD,
        strategy=strategy,
        schedule=schedule,
        queries=queries,
        kernel=case.kernel,
        scale=case.scale,
        softcap=case.softcap,
        interval=interval_of(case, data, queries, rows),
        shards=ShardLayout(q_shards, case.kv) if case.shards_given else None,
        head_groups=case.head_groups,
        keep_queries=case.keep_queries,
        inner_size=case.inner_size,
    )
    assert out.shape == (*q.shape[:3], v.shape[3]) and out.dtype == q.dtype
    dout = None if data.dout is None else data.dout[:, :, rows]
    dlse = None if data.dlse is None else data.dlse[:, :, rows]
    grads = torch.autograd.grad(loss_of(out, lse, dout, dlse), (q, k, v))
    return [x.detach().cpu() for x in (out, lse, *grads)]


def interval_of(case: Case, data: Operands, queries: str, rows: list[int]) -> KVInterval | list[KVInterval] | None:
    if data.start is None or data.stop is None:
        return None
    if case.pieces > 1:
        pieces = zip(data.start.unbind(-1), data.stop.unbind(-1), strict=True)
        return [_one_interval(case, replace(data, start=a, stop=b), queries, rows) for a, b in pieces]
    return _one_interval(case, data, queries, rows)


def _one_interval(case: Case, data: Operands, queries: str, rows: list[int]) -> KVInterval:
    assert data.start is not None and data.stop is not None
    if not case.interval_of_all_ranks:
        return KVInterval(data.start[:, rows], data.stop[:, rows])
    if queries == "replicated":
        return KVInterval(data.start[None], data.stop[None])
    bounds = []
    for bound, padding in ((data.start, 0), (data.stop, case.kv.total)):
        # Padding rows see everything here, which must not matter; of several ranges a row they must not overlap.
        padding = 0 if case.pieces > 1 else padding
        padded = bound.new_full((case.q.ranks, case.batch, case.q.longest), padding)
        for rank, length in enumerate(case.q.lengths):
            padded[rank, :, :length] = bound[:, list(case.q.positions(rank))]
        bounds.append(padded)
    return KVInterval(*bounds)


def attend_in_all_modes(cases: list[Case]) -> list[dict[tuple[str, str, str], list[Tensor]]]:
    return [{mode: attend(case, mode, dist.get_rank()) for mode in case.modes} for case in cases]


def assembled(case: Case, mode: tuple[str, str, str], parts: list[list[Tensor]]) -> list[Result]:
    """Whole sequences from what the ranks hold: one result, or one a rank for replicated queries."""

    def whole(index: int, shards: SequenceShards) -> Tensor:
        first = parts[0][index]
        x = first.new_full((*first.shape[:2], shards.total, *first.shape[3:]), float("nan"))
        for rank, part in enumerate(parts):
            x[:, :, list(shards.positions(rank))] = part[index]
        return x

    dk, dv = whole(3, case.kv), whole(4, case.kv)
    if mode[2] == "replicated":
        return [Result(part[0], part[1], part[2], dk, dv) for part in parts]
    return [Result(whole(0, case.q), whole(1, case.q), whole(2, case.q), dk, dv)]


def largest_error(got: Tensor, want: Tensor) -> float:
    """Largest absolute error; NaN where one is infinite and the other is not."""
    got, want = got.double().cpu(), want.double().cpu()
    same = got == want  # -inf beside -inf is right
    return (got - want).abs().masked_fill(same, 0.0).max().item() if got.numel() else 0.0


def largest(x: Tensor) -> float:
    return x.max().item() if x.numel() else 0.0


def check(
    case: Case,
    results: list[dict[tuple[str, str, str], list[Tensor]]],
    modes: Sequence[tuple[str, str, str]] = (),
) -> None:
    """Every output and gradient of every mode is as close to float64 as one device's attention, times 1.5.

    A few roundings of the largest sum of absolute terms are always allowed. In bf16 and fp16 two: a partial
    result is rounded once to travel and once after the merge. In float32 eight: sums run in another order. On
    a tensor of a few elements one device's attention may round all of them the lucky way (or see one key and
    be exact), which says nothing about accuracy. And scores are rounded in float32, the more the larger they
    are; the exponential turns that into a relative error of everything after it. Forward and backward kernels
    may round the same score differently, where the errors of one device cancel.
    """
    data = operands(case)
    truth, baseline, terms = (data.reference(attention) for attention in (exact, one_device, magnitudes))
    if case.lse_above_100:
        seen = truth.lse[truth.lse > float("-inf")]
        assert (seen > 100).all()
    for mode in modes or case.modes:
        for result in assembled(case, mode, [of_rank[mode] for of_rank in results]):
            for (name, got), (_, want), (_, single), (_, term) in zip(
                result.items(), truth.items(), baseline.items(), terms.items(), strict=True
            ):
                error = largest_error(got, want)
                assert error == error, f"NaN in {name} of {mode}"
                if case.dtype == "float64":
                    allowed = 1e-9
                else:
                    roundings = (8 if got.dtype == torch.float32 else 2) * torch.finfo(got.dtype).eps / 2
                    if name != "lse":
                        roundings += 4 * largest(terms.lse) * torch.finfo(torch.float32).eps / 2
                    allowed = 1.5 * largest_error(single, want) + roundings * largest(term)
                    if name == "lse" and case.dtype in ("float16", "bfloat16"):
                        # PyTorch's CPU flash kernel takes a faster exponential for these, 6e-5 off.
                        allowed += 1e-4
                assert error <= allowed, f"{name} of {mode}: error {error:.3g}, allowed {allowed:.3g}"
