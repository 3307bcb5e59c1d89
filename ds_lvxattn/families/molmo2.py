"""Molmo 2: ``Molmo2ForConditionalGeneration`` of transformers, unmodified.

All images of a row see each other: a row of an image sees what is before it, and every row of the images behind it,
which are further ranges of keys. Rows of an image are its visual tokens and whatever else its processor writes for it,
line breaks and tags. A visual token pools some patches of its image's squares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ds_lvxattn.data.sample import FrameShape, FrameSize
from ds_lvxattn.families.family import FrameLimits
from ds_lvxattn.families.image_features import ImageFeatures
from ds_lvxattn.families.image_masks import runs_of_images

POOLED = "image_token_pooling"  # int [tokens, patches]: the patches that each visual token pools, counted over images


class Molmo2(ImageFeatures):
    """The Molmo 2 family; see ``ImageFeatures``.

    ``FrameShape.grid``: squares, height and width that the processor gets, squares at most, and behind them the token
    ids that are of an image.
    """

    name = "Molmo 2"

    @classmethod
    def has_config(cls, config: Any) -> bool:
        # Known by name: older releases of transformers have no class for it.
        return getattr(config, "model_type", None) == "molmo2" and super().has_config(config)

    def trainable_by_default(self) -> tuple[str, ...]:
        # The projector pools by attention.
        return (*super().trainable_by_default(), "*multi_modal_projector.*")

    def looked_at(self, size: FrameSize | None, processor: Any, limits: FrameLimits) -> tuple[FrameShape, str]:
        shape, text = super().looked_at(size, processor, limits)
        of_images = sorted({token for token in processor.image_token_ids if token is not None})
        return replace(shape, grid=(*shape.grid, *of_images)), text

    def write(self, text: str, sizes: Sequence[FrameSize], processor: Any, limits: FrameLimits) -> str:
        first = processor.tokenizer.bos_token or processor.tokenizer.eos_token
        text = super().write(text, sizes, processor, limits)
        return text if text.startswith(first) else first + text

    def blocks(
        self, ids: np.ndarray, labels: np.ndarray, visual: np.ndarray, shapes: Sequence[FrameShape]
    ) -> Sequence[tuple[int, int]]:
        of_images = np.isin(ids, shapes[0].grid[4:]) if shapes else np.zeros(len(ids), dtype=bool)
        return runs_of_images(of_images.astype(np.int64) - 1)

    def pixels(self, frames: Sequence[np.ndarray], shapes: Sequence[FrameShape], processor: Any) -> Mapping[str, Any]:
        made = super().pixels(frames, shapes, processor)
        patches = made["pixel_values"].shape[2]
        before = np.cumsum([0, *(shape.grid[0] * patches for shape in shapes[:-1])])
        ahead = np.repeat(before, [shape.tokens for shape in shapes])
        return {**made, POOLED: _moved(made[POOLED], torch.from_numpy(ahead)[:, None])}

    def portion(
        self, pixels: Mapping[str, Tensor], shapes: Sequence[FrameShape], first: int, last: int
    ) -> Mapping[str, Tensor]:
        given = dict(super().portion({key: x for key, x in pixels.items() if key != POOLED}, shapes, first, last))
        begin, end = (sum(shape.tokens for shape in shapes[:at]) for at in (first, last))
        ahead = sum(shape.grid[0] for shape in shapes[:first]) * pixels["pixel_values"].shape[1]
        return {**given, POOLED: _moved(pixels[POOLED][begin:end], -ahead)}


def _moved(pooled: Tensor, by: Tensor | int) -> Tensor:
    """``pooled`` as counted over other images; -1, which stands for no patch, stays."""
    return torch.where(pooled >= 0, pooled + by, pooled)
