"""Small random models of transformers with images in their text, each with its own processor, for ``tiny_model``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AyaVisionConfig,
    AyaVisionProcessor,
    CLIPVisionConfig,
    Gemma4Config,
    Glm4vConfig,
    Glm4vProcessor,
    InternVLConfig,
    InternVLProcessor,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextProcessor,
    LlavaNextVideoConfig,
    LlavaNextVideoProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionProcessor,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.utils import is_torchvision_available

from ds_lvxattn.families import family_of_config
from ds_lvxattn.families.processors import OwnVideos
from ds_lvxattn.families.videos import VideoProcessor
from ds_lvxattn.needle.small_models import PIXELS, SIZE, SQUARE, random
from ds_lvxattn.needle.task import IMAGE, build_tokenizer
from tests.support.tiny_model import IMAGE_TOKEN, TINY

# Height and width, in pixels, that a picture is padded to.
PINPOINTS = [[SIZE * rows, SIZE * columns] for rows, columns in ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1))]


def tagged(tags: Sequence[str], **named: str) -> tuple[Any, dict[str, Any]]:
    """The tokenizer of the needle task, which also knows ``tags``, and the sizes of a text model for it."""
    needle = build_tokenizer()
    special = {key: getattr(needle, key) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
    if named:
        special["extra_special_tokens"] = named
    tokenizer = type(needle)(tokenizer_object=needle._tokenizer, **special)
    tokenizer.add_special_tokens({"additional_special_tokens": list(tags)}, replace_extra_special_tokens=False)
    return tokenizer, {**TINY.text, "vocab_size": len(tokenizer)}


def llava_next() -> tuple[Any, Any]:
    """Four patches a tile, in tiles of every shape, without their padding."""
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**TINY.vision, num_hidden_layers=2), text_config=LlamaConfig(**TINY.text),
        image_token_index=IMAGE_TOKEN, image_grid_pinpoints=PINPOINTS, vision_feature_layer=[-2, -1],
    )  # fmt: skip
    images = LlavaNextImageProcessorPil(size=SQUARE, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS, **PIXELS)
    processor = LlavaNextProcessor(
        images, build_tokenizer(), patch_size=SIZE // 2, vision_feature_select_strategy="default",
        image_token=IMAGE, num_additional_image_tokens=1,
    )  # fmt: skip
    return config, processor


class Videos(VideoProcessor):
    """Makes of videos what transformers' video processors make, which need torchvision."""

    def __call__(self, videos: Sequence[np.ndarray], **options: Any) -> dict[str, torch.Tensor]:
        return {"pixel_values_videos": torch.stack([self.fitted(video) for video in videos])}


class InternVL(OwnVideos, InternVLProcessor):
    """With such videos."""


class LlavaOnevision(OwnVideos, LlavaOnevisionProcessor):
    """With such videos."""


class LlavaNextVideo(OwnVideos, LlavaNextVideoProcessor):
    """With such videos."""


def llava_next_video() -> tuple[Any, Any]:
    """As LLaVA-NeXT, with one token for a frame of a video."""
    tokenizer, text = tagged(("<video>",))
    config = LlavaNextVideoConfig(
        vision_config=CLIPVisionConfig(**TINY.vision, num_hidden_layers=2), text_config=LlamaConfig(**text),
        image_token_index=IMAGE_TOKEN, image_grid_pinpoints=PINPOINTS, vision_feature_layer=[-2, -1],
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
    )  # fmt: skip
    images = LlavaNextImageProcessorPil(size=SQUARE, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS, **PIXELS)
    videos = Videos(family_of_config(config).video_settings(images))
    processor = LlavaNextVideo(
        videos, images, tokenizer, patch_size=SIZE // 2, vision_feature_select_strategy="default",
        image_token=IMAGE, num_additional_image_tokens=1,
    )  # fmt: skip
    return config, processor


