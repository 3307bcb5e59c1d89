"""The model families, one file each."""

from __future__ import annotations

from torch import nn
from transformers import LlamaForCausalLM, MistralForCausalLM, PreTrainedConfig, Qwen2ForCausalLM

from ds_lvxattn.errors import ConfigError
from ds_lvxattn.families.aria import Aria
from ds_lvxattn.families.blip2 import Blip2
from ds_lvxattn.families.family import Family
from ds_lvxattn.families.flamingo.open_flamingo import OpenFlamingo
from ds_lvxattn.families.idefics import Idefics
from ds_lvxattn.families.idefics2 import Idefics2
from ds_lvxattn.families.llava import Llava
from ds_lvxattn.families.mllama import Mllama
from ds_lvxattn.families.owl.mplug_owl3 import MPlugOwl3
from ds_lvxattn.families.qwen2_5_vl import Qwen25VL
from ds_lvxattn.families.text_only import TextOnly

FAMILIES: tuple[Family, ...] = (
    Mllama(),
    Idefics(),
    OpenFlamingo(),
    MPlugOwl3(),  # ahead of Qwen2, whose config its own extends
    Llava(),
    Blip2(),
    Idefics2(),
    Aria(),
    Qwen25VL(),
    TextOnly(LlamaForCausalLM),
    TextOnly(MistralForCausalLM),
    TextOnly(Qwen2ForCausalLM),
)

__all__ = ["FAMILIES", "Family", "family_of", "family_of_config"]


def family_of(model: nn.Module) -> Family:
    """The family of ``model``.

    Raises:
        ConfigError: no family knows its class.
    """
    for family in FAMILIES:
        if family.has_model(model):
            return family
    raise ConfigError(_unknown(type(model).__name__))


def family_of_config(config: PreTrainedConfig) -> Family:
    """The family whose models have such a config.

    Raises:
        ConfigError: no family has.
    """
    for family in FAMILIES:
        if family.has_config(config):
            return family
    raise ConfigError(_unknown(type(config).__name__))


def _unknown(name: str) -> str:
    known = ", ".join(f"{family.name} ({family.model_class.__name__})" for family in FAMILIES)
    return f"{name} belongs to no known model family: {known}; docs/adding-a-family.md says how to add one"
