"""What the published processor of mPLUG-Owl3 makes of images and of the text around them.

An image is scaled to one of a few grids of squares and cut into them; the whole image, scaled into one square, comes
behind. Each square has an image token, between words that say where it is. Frames of a video stay whole.

Nothing here needs more than transformers: an export takes this file along, so that it serves by itself.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, ProcessorMixin

IMAGE_TOKEN = "<|image|>"
# Rows and columns; of grids that suit a picture equally well, the first is taken.
GRIDS = ((2, 2), (1, 3), (1, 4), (3, 1), (4, 1), (2, 3), (3, 2))
# How the text says where squares are (``cut_prompt`` of the image processor): in the code of the 7B-240728, 2B and 1B
# checkpoints, and in that of 7B-241101.
CUT_PROMPTS = ("v2", "v3")


@functools.lru_cache(maxsize=4096)
def grid_of(height: int, width: int, side: int) -> tuple[int, int]:
    """Rows and columns of squares that a picture is cut into: most like it in shape and then in size.

    In the integers and the float32 of the published code, so that it decides alike where two suit nearly as well.
    """
    heights, widths = (torch.tensor(GRIDS) * side).unbind(1)

    def overlap(other_height: torch.Tensor, other_width: torch.Tensor) -> torch.Tensor:
        """Of two boxes with one corner in common, the share of their union that both have."""
        both = torch.minimum(widths, other_width) * torch.minimum(heights, other_height)
        return both / (heights * widths + other_height * other_width - both + 1e-5)

    of_its_shape = overlap((height / width * widths).long(), widths)
    best = torch.argmax(of_its_shape * 100 + overlap(torch.tensor(height), torch.tensor(width)))
    return GRIDS[int(best)]


def squares_of(picture: np.ndarray, side: int) -> list[np.ndarray]:
    """A uint8 ``[H, W, 3]`` picture as squares, row by row, and the whole of it behind them, not yet scaled."""
    rows, columns = grid_of(*picture.shape[:2], side)
    scaled = Image.fromarray(picture).resize((columns * side, rows * side), Image.Resampling.BICUBIC)
    squares = np.asarray(scaled).reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
    return [*squares, picture]


def text_of(grid: tuple[int, int], cut_prompt: str, image_token: str = IMAGE_TOKEN) -> str:
    """What stands in the text for a picture that is cut into such a grid."""
    rows, columns = grid
    if cut_prompt == "v3":
        lines = [" ".join([image_token] * columns)] * rows
        return "\n".join((f"<|start_cut|>{rows}*{columns}", *lines, f"{image_token}<|end_cut|>"))
    lines = [" ".join(f"subimg({row},{column}){image_token}" for column in range(columns)) for row in range(rows)]
    return "\n".join((f"Cut to {rows} rows {columns} columns with a global view", *lines, f"global_view{image_token}"))


class mPLUGOwl3Processor(ProcessorMixin):
    """Text and images as the model takes them.

    Args:
        image_processor: scales a picture to a square; its ``cut_prompt`` is one of ``CUT_PROMPTS``, or None where
            images stay whole.
        tokenizer: knows ``image_token``.
        image_token: stands for an image in the text.
        seen_behind: 0 where the token of an image sees it, as in fused hyper attention, 1 where the next one does.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: Any = None,
        image_token: str = IMAGE_TOKEN,
        seen_behind: int = 0,
    ) -> None:
        self.image_token, self.seen_behind = image_token, seen_behind
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]

    def __call__(
        self, images: Any = None, text: Any = None, cut: bool = True, return_tensors: str = "pt", **kwargs: Any
    ) -> BatchFeature:
        """The arguments of the model.

        Args:
            images: for one text a list of pictures, for several a list of lists, in the order of their image tokens.
            text: a string or a list of them.
            cut: False for frames of a video, which stay whole.
            kwargs: of the tokenizer.

        Returns:
            ``input_ids`` and ``attention_mask [B, S]``, padded ahead of the text; with images also ``pixel_values
            [images, C, H, W]`` and ``media_offset``, for each text int64 ``[images]``.

        Raises:
            ValueError: a text has other image tokens than images, or ends with an image that nothing sees.
        """
        texts = [text] if isinstance(text, str) else list(text)
        given = [list(one) for one in images] if _nested(images) else [list(images or [])]
        given += [[] for _ in texts[len(given) :]]
        prompt = getattr(self.image_processor, "cut_prompt", None) if cut else None
        written, pictures = [], []
        for one, own in zip(texts, given, strict=True):
            frames = [np.asarray(x.convert("RGB") if isinstance(x, Image.Image) else x) for x in own]
            whole, *rest = one.split(self.image_token)
            if len(rest) != len(frames):
                raise ValueError(f"{len(rest)} of {self.image_token!r} for {len(frames)} images in {one[:80]!r}")
            for frame, behind in zip(frames, rest, strict=True):
                made, squares = self._cut(frame, prompt)
                whole += made + behind
                pictures += squares
            written.append(whole)
        kwargs = {"padding": len(written) > 1, "padding_side": "left", **kwargs}
        inputs = dict(self.tokenizer(written, return_tensors=return_tensors, **kwargs))
        if pictures:
            pixels = self.image_processor(pictures, input_data_format="channels_last", return_tensors=return_tensors)
            inputs["pixel_values"] = pixels["pixel_values"]
            inputs["media_offset"] = [self._places(ids) for ids in inputs["input_ids"]]
        return BatchFeature(inputs)

    def _cut(self, frame: np.ndarray, prompt: str | None) -> tuple[str, list[np.ndarray]]:
        """What stands in the text for a picture, and its images."""
        if prompt is None:
            return self.image_token, [frame]
        side = self.image_processor.size["height"]
        return text_of(grid_of(*frame.shape[:2], side), prompt, self.image_token), squares_of(frame, side)

    def _places(self, input_ids: torch.Tensor) -> torch.Tensor:
        """int64 ``[images]``: the first token that sees each image of a text."""
        image = self.tokenizer.convert_tokens_to_ids(self.image_token)
        places = (input_ids == image).nonzero()[:, 0] + self.seen_behind
        if len(places) and places[-1] == len(input_ids):
            raise ValueError("a text ends with an image, which no token sees; write something behind it")
        return places


def _nested(images: Any) -> bool:
    return bool(images) and isinstance(images[0], (list, tuple))


mPLUGOwl3Processor.register_for_auto_class("AutoProcessor")
