"""Shards and intervals against brute force over single tokens."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from ds_lvxattn import SequenceShards
from ds_lvxattn.exchange.interval import clip_to_rank
from ds_lvxattn.exchange.shards import runs, split_by_size, split_evenly


@st.composite
def sequences(draw: st.DrawFn) -> SequenceShards:
    ranks = draw(st.integers(1, 5))
    if draw(st.booleans()):
        units = st.tuples(st.integers(0, 5), st.integers(0, ranks - 1))
        return SequenceShards.dealt(draw(st.lists(units, max_size=12)), ranks)
    if draw(st.booleans()):
        return SequenceShards(tuple(draw(st.lists(st.integers(0, 9), min_size=ranks, max_size=ranks))))
    if draw(st.booleans()):
        return SequenceShards.balanced(draw(st.integers(0, 40)), ranks)
    return SequenceShards.striped(draw(st.integers(0, 40)), ranks, draw(st.integers(1, 7)))


def owners(shards: SequenceShards) -> list[int]:
    """The rank of every token, by the definition of the placement."""
    if shards.units:
        return [rank for tokens, rank in shards.units for _ in range(tokens)]
    if shards.stripe:
        there_and_back = [*range(shards.ranks), *reversed(range(shards.ranks))]
        return [there_and_back[token // shards.stripe % len(there_and_back)] for token in range(shards.total)]
    return [rank for rank, length in enumerate(shards.lengths) for _ in range(length)]


@given(sequences())
def test_every_token_is_where_its_owner_says(shards: SequenceShards) -> None:
    owner = owners(shards)
    for rank in range(shards.ranks):
        held = [token for token in range(shards.total) if owner[token] == rank]
        assert list(shards.positions(rank)) == held
        assert shards.lengths[rank] == len(held)
        positions = torch.arange(-2, shards.total + 3, dtype=torch.int32)
        before = shards.tokens_before(positions, rank)
        assert before.dtype == torch.int32
        assert before.tolist() == [sum(token < position for token in held) for position in positions.tolist()]


@given(sequences())
def test_how_a_sequence_is_dealt_survives_as_integers(shards: SequenceShards) -> None:
    assert SequenceShards.of_deal(shards.lengths, shards.deal) == shards


@given(st.lists(st.integers(1, 9), max_size=9), st.integers(1, 4))
def test_parts_by_size_are_as_even_as_whole_items_allow(sizes: list[int], parts: int) -> None:
    counts = split_by_size(sizes, parts)
    assert len(counts) == parts and sum(counts) == len(sizes) and min(counts) >= 0
    largest = max(sum(sizes[i] for i in run) for run in runs(counts))
    edges = [range(len(sizes) + 1)] * (parts - 1)
    best = min(
        max(sum(sizes[a:b]) for a, b in itertools.pairwise((0, *cuts, len(sizes))))
        for cuts in itertools.product(*edges)
        if list(cuts) == sorted(cuts)
    )
    assert largest == best


@given(sequences())
def test_order_from_padded_restores_the_global_order(shards: SequenceShards) -> None:
    padded = [-1] * (shards.ranks * shards.longest)
    for rank in range(shards.ranks):
        for local, token in enumerate(shards.positions(rank)):
            padded[rank * shards.longest + local] = token
    order = shards.order_from_padded()
    restored = padded if order is None else [padded[index] for index in order]
    assert restored == list(range(shards.total))


@given(sequences(), st.lists(st.tuples(st.integers(-5, 50), st.integers(-5, 50)), max_size=8))
def test_a_clipped_range_sees_the_same_tokens(shards: SequenceShards, ranges: list[tuple[int, int]]) -> None:
    start, stop = torch.tensor(ranges, dtype=torch.int32).reshape(-1, 2).unbind(1)
    for rank in range(shards.ranks):
        held = list(shards.positions(rank))
        local_start, local_stop = clip_to_rank(start, stop, shards, rank)
        assert local_start.dtype == local_stop.dtype == torch.int32
        for (first, last), a, b in zip(ranges, local_start.tolist(), local_stop.tolist(), strict=True):
            assert 0 <= a <= b <= len(held)
            assert held[a:b] == [token for token in held if first <= token < last]


@given(st.integers(0, 50), st.integers(1, 6))
def test_contiguous_shards_differ_by_at_most_one_token(total: int, ranks: int) -> None:
    shards = SequenceShards.contiguous(total, ranks)
    assert shards.total == total and shards.ranks == ranks
    assert max(shards.lengths) - min(shards.lengths) <= 1
    assert shards.lengths == split_evenly(total, ranks)
    assert [len(run) for run in runs(shards.lengths)] == list(shards.lengths)
    assert [run.start for run in runs(shards.lengths)] == [shards.offset(rank) for rank in range(ranks)]
