"""Where the text and the frames of a micro-batch lie on the ranks, and what each token sees.

Pure host metadata, computed alike on every rank of a sequence-parallel group: the token ids of a batch are small,
so every rank has all of them, while it decodes and encodes only its own frames.

Frames may be of different sizes. The visual tokens of all samples are one sequence of keys, sample by sample and frame
by frame, so none of it is padding; a token sees a range of it. A frame is never divided.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ds_lvxattn.data.sample import IGNORE, FrameShape, Sample
from ds_lvxattn.exchange.shards import SequenceShards, ShardLayout, place_in_round, runs, split_by_size
from ds_lvxattn.families.family import Family, VisualFamily, portions_of


@dataclass(frozen=True)
class BatchLayout:
    """Layout of a micro-batch of ``B`` samples over ``n`` ranks.

    Attributes:
        text: shards of the text, padded to the longest sample. Where all keys are in the text, it has a row for each
            visual token.
        keys: shards of the visual tokens of all samples as keys of cross-attention; empty where all keys are in the
            text.
        owners: for every sample, the rank of each of its frames.
        shapes: for every sample, what the model makes of each of its frames.
        input_ids, shift_labels: int64 ``[B, S]``; ``shift_labels[:, i]`` is the label of token ``i + 1``.
        start, stop: int32 ``[B, S]``, the visual tokens that each text token sees, counted over the batch.
        sees_frame: bool ``[B, S]``, tokens that see a frame.
        ranges: per sample, per token, the frames it sees; a frame's image token is one token here.
        lengths: rows of every sample.
        visual: int64 ``[B, S]``, the visual token that a row takes, counted over the sample's frames; -1 for text.
        keys_in_text: see ``Family``.
        portions: how often the rank with most work calls the vision encoder, at least once: with a blank frame.
    """

    text: SequenceShards
    keys: SequenceShards
    owners: tuple[tuple[int, ...], ...]
    shapes: tuple[tuple[FrameShape, ...], ...]
    input_ids: np.ndarray
    shift_labels: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    sees_frame: np.ndarray
    ranges: tuple[tuple[tuple[int, int], ...], ...]
    lengths: tuple[int, ...]
    visual: np.ndarray
    keys_in_text: bool
    portions: int

    @property
    def frames(self) -> tuple[int, ...]:
        """Frames of every sample."""
        return tuple(map(len, self.shapes))

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of all samples."""
        return sum(shape.tokens for shapes in self.shapes for shape in shapes)

    @property
    def encoder_tokens(self) -> int:
        """Tokens of the vision encoder, of all samples."""
        return sum(shape.encoder_tokens for shapes in self.shapes for shape in shapes)

    @property
    def supervised_tokens(self) -> int:
        """Labels that count in the loss, over all samples and ranks."""
        return int((self.shift_labels != IGNORE).sum())

    @property
    def roles(self) -> dict[str, ShardLayout]:
        """Shards of queries and keys of each exchanged role; in cross-attention the rows of all samples are one
        sequence, as the keys are."""
        own = {"self": ShardLayout(self.text, self.text)}
        if self.keys_in_text:
            return own
        rows = SequenceShards(tuple(len(self.lengths) * rows for rows in self.text.lengths))
        return {"cross": ShardLayout(rows, self.keys), **own}

    def sees_all(self, role: str) -> bool:
        """Whether every row sees every key in attention of ``role``: then there is nothing to mask."""
        return role == "cross" and not self.start.any() and bool((self.stop == self.keys.total).all())

    def ranges_of(self, role: str, window: int | None = None) -> tuple[Tensor, Tensor]:
        """``start, stop`` of the rows of every rank in attention of ``role``: int32 on the CPU, ``[n, B, s_max]``, or
        ``[n, 1, B * s_max]`` for ``cross``.

        Args:
            window: of ``self``, the last keys that a row sees; None: all before it.
        """
        start, stop = self.start, self.stop
        if role == "self":
            stop = np.arange(1, start.shape[1] + 1, dtype=np.int32)
            start = np.broadcast_to(np.maximum(stop - (window or len(stop)), 0), start.shape)
            # Padding behind a sample sees nothing, and no row of the sample sees it.
            stop = np.where(stop <= np.array(self.lengths)[:, None], stop, np.int32(0))
        return self._by_rank(start, role == "cross"), self._by_rank(stop, role == "cross")

    def _by_rank(self, rows: np.ndarray, packed: bool) -> Tensor:
        batch, longest = rows.shape[0], self.text.longest
        shape = (1, batch * longest) if packed else (batch, longest)
        stacked = np.zeros((self.text.ranks, *shape), dtype=np.int32)
        for rank in range(self.text.ranks):
            own = rows[:, self.text.index(rank)]
            own = own.reshape(1, -1) if packed else own
            stacked[rank, :, : own.shape[1]] = own
        return torch.from_numpy(stacked)

    def places(self, rank: int) -> np.ndarray:
        """int64 ``[frames]``: the first token of its sample that sees each frame of ``rank``, over all samples.

        The last token for a frame that no token sees.
        """
        places = [np.zeros(0, dtype=np.int64)]
        for sample, ranges in enumerate(self.ranges):
            # What is seen grows along the text, so the frame is first seen where the ranges first reach beyond it.
            first = np.searchsorted([stop for _, stop in ranges], self.own_frames(sample, rank), side="right")
            places.append(np.minimum(first, len(ranges) - 1))
        return np.concatenate(places)

    def own_frames(self, sample: int, rank: int) -> list[int]:
        """Frames of ``sample`` that ``rank`` decodes and encodes."""
        return [frame for frame, owner in enumerate(self.owners[sample]) if owner == rank]

    def own_shapes(self, rank: int) -> list[FrameShape]:
        """What the model makes of the frames that ``rank`` encodes, over all samples."""
        return [shapes[frame] for i, shapes in enumerate(self.shapes) for frame in self.own_frames(i, rank)]

    def key_order(self, rank: int) -> np.ndarray | None:
        """int64 ``[keys]``: where each key of ``rank`` is among the tokens that it encodes, frame by frame with the
        padding of each behind it. None: in this order."""
        order, at = [], 0
        for sample, shapes in enumerate(self.shapes):
            tokens, padding = [], []
            for frame in self.own_frames(sample, rank):
                tokens.append(np.arange(at, at + shapes[frame].tokens))
                at += shapes[frame].tokens
                padding.append(np.arange(at, at + shapes[frame].padding))
                at += shapes[frame].padding
            order += tokens + padding
        padded = any(shape.padding for shapes in self.shapes for shape in shapes)
        return np.concatenate(order) if padded and order else None

    def visual_sources(self) -> tuple[np.ndarray, np.ndarray]:
        """Where the visual token of each row is encoded.

        Returns:
            int64 ``[B, S]`` twice: the rank, -1 for rows of text, and the token's number among those that the rank
            encodes, over all samples.
        """
        holder, token = np.full_like(self.visual, -1), np.zeros_like(self.visual)
        encoded = [0] * self.text.ranks
        for sample, (owners, shapes) in enumerate(zip(self.owners, self.shapes, strict=True)):
            numbers = [np.zeros(0, dtype=np.int64)]
            for owner, shape in zip(owners, shapes, strict=True):
                numbers.append(np.arange(encoded[owner], encoded[owner] + shape.tokens))
                encoded[owner] += shape.tokens
            rows = self.visual[sample] >= 0
            taken = self.visual[sample, rows]
            holder[sample, rows] = np.repeat(owners, [shape.tokens for shape in shapes])[taken] if shapes else -1
            token[sample, rows] = np.concatenate(numbers)[taken]
        return holder, token


