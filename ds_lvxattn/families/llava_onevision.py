"""LLaVA-OneVision: ``LlavaOnevisionForConditionalGeneration`` of transformers, unmodified.

Its processor makes three kinds of pictures: an image that is alone in its row is cut into tiles (any resolution);
where a row has several images, each is padded to one square; and a frame of a video is scaled to a square whose tokens
are pooled to a quarter of them, with one line break behind the last frame.

To the vision encoder and the projector all of them are squares, so a portion of pictures of any kinds is one call of
the model's own ``get_image_features``, as images of one square where they are not cut. What it makes of the frames of
a video is then pooled by the model's own ``apply_pooling``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaOnevisionForConditionalGeneration

from ds_lvxattn.data.sample import FrameShape, FrameSize
from ds_lvxattn.families.family import FrameLimits
from ds_lvxattn.families.image_features import made_by, on_host
from ds_lvxattn.families.video_features import Features, VideoFeatures

# What a picture is, in ``batch_num_images``, where the model wants the number of images in the row of an image: so the
# first is what it means to the model.
ALONE, SQUARE, FRAME, LAST_FRAME = 1, -1, -2, -3


class _Features(Features):
    """``get_image_features`` of a model, which also takes pictures of the other kinds; see ``Features``."""

    def __call__(
        self, pixel_values: Tensor, image_sizes: Tensor, batch_num_images: Tensor | None = None, **options: Any
    ) -> Any:
        kinds = [] if batch_num_images is None else batch_num_images.tolist()
        if not any(kind < 0 for kind in kinds):
            return self.own(pixel_values, image_sizes, batch_num_images=batch_num_images, **options)
        # The model takes the number of images of each row: rows of one image first, then one row of all others.
        alone = [at for at, kind in enumerate(kinds) if kind == ALONE]
        others = [at for at, kind in enumerate(kinds) if kind != ALONE]
        order, sizes = [*alone, *others], image_sizes.tolist()
        counts = [self.squares(sizes[at]) if kind == ALONE else 1 for at, kind in enumerate(kinds)]
        if order != sorted(order):
            parts = pixel_values.split(counts)
            pixel_values = torch.cat([parts[at] for at in order])
        rows = [1] * len(alone) + [max(len(others), 2)]  # it looks at no more images than there are
        answer = self.own(pixel_values, image_sizes[order], batch_num_images=rows, **options)
        features = [x for _, x in sorted(zip(order, answer.pooler_output, strict=True), key=lambda pair: pair[0])]
        frames = [at for at, kind in enumerate(kinds) if kind in (FRAME, LAST_FRAME)]
        if frames:
            # A square of several ends with a line break.
            pooled = self.inner.apply_pooling(torch.stack([features[at][:-1] for at in frames]))
            for at, frame in zip(frames, pooled, strict=True):
                end = features[at][-1:] if kinds[at] == LAST_FRAME else frame[:0]
                features[at] = torch.cat((frame, end))
        answer.pooler_output = features
        return answer


class LlavaOnevision(VideoFeatures):
    """The LLaVA-OneVision family; see ``VideoFeatures``.

    ``FrameShape.grid``: squares, height and width that the processor gets, and what the picture is.
    """

    name = "LLaVA-OneVision"
    model_class = LlavaOnevisionForConditionalGeneration
    video_processor = "LlavaOnevisionVideoProcessor"
    features = _Features

    # Visual tokens

    def looked_at(self, size: FrameSize | None, processor: Any, limits: FrameLimits) -> tuple[FrameShape, str]:
        if size is not None and size.part is not None:
            last = size.part.is_last
            grid = (1, size.height, size.width, LAST_FRAME if last else FRAME)
            shape = FrameShape(self._pooled_tokens + last, self.encoder_tokens(), grid)
            return shape, self.token_of(processor.tokenizer)
        if size is not None and size.images == 1:
            shape, text = super().looked_at(size, processor, limits)
            _, height, width, _ = shape.grid
            return replace(shape, grid=(shape.encoder_tokens // self.encoder_tokens(), height, width, ALONE)), text
        height, width = (self._square, self._square) if size is None else (size.height, size.width)
        shape = FrameShape(
            _tokens_of_square(processor, self._square, self._image_id),
            self.encoder_tokens(),
            (1, height, width, SQUARE),
        )
        return shape, self.token_of(processor.tokenizer)

    @property
    def _pooled_tokens(self) -> int:
        """Visual tokens of a frame of a video."""
        side = self._square // self.config.vision_config.patch_size
        return (-(-side // 2)) ** 2

    # Pixels

    def pixels(self, frames: Sequence[np.ndarray], shapes: Sequence[FrameShape], processor: Any) -> Mapping[str, Any]:
        kinds = [shape.grid[3] for shape in shapes]
        squares = [frame for frame, kind in zip(frames, kinds, strict=True) if kind == SQUARE]
        made = iter(_squares(processor, squares) if squares else ())
        values, sizes = [], []
        for frame, shape, kind in zip(frames, shapes, kinds, strict=True):
            if kind == ALONE:
                alone = self.made(frame, shape, processor)
                values.append(alone["pixel_values"][0])
                sizes.append(alone["image_sizes"][0])
                continue
            if kind == SQUARE:
                values.append(next(made))
            else:
                values.append(self.scaled(frame, processor))
            sizes.append(torch.tensor(shape.grid[1:3]))
        given = {"image_sizes": torch.stack(sizes), "batch_num_images": torch.tensor(kinds)}
        return on_host({"pixel_values": torch.cat(values)[None], **{key: x[None] for key, x in given.items()}})


def _squares(processor: Any, frames: Sequence[np.ndarray]) -> Tensor:
    """What the processor makes of images that stand in one row, ``[1, C, H, W]`` each."""
    given = [*frames, *frames[: len(frames) == 1]]  # one would be cut
    return made_by(processor, given)["pixel_values"][: len(frames)]


@functools.lru_cache(maxsize=16)
def _tokens_of_square(processor: Any, side: int, image_id: int) -> int:
    """Visual tokens of one of several images of a row."""
    made = made_by(processor, [np.zeros((side, side, 3), np.uint8)] * 2)
    return made["input_ids"].count(image_id) // 2
