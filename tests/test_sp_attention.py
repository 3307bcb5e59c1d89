"""``sp_attention`` against float64 dense attention: outputs, gradients, and its log-sum-exp as an operand."""

from __future__ import annotations

import os
import random
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ds_lvxattn import SequenceShards, ShardLayout, merge_attention, sp_attention
from ds_lvxattn.kernels.operator import local_attention
from ds_lvxattn.plan.modes import eligible_modes
from tests.support.distributed import run
from tests.support.marks import slow
from tests.support.reference import Result, exact, loss_of
from tests.support.sp_attention import (
    DTYPES,
    SHARDED,
    Case,
    attend,
    attend_in_all_modes,
    check,
    interval_of,
    largest_error,
    operands,
)

# For a longer search than the default one, which tries the same examples every time.
EXAMPLES = int(os.environ.get("DS_LVXATTN_TEST_EXAMPLES", "0"))


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
    lse_above_100 = draw(st.booleans())
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
        value_dim=draw(st.sampled_from([None, None, 5, 24])),
        dtype=draw(st.sampled_from(sorted(DTYPES))),
        mask=mask,
        pieces=draw(st.integers(2, 4)) if mask == "random" and draw(st.booleans()) else 1,
        loss=draw(st.sampled_from(["out", "out and lse", "lse"])),
        kernel=draw(st.sampled_from(["auto", "math"])),
        scale=draw(st.sampled_from([None, 0.3])),
        softcap=None if lse_above_100 else draw(st.sampled_from([None, None, 0.9])),
        lse_above_100=lse_above_100,
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
        Case(uneven, striped, 2, 2 * ranks, ranks, 12, 8, mask="random", pieces=3, inner_size=2, seed=1),
        Case(uneven, striped, 1, 2 * ranks, ranks, mask="random", pieces=2, interval_of_all_ranks=True,
             keep_queries=False, head_groups=(2, 1), seed=2),
        Case(uneven, striped, 1, ranks, 1, dtype="bfloat16", mask="random", pieces=5, seed=3),
    ]  # fmt: skip
    results = run(ranks, attend_in_all_modes, cases)
    for number, case in enumerate(cases):
        check(case, [of_rank[number] for of_rank in results])


@pytest.mark.parametrize("ranks", [slow(2), slow(3), 4])
def test_as_accurate_as_one_device(ranks: int) -> None:
    @settings(max_examples=EXAMPLES or 15, derandomize=not EXAMPLES, deadline=None, database=None)
    @given(cases(ranks))
    def holds(case: Case) -> None:
        results = run(ranks, attend_in_all_modes, [case])
        check(case, [of_rank[0] for of_rank in results])

    holds()


@st.composite
def cases_of_any_heads(draw: st.DrawFn, ranks: int) -> Case:
    """Query heads at least as many as ranks, which mostly divide neither them nor the key heads."""
    kv_heads = draw(st.integers(1, 6))
    group = draw(st.integers(-(-ranks // kv_heads), max(7, ranks)))
    mask = draw(st.sampled_from(["none", "random", "blind rows"]))
    return Case(
        q=lengths(draw, ranks, 6),
        kv=lengths(draw, ranks, 20),
        batch=draw(st.integers(1, 2)),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([1, 8, 16])),
        value_dim=draw(st.sampled_from([None, 4])),
        dtype=draw(st.sampled_from(sorted(DTYPES))),
        mask=mask,
        pieces=draw(st.integers(1, 3)) if mask == "random" else 1,
        loss=draw(st.sampled_from(["out", "out and lse", "lse"])),
        interval_of_all_ranks=draw(st.booleans()),
        transposed=draw(st.booleans()),
        head_groups=draw(st.sampled_from([None, (kv_heads, 1)])),
        inner_size=draw(st.sampled_from([size for size in (2, 3, 1) if ranks % size == 0])),
        seed=draw(st.integers(0, 2**31)),
    )


def attend_by_heads(case: Case) -> dict[tuple[str, str, str], list[Tensor]]:
    return {mode: attend(case, mode, dist.get_rank()) for mode in modes_by_heads(case)}


def modes_by_heads(case: Case) -> list[tuple[str, str, str]]:
    """Those that redistribute heads."""
    return [mode for mode in case.modes if mode[0] in ("ulysses", "hybrid")]


@pytest.mark.parametrize("ranks", [3, 4, 6])
def test_heads_that_the_ranks_do_not_divide(ranks: int) -> None:
    @settings(max_examples=EXAMPLES or 6, derandomize=not EXAMPLES, deadline=None, database=None)
    @given(cases_of_any_heads(ranks))
    def holds(case: Case) -> None:
        assert ("ulysses", "auto", "sharded") in modes_by_heads(case)
        check(case, run(ranks, attend_by_heads, case), modes_by_heads(case))

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
    interval = interval_of(case, data, queries, rows)

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
            softcap=case.softcap,
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
        Case(
            SequenceShards((2, 1)), SequenceShards((2, 3)), kv_heads=1, head_dim=2, mask="random", softcap=0.8, seed=1,
        ),
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
    ids=["2 ranks, masked, capped", "2 ranks", "4 ranks, empty shards, blind rows", "4 ranks, striped"],
)  # fmt: skip
def test_gradcheck(case: Case) -> None:
    for of_rank in run(case.q.ranks, gradcheck_in_all_modes, case):
        possible = [mode for mode in eligible_modes() if case.on_two_levels or not mode.two_levels]
        assert set(of_rank) == set(case.modes) and len(of_rank) == len(possible) + 1
        assert max(of_rank.values()) < 1e-6, of_rank


@pytest.mark.parametrize("mask", ["none", "random", "blind rows"])
@pytest.mark.parametrize(("keys", "softcap"), [(0, None), (6, None), (6, 0.8)])
def test_gradcheck_of_local_attention(mask: str, keys: int, softcap: float | None) -> None:
    case = Case(SequenceShards((5,)), SequenceShards((keys,)), 2, 4, 2, head_dim=3, mask=mask)
    data = operands(case)
    inputs = [x.requires_grad_() for x in (data.q, data.k, data.v)]

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = local_attention(q, k, v, data.start, data.stop, data.scale, "math", softcap)
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
                interval=interval_of(case, source, "sharded", own_rows),
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
