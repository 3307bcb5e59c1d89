"""What ``image_features`` would compute wrongly of a model: read off its config and signatures."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from transformers.modeling_outputs import BaseModelOutputWithPooling

from ds_lvxattn.families.image_masks import KINDS, has_masks_by_kind, image_blocks, makes_same_masks
from ds_lvxattn.families.text_only import OBSTACLES

# Ends of names of what models give of their encoders, and no forward asks for.
STATES = ("hidden_state", "hidden_states", "attentions")
# Embeddings of text tokens around and between images, in the order of their ids in the config: the same for any images,
# and put into the rows of those tokens by the forward (Ovis 2).
INDICATORS = "visual_indicator_features"
# What a model's ``get_rope_index`` is asked with, by name.
ROPE_INDEX = ("input_ids", KINDS, "image_grid_thw")


def inner_of(model: Any) -> Any:
    """The module whose forward puts the visual tokens into the text: ``model.model``, or the model itself (Llama 4)."""
    inner = getattr(model, "model", None)
    return inner if hasattr(inner, "get_image_features") or not hasattr(model, "get_placeholder_mask") else model


def indicators_of(config: Any) -> int:
    """How many rows ``INDICATORS`` has: 0 for a model without them."""
    return len(getattr(config, "visual_indicator_token_ids", None) or ())


def image_obstacles(model: Any) -> Iterator[str | None]:
    """Why ``model`` would be computed wrongly; None for what it has no trouble with."""
    config, inner = model.config, inner_of(model)
    if not hasattr(inner, "get_image_features") or not hasattr(inner, "get_placeholder_mask"):
        yield "there is no module that puts the tokens of its 'get_image_features' into the text"
    if config.is_encoder_decoder:
        yield "it is an encoder and a decoder"
    if "text_config" not in config.sub_configs or "vision_config" not in config.sub_configs:
        yield "its config has no 'text_config' beside a 'vision_config'"
    if getattr(config, "image_token_id", None) is None and getattr(config, "image_token_index", None) is None:
        yield "its config names no token that stands for an image"
    named = indicators_of(config)
    made = getattr(getattr(config, "vision_config", None), "num_visual_indicator_tokens", 0)
    if made != named:
        yield f"its config names {named} 'visual_indicator_token_ids', and its vision config has {made} of them"
    arguments = inspect.signature(inner.forward).parameters
    positions = hasattr(inner, "get_rope_index")
    if positions and not {*ROPE_INDEX} <= {*inspect.signature(inner.get_rope_index).parameters}:
        yield f"its rotary positions follow from more than the places of its images, {ROPE_INDEX} of 'get_rope_index'"
    if "token_type_ids" in arguments:
        yield "tokens of an image see each other in both directions ('token_type_ids')"
    blocks = image_blocks(type(model), config)
    if blocks is not None and blocks.exist and not makes_same_masks(type(model), type(inner), config):
        yield "its images see themselves in other layers in its forward than by its 'create_masks_for_generate'"
    if blocks is None:
        yield f"what its rows see, or where they stand, follows from which are of images, of all together ('{KINDS}')"
    if KINDS in arguments and not positions and not has_masks_by_kind(type(model)):
        yield f"what its rows see, or where they stand, follows from which are of images ('{KINDS}')"
    of_decoder = [key for key in inspect.signature(inner.get_decoder().forward).parameters if "token_type_ids" in key]
    if of_decoder:
        yield f"its layers compute rows of images in another way {of_decoder}"
    if any("deepstack" in key for key in _keys(config.to_dict())):
        yield "visual features go into several of its layers ('deepstack')"
    if hasattr(inner, "get_image_features"):
        asked = inspect.signature(inner.get_image_features)
        pixels = [key for key in asked.parameters if key.startswith("pixel_values") and key in arguments]
        if len(pixels) > 1:
            yield f"its images come in several arguments {pixels}"
        more = sorted(
            key
            for key in _fields(asked.return_annotation) - _fields(BaseModelOutputWithPooling)
            if not key.endswith(STATES) and not (key == INDICATORS and indicators_of(config))
        )
        if more:
            yield f"its 'get_image_features' gives more than visual tokens {more}"
    for of_text in OBSTACLES:
        yield of_text(model.get_decoder())


def _fields(annotation: Any) -> set[str]:
    """Fields of the dataclass, or of those in the union, that an annotation names."""
    classes = [x for x in (annotation, *get_args(annotation)) if dataclasses.is_dataclass(x)]
    return {field.name for x in classes for field in dataclasses.fields(x)}


def _keys(tree: Mapping[str, Any]) -> Iterator[str]:
    """Keys of nested dicts."""
    for key, value in tree.items():
        yield str(key)
        if isinstance(value, dict):
            yield from _keys(value)
