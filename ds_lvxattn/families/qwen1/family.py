"""Qwen-VL: ``QWenLMHeadModel`` of ``qwen1.model``, for the weights of published checkpoints.

An image is a square, of which the resampler of the vision encoder makes 256 tokens. They stand in the text, between
tags and behind a number.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ds_lvxattn.data.sample import FrameShape, FrameSize, SampleError
from ds_lvxattn.errors import ConfigError
from ds_lvxattn.families.concatenation import Concatenation
from ds_lvxattn.families.family import FrameLimits
from ds_lvxattn.families.frames import encode_in_portions
from ds_lvxattn.families.qwen1 import tokenizer
from ds_lvxattn.families.qwen1.model import QWenLMHeadModel, longer_text
from ds_lvxattn.families.qwen1.vision import PoolAttention, VisionAttention
from ds_lvxattn.runtime.batch import SequenceParallelBatch
from ds_lvxattn.runtime.recompute import Recomputation

START, END, TOKEN = tokenizer.SPECIAL[-3:]


class Qwen1VL(Concatenation):
    """The family of the first Qwen-VL; see ``VisualFamily``."""

    name = "Qwen-VL"
    model_class = QWenLMHeadModel
    attention_config = ""
    inner = "transformer"
    image_token = TOKEN
    frame_text = f"{START}{TOKEN}{END}\n"
    pixels_apart = True
    image_processor = CLIPImageProcessorPil
    # As its authors fine-tune it; positions of the resampler stay sines and cosines.
    trained = (
        "*transformer.wte.*", "*transformer.h.*", "*transformer.ln_f.*",
        *(f"*visual.attn_pool.{part}*" for part in ("query", "kv_proj", "attn.", "ln_q", "ln_kv")),
    )  # fmt: skip

    @classmethod
    def has_config(cls, config: Any) -> bool:
        return super().has_config(config) and config.visual is not None

    @classmethod
    def has_model(cls, model: nn.Module) -> bool:
        return super().has_model(model) and cls.has_config(model.config)

    def is_local(self, module: nn.Module) -> bool:
        return isinstance(module, (VisionAttention, PoolAttention))

    def encode(
        self, model: Any, pixels: Sequence[Tensor], batch: SequenceParallelBatch, recomputation: Recomputation
    ) -> Tensor:
        return encode_in_portions(model.visual, model.visual, pixels, batch, recomputation)

    def load_model(self, name: str, dtype: torch.dtype) -> PreTrainedModel:
        if others := self.config.other_settings():
            raise ConfigError(f"its config has {', '.join(others)}; choose a checkpoint without")
        return QWenLMHeadModel.from_pretrained(name, dtype=dtype)

    # Visual tokens

    def visual_widths(self) -> tuple[int, ...]:
        return (self.config.hidden_size, self.config.visual["width"])

    def frame_tokens(self) -> int:
        return self.config.visual["n_queries"]

    def encoder_tokens(self) -> int:
        return (self.config.visual["image_size"] // self.config.visual["patch_size"]) ** 2

    def write(self, text: str, sizes: Sequence[FrameSize], processor: Any, limits: FrameLimits) -> str:
        """Images are numbered, as in the texts that the model has seen."""
        numbers = itertools.count(1)
        return re.sub(re.escape(START), lambda found: f"Picture {next(numbers)}: {found[0]}", text)

    def positions(self, visual: np.ndarray, shapes: Sequence[FrameShape]) -> np.ndarray:
        """See ``Family``.

        Raises:
            SampleError: the text is longer than the rotary embedding is meant for (``use_dynamic_ntk``).
        """
        if self.config.use_dynamic_ntk and len(visual) > self.config.seq_length:
            raise SampleError(longer_text(len(visual), self.config))
        return super().positions(visual, shapes)

    # Pixels

    def load_processor(self, name: str) -> Any:
        try:
            return super().load_processor(name)
        except OSError:  # published checkpoints have none
            side = self.config.visual["image_size"]
            size = {"height": side, "width": side}
            return CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False)

    def blank_pixels(self) -> dict[str, Tensor]:
        side = self.config.visual["image_size"]
        return {"pixel_values": torch.zeros(1, 1, 3, side, side)}
