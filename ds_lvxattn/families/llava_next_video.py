"""LLaVA-NeXT-Video: ``LlavaNextVideoForConditionalGeneration`` of transformers, unmodified, with videos as such.

An image is a base square and tiles, as in LLaVA-NeXT. A frame of a video is scaled and cropped to one square, whose
patches the model pools ahead of its projector.

Both are squares to the vision encoder, and tokens to the projector: so a portion of images and frames calls each part
of the model once, whatever is in it, as ZeRO-3 wants.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaNextVideoForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ds_lvxattn.data.sample import FrameShape, FrameSize
from ds_lvxattn.families.family import FrameLimits
from ds_lvxattn.families.image_features import on_host
from ds_lvxattn.families.video_features import Features, VideoFeatures

FRAME = (0, 0)  # in ``image_sizes``: a frame of a video


class _Features(Features):
    """``get_image_features`` of a model, which also takes frames of videos; see ``Features``."""

    def __call__(self, pixel_values: Tensor, image_sizes: Tensor, **options: Any) -> Any:
        inner, config = self.inner, self.inner.config
        sizes = [tuple(size) for size in torch.as_tensor(image_sizes).tolist()]
        trained = any(True for _ in inner.vision_resampler.parameters())  # then every rank calls it
        if FRAME not in sizes and not (trained and pixel_values.dim() == 4):
            return self.own(pixel_values, image_sizes, **options)
        layers = config.vision_feature_layer
        states = inner.vision_tower(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
        squares = torch.cat([states[layer] for layer in ([layers] if isinstance(layers, int) else layers)], dim=-1)
        if config.vision_feature_select_strategy == "default":
            squares = squares[:, 1:]
        counts = [1 if size == FRAME else self.squares(size) for size in sizes]
        parts = list(squares.split(counts))
        frames = [at for at, size in enumerate(sizes) if size == FRAME]
        pooled = inner.vision_resampler(torch.cat([parts[at] for at in frames] or [squares[:1]]))
        for at, frame in zip(frames, pooled, strict=False):
            parts[at] = frame[None]
        rows = torch.cat([part.flatten(0, 1) for part in parts])
        if not frames:
            rows = torch.cat((rows, pooled[0]))  # of no use, but for the order of the backward passes of ranks
        projected = inner.multi_modal_projector(rows)[: sum(part.shape[:2].numel() for part in parts)]
        features = list(projected.split([part.shape[:2].numel() for part in parts]))
        for at, size in enumerate(sizes):
            if size != FRAME:
                packed, _ = inner.pack_image_features(
                    [features[at].unflatten(0, parts[at].shape[:2])],
                    [size],
                    config.vision_feature_select_strategy,
                    image_newline=inner.image_newline,
                )
                features[at] = packed[0]
        return BaseModelOutputWithPooling(pooler_output=features)  # type: ignore[arg-type]


class LlavaNextVideo(VideoFeatures):
    """The LLaVA-NeXT-Video family; see ``VideoFeatures``.

    ``FrameShape.grid``: squares, height and width that the processor gets, and whether it is a frame of a video.
    """

    name = "LLaVA-NeXT-Video"
    model_class = LlavaNextVideoForConditionalGeneration
    video_processor = "LlavaNextVideoVideoProcessor"
    features = _Features

    # Visual tokens

    def looked_at(self, size: FrameSize | None, processor: Any, limits: FrameLimits) -> tuple[FrameShape, str]:
        vision = self.config.vision_config
        side = vision.image_size // vision.patch_size
        if size is not None and size.part is not None:
            tokens = (side // self.config.spatial_pool_stride) ** 2
            shape = FrameShape(tokens, side**2, (1, size.height, size.width, True))
            return shape, self.token_of(processor.tokenizer)
        shape, text = super().looked_at(size, processor, limits)
        return replace(shape, grid=(shape.encoder_tokens // side**2, *shape.grid[1:3], False)), text

    # Pixels

    def pixels(self, frames: Sequence[np.ndarray], shapes: Sequence[FrameShape], processor: Any) -> Mapping[str, Any]:
        values, sizes = [], []
        for frame, shape in zip(frames, shapes, strict=True):
            if shape.grid[3]:
                values.append(self.scaled(frame, processor))
                sizes.append(torch.tensor(FRAME))
            else:
                made = self.made(frame, shape, processor)
                values.append(made["pixel_values"][0])
                sizes.append(made["image_sizes"][0])
        return on_host({"pixel_values": torch.cat(values)[None], "image_sizes": torch.stack(sizes)[None]})
