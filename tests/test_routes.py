"""Routes of query rows against brute force, their bytes for the masks of real models, and balance of placements."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ds_lvxattn import SequenceShards, ShardLayout
from ds_lvxattn.exchange.interval import clip_to_rank
from ds_lvxattn.exchange.routes import Routes, routed_rows, visible_work
from ds_lvxattn.plan.modes import mode_named
from ds_lvxattn.plan.traffic import LayerShape


@st.composite
def masked_batches(draw: st.DrawFn) -> tuple[ShardLayout, Tensor, Tensor]:
    ranks, batch = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    q = SequenceShards(tuple(draw(st.lists(st.integers(0, 5), min_size=ranks, max_size=ranks))))
    kv = SequenceShards.striped(draw(st.integers(0, 30)), ranks, draw(st.integers(1, 4)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    bounds = torch.randint(-2, kv.total + 3, (2, ranks, batch, q.longest), generator=generator, dtype=torch.int32)
    return ShardLayout(q, kv), bounds[0], bounds[1]


def needed(layout: ShardLayout, start: Tensor, stop: Tensor, of: int, on: int) -> list[tuple[int, int]]:
    """Rows ``(sequence, row)`` of rank ``of`` that see a key of rank ``on``, in the order of the rows."""
    keys = layout.kv.positions(on)
    return [
        (b, i)
        for b in range(start.shape[1])
        for i in range(layout.q.lengths[of])
        if any(start[of, b, i] <= key < stop[of, b, i] for key in keys)
    ]


@given(masked_batches())
def test_rows_travel_where_they_see_something(case: tuple[ShardLayout, Tensor, Tensor]) -> None:
    layout, start, stop = case
    ranks, batch = layout.q.ranks, start.shape[1]
    counts = routed_rows(start, stop, layout)
    for rank in range(ranks):
        routes = Routes.build(start, stop, layout, rank)
        own = layout.q.lengths[rank]
        leaving = [(on, row) for on in range(ranks) for row in needed(layout, start, stop, rank, on)]
        assert routes.send_rows.tolist() == [b * own + i for _, (b, i) in leaving]
        assert routes.sent == tuple(sum(to == on for to, _ in leaving) for on in range(ranks)) == counts[rank]
        # Every own row finds each of its results once.
        found = sorted((int(place), row) for places in routes.returns for row, place in enumerate(places.tolist()))
        assert [(p, row) for p, row in found if p < len(leaving)] == list(enumerate(routes.send_rows.tolist()))

        arriving = [(of, row) for of in range(ranks) for row in needed(layout, start, stop, of, rank)]
        assert routes.received == tuple(sum(of == source for source, _ in arriving) for of in range(ranks))
        slots = list(range(len(arriving))) if routes.slots is None else routes.slots.tolist()
        first, last = clip_to_rank(start, stop, layout.kv, rank)
        filled = torch.zeros(routes.start.numel(), dtype=torch.bool)
        for slot, (of, (b, i)) in zip(slots, arriving, strict=True):
            assert slot // routes.start.shape[1] == b and not filled[slot]
            filled[slot] = True
            assert routes.start.flatten()[slot] == first[of, b, i] and routes.stop.flatten()[slot] == last[of, b, i]
        empty = (routes.stop <= routes.start).flatten()
        assert empty[~filled].all() and not empty[filled].any()
        assert routes.start.shape[0] == batch


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_rows_that_see_one_image_travel_to_one_rank(ranks: int) -> None:
    """OpenFlamingo's immediate-media rule: text between images sees the image before it."""
    images, tokens, rows = 4 * ranks, 64, 16
    layout = ShardLayout(SequenceShards.contiguous(images * rows, ranks), SequenceShards((4 * tokens,) * ranks))
    image = torch.arange(images * rows, dtype=torch.int32).view(ranks, 1, -1) // rows
    # Text lies beside its images: nothing travels. Text about images elsewhere travels to one rank.
    for shift in (0, 4):
        seen = (image + shift) % images
        start, stop = seen * tokens, (seen + 1) * tokens
        shape = LayerShape(
            1, 8, 8, 64, layout.q.lengths, layout.kv.lengths, 2, routed_rows=routed_rows(start, stop, layout)
        )
        for rank in range(ranks):
            routed, gather = (mode_named("lv_xattn", name).traffic(shape, rank) for name in ("routed", "gather"))
            assert routed.forward * (ranks - 1) == (gather.forward if shift else 0)
            assert routed.backward * (ranks - 1) == (gather.backward if shift else 0)


@pytest.mark.parametrize("frames", [64, 65, 71, 100, 128, 1000])
def test_striped_frames_balance_a_growing_interval(frames: int) -> None:
    """Text after each frame sees the frames up to there; contiguous frames leave the last rank nearly idle."""
    ranks, tokens, rows = 8, 16, 3
    stop = ((torch.arange(frames * rows, dtype=torch.int32) // rows + 1) * tokens)[None]

    def balance(kv: SequenceShards) -> float:
        work = visible_work(torch.zeros_like(stop), stop, kv)
        shape = LayerShape(1, 1, 1, 1, (1,) * ranks, kv.lengths, 2, visible_work=work)
        assert sum(work) == int(stop.sum())
        return shape.balance

    assert balance(SequenceShards.striped(frames * tokens, ranks, tokens)) <= (1.02 if frames % ranks == 0 else 1.1)
    assert balance(SequenceShards.contiguous(frames * tokens, ranks)) > 1.8
