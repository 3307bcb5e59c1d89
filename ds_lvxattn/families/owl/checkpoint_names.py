"""Checkpoints of mPLUG-Owl3: published ones, whose configs leave out what their code has only one of, and our own."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoProcessor, PreTrainedModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.utils.hub import cached_file

from ds_lvxattn.families.owl.hyper_qwen2 import MPlugOwl3Config, mPLUGOwl3Model
from ds_lvxattn.families.owl.processing import CUT_PROMPTS, mPLUGOwl3Processor

PUBLISHED_PROCESSOR = "mPLUGOwl3ImageProcessor"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"

AutoProcessor.register(MPlugOwl3Config, mPLUGOwl3Processor, exist_ok=True)


def load_model(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a local path or hub name. Raises ``OSError`` or ``ValueError`` when nothing loads."""
    config = MPlugOwl3Config.from_pretrained(name)
    if config.hyper_attention is None or config.projector is None:
        config.hyper_attention, config.projector = kinds(parameter_names(name))
    return mPLUGOwl3Model.from_pretrained(name, config=config, dtype=dtype)


def kinds(parameters: Collection[str]) -> tuple[str, str]:
    """``hyper_attention`` and ``projector`` of a checkpoint with such parameters."""
    projector = "mlp" if "vision2text_model.0.weight" in parameters else "linear"
    for kind, mark in (("gate_proj", ".self_attn.gate_proj."), ("gate", ".self_attn.gate")):
        if any(mark in parameter for parameter in parameters):
            return kind, projector
    return "fused", projector


def parameter_names(name: str) -> set[str]:
    """Names of the parameters of a checkpoint in safetensors files. Raises ``OSError`` when there is none."""
    index = cached_file(name, INDEX, _raise_exceptions_for_missing_entries=False)
    if index is not None:
        with open(index) as file:
            return set(json.load(file)["weight_map"])
    single = cached_file(name, SINGLE)
    assert single is not None
    with safe_open(single, framework="pt") as tensors:
        return set(tensors.keys())


def load_processor(name: str) -> Any:
    """Images to squares of one size, with the mean and deviation of SigLIP; ``cut_prompt``: see ``processing``.

    Published checkpoints say the size as ``image_size``, and leave out how images are cut, as their code has only one
    way of doing it.

    Raises:
        ValueError: ``cut_prompt`` is none of those there are.
    """
    settings, _ = SiglipImageProcessorPil.get_image_processor_dict(name)
    processor: Any = SiglipImageProcessorPil.from_pretrained(name)
    side = settings.get("image_size")
    if side is not None:
        processor.size = {"height": side, "width": side}
    prompt = settings.get("cut_prompt")
    if "cut_prompt" not in settings and settings.get("image_processor_type") == PUBLISHED_PROCESSOR:
        prompt = "v3" if kinds(parameter_names(name))[0] == "fused" else "v2"
    if prompt not in (None, *CUT_PROMPTS):
        raise ValueError(f"'cut_prompt' of the image processor is {prompt!r}; choose one of {CUT_PROMPTS}, or null")
    processor.cut_prompt = prompt
    return processor
