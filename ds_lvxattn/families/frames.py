"""A rank's frames through a vision encoder, in portions that fit its memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ds_lvxattn.runtime.recompute import Recomputation, recompute


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
    portions: int,
    recomputation: Recomputation,
) -> Tensor:
    """``encode(*inputs)`` by ``module``, computed portion by portion of the frames.

    Every rank makes ``portions`` calls, as ZeRO-3 needs: a rank with fewer frames than portions encodes its first one
    again, which no row sees. Where ``module`` trains, its activations are computed again in the backward pass, a
    portion at a time, unless the policy is ``none``.

    Args:
        module: holds the parameters that ``encode`` uses.
        encode: frames of a portion, ``[f, ...]`` of each input, to ``[f, tokens, d]``.
        inputs: ``[frames, ...]`` each.

    Returns:
        ``[max(frames, portions), tokens, d]``.
    """
    inputs = [filled(x, portions) for x in inputs]
    parts = list(zip(*(x.tensor_split(portions) for x in inputs), strict=True))
    with_graph = any(p.requires_grad for p in module.parameters()) or any(x.requires_grad for x in inputs)
    if torch.is_grad_enabled() and with_graph:
        if recomputation.policy == "none":
            return torch.cat([encode(*part) for part in parts])
        # All that a portion keeps is its inputs, views of the batch's own.
        return torch.cat([recompute(module, encode, *part, keep=False) for part in parts])
    with torch.no_grad():
        first = encode(*parts[0])
        if portions == 1:
            return first.contiguous()
        # Frame by frame into their place: a list of portions beside the whole would take twice the memory.
        encoded = first.new_empty(inputs[0].shape[0], *first.shape[1:])
        places = encoded.tensor_split(portions)
        places[0].copy_(first)
        del first
        for place, part in zip(places[1:], parts[1:], strict=True):
            place.copy_(encode(*part))
        return encoded


def filled(x: Tensor, count: int) -> Tensor:
    """``x [f, ...]`` with its first frame again and again behind it, up to ``count`` frames."""
    missing = count - x.shape[0]
    return torch.cat((x, x[:1].expand(missing, *x.shape[1:]))) if missing > 0 else x
