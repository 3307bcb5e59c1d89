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
from ds_lvxattn.models.family import Family
from ds_lvxattn.shards import SequenceShards, ShardLayout, runs, split_evenly, striped_units


@dataclass(frozen=True)
class BatchLayout:
    """Layout of a micro-batch of ``B`` samples over ``n`` ranks.

    Frames fill *slots*: sample ``b`` uses the first ``frames[b]`` of them. Every rank has at least one slot, since a
    model cannot be fed nothing; slots that no sample uses hold no key of the attention.

    Attributes:
        text: shards of the text, padded to the longest sample.
        keys: shards of the visual tokens, padded to the sample with most frames.
        slots: the frame slots of every rank, ascending.
        frames: frames of every sample.
        input_ids, shift_labels: int64 ``[B, S]``; ``shift_labels[:, i]`` is the label of token ``i + 1``.
        start, stop: int32 ``[B, S]``, the visual tokens that each text token sees.
        sees_frame: bool ``[B, S]``, tokens that see a frame.
        ranges: per sample, per token, the frames it sees.
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

    @property
    def supervised_tokens(self) -> int:
        """Labels that count in the loss, over all samples and ranks."""
        return int((self.shift_labels != IGNORE).sum())

    @property
    def cross(self) -> ShardLayout:
        return ShardLayout(self.text, self.keys)

    @property
    def self_attention(self) -> ShardLayout:
        return ShardLayout(self.text, self.text)

    def ranges_of(self, role: str) -> tuple[Tensor, Tensor]:
        """``start, stop`` of the rows of every rank in attention of ``role``: int32 ``[n, B, s_max]`` on the CPU."""
        start, stop = self.start, self.stop
        if role == "self":
            start = np.zeros_like(self.start)
            stop = np.broadcast_to(np.arange(1, start.shape[1] + 1, dtype=np.int32), start.shape)
        return self._by_rank(start), self._by_rank(stop)

    def _by_rank(self, rows: np.ndarray) -> Tensor:
        stacked = np.zeros((self.text.ranks, rows.shape[0], self.text.longest), dtype=np.int32)
        for rank in range(self.text.ranks):
            stacked[rank, :, : self.text.lengths[rank]] = rows[:, self.text.positions(rank)]
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


def lay_out(
    samples: Sequence[Sample],
    family: Family,
    model_config: object,
    ranks: int,
    placement: str,
    pad_token: int,
    image_id: int,
) -> BatchLayout:
    """The layout of ``samples`` over ``ranks``.

    Args:
        samples: the micro-batch; equal on every rank of the group.
        family: the model's family.
        model_config: the model's transformers config.
        ranks: ranks of the sequence-parallel group.
        placement: ``contiguous`` or ``striped`` frames.
        pad_token: token id behind the end of a sample.
        image_id: token id of a frame.
    """
    # A rank without a text token could not run the text layers, so very short text is padded to one token a rank.
    length = max(ranks, *(len(sample.input_ids) for sample in samples))
    frames = tuple(sample.num_frames for sample in samples)
    per_frame = family.frame_tokens(model_config)
    slots = _slots(max(frames), ranks, placement)
    used = [sum(slot < max(frames) for slot in own) * per_frame for own in slots]
    keys = SequenceShards(tuple(used), per_frame if placement == "striped" else 0)

    shape = (len(samples), length)
    input_ids = np.full(shape, pad_token, dtype=np.int64)
    shift_labels = np.full(shape, IGNORE, dtype=np.int64)
    start, stop = np.zeros(shape, dtype=np.int32), np.zeros(shape, dtype=np.int32)
    sees_frame = np.zeros(shape, dtype=bool)
    ranges = []
    for row, sample in enumerate(samples):
        tokens = len(sample.input_ids)
        input_ids[row, :tokens] = sample.input_ids
        shift_labels[row, : max(tokens - 1, 0)] = sample.labels[1:]
        seen = family.frame_ranges(sample.input_ids, image_id, model_config)
        bounds = np.array(seen, dtype=np.int32).reshape(tokens, 2)
        hidden = bounds[:, 0] >= bounds[:, 1]
        sees_frame[row, :tokens] = ~hidden
        if family.hidden_rows_see_all(model_config):
            bounds[hidden] = (0, sample.num_frames)
        start[row, :tokens], stop[row, :tokens] = (bounds * per_frame).T
        ranges.append(tuple(seen))
    return BatchLayout(
        SequenceShards.contiguous(length, ranks), keys, slots, frames,
        input_ids, shift_labels, start, stop, sees_frame, tuple(ranges),
    )  # fmt: skip


def _slots(frames: int, ranks: int, placement: str) -> tuple[tuple[int, ...], ...]:
    count = max(frames, ranks)
    if placement == "striped":
        return tuple(tuple(striped_units(count, ranks, rank)) for rank in range(ranks))
    return tuple(tuple(run) for run in runs(split_evenly(count, ranks)))
