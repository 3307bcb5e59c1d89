"""The small models of transformers that come with a processor, narrower and with every parameter random."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText

from ds_lvxattn.errors import ConfigError
from ds_lvxattn.needle.small_models import random
from ds_lvxattn.needle.small_models.own_processors import (
    OWN_PROCESSORS,
    InternVLOwnVideos,
    LlavaOnevisionOwnVideos,
    with_own_processor,
)
from tests.support.tiny_model import TINY


def loads(kind: str) -> bool:
    """Whether the processor of a model is one that this release of transformers has, with what is installed."""
    try:
        with_own_processor(kind, TINY)
    except ConfigError:
        return False
    return True


# Configs and processors by the model's type.
IMAGE_MODELS: dict[str, Callable[[], tuple[Any, Any]]] = {
    kind: functools.partial(with_own_processor, kind, TINY) for kind in OWN_PROCESSORS if loads(kind)
}
# What their chat templates write around an image.
AROUND = {"glm4v": ("<|begin_of_image|>", "<|end_of_image|>")}
# Those whose whole processor has one for videos, which needs torchvision.
WITH_VIDEOS: dict[str, Any] = {"llava_onevision": LlavaOnevisionOwnVideos, "internvl": InternVLOwnVideos}
SERVED = ("llava_next", "aya_vision", *WITH_VIDEOS)


def image_model(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """The model called ``kind``, with the same weights at every call, and its processor as ``own_processor``."""
    config, processor = IMAGE_MODELS[kind]()

    def build() -> nn.Module:
        model = AutoModelForImageTextToText.from_config(config)
        model.own_processor = processor
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    return nn.Module.to(random(build, seed=1), dtype)
