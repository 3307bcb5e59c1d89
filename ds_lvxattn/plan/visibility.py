"""What an interval mask leaves to compute, and how evenly it lies on the ranks: a few numbers for the cost model."""

from __future__ import annotations

from dataclasses import dataclass

from ds_lvxattn.plan.traffic import LayerShape

MASKS = ("full", "growing", "frame")


@dataclass(frozen=True)
class Visibility:
    """A mask, summed up.

    Attributes:
        masked: whether rows have intervals at all (it decides the kernel).
        share: visible (row, key) pairs over all pairs.
        busiest_keys: pairs on the keys of the rank that has most, over the mean: the load where queries travel.
        busiest_step: pairs of the rank that has most, summed over the steps of a ring, over the mean: the load where
            ranks wait for each other at each step.
        drift: keys by which the two ends of a row's range move from a row to the next, both added; a tile of rows
            computes what any of its rows sees.
        rows_seen: rows that see something on a rank, on the rank that most see, over all rows.
    """

    masked: bool = False
    share: float = 1.0
    busiest_keys: float = 1.0
    busiest_step: float = 1.0
    drift: float = 0.0
    rows_seen: float = 1.0


FULL = Visibility()


def growing(queries: int, keys: int, ranks: int) -> Visibility:
    """Row ``i`` sees the keys up to its own place: causal self-attention, or all frames so far."""
    uneven = (
        2 - 1 / ranks
    )  # the first rank's keys are seen by nearly all rows; at each step of a ring some rank has all
    return Visibility(True, 0.5, uneven, uneven, keys / max(queries, 1), 1.0)


def one_frame(queries: int, keys: int, ranks: int, frame_keys: int) -> Visibility:
    """Every row sees one frame, the rows evenly spread over the frames (OpenFlamingo's immediate media)."""
    return Visibility(True, min(frame_keys / max(keys, 1), 1.0), 1.0, 1.0, 2 * keys / max(queries, 1), 1 / ranks)


def of_mask(name: str, queries: int, keys: int, ranks: int, frame_keys: int) -> Visibility:
    """A mask by its name: ``full``, ``growing`` or ``frame``."""
    if name == "full":
        return Visibility(masked=True)
    return growing(queries, keys, ranks) if name == "growing" else one_frame(queries, keys, ranks, frame_keys)


def of_shape(shape: LayerShape) -> Visibility:
    """The mask of a batch, as far as its sizes tell.

    Work by rings of ranks is taken to be as uneven as work by keys, which holds for masks that grow along the sequence.
    Ranges that do not span all keys, and of which no drift is known, are taken to move over all of them from the first
    row to the last.
    """
    if shape.routed_rows is None or shape.visible_work is None:
        return FULL
    rows, keys = sum(shape.q_lengths), sum(shape.kv_lengths)
    pairs, work = shape.batch * rows * keys, sum(shape.visible_work)
    if not work:
        return Visibility(True, 0.0, 1.0, 1.0, 0.0, 0.0)
    seen = max(map(sum, zip(*shape.routed_rows, strict=True)))
    share = work / pairs
    # The work of an even share of the keys: a rank with more of them than others is counted by its own length.
    dense = [length * work / keys for length in shape.kv_lengths]
    uneven = max(have / want for have, want in zip(shape.visible_work, dense, strict=True) if want)
    drift = (keys / rows if share < 1.0 else 0.0) if shape.drift is None else shape.drift
    return Visibility(True, share, uneven, max(uneven, 1.0), drift, min(seen / (shape.batch * rows), 1.0))
