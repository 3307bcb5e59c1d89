"""What families have in common whose image processor cuts an image into several."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from ds_lvxattn.data.sample import FrameShape, FrameSize
from ds_lvxattn.families.family import FrameLimits, VisualFamily
from ds_lvxattn.families.processors import written


class Crops(VisualFamily):
    """A family whose images may be crops, each with an image token and encoded by itself; see ``VisualFamily``.

    A frame of a video stays whole. ``FrameShape.grid``: rows and columns of an image that is cut.

    Attributes:
        whole_behind: whether the whole image, scaled down, is one more image behind its crops.
    """

    whole_behind: ClassVar[bool] = True

    @abstractmethod
    def grid_of(self, size: FrameSize, processor: Any) -> tuple[int, ...]:
        """How the image processor cuts an image; empty where it leaves it whole."""

    def images_in(self, grid: Sequence[int]) -> int:
        """The images that one of such a grid is to the model."""
        return math.prod(grid) + self.whole_behind if grid else 1

    def crops_of(self, size: FrameSize | None, processor: Any, limits: FrameLimits) -> list[FrameShape]:
        grid = () if size is None or size.video else self.grid_of(size, processor)
        tokens = self.frame_tokens(), self.encoder_tokens()
        return [FrameShape(*tokens, grid, crop=crop, pictures=int(crop == 0)) for crop in range(self.images_in(grid))]

    def image_text(self, grid: Sequence[int], processor: Any) -> str:
        """How the model's own processor writes an image of such a grid; here the tokens of its crops alone."""
        return self.image_token * self.images_in(grid)

    def write(self, text: str, sizes: Sequence[FrameSize], processor: Any, limits: FrameLimits) -> str:
        grids = (self.crops_of(size, processor, limits)[0].grid for size in sizes)
        return written(text, self.image_token, (self.image_text(grid, processor) for grid in grids))

    def complete_processor(self, processor: Any, image_token: str) -> None:
        """It counts the visual tokens of a crop by this."""
        processor.image_seq_len = self.frame_tokens()
