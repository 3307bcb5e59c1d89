"""Where the text and the frames of a micro-batch lie on the ranks, and what each token sees.

Pure host metadata, computed alike on every rank of a sequence-parallel group: the token ids of a batch are small,
so every rank has all of them, while it decodes and encodes only its own frames.

Frames may be of different sizes. The visual tokens of all samples are one sequence of keys, sample by sample and frame
by frame, so none of it is padding; a token sees a range of it. A frame is never divided.

Samples may share a row of the batch (packing). They stay apart: a token sees the text and the frames of its own sample
alone, positions begin anew with each, and no token predicts the first one of the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ds_lvxattn.batches.packing import Span, first_fit, samples_of_rows
from ds_lvxattn.batches.placement import frame_owners, key_shards
from ds_lvxattn.data.sample import IGNORE, FrameShape, Sample
from ds_lvxattn.exchange.sequence_mixing import Document
from ds_lvxattn.exchange.shards import SequenceShards, ShardLayout
from ds_lvxattn.families.family import Family, VisualFamily, portions_of


@dataclass(frozen=True)
class BatchLayout:
    """Layout of a micro-batch of ``B`` rows, of one sample each unless they are packed, over ``n`` ranks.

    The text is divided, or on every rank: then ``text`` has one shard, while ``keys`` has one for each rank.

    Attributes:
        spans: where each sample lies.
        text: shards of the text, padded to the longest row. Where all keys are in the text, it has one token for each
            visual token.
        keys: shards of the visual tokens of all samples as keys of cross-attention; empty where all keys are in the
            text.
        owners: for every sample, the rank of each of its frames.
        shapes: for every sample, what the model makes of each of its frames.
        input_ids, shift_labels: int64 ``[B, S]``; ``shift_labels[:, i]`` is the label of token ``i + 1``.
        start, stop: int32 ``[B, S]``, the visual tokens that each text token sees, counted over the batch.
        sees_frame: bool ``[B, S]``, tokens that see a frame.
        ranges: per sample, per token, the frames it sees; a frame's image token is one token here.
        visual: int64 ``[B, S]``, the visual token that a token takes, counted over the sample's frames; -1 for text.
        blocks: per sample, runs of its tokens that see each other in both directions; see ``Family.blocks``.
        blocks_in_full, blocks_in_window, blocks_joined: see ``Family``.
        keys_in_text: see ``Family``.
        portions: how often the rank with most work calls the vision encoder, at least once: with a blank frame.
    """

    spans: tuple[Span, ...]
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
    visual: np.ndarray
    blocks: tuple[tuple[tuple[int, int], ...], ...]
    blocks_in_full: bool
    blocks_in_window: bool
    blocks_joined: bool
    keys_in_text: bool
    portions: int

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return len(self.input_ids)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of every sample."""
        return tuple(span.stop - span.start for span in self.spans)

    @property
    def samples_of_rows(self) -> list[list[int]]:
        """The samples of each row, in the order in which they lie there."""
        return samples_of_rows(self.spans)

    @property
    def documents(self) -> tuple[Document, ...] | None:
        """The samples, where some share a row; see ``MixedRows``."""
        if len(self.spans) == self.rows:
            return None
        return tuple(sorted((span.row, span.start, span.stop) for span in self.spans))

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
    def encoder_pairs(self) -> int:
        """Pairs of such tokens of one picture: what attention inside the encoder computes, where it has no windows."""
        return sum(shape.encoder_tokens**2 for shapes in self.shapes for shape in shapes)

    @property
    def copies(self) -> int:
        """On how many ranks each row of text is: 1, or all where only the frames are divided."""
        return self.keys.ranks // self.text.ranks

    def rows_of(self, rank: int) -> slice | np.ndarray:
        """What takes the rows of text of ``rank`` out of an array along the text."""
        return self.text.index(rank if self.copies == 1 else 0)

    @property
    def in_block(self) -> np.ndarray:
        """bool ``[B, S]``, tokens of ``blocks``."""
        inside = np.zeros(self.input_ids.shape, dtype=bool)
        for span, blocks in zip(self.spans, self.blocks, strict=True):
            for first, last in blocks:
                inside[span.row, span.start + first : span.start + last] = True
        return inside

    @property
    def supervised_tokens(self) -> int:
        """Labels that count in the loss, over all samples and ranks."""
        return int((self.shift_labels != IGNORE).sum())

    @property
    def roles(self) -> dict[str, ShardLayout]:
        """Shards of queries and keys of each exchanged role; in cross-attention the rows of the batch are one sequence,
        as the keys are."""
        own = {"self": ShardLayout(self.text, self.text)}
        if self.keys_in_text:
            return own
        rows = SequenceShards(tuple(self.rows * tokens for tokens in self.text.lengths) * self.copies)
        return {"cross": ShardLayout(rows, self.keys), **own}

    def sees_all(self, role: str) -> bool:
        """Whether every row sees every key in attention of ``role``: then there is nothing to mask."""
        return role == "cross" and not self.start.any() and bool((self.stop == self.keys.total).all())

    def ranges_of(self, role: str, window: int | None = None, chunk: int | None = None) -> tuple[Tensor, Tensor]:
        """``start, stop`` of the rows of every rank in attention of ``role``: int32 on the CPU, ``[n, B, s_max]``, or
        ``[n, 1, B * s_max]`` for ``cross``; ``n`` is 1 where every rank has all rows. Where rows see several ranges,
        both have a last dimension more: the ranges.

        Args:
            window: of ``self``, the last keys that a row sees; None: all before it in its sample.
            chunk: of ``self``, rows of a chunk, beyond whose start a row does not see; None: there are none.
        """
        start, stop = self.start, self.stop
        if role == "self":
            # Padding behind the samples of a row sees nothing, and none of their rows sees it.
            start, stop = np.zeros_like(start), np.zeros_like(stop)
            for span, blocks in zip(self.spans, self.blocks, strict=True):
                place = span.place
                stop[place] = np.arange(span.start + 1, span.stop + 1)
                start[place] = span.start if window is None else np.maximum(stop[place] - window, span.start)
                if chunk is not None:
                    own = np.arange(span.stop - span.start)
                    start[place] = np.maximum(start[place], span.start + own - own % chunk)
                # To the end of the block: with what a row sees before it, still one range.
                for first, last in self._blocks_with(window, blocks):
                    block = span.row, slice(span.start + first, span.start + last)
                    stop[block] = span.start + last
                    if not self.blocks_in_window:
                        start[block] = np.minimum(start[block], span.start + first)
            more = self._later_blocks(window)
            if more:
                bounds = zip((start, stop), *more, strict=True)
                of_rows, to = (torch.stack([self._by_rank(x, False) for x in every], dim=-1) for every in bounds)
                return of_rows, to
        return self._by_rank(start, role == "cross"), self._by_rank(stop, role == "cross")

    def _blocks_with(self, window: int | None, blocks: Sequence[tuple[int, int]]) -> Sequence[tuple[int, int]]:
        """``blocks``, if they are some in layers with such a window."""
        return blocks if self.blocks_in_full or window is not None else ()

    def _later_blocks(self, window: int | None) -> list[tuple[np.ndarray, np.ndarray]]:
        """Further ranges ``start, stop``, int32 ``[B, S]``, of rows that see the later blocks of their sample too."""
        if not self.blocks_joined:
            return []
        of_samples = [self._blocks_with(window, blocks) for blocks in self.blocks]
        more = [
            (np.zeros(self.input_ids.shape, dtype=np.int32), np.zeros(self.input_ids.shape, dtype=np.int32))
            for _ in range(max(map(len, of_samples), default=0) - 1)
        ]
        for span, blocks in zip(self.spans, of_samples, strict=True):
            for number, (first, last) in enumerate(blocks):
                rows = span.row, slice(span.start + first, span.start + last)
                for (start, stop), (begin, end) in zip(more, blocks[number + 1 :], strict=False):
                    start[rows], stop[rows] = span.start + begin, span.start + end
        return more

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
        """Frames of ``sample`` that ``rank`` encodes."""
        return [frame for frame, owner in enumerate(self.owners[sample]) if owner == rank]

    def own_pictures(self, sample: int, rank: int) -> dict[int, list[int]]:
        """Pictures of ``sample`` that ``rank`` decodes, each with the numbers of its images that ``rank`` encodes, as
        ``FrameShape.crop``; none of a picture that stays whole."""
        found: dict[int, list[int]] = {}
        picture, shapes = -1, self.shapes[sample]
        for shape, after, owner in zip(shapes, (*shapes[1:], None), self.owners[sample], strict=False):
            picture += shape.crop == 0
            if owner == rank:
                is_cut = shape.crop > 0 or (after is not None and after.crop > 0)
                found.setdefault(picture, []).extend([shape.crop] * is_cut)
        return found

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
        for span, owners, shapes in zip(self.spans, self.owners, self.shapes, strict=True):
            numbers = [np.zeros(0, dtype=np.int64)]
            for owner, shape in zip(owners, shapes, strict=True):
                numbers.append(np.arange(encoded[owner], encoded[owner] + shape.tokens))
                encoded[owner] += shape.tokens
            place = span.place
            rows = self.visual[place] >= 0
            taken = self.visual[place][rows]
            holder[place][rows] = np.repeat(owners, [shape.tokens for shape in shapes])[taken] if shapes else -1
            token[place][rows] = np.concatenate(numbers)[taken]
        return holder, token

    def positions(self, family: Family) -> np.ndarray:
        """Position ids ``[..., B, S]``: of each sample its ``Family.positions``, which go on in what pads the row."""
        rows = []
        for visual, samples in zip(self.visual, self.samples_of_rows, strict=True):
            parts = np.split(visual, [self.spans[sample].start for sample in samples[1:]])
            of_parts = [family.positions(part, self.shapes[i]) for i, part in zip(samples, parts, strict=True)]
            rows.append(np.concatenate(of_parts, axis=-1))
        return np.stack(rows, axis=-2)


