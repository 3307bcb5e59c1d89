"""Language models without images: causal self-attention over a text that is divided over the ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ds_lvxattn.families.family import Family
from ds_lvxattn.families.rotary import self_attention_role, self_attention_sizes, self_attention_window
from ds_lvxattn.runtime.recompute import Recomputation


class TextOnly(Family):
    """A causal language model of transformers; see ``Family``. Samples with frames are refused."""

    image_token = None
    keys_in_text = True

    def __init__(self, model_class: type[Any]) -> None:
        self.name = f"text only, {model_class.__name__}"
        self.model_class = model_class

    def role_of(self, module: nn.Module) -> str | None:
        return self_attention_role(module)

    def sizes_of(self, module: Any) -> tuple[int, int, int]:
        return self_attention_sizes(module)

    def window_of(self, module: Any) -> int | None:
        return self_attention_window(module)

    def install_hooks(self, model: nn.Module, recomputation: Recomputation) -> None:
        """Nothing: the model takes the rank's tokens and positions as they are."""

    def trainable_by_default(self, model_config: Any) -> tuple[str, ...]:
        return ("*",)

    def frame_tokens(self, model_config: Any) -> int:
        return 1

    def visual_widths(self, model_config: Any) -> tuple[int, ...]:
        return ()

    def frames_at_once(self, model_config: Any) -> int:
        return 1

    def frame_ranges(self, input_ids: Sequence[int], image_id: int, model_config: Any) -> list[tuple[int, int]]:
        return [(0, 0)] * len(input_ids)

    def load_model(self, name: str, dtype: torch.dtype) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype)

    def load_processor(self, name: str) -> None:
        return None

    def pixels(self, frames: Sequence[np.ndarray], processor: Any, model_config: Any) -> Mapping[str, Tensor]:
        raise ValueError(f"{len(frames)} frames for {self.name}, which takes none; give it text alone")

    def blank_pixels(self, model_config: Any) -> Mapping[str, Tensor]:
        return {}

    def dense_mask(
        self, ranges: Sequence[Sequence[tuple[int, int]]], frames: int, model_config: Any
    ) -> Mapping[str, Tensor]:
        return {}
