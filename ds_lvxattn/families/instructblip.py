"""InstructBLIP, for images and for video: models of transformers, unmodified, around a decoder-only language model.

They are BLIP-2 but for one thing: beside each frame the Q-Former reads the instruction, in a tokenizer of its own. The
instruction is the text ahead of the first answer, as the model's processor gives one prompt to both tokenizers; it is
part of the frame's shape, which every rank knows.

The model for video puts its frames through the Q-Former one by one, too; its frames are images here.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    InstructBlipForConditionalGeneration,
    InstructBlipVideoForConditionalGeneration,
    PreTrainedModel,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.instructblip.modeling_instructblip import (
    InstructBlipAttention,
    InstructBlipQFormerMultiHeadAttention,
)
from transformers.models.instructblipvideo.modeling_instructblipvideo import (
    InstructBlipVideoAttention,
    InstructBlipVideoQFormerMultiHeadAttention,
)

from ds_lvxattn.data.sample import IGNORE, FrameShape, Sample, SampleError
from ds_lvxattn.families.blip2 import Blip2

Q_FORMER_TOKENIZER = "qformer_tokenizer"  # its folder in a checkpoint


class InstructedImages:
    """An image processor, with the tokenizer of the language model and that of the Q-Former."""

    def __init__(self, images: Any, tokenizer: Any, q_former_tokenizer: Any) -> None:
        self.images, self.tokenizer, self.q_former_tokenizer = images, tokenizer, q_former_tokenizer

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.images(*args, **options)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """As of transformers' processors."""
        self.images.save_pretrained(folder)
        self.q_former_tokenizer.save_pretrained(os.path.join(folder, Q_FORMER_TOKENIZER))

    def instruction(self, input_ids: Sequence[int]) -> list[int]:
        """Tokens of the Q-Former for text of the language model."""
        text = self.tokenizer.decode(input_ids, skip_special_tokens=True).strip()
        return self.q_former_tokenizer(text)["input_ids"]


class InstructBlip(Blip2):
    """The InstructBLIP family; see ``Blip2``. Its processor is an ``InstructedImages``."""

    name = "InstructBLIP"
    model_class: type[PreTrainedModel] = InstructBlipForConditionalGeneration
    pixels_apart = False  # instructions are padded to the longest
    pixel_arguments = ("pixel_values", "qformer_input_ids", "qformer_attention_mask")
    q_former_attention: tuple[type[nn.Module], ...] = (InstructBlipQFormerMultiHeadAttention,)
    vision_attention: tuple[type[nn.Module], ...] = (InstructBlipAttention,)

    def read(self, q_former: nn.Module, queries: Tensor, states: Tensor, *told: Tensor) -> Tensor:
        input_ids, mask = told
        mask = torch.cat((mask.new_ones(queries.shape[:2]), mask), dim=1)
        read = q_former(
            input_ids=input_ids, attention_mask=mask, query_embeds=queries, encoder_hidden_states=states
        ).last_hidden_state
        return read[:, : queries.shape[1]]

    def told(self, shapes: list[FrameShape], sample: Sample, processor: Any) -> list[FrameShape]:
        if not shapes:
            return shapes
        first = next((n for n, label in enumerate(sample.labels) if label != IGNORE), len(sample.labels))
        image = self._frame_token_id
        told = tuple(processor.instruction([token for token in sample.input_ids[:first] if token != image]))
        most = self.config.qformer_config.max_position_embeddings
        if len(told) > most:
            raise SampleError(
                f"{sample.name}: the text ahead of the first answer has {len(told)} tokens of the Q-Former's "
                f"tokenizer, which takes {most}"
            )
        return [replace(shape, told=told) for shape in shapes]

    def load_processor(self, name: str) -> Any:
        words = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        q_former = AutoTokenizer.from_pretrained(name, subfolder=Q_FORMER_TOKENIZER, trust_remote_code=False)
        return InstructedImages(BlipImageProcessorPil.from_pretrained(name), words, q_former)

    def pixels(
        self, frames: Sequence[np.ndarray], shapes: Sequence[FrameShape], processor: Any
    ) -> Mapping[str, Tensor]:
        return {**super().pixels(frames, shapes, processor), **_padded([shape.told for shape in shapes])}

    def blank_pixels(self) -> Mapping[str, Tensor]:
        return {**super().blank_pixels(), **_padded([()])}

    @property
    def _frame_token_id(self) -> int:
        return self.config.image_token_id


class InstructBlipVideo(InstructBlip):
    """The family of InstructBLIP for video; see ``InstructBlip``."""

    name = "InstructBLIP video"
    model_class = InstructBlipVideoForConditionalGeneration
    image_token = "<video>"
    features = "get_video_features"
    q_former_attention = (InstructBlipVideoQFormerMultiHeadAttention,)
    vision_attention = (InstructBlipVideoAttention,)

    def load_model(self, name: str, dtype: torch.dtype) -> PreTrainedModel:
        return with_features_of_frames_alone(super().load_model(name, dtype))

    def pad_tiles(self, pixels: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Each frame as a video of one, which the model makes the same of."""
        made = super().pad_tiles(pixels)
        return {**made, "pixel_values": made["pixel_values"].unsqueeze(1)}

    @property
    def _frame_token_id(self) -> int:
        return self.config.video_token_id


def with_features_of_frames_alone(model: Any) -> PreTrainedModel:
    """``model``, an InstructBLIP for video, whose Q-Former is not told what the language model is.

    transformers 5.23 hands all further arguments of the forward to both, and so the text's ``position_ids`` to the
    instruction.
    """
    model.get_video_features = functools.partial(_features, model.get_video_features)
    return model


def _features(get_video_features: Any, pixel_values: Any, **options: Any) -> Any:
    known = ("qformer_input_ids", "qformer_attention_mask", "interpolate_pos_encoding", "return_dict")
    return get_video_features(pixel_values, **{key: options[key] for key in known if key in options})


def _padded(told: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Instructions of frames, int64 ``[1, frames, tokens]``, and which of these tokens there are."""
    longest = max(1, *map(len, told))
    ids, mask = torch.zeros(2, 1, len(told), longest, dtype=torch.long)
    for frame, tokens in enumerate(told):
        ids[0, frame, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
        mask[0, frame, : len(tokens)] = 1
    return {"qformer_input_ids": ids, "qformer_attention_mask": mask}
