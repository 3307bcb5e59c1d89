"""What Qwen2-VL, Qwen2.5-VL and Qwen3-VL have in common: pictures of any size, and videos whose frames are merged.

A picture keeps its proportions, scaled as the model's processors scale it. Of a video, ``temporal_patch_size`` frames
are one part, which goes to a rank as a frame does; the vision encoder attends within a part alone, so to it a part is
an image. Patches of all of a rank's pictures stand one behind another, whatever their sizes.

Rotary positions have three parts (time, row, column): the visual tokens of an image share one time, and text goes on
behind the largest position of the image. They follow from the whole sequence, so they are made on the host.

What the encoder wants to know of its pictures' sizes is made on the host too, from the shapes that the collator knows:
left to itself, the model asks the device for it in every layer.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids

from ds_lvxattn.data.sample import FrameShape, FrameSize, Part
from ds_lvxattn.errors import ConfigError
from ds_lvxattn.families.concatenation import Concatenation
from ds_lvxattn.families.family import FrameLimits
from ds_lvxattn.families.frames import encode_in_portions
from ds_lvxattn.families.processors import ImagesAndVideos
from ds_lvxattn.families.videos import VideoProcessor
from ds_lvxattn.runtime.batch import SequenceParallelBatch
from ds_lvxattn.runtime.recompute import Recomputation

# Visual tokens along a side of a frame whose size is not known, unless the vision config has an ``image_size``
# (published ones have not), and of a frame of a video that goes in as an image, at most.
SIDE = 10
# Of the vision encoder: where the sequences end that attend by themselves, and how long the longest of them is.
ENDS = {"cu_seqlens": "max_seqlen", "cu_window_seqlens": "max_window_seqlen"}


class QwenVL(Concatenation):
    """A family of this line; see ``VisualFamily``.

    Attributes:
        vision_attention: the class of its vision encoder's attention.
        video_processor: name of transformers' class, and its ``size``, where no file has one.
    """

    image_token = "<|image_pad|>"
    frame_text = "<|vision_start|><|image_pad|><|vision_end|>"
    video_token = "<|video_pad|>"
    video_text = "<|vision_start|><|video_pad|><|vision_end|>"
    pixel_arguments = ("pixel_values", "image_grid_thw")
    trained: tuple[str, ...] = ("*language_model.*", "*visual.merger.*")
    pixels_apart = True
    vision_attention: type[nn.Module]
    video_processor: tuple[str, Mapping[str, int]]

    def is_local(self, module: nn.Module) -> bool:
        return isinstance(module, self.vision_attention)

    def sizes_of(self, module: Any) -> tuple[int, int, int]:
        if self.is_local(module):
            return module.num_heads, module.num_heads, module.head_dim
        return super().sizes_of(module)

    def encode(
        self, model: Any, pixels: Sequence[Tensor], batch: SequenceParallelBatch, recomputation: Recomputation
    ) -> Tensor:
        encode = functools.partial(self.encode_portion, model.visual)
        return encode_in_portions(model.visual, encode, pixels, batch, recomputation, ragged=True, patches=1)

    def encode_portion(self, vision: Any, pixels: Tensor, grid: Tensor, shapes: Sequence[FrameShape]) -> Tensor:
        """Visual tokens ``[tokens, d]`` of a portion of pictures, without a question to the device.

        Args:
            vision: the vision encoder.
            pixels: ``[patches, values]`` of all of them.
            grid: int64 ``[f, 3]``.
            shapes: of the pictures.
        """
        known = self.encoder_arguments(torch.tensor([(1, *shape.grid) for shape in shapes]))
        # The ends of sequences are read on the host, unless FlashAttention reads them.
        flash = "flash" in str(vision.config._attn_implementation)
        placed = {key: x if key in ENDS and not flash else _placed(x, pixels.device) for key, x in known.items()}
        longest = {ENDS[key]: int(x.diff().max()) for key, x in known.items() if key in ENDS and flash}
        return self.features(vision(pixels, grid_thw=grid, **placed, **longest))

    def encoder_arguments(self, grid: Tensor) -> dict[str, Tensor]:
        """Arguments of the vision encoder that follow from the sizes of its pictures, which it would make itself.

        Args:
            grid: int64 ``[f, 3]`` on the CPU, time, rows and columns of each.
        """
        merge = self.config.vision_config.spatial_merge_size
        return {"cu_seqlens": get_vision_cu_seqlens(grid), "position_ids": get_vision_position_ids(grid, merge)}

    def features(self, encoded: Any) -> Tensor:
        """The visual tokens ``[tokens, d]`` of what the vision encoder returned."""
        return encoded.pooler_output

    def visual_widths(self) -> tuple[int, ...]:
        vision = self.config.vision_config
        return (vision.out_hidden_size, vision.hidden_size * vision.spatial_merge_size**2)

    def frame_tokens(self) -> int:
        return self._side() ** 2

    def encoder_tokens(self) -> int:
        return (self._side() * self.config.vision_config.spatial_merge_size) ** 2

    def _token(self) -> int:
        """Pixels along a side of a visual token."""
        return self.config.vision_config.patch_size * self.config.vision_config.spatial_merge_size

    def _side(self) -> int:
        """Visual tokens along a side of a frame whose size is not known."""
        token = self._token()
        size = getattr(self.config.vision_config, "image_size", SIDE * token)
        if size % token or not size:
            raise ConfigError(
                f"frames of {size} pixels do not divide into tokens of {token}; set 'image_size' of the model's vision "
                f"config to a multiple of {token}"
            )
        return size // token

    # Sizes and positions

    def shape_of(self, size: FrameSize | None, processor: Any, limits: FrameLimits) -> FrameShape:
        vision = self.config.vision_config
        merge, token = vision.spatial_merge_size, self._token()
        if size is None:
            sides = (self._side() * token,) * 2
        elif size.part is not None:
            sides = self.video_sides(self.limited_video(processor.video, limits), size.part, size)
        else:
            least, most = processor.size["shortest_edge"], processor.size["longest_edge"]
            if size.video:
                most = min(limits.frame_pixels or (SIDE * token) ** 2, most)
            sides = smart_resize(size.height, size.width, token, min(least, most), most)
        grid = (sides[0] // vision.patch_size, sides[1] // vision.patch_size)
        part = None if size is None else size.part
        time, pictures = None, 1
        if part is not None:
            time = self.time_of(part) if part.number else None
            pictures = min(part.merged, part.frames - part.number * part.merged)
        patches = grid[0] * grid[1]
        return FrameShape(patches // merge**2, patches, grid, time=time, pictures=pictures)

    def time_of(self, part: Part) -> float | None:
        """How far a part of a video is behind its first in time, in positions; see ``FrameShape``."""
        return None

    def video_sides(self, video: VideoProcessor, part: Part, size: FrameSize) -> tuple[int, int]:
        """Pixels to which a frame of a video is scaled. Here the limits of the processor are those of a frame."""
        least, most = video.settings["size"]["shortest_edge"], video.settings["size"]["longest_edge"]
        token = self._token()
        if video.settings.get("cap_pixels_per_frame"):
            of_video = int(video.settings["max_video_tokens"] * token**2 * 0.9)
            most = max(min(most, of_video * part.merged // part.frames), int(least * 1.05))
        return smart_resize(size.height, size.width, token, least, most)

    def limited_video(self, video: VideoProcessor, limits: FrameLimits) -> VideoProcessor:
        """``video`` with the limit of a frame's pixels."""
        if limits.frame_pixels is None:
            return video
        size = {edge: min(pixels, limits.frame_pixels) for edge, pixels in video.settings["size"].items()}
        return video.with_settings(size=size)

    def limited(self, processor: Any, limits: FrameLimits) -> Any:
        if not isinstance(processor, ImagesAndVideos):
            return processor
        return processor.with_video(self.limited_video(processor.video, limits))

    def merged_frames(self) -> int:
        return self.config.vision_config.temporal_patch_size

    def video_parts(self, times: Sequence[float], seconds: float) -> str:
        return self.image_token * len(times)

    def positions(self, visual: np.ndarray, shapes: Sequence[FrameShape]) -> np.ndarray:
        merge = self.config.vision_config.spatial_merge_size
        is_text = visual < 0
        # Of each visual token its time, row and column in its picture or video; text moves on by one, a picture by its
        # longer side once all its tokens have their positions, a video with its last part.
        times, rows, columns, moves = (np.zeros(max(len(visual), 1), dtype=np.int64) for _ in range(4))
        at = 0
        for shape in shapes:
            height, width = (side // merge for side in shape.grid)
            part = slice(at, at + shape.tokens)
            rows[part], columns[part] = np.divmod(np.arange(shape.tokens), width)
            if shape.time is not None:
                times[part], moves[at - 1] = shape.time, 0
            at += shape.tokens
            moves[at - 1] = max(height, width)
        moves = np.where(is_text, 1, moves[visual])
        first = np.cumsum(moves) - moves
        return np.stack([np.where(is_text, first, first + part[visual]) for part in (times, rows, columns)])

    # Pixels

    def load_processor(self, name: str) -> Any:
        images = AutoImageProcessor.from_pretrained(name, backend="pil", trust_remote_code=False)
        return ImagesAndVideos(images, VideoProcessor.load(name, self.video_settings(images)))

    def video_settings(self, images: Any) -> dict[str, Any]:
        """Settings of the video processor where no file has them: those of the image processor, but for the size."""
        name, size = self.video_processor
        shared = (
            "do_resize", "do_rescale", "do_normalize", "do_convert_rgb", "rescale_factor", "resample", "image_mean",
            "image_std", "patch_size", "merge_size", "temporal_patch_size",
        )  # fmt: skip
        return {"video_processor_type": name, "size": size, **{key: getattr(images, key) for key in shared}}

    def pixels(
        self, frames: Sequence[np.ndarray], shapes: Sequence[FrameShape], processor: Any
    ) -> Mapping[str, Tensor]:
        """``pixel_values [1, patches, ...]`` of all frames one after another, and their grids ``[1, frames, 3]``."""
        patch = self.config.vision_config.patch_size
        sides = [(shape.grid[0] * patch, shape.grid[1] * patch) for shape in shapes]
        images = iter(())
        scaled = [
            np.asarray(Image.fromarray(frame).resize((width, height), processor.resample))
            for frame, (height, width) in zip(frames, sides, strict=True)
            if frame.ndim == 3
        ]
        if scaled:
            made = processor(scaled, do_resize=False, return_tensors="pt")
            images = iter(made["pixel_values"].split(made["image_grid_thw"].prod(1).tolist()))
        patches = [
            next(images) if frame.ndim == 3 else processor.video.patches(frame, *side)
            for frame, side in zip(frames, sides, strict=True)
        ]
        grids = torch.tensor([(1, *shape.grid) for shape in shapes])
        return {"pixel_values": torch.cat(patches)[None], "image_grid_thw": grids[None]}

    def blank_pixels(self) -> Mapping[str, Tensor]:
        vision = self.config.vision_config
        side = self._side() * vision.spatial_merge_size
        values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        return {
            "pixel_values": torch.zeros(1, side**2, values),
            "image_grid_thw": torch.tensor([[[1, side, side]]]),
        }

    def prompt_arguments(self, positions: np.ndarray) -> Mapping[str, Tensor]:
        """Positions ``[4, B, S]``, places in the text ahead of the three: the model knows of no parts of videos."""
        places = np.broadcast_to(np.arange(positions.shape[-1]), (1, *positions.shape[1:]))
        return {"position_ids": torch.from_numpy(np.concatenate((places, positions)))}


def _placed(x: Tensor, device: torch.device) -> Tensor:
    """``x`` on the device, without waiting for what the device has to do."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)
