"""The model families, one file each."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ds_lvxattn.errors import ConfigError
from ds_lvxattn.families.aria import Aria
from ds_lvxattn.families.blip2 import Blip2
from ds_lvxattn.families.cohere_compass import CohereCompass
from ds_lvxattn.families.family import Family, VisualFamily
from ds_lvxattn.families.flamingo.open_flamingo import OpenFlamingo
from ds_lvxattn.families.gemma3 import Gemma3
from ds_lvxattn.families.idefics import Idefics
from ds_lvxattn.families.idefics2 import Idefics2
from ds_lvxattn.families.idefics3 import Idefics3, SmolVLM
from ds_lvxattn.families.image_features import ImageFeatures
from ds_lvxattn.families.instructblip import InstructBlip, InstructBlipVideo
from ds_lvxattn.families.internvl import InternVL
from ds_lvxattn.families.llava import Llava
from ds_lvxattn.families.llava_next_video import LlavaNextVideo
from ds_lvxattn.families.llava_onevision import LlavaOnevision
from ds_lvxattn.families.mllama import Mllama
from ds_lvxattn.families.molmo2 import Molmo2
from ds_lvxattn.families.owl.mplug_owl3 import MPlugOwl3
from ds_lvxattn.families.paligemma import PaliGemma
from ds_lvxattn.families.qwen1.family import Qwen1VL
from ds_lvxattn.families.qwen2_5_omni import Qwen25Omni
from ds_lvxattn.families.qwen2_5_vl import Qwen25VL
from ds_lvxattn.families.qwen2_vl import Qwen2VL
from ds_lvxattn.families.qwen3_omni import Qwen3Omni
from ds_lvxattn.families.qwen3_vl import Cosmos3Omni, Qwen3VL, Qwen3VLMoe, Qwen35, Qwen35Moe
from ds_lvxattn.families.text_only import TextOnly

FAMILIES: tuple[type[Family], ...] = (
    Mllama,
    Idefics,
    OpenFlamingo,
    MPlugOwl3,  # its config extends that of Qwen2
    Llava,
    Blip2,
    InstructBlip,
    InstructBlipVideo,
    Idefics2,
    Idefics3,
    SmolVLM,
    Aria,
    Qwen1VL,
    Qwen2VL,
    Qwen25VL,
    Qwen3VL,
    Qwen3VLMoe,
    Cosmos3Omni,
    Qwen25Omni,
    Qwen3Omni,
    Qwen35,
    Qwen35Moe,
    CohereCompass,
    Gemma3,
    PaliGemma,
    LlavaOnevision,
    LlavaNextVideo,
    InternVL,
    Molmo2,
    ImageFeatures,  # any other model of transformers with images in its text
    TextOnly,  # last: any causal language model of transformers
)

# Models that none of them can take, by the type of their config, and why.
REFUSED = {
    "qwen": "Qwen of text alone (no 'visual' in its config) runs on code of its own, for transformers 4, which "
    "computes its scores itself and counts positions from the first token that a rank has; train Qwen2 or a later one",
}

__all__ = ["FAMILIES", "REFUSED", "Family", "VisualFamily", "family_of", "family_of_config", "unwrapped"]


def unwrapped(model: Any) -> Any:
    """The transformers model inside a ``PeftModel``, or ``model`` itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def family_of(model: nn.Module) -> Family:
    """The family of ``model``, which may be a ``PeftModel``, for its config.

    Raises:
        ConfigError: no family knows its class.
    """
    model = unwrapped(model)
    for family in FAMILIES:
        if family.has_model(model):
            config: Any = model.config
            return family(config)
    for name, part in model.named_children():
        if any(family.has_model(part) for family in FAMILIES):
            several = isinstance(model, PreTrainedModel)
            what = "is several models in one" if several else "is no model of transformers"
            raise ConfigError(
                f"{type(model).__name__} {what}; attach the {type(part).__name__} in it ('{name}'), "
                + ("and train that one alone" if several else "and give engine_arguments what is around it")
            )
    raise ConfigError(_unknown(type(model).__name__, getattr(model, "config", None)))


def family_of_config(config: PreTrainedConfig) -> Family:
    """The family whose models have such a config, for this one.

    Raises:
        ConfigError: no family has.
    """
    for family in FAMILIES:
        if family.has_config(config):
            return family(config)
    raise ConfigError(_unknown(type(config).__name__, config))


def _unknown(name: str, config: Any) -> str:
    reason = REFUSED.get(getattr(config, "model_type", ""))
    if reason is not None:
        return f"{name} cannot be sequence-parallel: {reason}"
    known = ", ".join(f"{family.name} ({family.model_class.__name__})" for family in FAMILIES)
    return f"{name} belongs to no known model family: {known}; docs/adding-a-family.md says how to add one"