def lay_out(
    samples: Sequence[Sample],
    shapes: Sequence[Sequence[FrameShape]],
    family: Family,
    ranks: int,
    placement: str,
    pad_token: int,
    image_id: int,
    packing: int | None = None,
    divide_text: bool = True,
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
        packing: tokens of a row that samples share; None: each has a row of its own.
        divide_text: False: only the frames are divided, which needs keys of their own.
    """
    # Text that sees visual tokens as keys of their own has one row for the image token of a frame.
    rows_of = [
        _rows(sample, image_id, [n for shape in of_frames for n in (shape.rows if family.keys_in_text else (1,))])
        for sample, of_frames in zip(samples, shapes, strict=True)
    ]
    spans = first_fit([len(ids) for ids, _ in rows_of], packing)
    striped = placement == "striped"
    text = _text(spans, ranks if divide_text else 1, striped and family.keys_in_text)
    seen_of = [_ranges(sample, family, image_id) for sample in samples]
    shapes = [_as_seen(of_frames, seen) for of_frames, seen in zip(shapes, seen_of, strict=True)]
    # What a frame weighs: keys where they stay on its rank, and where they travel to the text the encoder's work.
    weights = [
        [s.encoder_tokens if family.keys_in_text else s.tokens + s.padding for s in of_frames] for of_frames in shapes
    ]
    owners = frame_owners(weights, spans, ranks, striped)
    keys = SequenceShards((0,) * ranks) if family.keys_in_text else key_shards(shapes, owners, ranks, striped)

    size = (max(span.row for span in spans) + 1, text.total)
    input_ids = np.full(size, pad_token, dtype=np.int64)
    shift_labels = np.full(size, IGNORE, dtype=np.int64)
    visual = np.full(size, -1, dtype=np.int64)
    own_keys = isinstance(family, VisualFamily) and not family.keys_in_text
    for (ids, labels), span in zip(rows_of, spans, strict=True):
        input_ids[span.place] = ids
        shift_labels[span.place][:-1] = labels[1:]
        if not own_keys:
            takes = ids == image_id
            visual[span.place][takes] = np.arange(takes.sum())
    blocks = [
        tuple(family.blocks(ids, labels, visual[span.place], of_frames))
        for (ids, labels), span, of_frames in zip(rows_of, spans, shapes, strict=True)
    ]
    hidden_see_all = isinstance(family, VisualFamily) and family.hidden_rows_see_all()
    start, stop, sees_frame = _visible(seen_of if own_keys else (), spans, shapes, size, hidden_see_all)
    work = [
        [s.encoder_tokens for i, of in enumerate(shapes) for s, owner in zip(of, owners[i], strict=True) if owner == r]
        for r in range(ranks)
    ]
    return BatchLayout(
        spans, text, keys, owners, tuple(map(tuple, shapes)), input_ids, shift_labels, start, stop, sees_frame,
        tuple(seen_of), visual, tuple(blocks), family.blocks_in_full, family.blocks_in_window, family.blocks_joined,
        family.keys_in_text, max(map(portions_of, work)),
    )  # fmt: skip


def _text(spans: Sequence[Span], ranks: int, striped: bool) -> SequenceShards:
    """Shards of the longest row. A rank without a token could not run the text layers, so very short text is padded to
    one token a rank."""
    length = max(ranks, *(span.stop for span in spans))
    return (SequenceShards.balanced if striped else SequenceShards.contiguous)(length, ranks)


def _as_seen(shapes: Sequence[FrameShape], seen: Sequence[tuple[int, int]]) -> Sequence[FrameShape]:
    """The frames of a sample without the padding that none of its text sees: what sees no frame sees that."""
    return shapes if any(a >= b for a, b in seen) else [replace(shape, padding=0) for shape in shapes]


def _visible(
    seen_of: Sequence[Sequence[tuple[int, int]]],
    spans: Sequence[Span],
    shapes: Sequence[Sequence[FrameShape]],
    size: tuple[int, int],
    hidden_see_all: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``start``, ``stop`` and ``sees_frame`` of a ``BatchLayout``.

    Args:
        seen_of: per sample and token the frames that it sees; empty where keys are in the text.
        size: rows of the batch, and tokens of a row.
        hidden_see_all: see ``VisualFamily.hidden_rows_see_all``.
    """
    start, stop = np.zeros(size, dtype=np.int32), np.zeros(size, dtype=np.int32)
    sees_frame = np.zeros(size, dtype=bool)
    before = 0  # visual tokens of the samples ahead
    for seen, span, of_frames in zip(seen_of, spans, shapes, strict=False):
        bounds = np.array(seen, dtype=np.int64).reshape(len(seen), 2)
        hidden = bounds[:, 0] >= bounds[:, 1]
        sees_frame[span.place] = ~hidden
        edges = before + np.cumsum([0, *(shape.tokens for shape in of_frames)])
        start[span.place], stop[span.place] = np.where(hidden, before, edges[bounds].T)
        behind = int(edges[-1]) + sum(shape.padding for shape in of_frames)
        if hidden_see_all:
            stop[span.place][hidden] = behind
        before = behind
    return start, stop, sees_frame


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