def lay_out(
    samples: Sequence[Sample],
    shapes: Sequence[Sequence[FrameShape]],
    family: Family,
    ranks: int,
    placement: str,
    pad_token: int,
    image_id: int,
) -> BatchLayout:
    """The layout of ``samples`` over ``ranks``.

    Args:
        samples: the micro-batch; equal on every rank of the group.
        shapes: what the model makes of their frames.
        family: the model's family.
        ranks: ranks of the sequence-parallel group.
        placement: ``contiguous`` or ``striped`` frames; where all keys are in the text, so is the text.
        pad_token: token id behind the end of a sample.
        image_id: token id of a frame.
    """
    # Text that sees visual tokens as keys of their own has one row for the image token of a frame.
    rows_of = [
        _rows(sample, image_id, [shape.tokens if family.keys_in_text else 1 for shape in of_frames])
        for sample, of_frames in zip(samples, shapes, strict=True)
    ]
    lengths = tuple(len(ids) for ids, _ in rows_of)
    # A rank without a text token could not run the text layers, so very short text is padded to one token a rank.
    length = max(ranks, *lengths)
    striped = placement == "striped"
    text = (SequenceShards.balanced if striped and family.keys_in_text else SequenceShards.contiguous)(length, ranks)
    # What a frame weighs: keys where they stay on its rank, and where they travel to the text the encoder's work.
    seen_of = [_ranges(sample, family, image_id) for sample in samples]
    shapes = [
        of_frames if any(a >= b for a, b in seen) else [replace(shape, padding=0) for shape in of_frames]
        for of_frames, seen in zip(shapes, seen_of, strict=True)
    ]
    weights = [
        [s.encoder_tokens if family.keys_in_text else s.tokens + s.padding for s in of_frames] for of_frames in shapes
    ]
    owners = (_striped if striped else _contiguous)(weights, ranks)
    keys = SequenceShards((0,) * ranks) if family.keys_in_text else _keys(shapes, owners, ranks, striped)

    shape = (len(samples), length)
    input_ids = np.full(shape, pad_token, dtype=np.int64)
    shift_labels = np.full(shape, IGNORE, dtype=np.int64)
    visual = np.full(shape, -1, dtype=np.int64)
    start, stop = np.zeros(shape, dtype=np.int32), np.zeros(shape, dtype=np.int32)
    sees_frame = np.zeros(shape, dtype=bool)
    before = 0  # visual tokens of the samples ahead
    for row, (ids, labels) in enumerate(rows_of):
        tokens = len(ids)
        input_ids[row, :tokens] = ids
        shift_labels[row, : max(tokens - 1, 0)] = labels[1:]
        if not isinstance(family, VisualFamily) or family.keys_in_text:
            of_frames = ids == image_id
            visual[row, :tokens][of_frames] = np.arange(of_frames.sum())
            continue
        bounds = np.array(seen_of[row], dtype=np.int64).reshape(tokens, 2)
        hidden = bounds[:, 0] >= bounds[:, 1]
        sees_frame[row, :tokens] = ~hidden
        edges = before + np.cumsum([0, *(shape.tokens for shape in shapes[row])])
        start[row, :tokens], stop[row, :tokens] = np.where(hidden, before, edges[bounds].T)
        behind = int(edges[-1]) + sum(shape.padding for shape in shapes[row])
        if family.hidden_rows_see_all():
            stop[row, :tokens][hidden] = behind
        before = behind
    costs = [
        [s.encoder_tokens for i, of in enumerate(shapes) for s, owner in zip(of, owners[i], strict=True) if owner == r]
        for r in range(ranks)
    ]
    return BatchLayout(
        text, keys, owners, tuple(map(tuple, shapes)), input_ids, shift_labels, start, stop, sees_frame, tuple(seen_of),
        lengths, visual, family.keys_in_text, max(map(portions_of, costs)),
    )  # fmt: skip


def _ranges(sample: Sample, family: Family, image_id: int) -> tuple[tuple[int, int], ...]:
    """For each token of the text the frames that it sees."""
    if not isinstance(family, VisualFamily) or family.keys_in_text:
        return ((0, 0),) * len(sample.input_ids)
    return tuple(family.frame_ranges(sample.input_ids, image_id))


def _rows(sample: Sample, image_id: int, rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """int64 ids and labels of the rows of ``sample``, with ``rows`` for the image token of each frame."""
    ids, labels = np.array(sample.input_ids, dtype=np.int64), np.array(sample.labels, dtype=np.int64)
    times = np.ones_like(ids)
    times[ids == image_id] = rows
    return ids.repeat(times), labels.repeat(times)


def _contiguous(weights: Sequence[Sequence[int]], ranks: int) -> tuple[tuple[int, ...], ...]:
    """Owners of the frames of each sample: runs of them in the order of the ranks, as its text is divided.

    A sample fills up what those before it left uneven.
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
    """Owners of the frames of each sample, dealt in rounds of one a rank: there and back where they are equal.

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


def _keys(
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
