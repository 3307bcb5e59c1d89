"""Language models without images: causal self-attention over a text that is divided over the ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MistralForCausalLM, PreTrainedModel, Qwen2ForCausalLM

from ds_lvxattn.families.family import Family
from ds_lvxattn.families.rotary import self_attention_role, self_attention_sizes, self_attention_window
from ds_lvxattn.runtime.recompute import Recomputation


class TextOnly(Family):
    """Causal language models of transformers; see ``Family``. Samples with frames are refused."""

    keys_in_text = True

    def role_of(self, module: nn.Module) -> str | None:
        return self_attention_role(module)

    def sizes_of(self, module: Any) -> tuple[int, int, int]:
        return self_attention_sizes(module)

    def window_of(self, module: Any) -> int | None:
        return self_attention_window(module)

    def install_hooks(self, model: nn.Module, recomputation: Recomputation) -> None:
        """Nothing: the model takes the rank's tokens and positions as they are."""

    def trainable_by_default(self) -> tuple[str, ...]:
        return ("*",)

    def load_model(self, name: str, dtype: torch.dtype) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype)


class Llama(TextOnly):
    name, model_class = "Llama", LlamaForCausalLM


class Mistral(TextOnly):
    name, model_class = "Mistral", MistralForCausalLM


class Qwen2(TextOnly):
    name, model_class = "Qwen2", Qwen2ForCausalLM
