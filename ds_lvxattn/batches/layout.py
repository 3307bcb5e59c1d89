"""Where the text and the frames of a micro-batch lie on the ranks, and what each token sees.

Pure host metadata, computed alike on every rank of a sequence-parallel group: the token ids of a batch are small,
so every rank has all of them, while it decodes and encodes only its own frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ds_lvxattn.data.sample import IGNORE, Sample
from ds_lvxattn.exchange.shards import SequenceShards, ShardLayout, runs, split_evenly, striped_units
from ds_lvxattn.families.family import Family, VisualFamily


@dataclass(frozen=True)
class BatchLayout:
    """Layout of a micro-batch of ``B`` samples over ``n`` ranks.

    Frames fill *slots*: sample ``b`` uses the first ``frames[b]`` of them. Every rank has at least one slot, since a
    model cannot be fed nothing; slots that no sample uses hold no key of the attention.

    Attributes:
        text: shards of the text, padded to the longest sample. Where all keys are in the text, it has a row for each
            visual token.
        keys: shards of the visual tokens as keys of cross-attention, padded to the sample with most frames; empty where
            all keys are in the text.
        slots: the frame slots of every rank, ascending.
        frames: frames of every sample.
        input_ids, shift_labels: int64 ``[B, S]``; ``shift_labels[:, i]`` is the label of token ``i + 1``.
        start, stop: int32 ``[B, S]``, the visual tokens that each text token sees.
        sees_frame: bool ``[B, S]``, tokens that see a frame.
        ranges: per sample, per token, the frames it sees; a frame's image token is one token here.
        lengths: rows of every sample.
        visual: int64 ``[B, S]``, the visual token that a row takes, counted over the sample's frames; -1 for text.
        frame_tokens: visual tokens of a frame.
        keys_in_text: see ``Family``.
    """

    text: SequenceShards
    keys: SequenceShards
    slots: tuple[tuple[int, ...], ...]
    frames: tuple[int, ...]
    input_ids: np.ndarray
    shift_labels: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    sees_frame: np.ndarray
    ranges: tuple[tuple[tuple[int, int], ...], ...]
    lengths: tuple[int, ...]
    visual: np.ndarray
    frame_tokens: int
    keys_in_text: bool

    @property
    def supervised_tokens(self) -> int:
        """Labels that count in the loss, over all samples and ranks."""
        return int((self.shift_labels != IGNORE).sum())

    @property
    def roles(self) -> dict[str, ShardLayout]:
        """Shards of queries and keys of each exchanged role."""
        own = {"self": ShardLayout(self.text, self.text)}
        return own if self.keys_in_text else {"cross": ShardLayout(self.text, self.keys), **own}

    def ranges_of(self, role: str, window: int | None = None) -> tuple[Tensor, Tensor]:
        """``start, stop`` of the rows of every rank in attention of ``role``: int32 ``[n, B, s_max]`` on the CPU.

        Args:
            window: of ``self``, the last keys that a row sees; None: all before it.
        """
        start, stop = self.start, self.stop
        if role == "self":
            stop = np.arange(1, start.shape[1] + 1, dtype=np.int32)
            start = np.broadcast_to(np.maximum(stop - (window or len(stop)), 0), start.shape)
            # Padding behind a sample sees nothing, and no row of the sample sees it.
            stop = np.where(stop <= np.array(self.lengths)[:, None], stop, np.int32(0))
        return self._by_rank(start), self._by_rank(stop)

    def _by_rank(self, rows: np.ndarray) -> Tensor:
        stacked = np.zeros((self.text.ranks, rows.shape[0], self.text.longest), dtype=np.int32)
        for rank in range(self.text.ranks):
            stacked[rank, :, : self.text.lengths[rank]] = rows[:, self.text.index(rank)]
        return torch.from_numpy(stacked)

    @property
    def most_frames(self) -> int:
        """Frames, of all samples, that the rank with most of them encodes: at least one, which may be blank."""
        samples = range(len(self.frames))
        return max(1, *(sum(len(self.own_frames(i, rank)) for i in samples) for rank in range(len(self.slots))))

    def places(self, rank: int) -> np.ndarray:
        """int64 ``[B, slots]``: the first text token that sees the frame in each slot of ``rank``.

        0 for a slot that the sample does not use, the last token for a frame that no token sees.
        """
        places = np.zeros((len(self.frames), len(self.slots[rank])), dtype=np.int64)
        for sample, ranges in enumerate(self.ranges):
            # What is seen grows along the text, so the frame is first seen where the ranges first reach beyond it.
            first = np.searchsorted([stop for _, stop in ranges], self.slots[rank], side="right")
            used = np.array(self.slots[rank]) < self.frames[sample]
            places[sample] = np.where(used, np.minimum(first, len(ranges) - 1), 0)
        return places

    def own_frames(self, sample: int, rank: int) -> list[int]:
        """Frames of ``sample`` that ``rank`` decodes and encodes."""
        return [slot for slot in self.slots[rank] if slot < self.frames[sample]]

    def visual_sources(self) -> tuple[np.ndarray, np.ndarray]:
        """Where the visual token of each row is encoded.

        Returns:
            int64 ``[B, S]`` twice: the rank, -1 for rows of text, and the token's number among those that the rank
            encodes, over all samples.
        """
        holder, token = np.full_like(self.visual, -1), np.zeros_like(self.visual)
        encoded = [0] * len(self.slots)
        for sample, frames in enumerate(self.frames):
            rank_of, number = np.zeros(frames, dtype=np.int64), np.zeros(frames, dtype=np.int64)
            for rank in range(len(self.slots)):
                own = self.own_frames(sample, rank)
                rank_of[own], number[own] = rank, np.arange(encoded[rank], encoded[rank] + len(own))
                encoded[rank] += len(own)
            rows = self.visual[sample] >= 0
            frame, part = np.divmod(self.visual[sample, rows], self.frame_tokens)
            holder[sample, rows], token[sample, rows] = rank_of[frame], number[frame] * self.frame_tokens + part
        return holder, token


def lay_out(
    samples: Sequence[Sample],
    family: Family,
    ranks: int,
    placement: str,
    pad_token: int,
    image_id: int,
) -> BatchLayout:
    """The layout of ``samples`` over ``ranks``.

    Args:
        samples: the micro-batch; equal on every rank of the group.
        family: the model's family.
        ranks: ranks of the sequence-parallel group.
        placement: ``contiguous`` or ``striped`` frames; where all keys are in the text, so is the text.
        pad_token: token id behind the end of a sample.
        image_id: token id of a frame.
    """
    frames = tuple(sample.num_frames for sample in samples)
    per_frame = family.frame_tokens() if isinstance(family, VisualFamily) else 1
    # Text that sees visual tokens as keys of their own has one row for the image token of a frame.
    rows_of = [_rows(sample, image_id, per_frame if family.keys_in_text else 1) for sample in samples]
    lengths = tuple(len(ids) for ids, _ in rows_of)
    # A rank without a text token could not run the text layers, so very short text is padded to one token a rank.
    length = max(ranks, *lengths)
    striped = placement == "striped"
    text = (SequenceShards.balanced if striped and family.keys_in_text else SequenceShards.contiguous)(length, ranks)
    slots = _slots(max(frames), ranks, placement)
    keys = SequenceShards((0,) * ranks)
    if not family.keys_in_text:
        used = [sum(slot < max(frames) for slot in own) * per_frame for own in slots]
        keys = SequenceShards(tuple(used), per_frame if striped else 0)

    shape = (len(samples), length)
    input_ids = np.full(shape, pad_token, dtype=np.int64)
    shift_labels = np.full(shape, IGNORE, dtype=np.int64)
    visual = np.full(shape, -1, dtype=np.int64)
    start, stop = np.zeros(shape, dtype=np.int32), np.zeros(shape, dtype=np.int32)
    sees_frame = np.zeros(shape, dtype=bool)
    ranges: list[tuple[tuple[int, int], ...]] = []
    for row, (sample, (ids, labels)) in enumerate(zip(samples, rows_of, strict=True)):
        tokens = len(ids)
        input_ids[row, :tokens] = ids
        shift_labels[row, : max(tokens - 1, 0)] = labels[1:]
        if not isinstance(family, VisualFamily) or family.keys_in_text:
            ranges.append(((0, 0),) * len(sample.input_ids))
            of_frames = ids == image_id
            visual[row, :tokens][of_frames] = np.arange(of_frames.sum())
            continue
        seen = family.frame_ranges(sample.input_ids, image_id)
        ranges.append(tuple(seen))
        bounds = np.array(seen, dtype=np.int32).reshape(tokens, 2)
        hidden = bounds[:, 0] >= bounds[:, 1]
        sees_frame[row, :tokens] = ~hidden
        if family.hidden_rows_see_all():
            bounds[hidden] = (0, sample.num_frames)
        start[row, :tokens], stop[row, :tokens] = (bounds * per_frame).T
    return BatchLayout(
        text, keys, slots, frames, input_ids, shift_labels, start, stop, sees_frame, tuple(ranges),
        lengths, visual, per_frame, family.keys_in_text,
    )  # fmt: skip


def _rows(sample: Sample, image_id: int, per_frame: int) -> tuple[np.ndarray, np.ndarray]:
    """int64 ids and labels of the rows of ``sample``, with ``per_frame`` rows for each image token."""
    ids, labels = np.array(sample.input_ids, dtype=np.int64), np.array(sample.labels, dtype=np.int64)
    times = np.where(ids == image_id, per_frame, 1)
    return ids.repeat(times), labels.repeat(times)


def _slots(frames: int, ranks: int, placement: str) -> tuple[tuple[int, ...], ...]:
    count = max(frames, ranks)
    if placement == "striped":
        return tuple(tuple(striped_units(count, ranks, rank)) for rank in range(ranks))
    return tuple(tuple(run) for run in runs(split_evenly(count, ranks)))
