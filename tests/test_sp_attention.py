"""``sp_attention`` against float64 dense attention: outputs, gradients, and its log-sum-exp as an operand."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ds_lvxattn import KVInterval, SequenceShards, ShardLayout, merge_attention, sp_attention
from ds_lvxattn.kernels.operator import local_attention
from ds_lvxattn.plan.modes import eligible_modes
from tests.support.distributed import device, run
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
    dtype: str = "float64"
    mask: str = "none"
    pieces: int = 1
    loss: str = "out and lse"
    kernel: str = "auto"
    scale: float | None = None
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

    @property
    def mask(self) -> Tensor | None:
        return visible(self.start, self.stop, self.k.shape[2])

    def reference(self, attention: Any) -> Result:
        """Result of ``exact`` or ``one_device``."""
        return attention(self.q, self.k, self.v, self.mask, self.scale, self.dout, self.dlse)


def operands(case: Case) -> Operands:
    generator = torch.Generator().manual_seed(case.seed)
    dtype, rows, keys = DTYPES[case.dtype], case.q.total, case.kv.total

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q = normal(case.batch, case.heads, rows, case.head_dim)
    k = normal(case.batch, case.kv_heads, keys, case.head_dim)
    v = normal(case.batch, case.kv_heads, keys, case.head_dim)
    dout, dlse = normal(*q.shape), normal(*q.shape[:3])
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
        interval=_interval(case, data, queries, rows),
        shards=ShardLayout(q_shards, case.kv) if case.shards_given else None,
        head_groups=case.head_groups,
        keep_queries=case.keep_queries,
        inner_size=case.inner_size,
    )
    assert out.shape == q.shape and out.dtype == q.dtype
    dout = None if data.dout is None else data.dout[:, :, rows]
    dlse = None if data.dlse is None else data.dlse[:, :, rows]
    grads = torch.autograd.grad(loss_of(out, lse, dout, dlse), (q, k, v))
    return [x.detach().cpu() for x in (out, lse, *grads)]


def _interval(case: Case, data: Operands, queries: str, rows: list[int]) -> KVInterval | list[KVInterval] | None:
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


def lengths(draw: st.DrawFn, ranks: int, largest: int) -> SequenceShards:
    """Contiguous shards, uneven and maybe empty, or striped ones."""
    if draw(st.integers(0, 2)):
        return SequenceShards(tuple(draw(st.integers(0, largest)) for _ in range(ranks)))
    return SequenceShards.striped(draw(st.integers(0, largest * ranks)), ranks, draw(st.integers(1, 4)))


@st.composite
def cases(draw: st.DrawFn, ranks: int) -> Case:
    q, kv = lengths(draw, ranks, 6), lengths(draw, ranks, 40)
    # Layouts that Ulysses can run are as frequent as those with fewer heads than ranks.
    mask = draw(st.sampled_from(["none", "random", "growing", "blind rows"]))
    heads, kv_heads = draw(
        st.sampled_from([(ranks, ranks), (2 * ranks, ranks), (2 * ranks, 1), (1, 1), (3, 1), (4, 2), (3, 3)])
    )
    divisors = st.sampled_from([count for count in range(1, kv_heads + 1) if kv_heads % count == 0])
    return Case(
        q=q,
        kv=kv,
        batch=draw(st.integers(1, 2)),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([1, 8, 16, 33, 64])),
        dtype=draw(st.sampled_from(sorted(DTYPES))),
        mask=mask,
        pieces=draw(st.integers(2, 4)) if mask == "random" and draw(st.booleans()) else 1,
        loss=draw(st.sampled_from(["out", "out and lse", "lse"])),
        kernel=draw(st.sampled_from(["auto", "math"])),
        scale=draw(st.sampled_from([None, 0.3])),
        lse_above_100=draw(st.booleans()),
        interval_of_all_ranks=draw(st.booleans()),
        shards_given=bool(q.stripe or kv.stripe) or draw(st.booleans()),
        transposed=draw(st.booleans()),
        head_groups=draw(st.one_of(st.none(), st.tuples(divisors, divisors))),
        keep_queries=draw(st.sampled_from([None, True, False])),
        inner_size=draw(st.sampled_from([size for size in (2, 4, 1) if ranks % size == 0])),
        seed=draw(st.integers(0, 2**31)),
    )


@pytest.mark.parametrize("ranks", [2, 4])
def test_several_ranges_a_row(ranks: int) -> None:
    striped = SequenceShards.striped(11 * ranks, ranks, 3)
    uneven = SequenceShards((5, 0, 3, 1)[-ranks:])
    cases = [
        Case(uneven, striped, 2, 2 * ranks, ranks, mask="random", pieces=3, inner_size=2, seed=1),
        Case(uneven, striped, 1, 2 * ranks, ranks, mask="random", pieces=2, interval_of_all_ranks=True,
             keep_queries=False, head_groups=(2, 1), seed=2),
        Case(uneven, striped, 1, ranks, 1, dtype="bfloat16", mask="random", pieces=5, seed=3),
    ]  # fmt: skip
    results = run(ranks, attend_in_all_modes, cases)
    for number, case in enumerate(cases):
        check(case, [of_rank[number] for of_rank in results])


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_as_accurate_as_one_device(ranks: int) -> None:
    @settings(max_examples=EXAMPLES or 15, derandomize=not EXAMPLES, deadline=None, database=None)
    @given(cases(ranks))
    def holds(case: Case) -> None:
        results = run(ranks, attend_in_all_modes, [case])
        check(case, [of_rank[0] for of_rank in results])

    holds()


def random_steps(ranks: int, count: int) -> list[tuple[Case, tuple[str, str, str]]]:
    """``count`` attention calls that have nothing in common but the ranks; some ranks hold nothing."""
    choose = random.Random(ranks)

    def shards(largest: int) -> SequenceShards:
        if choose.random() < 0.3:
            return SequenceShards.striped(choose.randint(0, largest * ranks), ranks, choose.randint(1, 4))
        return SequenceShards(tuple(choose.choice((0, 1, choose.randint(0, largest))) for _ in range(ranks)))

    steps = []
    for seed in range(count):
        heads, kv_heads = choose.choice([(ranks, ranks), (2 * ranks, ranks), (4, 2), (6, 3), (3, 1), (2, 2)])
        divisors = [groups for groups in range(1, kv_heads + 1) if kv_heads % groups == 0]
        case = Case(
            q=shards(5),
            kv=shards(24),
            batch=choose.randint(1, 2),
            heads=heads,
            kv_heads=kv_heads,
            dtype=choose.choice(["float64", "float32"]),
            mask=choose.choice(["none", "random", "growing", "blind rows"]),
            loss=choose.choice(["out", "out and lse"]),
            interval_of_all_ranks=choose.random() < 0.8,
            head_groups=choose.choice([None, (choose.choice(divisors), choose.choice(divisors))]),
            keep_queries=choose.choice([None, True, False]),
            inner_size=choose.choice([size for size in (1, 2, 4) if ranks % size == 0]),
            seed=seed,
        )
        steps.append((case, choose.choice(case.modes)))
    return steps


def attend_step_by_step(steps: list[tuple[Case, tuple[str, str, str]]]) -> list[list[Tensor]]:
    return [attend(case, mode, dist.get_rank()) for case, mode in steps]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_two_hundred_random_steps(ranks: int) -> None:
    """Shards, masks, strategies and schedules change at every step, as no training does: no hang, no mismatch."""
    steps = random_steps(ranks, 200)
    results = run(ranks, attend_step_by_step, steps)
    for number, (case, mode) in enumerate(steps):
        check(case, [{mode: of_rank[number]} for of_rank in results], (mode,))


def gradcheck_in_all_modes(case: Case) -> dict[tuple[str, str, str], float]:
    return {mode: _gradcheck(case, mode) for mode in case.modes}


def _gradcheck(case: Case, mode: tuple[str, str, str], step: float = 1e-6) -> float:
    """Largest difference between gradients and central differences of the loss of the whole group.

    One element of one rank moves at a time while all ranks evaluate the attention together. The elements of
    replicated queries move on every rank, as they are one tensor; each rank's equal loss counts once.
    """
    strategy, schedule, queries = mode
    rank, ranks = dist.get_rank(), dist.get_world_size()
    replicated = queries == "replicated"
    data = operands(case)
    rows = list(range(case.q.total) if replicated else case.q.positions(rank))
    keys = list(case.kv.positions(rank))
    inputs = [x.clone().requires_grad_() for x in (data.q[:, :, rows], data.k[:, :, keys], data.v[:, :, keys])]
    q_shards = SequenceShards((case.q.total,) * ranks) if replicated else case.q
    interval = _interval(case, data, queries, rows)

    def loss() -> Tensor:
        out, lse = sp_attention(
            *inputs,
            group=dist.group.WORLD,
            strategy=strategy,
            schedule=schedule,
            queries=queries,
            interval=interval,
            shards=ShardLayout(q_shards, case.kv),
            inner_size=case.inner_size,
        )
        return (out.sin() * out).sum() + lse.masked_fill(lse == float("-inf"), 0.0).sin().sum()

    def loss_of_group() -> float:
        with torch.no_grad():
            total = loss()
        dist.all_reduce(total)
        return total.item() / (ranks if replicated else 1)

    worst = 0.0
    gradients = torch.autograd.grad(loss(), inputs)
    for x, gradient, lengths in zip(inputs, gradients, (q_shards.lengths, *[case.kv.lengths] * 2), strict=True):
        shared = replicated and x is inputs[0]
        for owner, length in enumerate(lengths[:1] if shared else lengths):
            mine = shared or rank == owner
            for element in range(x.shape[0] * x.shape[1] * length * x.shape[3]):
                if mine:
                    value = x.data.view(-1)[element].clone()
                sides = []
                for moved in (step, -step):
                    if mine:
                        x.data.view(-1)[element] = value + moved
                    sides.append(loss_of_group())
                if mine:
                    x.data.view(-1)[element] = value
                    numeric = (sides[0] - sides[1]) / (2 * step)
                    worst = max(worst, abs(numeric - gradient.reshape(-1)[element].item()))
    return worst


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case(SequenceShards((2, 1)), SequenceShards((2, 3)), kv_heads=1, head_dim=2, mask="random", seed=1),
        Case(SequenceShards((2, 1)), SequenceShards((3, 2)), heads=2, head_dim=3, lse_above_100=True),
        Case(
            SequenceShards((1, 0, 1, 1)), SequenceShards((2, 1, 0, 1)),
            heads=4, kv_heads=1, head_dim=1, mask="blind rows", inner_size=2, seed=2,
        ),
        Case(
            SequenceShards((1, 1, 0, 1)), SequenceShards.striped(5, 4, 1),
            heads=4, kv_heads=2, head_dim=1, inner_size=2,
        ),
    ],
    ids=["2 ranks, masked", "2 ranks", "4 ranks, empty shards, blind rows", "4 ranks, striped"],
)  # fmt: skip
def test_gradcheck(case: Case) -> None:
    for of_rank in run(case.q.ranks, gradcheck_in_all_modes, case):
        possible = [mode for mode in eligible_modes() if case.on_two_levels or not mode.two_levels]
        assert set(of_rank) == set(case.modes) and len(of_rank) == len(possible) + 1
        assert max(of_rank.values()) < 1e-6, of_rank


@pytest.mark.parametrize("mask", ["none", "random", "blind rows"])
@pytest.mark.parametrize("keys", [0, 6])
def test_gradcheck_of_local_attention(mask: str, keys: int) -> None:
    case = Case(SequenceShards((5,)), SequenceShards((keys,)), 2, 4, 2, head_dim=3, mask=mask)
    data = operands(case)
    inputs = [x.requires_grad_() for x in (data.q, data.k, data.v)]

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = local_attention(q, k, v, data.start, data.stop, data.scale, "math")
        return out, lse.masked_fill(lse == float("-inf"), 0.0)

    assert torch.autograd.gradcheck(call, inputs)


def test_gradcheck_of_merge_attention() -> None:
    outs = [torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    lses = [torch.randn(1, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    # Rows that one partial did not see, and a row that none saw.
    seen = torch.ones(3, 1, 2, 4, dtype=torch.bool)
    seen[0, :, :, 0] = seen[1, :, 0, 1] = seen[:, :, 1, 3] = False

    def call(*partials: Tensor) -> tuple[Tensor, Tensor]:
        outs = [o * s[..., None] for o, s in zip(partials[:3], seen, strict=True)]
        lses = [x.masked_fill(~s, float("-inf")) for x, s in zip(partials[3:], seen, strict=True)]
        out, lse = merge_attention(list(zip(outs, lses, strict=True)))
        return out, lse.masked_fill(lse == float("-inf"), 0.0)

    assert torch.autograd.gradcheck(call, (*outs, *lses))


def merge_of_two_sources(mode: tuple[str, str, str], rows: Case, visual: Case, text: Case) -> list[Tensor]:
    """``out, lse`` and the gradients of attention over two sources of keys, merged by the caller."""
    strategy, schedule, _ = mode
    rank = dist.get_rank()
    data, *sources = (operands(case) for case in (rows, visual, text))
    own_rows = list(rows.q.positions(rank))
    q = data.q[:, :, own_rows].clone().requires_grad_()
    leaves, partials = [q], []
    for case, source in zip((visual, text), sources, strict=True):
        keys = list(case.kv.positions(rank))
        k, v = (x[:, :, keys].clone().requires_grad_() for x in (source.k, source.v))
        leaves += [k, v]
        partials.append(
            sp_attention(
                q,
                k,
                v,
                group=dist.group.WORLD,
                strategy=strategy,
                schedule=schedule,
                interval=_interval(case, source, "sharded", own_rows),
            )
        )
    out, lse = merge_attention(partials)
    assert data.dout is not None and data.dlse is not None
    loss = loss_of(out, lse, data.dout[:, :, own_rows], data.dlse[:, :, own_rows])
    return [x.detach().cpu() for x in (out, lse, *torch.autograd.grad(loss, leaves))]


@pytest.mark.parametrize("mode", [(*mode, "sharded") for mode in SHARDED], ids=" ".join)
def test_merging_two_sources_is_attention_over_both(mode: tuple[str, str, str]) -> None:
    rows = Case(SequenceShards((3, 2)), SequenceShards((0, 0)), batch=2, heads=4, seed=3)
    visual = replace(rows, kv=SequenceShards((7, 4)), mask="blind rows", seed=4)
    text = replace(rows, kv=SequenceShards((0, 3)), seed=5)
    data, first, second = (operands(case) for case in (rows, visual, text))
    mask = first.mask
    assert mask is not None
    mask = torch.cat((mask, mask.new_ones((*mask.shape[:3], text.kv.total))), dim=3)
    k, v = (torch.cat((getattr(first, name), getattr(second, name)), dim=2) for name in ("k", "v"))
    want = exact(data.q, k, v, mask, data.scale, data.dout, data.dlse)

    parts = run(2, merge_of_two_sources, mode, rows, visual, text)
    out, lse, dq, dk1, dv1, dk2, dv2 = (torch.cat(pieces, dim=2) for pieces in zip(*parts, strict=True))
    got = Result(out, lse, dq, torch.cat((dk1, dk2), dim=2), torch.cat((dv1, dv2), dim=2))
    for (name, x), (_, y) in zip(got.items(), want.items(), strict=True):
        assert largest_error(x, y) < 1e-10, name


def flat_twins(case: Case) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Results of every two-level mode on grids of one node, and of one rank a node, and of the flat mode that it is."""
    pairs = []
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for mode in (mode for mode in eligible_modes() if mode.two_levels):
        flat = {"two_level": ("lv_xattn", "gather"), "kv_ring": ("ring", "ring")}.get(mode.schedule)
        flat = flat or ("lv_xattn", mode.schedule)
        one_node = ("lv_xattn", "gather") if mode.strategy == "lv_xattn" else ("ulysses", "auto")
        twins = ((ranks, one_node),) if mode.schedule == "kv_gather" else ((1, flat), (ranks, one_node))
        for inner_size, twin in twins:
            grid = replace(case, inner_size=inner_size)
            pairs.append((attend(grid, (*mode.key, "sharded"), rank), attend(grid, (*twin, "sharded"), rank)))
    return pairs


def test_grids_of_one_level_are_the_flat_modes_to_the_bit() -> None:
    case = Case(SequenceShards((3, 0, 4, 2)), SequenceShards.striped(29, 4, 2), heads=4, kv_heads=4, dtype="bfloat16",
                mask="random")  # fmt: skip
    for pairs in run(4, flat_twins, case):
        for two_levels, flat in pairs:
            assert all(torch.equal(x, y) for x, y in zip(two_levels, flat, strict=True))
