"""PaliGemma: ``PaliGemmaForConditionalGeneration`` of transformers, unmodified, around Gemma or Gemma 2.

A prefix language model: images and question, all that is ahead of the first answer, see each other in both directions,
and what follows is causal. In a conversation of several turns the later questions follow, as the model has one prefix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import PaliGemmaForConditionalGeneration
from transformers.models.gemma import modeling_gemma
from transformers.models.siglip.modeling_siglip import SiglipAttention

from ds_lvxattn.data.sample import IGNORE, FrameShape
from ds_lvxattn.families.concatenation import Concatenation
from ds_lvxattn.families.frames import last_hidden_states, patches_of
from ds_lvxattn.runtime.batch import SequenceParallelBatch
from ds_lvxattn.runtime.recompute import Recomputation

# Where Gemma scales its embeddings inside the model, PaliGemma divides visual tokens by the factor beforehand.
SCALED_INSIDE = not hasattr(modeling_gemma, "GemmaTextScaledWordEmbedding")


class PaliGemma(Concatenation):
    """The PaliGemma family; see ``VisualFamily``."""

    name = "PaliGemma"
    model_class = PaliGemmaForConditionalGeneration
    image_token = "<image>"
    pixels_apart = True
    blocks_in_window = False

    def is_local(self, module: nn.Module) -> bool:
        # The second stands in a head that is left out.
        return isinstance(module, (SiglipAttention, nn.MultiheadAttention))

    def encode(
        self, model: Any, pixels: Sequence[Tensor], batch: SequenceParallelBatch, recomputation: Recomputation
    ) -> Tensor:
        tokens = model.multi_modal_projector(last_hidden_states(model.vision_tower, pixels, batch, recomputation))
        return tokens / self.config.text_config.hidden_size**0.5 if SCALED_INSIDE else tokens

    def positions(self, visual: np.ndarray, shapes: Sequence[FrameShape]) -> np.ndarray:
        return super().positions(visual, shapes) + 1

    def blocks(
        self, ids: np.ndarray, labels: np.ndarray, visual: np.ndarray, shapes: Sequence[FrameShape]
    ) -> Sequence[tuple[int, int]]:
        answers = np.flatnonzero(labels != IGNORE)
        return [(0, int(answers[0]) if len(answers) else len(labels))]

    def block_arguments(self, in_block: np.ndarray) -> Mapping[str, np.ndarray]:
        return {"token_type_ids": (~in_block).astype(np.int64)}

    def visual_widths(self) -> tuple[int, ...]:
        return (self.config.text_config.hidden_size, self.config.vision_config.hidden_size)

    def frame_tokens(self) -> int:
        return self.encoder_tokens()

    def encoder_tokens(self) -> int:
        return patches_of(self.config.vision_config)
