"""A rank's frames through a vision encoder, in portions that fit its memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ds_lvxattn.exchange.shards import runs, split_by_size
from ds_lvxattn.runtime.batch import SequenceParallelBatch
from ds_lvxattn.runtime.recompute import Recomputation, recompute
from ds_lvxattn.runtime.zero3 import gathered_once


def refuse_mask(kwargs: Mapping[str, Any], name: str) -> None:
    """Raise ``ValueError`` where the model is called with its dense mask beside the intervals of a batch."""
    if kwargs.get(name) is not None:
        raise ValueError(
            f"{name} was given: under sequence parallelism what a token sees follows from the image tokens in the text "
            "(frame_ranges of the model's family), and the batch has it as intervals; leave the argument out, or set "
            "'sequence_parallel_size' to 1"
        )


def encode_in_portions(
    module: nn.Module,
    encode: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    batch: SequenceParallelBatch,
    recomputation: Recomputation | None,
    ragged: bool = False,
    patches: int = 0,
    behind: int = 0,
) -> Tensor:
    """``encode(*inputs)`` by ``module``, computed portion by portion of the frames.

    Every rank makes ``batch.portions`` calls, as ZeRO-3 needs: a rank with fewer frames than portions encodes its
    first one again, which no row sees. Portions cost about equally. Where ``module`` trains, its activations are
    computed again in the backward pass, a portion at a time, unless the policy is ``none``. Where it is frozen, ZeRO-3
    gathers it once for all portions if it is small enough (``training.zero3``).

    Args:
        module: holds the parameters that ``encode`` uses.
        encode: frames of a portion, ``[f, ...]`` of each input, to ``[f, tokens, d]``; if ``ragged``, with their shapes
            as argument ``shapes``, to their visual tokens, each frame's padding behind its own, ``[tokens, d]``.
        inputs: ``[frames, ...]`` each, but for the first ``patches`` of them: ``[encoder tokens, ...]`` of all frames,
            one after another.
        batch: says what they are, and in how many portions they are encoded.
        recomputation: the model's; None: nothing is computed again.
        behind: rows that ``encode`` gives behind those of the rank's last frame, in the same portion, if ``ragged``.

    Returns:
        ``[frames, tokens, d]``, or ``[tokens + behind, d]``.
    """
    shapes, portions = batch.shapes, batch.portions
    counts = [count for count in split_by_size([shape.encoder_tokens for shape in shapes], portions) if count]
    own = runs(counts)
    parts = [*own, *[range(1)] * (portions - len(own))]
    rows = [sum(shapes[i].tokens + shapes[i].padding for i in part) if ragged else len(part) for part in parts]
    rows[len(own) - 1] += behind

    def encoded(part: range, again: bool = False) -> Tensor:
        begin, end = (sum(shape.encoder_tokens for shape in shapes[:at]) for at in (part.start, part.stop))
        portion = [x[begin:end] if n < patches else x[part.start : part.stop] for n, x in enumerate(inputs)]
        call = functools.partial(encode, shapes=shapes[part.start : part.stop]) if ragged else encode
        # All that a portion keeps is its inputs, views of the batch's own.
        return recompute(module, call, *portion, keep=False) if again else call(*portion)

    with_graph = any(p.requires_grad for p in module.parameters()) or any(x.requires_grad for x in inputs)
    if torch.is_grad_enabled() and with_graph:
        again = recomputation is not None and recomputation.policy != "none"
        whole = torch.cat([encoded(part, again) for part in parts])
        # What is encoded again is part of the result, so that its backward pass runs on this rank too.
        return whole if len(parts) == len(own) else whole[: sum(rows[: len(own)])]
    with torch.no_grad(), gathered_once(module):
        first = encoded(parts[0])
        if portions == 1:
            return first.contiguous()
        # Portion by portion into its place: a list of them beside the whole would take twice the memory.
        whole = first.new_empty(sum(rows[: len(own)]), *first.shape[1:])
        for number, (part, place) in enumerate(zip(parts, whole.split(rows[: len(own)]), strict=False)):
            place.copy_(encoded(part) if number else first)
        for part in parts[len(own) :]:
            encoded(part)
        return whole


def last_hidden_states(
    tower: nn.Module, pixels: Sequence[Tensor], batch: SequenceParallelBatch, recomputation: Recomputation
) -> Tensor:
    """What a vision tower that takes ``pixel_values`` makes of the rank's frames, ``[f, tokens, d_vision]``."""

    def encode(pixel_values: Tensor) -> Tensor:
        return tower(pixel_values=pixel_values).last_hidden_state

    return encode_in_portions(tower, encode, pixels, batch, recomputation)


def patches_of(vision: Any) -> int:
    """Patches of a picture, which is a square, in a vision encoder of this config."""
    return (vision.image_size // vision.patch_size) ** 2


def in_samples(features: Tensor, samples: int) -> Tensor:
    """``[rows, d]`` as ``[samples, rows / samples, d]``, filled up with zeros, for a model that wants a batch.

    Attention takes the rows of all samples as one sequence again (``SequenceParallelBatch.exchange``).
    """
    if missing := -len(features) % samples:
        features = nn.functional.pad(features, (0, 0, 0, missing))  # a copy of them all, in both passes
    return features.unflatten(0, (samples, -1))
