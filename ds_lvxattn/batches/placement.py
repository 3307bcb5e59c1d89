"""Which rank encodes which frame, so that all have about the same work, and where its visual tokens lie as keys."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from ds_lvxattn.batches.packing import Span, samples_of_rows
from ds_lvxattn.data.sample import FrameShape
from ds_lvxattn.exchange.shards import SequenceShards, place_in_round, runs, split_by_size


def frame_owners(
    weights: Sequence[Sequence[int]], spans: Sequence[Span], ranks: int, striped: bool
) -> tuple[tuple[int, ...], ...]:
    """Owners of the frames of each sample. Those of a row are placed as one sequence, as the text of the row is."""
    rows = samples_of_rows(spans)
    of_rows = [[weight for sample in row for weight in weights[sample]] for row in rows]
    owners: list[tuple[int, ...]] = [()] * len(weights)
    for row, of_row in zip(rows, (_striped if striped else _contiguous)(of_rows, ranks), strict=True):
        for sample, run in zip(row, runs([len(weights[sample]) for sample in row]), strict=True):
            owners[sample] = of_row[run.start : run.stop]
    return tuple(owners)


def _contiguous(weights: Sequence[Sequence[int]], ranks: int) -> tuple[tuple[int, ...], ...]:
    """Owners of the frames of each row: runs of them in the order of the ranks, as its text is divided.

    A row fills up what those before it left uneven.
    """
    loads = np.zeros(ranks)
    owners = []
    for sample in weights:
        if not loads.any() or len(set(loads)) == 1:
            counts: Sequence[int] = split_by_size(sample, ranks)
        else:
            room = np.maximum((loads.sum() + sum(sample)) / ranks - loads, 0)
            ahead = np.cumsum([0, *sample])
            shares = np.cumsum(room)[:-1] / max(room.sum(), 1) * ahead[-1]
            cuts = [int(np.abs(ahead - share).argmin()) for share in shares]
            counts = [b - a for a, b in itertools.pairwise((0, *cuts, len(sample)))]
        owners.append(tuple(rank for rank, count in enumerate(counts) for _ in range(count)))
        loads += [sum(sample[i] for i in run) for run in runs(counts)]
    return tuple(owners)


def _striped(weights: Sequence[Sequence[int]], ranks: int) -> tuple[tuple[int, ...], ...]:
    """Owners of the frames of each row, dealt in rounds of one a rank: there and back where they are equal.

    In a round the largest frame goes to the rank that has least.
    """
    loads, owners, number = [0] * ranks, [], 0
    for sample in weights:
        own = [0] * len(sample)
        for first in range(0, len(sample), ranks):
            turn = sorted(range(ranks), key=lambda rank: (loads[rank], place_in_round(rank, ranks, number)))
            frames = sorted(range(first, min(first + ranks, len(sample))), key=lambda frame: (-sample[frame], frame))
            for frame, rank in zip(frames, turn, strict=False):
                own[frame] = rank
                loads[rank] += sample[frame]
            number += 1
        owners.append(tuple(own))
    return tuple(owners)


def key_shards(
    shapes: Sequence[Sequence[FrameShape]], owners: Sequence[Sequence[int]], ranks: int, striped: bool
) -> SequenceShards:
    """Shards of the visual tokens: of each sample those of its frames, and behind them what pads the frames."""
    if striped and len(shapes) == 1 and len(set(shapes[0])) == 1 and not shapes[0][0].padding:  # told by one number
        return SequenceShards.striped(sum(shape.tokens for shape in shapes[0]), ranks, shapes[0][0].tokens)
    units: list[tuple[int, int]] = []
    for sample, own in zip(shapes, owners, strict=True):
        units += [(shape.tokens, rank) for shape, rank in zip(sample, own, strict=True)]
        units += [(shape.padding, rank) for shape, rank in zip(sample, own, strict=True)]
    return SequenceShards.dealt(units, ranks)
