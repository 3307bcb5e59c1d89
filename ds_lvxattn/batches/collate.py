"""Micro-batches: this rank's part of the samples as the arguments of the model's forward."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ds_lvxattn.batches.layout import BatchLayout, lay_out
from ds_lvxattn.data.sample import IGNORE, FrameShape, FrameSize, Sample, SampleError, in_one_row
from ds_lvxattn.exchange.comm import Communicator, communicator
from ds_lvxattn.exchange.interval import KVInterval
from ds_lvxattn.exchange.routes import Routes, routed_rows, visible_work
from ds_lvxattn.exchange.shards import ShardLayout
from ds_lvxattn.families.family import Family, FrameLimits, VisualFamily
from ds_lvxattn.kernels.pattern import drift_of, in_kernel_order
from ds_lvxattn.plan.choice import shape_class
from ds_lvxattn.plan.layer_plan import LayerPlan, kind_of
from ds_lvxattn.plan.planner import BatchSizes
from ds_lvxattn.plan.traffic import CallShape
from ds_lvxattn.runtime.batch import AttentionInputs, SequenceParallelBatch
from ds_lvxattn.runtime.layer_times import LayerTimes
from ds_lvxattn.runtime.visual_rows import VisualRows

Images = list[list[np.ndarray]]  # per sample, the pictures that this rank decoded
Pixels = dict[str, Any]  # the model's pixel arguments, made of them on the host

FRAMES_AT_ONCE = 4  # that a thread makes pixels of, where several share the frames


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch, ready for the model.

    Attributes:
        inputs: keyword arguments of the model's forward, on the device.
        labels: int64 ``[B, s]``, the label that each of the rank's rows predicts.
        answers: int64 ``[B, s]``, the number of the answer that each row belongs to, -1 for none.
        num_answers: answers in the micro-batch, over all ranks of the group.
        text_tokens, frames: its size, over all ranks of the group.
    """

    inputs: dict[str, Any]
    labels: Tensor
    answers: Tensor
    num_answers: int
    text_tokens: int
    frames: int


@dataclass(frozen=True)
class Vocabulary:
    """How many tokens a model knows; None where it does not say.

    Attributes:
        embeddings: that it embeds.
        logits: that it predicts.
    """

    embeddings: int | None = None
    logits: int | None = None

    @classmethod
    def of(cls, model: Any) -> Vocabulary:
        found = []
        layers = model.get_input_embeddings(), model.get_output_embeddings()
        for layer, size, more in zip(
            layers, ("num_embeddings", "out_features"), ("num_additional_embeddings", "out_additional_features"),
            strict=True,
        ):  # fmt: skip
            rows = getattr(layer, size, None)
            found.append(None if rows is None else rows + getattr(layer, more, 0))
        return cls(*found)

    def check(self, sample: Sample, image_id: int) -> None:
        """Raise ``SampleError`` where ``sample`` is empty or has tokens that the model does not know, at which only the
        rank that has them would fail."""
        if not len(sample.input_ids):
            raise SampleError(f"{sample.name}: no tokens")
        rows = (
            ("token", sample.input_ids, image_id, self.embeddings, "embeddings"),
            ("label", sample.labels, IGNORE, self.logits, "logits"),
        )
        for what, listed, other, known, ofs in rows:
            ids = np.asarray(listed)
            wrong = (ids != other) & ((ids < 0) | (ids >= (np.inf if known is None else known)))
            if known is not None and wrong.any():
                raise SampleError(
                    f"{sample.name}: {what} {int(ids[wrong][0])}, and the model has {known} {ofs}; is its text of "
                    "another model's tokenizer, or the model to be resized (resize_token_embeddings)?"
                )


@dataclass(frozen=True)
class Division:
    """How a sequence-parallel group divides its batches.

    Attributes:
        comm: communicator of the group.
        placement: how frames lie on the ranks.
        limits: sliding windows and chunks of the model's self-attention layers, each pair once.
        kernel: local attention kernel.
    """

    comm: Communicator
    placement: str
    limits: Sequence[tuple[int | None, int | None]]
    kernel: str


