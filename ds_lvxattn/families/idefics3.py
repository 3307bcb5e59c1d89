"""Idefics3 and SmolVLM: models of transformers, unmodified, whose processor cuts an image into squares.

An image is scaled to the processor's longest edge and cut into squares of the vision encoder's size; the whole image,
scaled into one such square, comes behind them. Each square is encoded by itself, a pixel shuffle makes fewer and wider
tokens of its patches, and its tokens stand in the text behind a tag that says which square it is. So a square is what
ranks share: those of one image may lie on several. A frame of a video is one square, as in SmolVLM's video processor,
whose text also tells how many frames there are, of how long a video, and when each is shown.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    Idefics3ForConditionalGeneration,
    PreTrainedModel,
    SmolVLMForConditionalGeneration,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import (
    Idefics3ImageProcessorPil,
    get_resize_output_image_size,
)
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionAttention
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionAttention

from ds_lvxattn.data.sample import FrameShape, FrameSize
from ds_lvxattn.families.concatenation import Concatenation
from ds_lvxattn.families.crops import Crops
from ds_lvxattn.families.frames import last_hidden_states, patches_of
from ds_lvxattn.runtime.batch import SequenceParallelBatch
from ds_lvxattn.runtime.recompute import Recomputation

SMALL = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
FAKE, WHOLE = "<fake_token_around_image>", "<global-img>"


class Idefics3(Crops, Concatenation):
    """The Idefics3 family; see ``Crops``."""

    name = "Idefics3"
    model_class: type[PreTrainedModel] = Idefics3ForConditionalGeneration
    image_token = "<image>"
    pixels_apart = True
    trained = ("*text_model.*", "*connector.*")
    image_processor: Any = Idefics3ImageProcessorPil  # transformers 5.17 takes it for one that needs torchvision

    def is_local(self, module: nn.Module) -> bool:
        return isinstance(module, (Idefics3VisionAttention, SmolVLMVisionAttention))

    def encode(
        self, model: Any, pixels: Sequence[Tensor], batch: SequenceParallelBatch, recomputation: Recomputation
    ) -> Tensor:
        return model.connector(last_hidden_states(model.vision_model, pixels, batch, recomputation))

    def visual_widths(self) -> tuple[int, ...]:
        shuffled = self.config.vision_config.hidden_size * self.config.scale_factor**2
        return (self.config.text_config.hidden_size, shuffled)

    def frame_tokens(self) -> int:
        return self.encoder_tokens() // self.config.scale_factor**2

    def encoder_tokens(self) -> int:
        return patches_of(self.config.vision_config)

    def grid_of(self, size: FrameSize, processor: Any) -> tuple[int, ...]:
        return _grid(size.height, size.width, processor) if processor.do_image_splitting else ()

    def cut(self, frame: np.ndarray, processor: Any) -> list[np.ndarray]:
        made = processor(
            [[frame]], do_image_splitting=True, do_rescale=False, do_normalize=False, do_pad=False, return_tensors="np"
        )
        return [np.ascontiguousarray(square.transpose(1, 2, 0)) for square in made["pixel_values"][0]]

    def image_text(self, grid: Sequence[int], processor: Any) -> str:
        whole = f"{FAKE}{WHOLE}{self.image_token}{FAKE}"
        if not grid:
            return whole
        rows, columns = map(range, grid)
        squares = (
            "".join(f"{FAKE}<row_{row + 1}_col_{column + 1}>{self.image_token}" for column in columns) for row in rows
        )
        return "\n".join((*squares, "", whole))

    def pixels(
        self, frames: Sequence[np.ndarray], shapes: Sequence[FrameShape], processor: Any
    ) -> Mapping[str, Tensor]:
        """``pixel_values [1, squares, ...]``; those of a picture that was cut have their size already."""
        frames = [frame[0] if frame.ndim == 4 else frame for frame in frames]  # of a video as such, one by one
        made: list[Tensor] = []
        for is_cut, part in itertools.groupby(zip(frames, shapes, strict=True), lambda pair: bool(pair[1].grid)):
            images = [frame for frame, _ in part]
            processed = processor([images], do_image_splitting=False, do_resize=not is_cut, return_tensors="pt")
            made.append(processed["pixel_values"])
        return {"pixel_values": torch.cat(made, dim=1)}

    def blank_pixels(self) -> Mapping[str, Tensor]:
        vision = self.config.vision_config
        # Not zeros, which the unmodified model takes for padding.
        return {"pixel_values": torch.ones(1, 1, vision.num_channels, vision.image_size, vision.image_size)}

    def pad_tiles(self, pixels: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return pixels  # the model takes the images of a batch one after the other


class SmolVLM(Idefics3):
    """The SmolVLM family; see ``Idefics3``."""

    name = "SmolVLM"
    model_class = SmolVLMForConditionalGeneration
    image_processor = SmolVLMImageProcessorPil
    video_token = video_text = "<video>"
    video_template = processing_smolvlm.DEFAULT_CHAT_TEMPLATE  # published ones leave videos out

    def video_parts(self, times: Sequence[float], seconds: float) -> str:
        frames = (f"{int(time) // 60:02d}:{int(time) % 60:02d}" for time in times)
        return "".join(
            (
                processing_smolvlm.DEFAULT_VIDEO_INTRO.format(
                    frame_count=in_words(len(times)), video_duration=str(timedelta(seconds=int(seconds)))
                ),
                *(
                    processing_smolvlm.FRAME_TIMESTAMP_MESSAGE.format(timestamp=frame) + self.image_token
                    for frame in frames
                ),
                processing_smolvlm.DEFAULT_MEDIA_OUTTRO,
            )
        )

    def tokens_of_videos(self, tokenizer: Any) -> tuple[str, ...]:
        return self.token_of(tokenizer), FAKE, WHOLE  # a video itself is text alone


def in_words(number: int) -> str:
    """A number of frames, below a million, as the package ``num2words`` writes it, which SmolVLM's processor uses."""
    thousands, rest = divmod(number, 1000)
    hundreds, below = divmod(rest, 100)
    words = [f"{SMALL[hundreds]} hundred"] if hundreds else []
    if below or not number:
        tens, ones = divmod(below, 10)
        words.append(SMALL[below] if below < 20 else "-".join((TENS[tens], *([SMALL[ones]] if ones else []))))
    last = " and ".join(words)
    if not thousands:
        return last
    front = f"{in_words(thousands)} thousand"
    return f"{front}{', ' if hundreds else ' and '}{last}" if rest else front


def _grid(height: int, width: int, processor: Any) -> tuple[int, ...]:
    """Rows and columns of squares that the processor cuts a picture into; none where it leaves it whole."""
    side = processor.max_image_size["longest_edge"]
    if processor.do_resize:
        picture = np.broadcast_to(np.uint8(0), (3, height, width))  # whose size alone is read
        height, width = get_resize_output_image_size(picture, processor.size["longest_edge"])
    # The longer edge becomes a multiple of the square's, the other one follows it and then becomes one, too.
    ratio = width / height
    if width >= height:
        columns = -(-width // side)
        rows = -(-int(columns * side / ratio) // side)
    else:
        rows = -(-height // side)
        columns = -(-int(rows * side * ratio) // side)
    return (rows, columns) if rows > 1 or columns > 1 else ()