def llava_onevision() -> tuple[Any, Any]:
    """As LLaVA-NeXT; an image of many tiles is scaled down to nine."""
    tokenizer, text = tagged(("<video>",))
    pinpoints = [*PINPOINTS, [4 * SIZE, 4 * SIZE]]
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**TINY.vision, num_hidden_layers=2, vision_use_head=False),
        text_config=Qwen2Config(**text), image_token_index=IMAGE_TOKEN, vision_feature_layer=-1,
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"), image_grid_pinpoints=pinpoints,
        vision_feature_select_strategy="full",
    )  # fmt: skip
    images = LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=pinpoints, **PIXELS)
    videos = Videos(family_of_config(config).video_settings(images))
    processor = LlavaOnevision(
        images, tokenizer, videos, num_image_tokens=4, vision_feature_select_strategy="full", image_token=IMAGE
    )
    return config, processor


def internvl() -> tuple[Any, Any]:
    """Four patches become a token, four of them a tile; up to three tiles and a thumbnail, between tags."""
    start, end = "<img>", "</img>"
    tokenizer, text = tagged(
        (start, end, "<video>"), start_image_token=start, end_image_token=end, context_image_token=IMAGE,
        video_token="<video>",
    )  # fmt: skip
    vision = {**TINY.vision, "patch_size": SIZE // 4, "num_hidden_layers": 2}
    config = InternVLConfig(
        vision_config=vision, text_config=Qwen2Config(**text), image_token_id=IMAGE_TOKEN, image_seq_length=4
    )
    images = GotOcr2ImageProcessorPil(size=SQUARE, max_patches=3, **PIXELS)
    videos = Videos(family_of_config(config).video_settings(images))
    return config, InternVL(images, tokenizer, videos, image_seq_length=4)


def aya_vision() -> tuple[Any, Any]:
    """Up to three tiles and a thumbnail, each with its name ahead of it in the text."""
    tags = ("<start>", "<end>", "TILE_1", "TILE_2", "TILE_3", "TILE_GLOBAL")
    tokenizer, text = tagged(tags)
    vision = SiglipVisionConfig(**{**TINY.vision, "patch_size": SIZE // 4}, num_hidden_layers=2, vision_use_head=False)
    config = AyaVisionConfig(vision_config=vision, text_config=LlamaConfig(**text), image_token_index=IMAGE_TOKEN)
    images = GotOcr2ImageProcessorPil(size=SQUARE, max_patches=3, crop_to_patches=True, **PIXELS)
    processor = AyaVisionProcessor(
        images, tokenizer, patch_size=SIZE // 4, img_size=SIZE, image_token=IMAGE, downsample_factor=2,
        start_of_img_token="<start>", end_of_img_token="<end>", img_patch_token=IMAGE,
    )  # fmt: skip
    return config, processor


class Glm4v(OwnVideos, Glm4vProcessor):
    """Without a video processor, whose videos are not asked for."""


def glm4v() -> tuple[Any, Any]:
    """Images of their own proportions, whose places and sizes rotary positions follow from."""
    tags = ("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>")
    tokenizer, text = tagged(tags, image_token=IMAGE)
    start, end = tokenizer.convert_tokens_to_ids(list(tags[:2]))
    heads, patch = TINY.vision_heads, SIZE // 4
    vision = {
        "hidden_size": TINY.vision_width, "num_heads": heads, "depth": 2, "patch_size": patch, "image_size": SIZE,
        "intermediate_size": 32, "out_hidden_size": TINY.width,
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}
    config = Glm4vConfig(
        vision_config=vision, text_config={**text, "rope_parameters": rope}, image_token_id=IMAGE_TOKEN,
        image_start_token_id=start, image_end_token_id=end,
    )  # fmt: skip
    size = {"shortest_edge": 2 * SIZE**2, "longest_edge": 8 * SIZE**2}
    images = Glm4vImageProcessorPil(patch_size=patch, size=size, **PIXELS)
    return config, Glm4v(images, tokenizer, VideoProcessor({}))


def gemma4() -> tuple[Any, Any]:
    """Images of up to 70 tokens, which see themselves in both directions in layers with a shorter window.

    Raises:
        ImportError: of an earlier release, whose processor needs torchvision.
    """
    from transformers.models.gemma4.feature_extraction_gemma4 import Gemma4AudioFeatureExtractor
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
    from transformers.models.gemma4.processing_gemma4 import Gemma4Processor

    start, end, audio = "<boi>", "<eoi>", ("<audio>", "<boa>", "<eoa>")
    named = dict(zip(("audio_token", "boa_token", "eoa_token"), audio, strict=True))
    tokenizer, text = tagged(
        (start, end, "<|video|>", *audio), image_token=IMAGE, boi_token=start, eoi_token=end, **named
    )
    heads, patch = TINY.vision_heads, SIZE // 4
    vision = {
        "hidden_size": TINY.vision_width, "num_attention_heads": heads, "num_key_value_heads": heads,
        "num_hidden_layers": 2, "patch_size": patch, "intermediate_size": 32, "head_dim": 8, "global_head_dim": 8,
        "pooling_kernel_size": 2, "position_embedding_size": 80,
    }  # fmt: skip
    of_text = {
        **text, "head_dim": 8, "global_head_dim": 8, "use_bidirectional_attention": "vision", "sliding_window": 40,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "hidden_size_per_layer_input": 4,
        "vocab_size_per_layer_input": text["vocab_size"], "max_position_embeddings": 1024,
    }  # fmt: skip
    config = Gemma4Config(vision_config=vision, text_config=of_text, audio_config=None, image_token_id=IMAGE_TOKEN)
    images = Gemma4ImageProcessorPil(patch_size=patch, pooling_kernel_size=2, max_soft_tokens=70, **PIXELS)
    # Without a video processor, whose videos are not asked for.
    own: Any = type("Gemma4", (OwnVideos, Gemma4Processor), {})
    return config, own(Gemma4AudioFeatureExtractor(), images, tokenizer, VideoProcessor({}))


def molmo2() -> tuple[Any, Any]:
    """A view of the whole, and up to two squares that overlap; four patches a token, a line break behind each row."""
    from transformers.models.molmo2.configuration_molmo2 import Molmo2Config
    from transformers.models.molmo2.image_processing_molmo2 import Molmo2ImageProcessor
    from transformers.models.molmo2.processing_molmo2 import Molmo2Processor

    tags = (
        "<im_patch>", "<im_col>", "<im_start>", "<low_res_im_start>", "<frame_start>", "<im_end>", "<frame_end>",
        "<im_low>", "<|video|>",
    )  # fmt: skip
    tokenizer, text = tagged(tags, image_token=IMAGE)
    patch, heads = SIZE // 6, {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    vision = {
        **heads, "hidden_size": TINY.vision_width, "num_hidden_layers": 2, "intermediate_size": 32,
        "image_size": [6 * patch, 6 * patch], "patch_size": patch,
    }  # fmt: skip
    adapter = {
        **heads, "hidden_size": TINY.vision_width, "intermediate_size": 32, "text_hidden_size": TINY.width,
        "vision_feature_layer": [-1, 0],
    }  # fmt: skip
    config = Molmo2Config(
        vision_config=vision, adapter_config=adapter, text_config={**text, "additional_vocab_size": 0, "head_dim": 8},
        image_patch_id=tokenizer.convert_tokens_to_ids("<im_patch>"),
    )  # fmt: skip
    images = Molmo2ImageProcessor(
        size={"height": 6 * patch, "width": 6 * patch}, patch_size=patch, max_crops=2, overlap_margins=[1, 1]
    )
    # Without a video processor, whose videos are not asked for.
    own: Any = type("Molmo2", (OwnVideos, Molmo2Processor), {})
    return config, own(images, VideoProcessor({}), tokenizer)


def loads(make: Callable[[], tuple[Any, Any]]) -> bool:
    """Whether the processor of a model is one that this release of transformers has without torchvision."""
    try:
        make()
    except ImportError:
        return False
    return True


# Configs and processors by the model's type.
IMAGE_MODELS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llava_next": llava_next,
    "llava_next_video": llava_next_video,
    "llava_onevision": llava_onevision,
    "internvl": internvl,
    "aya_vision": aya_vision,
    "glm4v": glm4v,
    **({"gemma4": gemma4} if loads(gemma4) else {}),
    # Its processor loads without torchvision, and fails at the first image.
    **({"molmo2": molmo2} if is_torchvision_available() and loads(molmo2) else {}),
}
# What their chat templates write around an image.
AROUND = {"glm4v": ("<|begin_of_image|>", "<|end_of_image|>")}
# Those whose whole processor has one for videos, which needs torchvision.
WITH_VIDEOS: dict[str, Any] = {"llava_onevision": LlavaOnevision, "internvl": InternVL}
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
