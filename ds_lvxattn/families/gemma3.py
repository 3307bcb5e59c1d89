"""Gemma 3: ``Gemma3ForConditionalGeneration`` of transformers, unmodified.

The visual tokens of an image stand in the text and see each other in both directions. A row of an image sees what is
before the image and all of it: one range, which ends where the image does. Adjacent images count as one, as they do in
the model. Images are one square; the model's crops (pan and scan) are not used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import Gemma3ForConditionalGeneration
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.siglip.modeling_siglip import SiglipAttention

from ds_lvxattn.data.sample import FrameShape
from ds_lvxattn.families.concatenation import Concatenation
from ds_lvxattn.families.frames import last_hidden_states, patches_of
from ds_lvxattn.families.image_masks import runs_of_images
from ds_lvxattn.runtime.batch import SequenceParallelBatch
from ds_lvxattn.runtime.recompute import Recomputation


class Gemma3(Concatenation):
    """The Gemma 3 family; see ``VisualFamily``."""

    name = "Gemma 3"
    model_class = Gemma3ForConditionalGeneration
    image_token = "<image_soft_token>"
    frame_text = "\n\n<start_of_image><image_soft_token><end_of_image>\n\n"
    pixels_apart = True
    # Releases without this function have the whole image seen inside a sliding window too.
    blocks_in_window = hasattr(modeling_gemma3, "create_masks_for_vision_model")

    def is_local(self, module: nn.Module) -> bool:
        # The second stands in a head that is left out.
        return isinstance(module, (SiglipAttention, nn.MultiheadAttention))

    def encode(
        self, model: Any, pixels: Sequence[Tensor], batch: SequenceParallelBatch, recomputation: Recomputation
    ) -> Tensor:
        return model.multi_modal_projector(last_hidden_states(model.vision_tower, pixels, batch, recomputation))

    def blocks(
        self, ids: np.ndarray, labels: np.ndarray, visual: np.ndarray, shapes: Sequence[FrameShape]
    ) -> Sequence[tuple[int, int]]:
        return runs_of_images(visual)

    def block_arguments(self, in_block: np.ndarray) -> Mapping[str, np.ndarray]:
        return {"token_type_ids": in_block.astype(np.int64)}

    def visual_widths(self) -> tuple[int, ...]:
        return (self.config.text_config.hidden_size, self.config.vision_config.hidden_size)

    def frame_tokens(self) -> int:
        return self.config.mm_tokens_per_image

    def encoder_tokens(self) -> int:
        return patches_of(self.config.vision_config)

    def pixels(
        self, frames: Sequence[np.ndarray], shapes: Sequence[FrameShape], processor: Any
    ) -> Mapping[str, Tensor]:
        made = processor(list(frames), do_pan_and_scan=False, return_tensors="pt")
        return {"pixel_values": made["pixel_values"][None]}