@dataclass(frozen=True)
class Collator:
    """Samples to micro-batches. What a batch is divided and computed by, its layout and its plan, is handed in.

    Attributes:
        family: the model's family.
        processor: image processor of the model.
        pad_token: token id behind the end of a sample.
        image_id: token id of a frame.
        device: where the tensors go.
        dtype: dtype of pixel values.
        limits: how large frames may be.
        division: how the group of the attached model divides batches; None: the unmodified model with its own mask.
        vocabulary: tokens that samples may have.
    """

    family: Family
    processor: Any
    pad_token: int
    image_id: int
    device: torch.device
    dtype: torch.dtype
    division: Division | None
    limits: FrameLimits
    vocabulary: Vocabulary = Vocabulary()

    def layout(self, samples: Sequence[Sample], packing: int | None = None) -> BatchLayout:
        """Layout of ``samples`` over the ranks of the group, the same on each of them.

        Args:
            packing: tokens of a row that samples share; None: each has a row of its own.
        """
        if self.division is None:
            return self.undivided_layout(samples)
        return self._layout(samples, self.division.comm.ranks, self.division.placement, packing)

    def undivided_layout(self, samples: Sequence[Sample], packing: int | None = None) -> BatchLayout:
        """Layout of ``samples`` on a single rank: every rank of the group is to compute all of them."""
        return self._layout(samples, 1, "contiguous", packing)

    def frames_layout(self, samples: Sequence[Sample], packing: int | None = None) -> BatchLayout:
        """Layout of ``samples`` whose frames are divided over the ranks, while every rank has all of the text."""
        assert self.division is not None and not self.family.keys_in_text
        return self._layout(samples, self.division.comm.ranks, self.division.placement, packing, divide_text=False)

    def _layout(
        self, samples: Sequence[Sample], ranks: int, placement: str, packing: int | None, divide_text: bool = True
    ) -> BatchLayout:
        return lay_out(
            samples,
            [self._frame_shapes(s) for s in samples],
            self.family,
            ranks,
            placement,
            self.pad_token,
            self.image_id,
            packing,
            divide_text,
        )

    def _frame_shapes(self, sample: Sample) -> list[FrameShape]:
        sizes: Sequence[FrameSize | None] = in_one_row(sample.sizes or ()) or [None] * sample.num_frames
        if not isinstance(self.family, VisualFamily):
            return []
        shapes = [shape for size in sizes for shape in self.family.crops_of(size, self.processor, self.limits)]
        return self.family.told(shapes, sample, self.processor)

    def rank_in(self, layout: BatchLayout) -> int:
        """Which rank of ``layout`` this one is; one of a single rank is that of every rank."""
        return self.division.comm.rank if self.division and layout.keys.ranks > 1 else 0

    def check(self, sample: Sample) -> Sample:
        """``sample``, if the model knows its tokens and it has the image tokens of its frames.

        Raises:
            SampleError: otherwise.
        """
        self.vocabulary.check(sample, self.image_id)
        if not isinstance(self.family, VisualFamily):
            if sample.num_frames:
                raise SampleError(f"{sample.name}: {sample.num_frames} frames, and {self.family.name} takes text alone")
            return sample
        tokens = sum(token == self.image_id for token in sample.input_ids)
        wanted = sum(len(shape.rows) for shape in self._frame_shapes(sample))
        if tokens != wanted:
            cut = "" if wanted == sample.num_frames else f", which its processor cuts into {wanted} images"
            raise SampleError(
                f"{sample.name}: {tokens} image tokens (id {self.image_id}) in the text for {sample.num_frames} "
                f"frames{cut}; write one {self.family.image_token} for each {'image' if cut else 'frame'}"
            )
        return sample

    def load(self, samples: Sequence[Sample], layout: BatchLayout) -> Images:
        """Decode the pictures of the frames that lie on this rank. Raises what ``Sample.pictures`` raises."""
        rank = self.rank_in(layout)
        return [sample.pictures(list(layout.own_pictures(i, rank))) for i, sample in enumerate(samples)]

    def sizes(self, layout: BatchLayout) -> BatchSizes:
        """What the planner must know of the batch."""
        return BatchSizes(
            shape_class(layout.rows, layout.text.total, layout.keys.total),
            layout.keys.ranks,
            layout.copies > 1,
            layout.rows * layout.text.total,
            layout.encoder_tokens,
            functools.partial(self._shapes, layout),
            layout.encoder_pairs,
        )

    def _shapes(self, layout: BatchLayout) -> dict[str, CallShape]:
        element = self.dtype.itemsize
        shapes = {}
        for kind, shards, ranges in self._kinds(layout):
            rows_of_batch = 1 if kind == "cross" else layout.rows  # there all of them are one sequence
            if layout.copies > 1:  # no row travels
                shapes[kind] = CallShape(rows_of_batch, shards.q.lengths, shards.kv.lengths, element)
                continue
            size, between = self._node_size(layout), None
            if size is not None and ranges is not None:
                rows = _interval(*ranges).of_nodes(shards.q, size)
                between = routed_rows(rows.start, rows.stop, shards.of_nodes(size))
            # Of rows that are dealt out, ranges move from one unit to the next, which is between tiles.
            drift = None
            if ranges is not None and not shards.q.stripe and not shards.q.units:
                # Of several ranges a row, that of the first, which most rows have alone.
                drift = drift_of(*in_kernel_order(*_each(*ranges)[0]))
            shapes[kind] = CallShape(
                rows_of_batch, shards.q.lengths, shards.kv.lengths, element,
                None if ranges is None else routed_rows(*ranges, shards),
                None if ranges is None else visible_work(*ranges, shards.kv), size, between, drift,
            )  # fmt: skip
        return shapes

    def _node_size(self, layout: BatchLayout) -> int | None:
        """Ranks of a node, where a layout is divided over several."""
        if self.division is None or layout.text.ranks == 1:
            return None
        comm = self.division.comm
        return comm.node_size if comm.node_size < comm.ranks else None

    def pixels(self, layout: BatchLayout, images: Images, threads: Executor | None = None) -> Pixels:
        """What ``collate`` would make of ``images``, so that a loader can do it ahead: it takes the host long.

        In the training dtype, and for a GPU in pinned memory.

        Args:
            threads: share the frames, where the model's family allows it; None: the caller's thread makes all of them.
        """
        made = self._visual(layout, images, threads)
        return {key: self._on_host(x) if isinstance(x, Tensor) else x for key, x in made.items()}

    def collate(
        self,
        layout: BatchLayout,
        images: Images | Pixels,
        plans: Mapping[nn.Module, LayerPlan],
        portions: int | None = None,
        times: LayerTimes | None = None,
        tokens: Tensor | float | None = None,
    ) -> MicroBatch:
        """This rank's micro-batch.

        Args:
            images: the frames that lie on this rank, or what ``pixels`` made of them.
            plans: what each attention module runs with, by the planner's word for ``sizes(layout)``; without division
                none.
            portions: ``layout.portions`` over all groups of the run; None: there is one group.
            times: measures the attention layers; None: nothing is measured.
            tokens: what the sum of the losses of the supervised tokens is divided by; None: their number.
        """
        own = layout.rows_of(self.rank_in(layout))
        # Of text that every rank computes, each counts its part of the loss and of the gradients.
        shares = self.division.comm.ranks // layout.text.ranks if self.division else 1
        labels = torch.from_numpy(layout.shift_labels[:, own]).contiguous()
        answers, num_answers = number_answers(layout.shift_labels)
        inputs: dict[str, Any] = {
            "input_ids": torch.from_numpy(layout.input_ids[:, own]),
            "use_cache": False,
            # The model's own loss: summed over its rows and divided by a count that is the same on the whole group.
            "labels": labels,
            "shift_labels": labels,
            "num_items_in_batch": (max(layout.supervised_tokens, 1) if tokens is None else tokens) * shares,
        }
        of_blocks = self.family.block_arguments(layout.in_block)
        inputs |= {key: torch.from_numpy(np.ascontiguousarray(x[:, own])) for key, x in of_blocks.items()}
        inputs |= images if isinstance(images, dict) else self.pixels(layout, images)
        inputs = {key: self._to_device(value) if isinstance(value, Tensor) else value for key, value in inputs.items()}
        inputs["labels"] = inputs["shift_labels"]  # one tensor, by which the model's forward knows them
        # In their own dtype: fractions (Qwen3-Omni) would not survive the training dtype.
        positions = torch.from_numpy(np.ascontiguousarray(layout.positions(self.family)[..., own]))
        inputs["position_ids"] = positions.to(self.device, non_blocking=True)
        if self.division:
            batch = self._exchange(layout, own, plans, portions or layout.portions, times)
            blocks = {key: inputs[key] for key in of_blocks}
            inputs["sequence_parallel"] = replace(batch, position_ids=inputs["position_ids"], block_arguments=blocks)
        return MicroBatch(
            inputs,
            inputs["labels"],
            torch.from_numpy(answers[:, own]).to(self.device),
            num_answers,
            sum(map(len, layout.ranges)),
            sum(shape.pictures for shapes in layout.shapes for shape in shapes),
        )

    def _in_dtype(self, x: Tensor) -> Tensor:
        return x.to(self.dtype) if x.is_floating_point() else x

    def _on_host(self, x: Tensor) -> Tensor:
        x = self._in_dtype(x)
        return x.pin_memory() if self.device.type == "cuda" else x

    def _to_device(self, x: Tensor) -> Tensor:
        return x.to(self.device, dtype=self.dtype if x.is_floating_point() else None, non_blocking=True)

    def _visual(self, layout: BatchLayout, images: Images, threads: Executor | None) -> dict[str, Any]:
        family = self.family
        if not isinstance(family, VisualFamily):
            return {}
        rank = self.rank_in(layout)
        images = [self._cut(family, layout.own_pictures(i, rank), some) for i, some in enumerate(images)]
        flat = [image for sample in images for image in sample]
        # A caller may leave the pictures of a sample out.
        given = [layout.own_frames(i, rank) if some else [] for i, some in enumerate(images)]
        shapes = [layout.shapes[i][frame] for i, frames in enumerate(given) for frame in frames]
        if self.division:
            # A rank without frames encodes a blank one, so that every rank runs the same modules and collectives.
            return dict(self._pixels(family, flat, shapes, threads))
        frames = max(layout.frames)
        if not frames and not family.needs_frames:
            return {}  # the unmodified model skips its vision encoder
        if family.keys_in_text:
            return dict(family.pad_tiles(self._pixels(family, flat, shapes, threads)))
        frames = max(frames, 1)
        of_samples = [
            family.pad_tiles(self._pixels(family, some, [layout.shapes[i][frame] for frame in given[i]], threads))
            for i, some in enumerate(images)
        ]
        # Rows of the padding behind a sample see nothing.
        ranges = [[*rows, *[(0, 0)] * (layout.input_ids.shape[1] - len(rows))] for rows in layout.ranges]
        dense = family.dense_mask(ranges, layout.shapes)
        padded = {key: _padded([pixels[key] for pixels in of_samples], frames) for key in of_samples[0]}
        return {**padded, **dense}

    def _cut(self, family: VisualFamily, own: Mapping[int, Sequence[int]], pictures: list[np.ndarray]) -> list[Any]:
        """The frames of a sample that this rank encodes, of the pictures that it decoded (or of none)."""
        frames = []
        for picture, crops in zip(pictures, own.values(), strict=bool(pictures)):
            images = family.cut(picture, self.processor) if crops else []
            frames += [images[crop] for crop in crops] or [picture]
        return frames

    def _pixels(
        self,
        family: VisualFamily,
        frames: list[np.ndarray],
        shapes: Sequence[FrameShape],
        threads: Executor | None,
    ) -> Mapping[str, Tensor]:
        """Pixel arguments of these frames, or of a blank one."""
        if not frames:
            return family.blank(self.processor, self.limits)

        def part(first: int, last: int) -> Mapping[str, Tensor]:
            return family.pixels(frames[first:last], shapes[first:last], self.processor)

        def part_in_dtype(first: int) -> Mapping[str, Tensor]:
            return {key: self._in_dtype(x) for key, x in part(first, first + FRAMES_AT_ONCE).items()}

        if threads is None or not family.pixels_apart or len(frames) <= FRAMES_AT_ONCE:
            return part(0, len(frames))
        return family.joined(list(threads.map(part_in_dtype, range(0, len(frames), FRAMES_AT_ONCE))))

    def _exchange(
        self,
        layout: BatchLayout,
        own: slice | np.ndarray,
        plans: Mapping[nn.Module, LayerPlan],
        portions: int,
        times: LayerTimes | None,
    ) -> SequenceParallelBatch:
        assert self.division is not None
        comm = self.division.comm if layout.keys.ranks > 1 else communicator(None)
        # Kinds of layers whose rows are routed: between all ranks, and between nodes.
        routed = {(plan.kind, plan.mode.two_levels) for plan in plans.values() if plan.mode.routes_by_mask}
        roles = {
            kind: self._inputs(comm, shards, ranges, [levels for of, levels in routed if of == kind], layout.copies > 1)
            for kind, shards, ranges in self._kinds(layout)
        }
        shapes = layout.own_shapes(comm.rank)
        if not shapes and isinstance(self.family, VisualFamily):
            shapes = [self.family.shape_of(None, self.processor, self.limits)]
        places = layout.places(comm.rank) if sum(layout.frames) else np.zeros(0, dtype=np.int64)
        order = layout.key_order(comm.rank)
        places = np.pad(places, (0, len(shapes) - len(places)))
        sees_frame = torch.from_numpy(layout.sees_frame[:, own]).to(self.dtype)
        visual_rows = None
        if layout.keys_in_text and isinstance(self.family, VisualFamily):
            visual_rows = VisualRows.build(*layout.visual_sources(), layout.text, comm.rank, self.device)
        return SequenceParallelBatch(
            comm,
            roles,
            plans,
            self.division.kernel,
            times,
            tuple(shapes),
            None if order is None else torch.from_numpy(order).to(self.device),
            torch.from_numpy(places)[None].to(self.device),
            portions,
            sees_frame[:, None, :, None].to(self.device),
            visual_rows,
            documents=layout.documents,
        )

    def _kinds(self, layout: BatchLayout) -> Iterator[tuple[str, ShardLayout, tuple[Tensor, Tensor] | None]]:
        """Name, shards and ranges of the kinds of layers that exchange; no ranges where every row sees all keys."""
        assert self.division is not None
        for role, shards in layout.roles.items():
            for limits in ((None, None), *(self.division.limits if role == "self" else ())):
                # On the CPU the kernel without a mask is the less exact one, and no faster where it is used.
                unmasked = self.device.type == "cuda" and layout.sees_all(role)
                ranges = None if unmasked else layout.ranges_of(role, *limits)
                yield kind_of(role, *limits), shards, ranges

    def _inputs(
        self,
        comm: Communicator,
        shards: ShardLayout,
        ranges: tuple[Tensor, Tensor] | None,
        routed: Sequence[bool],
        copied: bool,
    ) -> AttentionInputs:
        if ranges is None:
            return AttentionInputs(shards, None, copied=copied)
        start, stop = ranges
        routes, between, size = None, None, comm.node_size
        one_level = comm.ranks > 1 and size in (1, comm.ranks)  # two levels are then the flat mode
        if comm.ranks > 1 and (False in routed or (True in routed and one_level)):
            routes = Routes.build(start, stop, shards, comm.rank, self.device)
        if True in routed and 1 < size < comm.ranks:
            rows = _interval(start, stop).of_nodes(shards.q, size)
            nodes = shards.of_nodes(size)
            between = Routes.build(rows.start, rows.stop, nodes, comm.rank // size, self.device)
        interval = KVInterval.several([KVInterval.from_host(*bounds, self.device) for bounds in _each(start, stop)])
        return AttentionInputs(shards, interval, routes, routes if one_level else between, copied)


def _each(start: Tensor, stop: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The ranges of ``BatchLayout.ranges_of`` by themselves, each ``[n, B, s_max]``: one, or several."""
    return [(start, stop)] if start.dim() == 3 else list(zip(start.unbind(-1), stop.unbind(-1), strict=True))


def _interval(start: Tensor, stop: Tensor) -> KVInterval:
    return KVInterval(start, stop, ranges=None if start.dim() == 3 else start.shape[-1])


def _padded(samples: Sequence[Tensor], frames: int) -> Tensor:
    """``[1, n, ...]`` each, of frames or of their tiles, with zeros up to the longest, and to ``frames``."""
    longest = max(frames, *(x.shape[1] for x in samples))
    padded = samples[0].new_zeros((len(samples), longest, *samples[0].shape[2:]))
    for row, x in zip(padded, samples, strict=True):
        row[: x.shape[1]] = x[0]
    return padded


def number_answers(shift_labels: np.ndarray) -> tuple[np.ndarray, int]:
    """Number the answers: runs of adjacent labels.

    Returns:
        int64 ``[B, S]``, the number of the answer a row belongs to or -1, and how many there are.
    """
    supervised = shift_labels != IGNORE
    begins = supervised.copy()
    begins[:, 1:] &= ~supervised[:, :-1]
    numbers = np.cumsum(begins.reshape(-1)).reshape(begins.shape) - 1
    return np.where(supervised, numbers, -1).astype(np.int64), int(begins.sum())
