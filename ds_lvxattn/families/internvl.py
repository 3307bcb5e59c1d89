"""InternVL: ``InternVLForConditionalGeneration`` of transformers, unmodified, with videos as such.

An image is tiles and a thumbnail, as in other models with images in their text. Of a video its processor scales each
frame into one tile and numbers it in the text, ``Frame1: <img>...</img>``; the model takes that tile as an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from transformers import InternVLForConditionalGeneration

from ds_lvxattn.data.sample import FrameShape, FrameSize
from ds_lvxattn.families.family import FrameLimits
from ds_lvxattn.families.image_features import ImageFeatures

FRAME = -1  # in the place of the most tiles of an image: a frame that the video processor scales


class InternVL(ImageFeatures):
    """The InternVL family; see ``ImageFeatures``.

    With ``FrameLimits.frame_tiles`` other than 1 the image processor cuts the frames of a video.
    """

    name = "InternVL"
    model_class = InternVLForConditionalGeneration
    video_token = video_text = "<video>"
    video_processor = "InternVLVideoProcessor"

    def video_parts(self, times: Sequence[float], seconds: float) -> str:
        return "\n".join(f"Frame{number + 1}: {self.image_token}" for number in range(len(times)))

    def looked_at(self, size: FrameSize | None, processor: Any, limits: FrameLimits) -> tuple[FrameShape, str]:
        if size is None or size.part is None or limits.frame_tiles != 1:
            return super().looked_at(size, processor, limits)
        shape, text = super().looked_at(None, processor, limits)
        return replace(shape, grid=(1, size.height, size.width, FRAME)), text

    def made(self, frame: np.ndarray, shape: FrameShape, processor: Any, most: int = 0) -> dict[str, Any]:
        if most == FRAME:
            return {"pixel_values": self.scaled(frame, processor)}
        return super().made(frame[0] if frame.ndim == 4 else frame, shape, processor, most)
