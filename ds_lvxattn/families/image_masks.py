"""Which rows of an image see each other in both directions, told by the model's own masks.

``create_masks_for_generate`` of a model makes the masks of its kinds of layers from what each row is of. Asked with a
short row of two images it shows whether an image sees itself whole in layers with and without a sliding window, and
whether the window limits that. The rows of such an image are a block, which is intervals (``Family.blocks``).
"""

from __future__ import annotations

import copy
import inspect
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

KINDS = "mm_token_type_ids"  # of each row: 0 for text, 1 for an image
ASKED = (0, 1, 1, 1, 1, 0, 1, 1, 0)
PLAIN, OF_ALL_KINDS = "create_causal_mask", "create_masks_for_generate"
WINDOW = 2  # shorter than an image of ``ASKED``
TYPES = {"full_attention": None, "sliding_attention": WINDOW}


@dataclass(frozen=True)
class ImageBlocks:
    """What a model's images are to its masks.

    Attributes:
        exist: whether an image is a block, in layers with a sliding window at least.
        in_full: whether it is one in layers without a window too.
        in_window: whether the window limits what a row sees of its block.
        joined: whether all images of a row are one block.
    """

    exist: bool = False
    in_full: bool = False
    in_window: bool = True
    joined: bool = False


def runs_of_images(visual: np.ndarray) -> list[tuple[int, int]]:
    """Runs ``[first, last)`` of rows of images, adjacent images as one; ``visual`` as in ``Family.positions``."""
    edges = np.flatnonzero(np.diff(np.pad(visual >= 0, 1).astype(np.int8)))
    return [(int(first), int(last)) for first, last in edges.reshape(-1, 2)]


def has_masks_by_kind(model_class: Any) -> bool:
    """Whether such a model makes its masks from what each row is of."""
    make = getattr(model_class, "create_masks_for_generate", None)
    return make is not None and KINDS in inspect.signature(make).parameters


def makes_same_masks(model_class: Any, inner_class: Any, config: Any) -> bool:
    """Whether ``inner_class.forward`` makes masks by the functions that ``create_masks_for_generate`` makes them by.

    That of Gemma 4 Unified does not: in training its images see themselves in other layers than in generation.
    """
    forward, asked = (_mask_makers(x) for x in (inner_class.forward, model_class.create_masks_for_generate))
    text = config.get_text_config()
    limits = ("layer_types", "sliding_window", "attention_chunk_size")
    if all(getattr(text, limit, None) is None for limit in limits):
        # Layers of one kind: transformers' function for masks of all kinds makes what its causal one does.
        forward, asked = ({PLAIN if name == OF_ALL_KINDS else name for name in names} for names in (forward, asked))
    return forward == asked


def _mask_makers(function: Any) -> set[str]:
    """The functions for masks that it calls, by name."""
    names = inspect.unwrap(function).__code__.co_names
    return {name for name in names if name.startswith("create_") and "mask" in name}


def image_blocks(model_class: Any, config: Any) -> ImageBlocks | None:
    """What the images of such a model are; None: its masks are not those of any ``ImageBlocks``."""
    if not has_masks_by_kind(model_class):
        return ImageBlocks()
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text._attn_implementation = "eager"
    if getattr(text, "sliding_window", None) is not None:
        text.sliding_window = WINDOW
    asked = torch.tensor([ASKED])
    masks = model_class.create_masks_for_generate(
        config=config, inputs_embeds=torch.zeros(1, len(ASKED), 1), attention_mask=None, past_key_values=None,
        position_ids=torch.arange(len(ASKED))[None], **{KINDS: asked},
    )  # fmt: skip
    masks = masks if isinstance(masks, dict) else {"full_attention": masks}
    if not masks.keys() <= TYPES.keys():
        return None
    shown = {kind: (mask[0, 0] == 0).numpy() for kind, mask in masks.items()}
    apart = itertools.product((False, True), (True, False), (False,))
    joined = itertools.product((False, True), (True,), (True,))
    kinds = ImageBlocks(), *(ImageBlocks(True, *rest) for rest in itertools.chain(apart, joined))
    return next((blocks for blocks in kinds if _shows(blocks, shown)), None)


def _shows(blocks: ImageBlocks, shown: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(mask, _mask(blocks, TYPES[kind])) for kind, mask in shown.items())


def _mask(blocks: ImageBlocks, window: int | None) -> np.ndarray:
    """bool ``[S, S]``: what the rows of ``ASKED`` see in layers with such a window."""
    row, key = np.ogrid[: len(ASKED), : len(ASKED)]
    sees = key <= row
    inside = np.zeros_like(sees)
    if blocks.in_full if window is None else blocks.exist:
        if blocks.joined:
            inside |= np.outer(ASKED, ASKED).astype(bool)
        for first, last in runs_of_images(np.array(ASKED) - 1):
            inside[first:last, first:last] = True
    if window is None:
        return sees | inside
    near = key > row - window
    return (sees | inside) & near if blocks.in_window else (sees & near) | inside
