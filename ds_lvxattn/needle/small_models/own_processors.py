"""Small models that come with the whole processor of their kind, which says what tokens an image has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
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
    PreTrainedModel,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from ds_lvxattn.errors import ConfigError
from ds_lvxattn.families import family_of_config
from ds_lvxattn.families.image_features import ImageFeatures, check_runs
from ds_lvxattn.families.processors import OwnVideos
from ds_lvxattn.families.videos import VideoProcessor
from ds_lvxattn.needle.small_models.qwen import qwen_vl_text
from ds_lvxattn.needle.small_models.scale import HEADS, IMAGE_ID, PIXELS, SIZE, SQUARE, Scale
from ds_lvxattn.needle.task import IMAGE, build_tokenizer

# Height and width, in pixels, that a picture is padded to.
PINPOINTS = [[SIZE * rows, SIZE * columns] for rows, columns in ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1))]


def tagged(scale: Scale, tags: Sequence[str], **named: str) -> tuple[Any, dict[str, Any]]:
    """The tokenizer of the needle task, which also knows ``tags``, and the sizes of a text model for it."""
    needle = build_tokenizer()
    special = {key: getattr(needle, key) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
    if named:
        special["extra_special_tokens"] = named
    tokenizer = type(needle)(tokenizer_object=needle._tokenizer, **special)
    tokenizer.add_special_tokens({"additional_special_tokens": list(tags)}, replace_extra_special_tokens=False)
    tokenizer.chat_template = needle.chat_template
    return tokenizer, {**scale.text, "vocab_size": len(tokenizer)}


def llava_next(scale: Scale) -> tuple[Any, Any]:
    """Four patches a tile, in tiles of every shape, without their padding."""
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**scale.vision, num_hidden_layers=2), text_config=LlamaConfig(**scale.text),
        image_token_index=IMAGE_ID, image_grid_pinpoints=PINPOINTS, vision_feature_layer=[-2, -1],
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


class InternVLOwnVideos(OwnVideos, InternVLProcessor):
    """With such videos."""


class LlavaOnevisionOwnVideos(OwnVideos, LlavaOnevisionProcessor):
    """With such videos."""


class LlavaNextVideoOwnVideos(OwnVideos, LlavaNextVideoProcessor):
    """With such videos."""


def videos_of(config: Any, images: Any) -> Videos:
    """What makes the videos of a model, by what its family knows of them."""
    family = family_of_config(config)
    assert isinstance(family, ImageFeatures)
    return Videos(family.video_settings(images))


def llava_next_video(scale: Scale) -> tuple[Any, Any]:
    """As LLaVA-NeXT, with one token for a frame of a video."""
    tokenizer, text = tagged(scale, ("<video>",))
    config = LlavaNextVideoConfig(
        vision_config=CLIPVisionConfig(**scale.vision, num_hidden_layers=2), text_config=LlamaConfig(**text),
        image_token_index=IMAGE_ID, image_grid_pinpoints=PINPOINTS, vision_feature_layer=[-2, -1],
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
    )  # fmt: skip
    images = LlavaNextImageProcessorPil(size=SQUARE, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS, **PIXELS)
    videos = videos_of(config, images)
    processor = LlavaNextVideoOwnVideos(
        videos, images, tokenizer, patch_size=SIZE // 2, vision_feature_select_strategy="default",
        image_token=IMAGE, num_additional_image_tokens=1,
    )  # fmt: skip
    return config, processor


def llava_onevision(scale: Scale) -> tuple[Any, Any]:
    """As LLaVA-NeXT; an image of many tiles is scaled down to nine."""
    tokenizer, text = tagged(scale, ("<video>",))
    pinpoints = [*PINPOINTS, [4 * SIZE, 4 * SIZE]]
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**scale.vision, num_hidden_layers=2, vision_use_head=False),
        text_config=Qwen2Config(**text), image_token_index=IMAGE_ID, vision_feature_layer=-1,
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"), image_grid_pinpoints=pinpoints,
        vision_feature_select_strategy="full",
    )  # fmt: skip
    images = LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=pinpoints, **PIXELS)
    videos = videos_of(config, images)
    processor = LlavaOnevisionOwnVideos(
        images, tokenizer, videos, num_image_tokens=4, vision_feature_select_strategy="full", image_token=IMAGE
    )
    return config, processor


def internvl(scale: Scale) -> tuple[Any, Any]:
    """Four patches become a token, four of them a tile; up to three tiles and a thumbnail, between tags."""
    start, end = "<img>", "</img>"
    tokenizer, text = tagged(
        scale, (start, end, "<video>"), start_image_token=start, end_image_token=end, context_image_token=IMAGE,
        video_token="<video>",
    )  # fmt: skip
    vision = {**scale.vision, "patch_size": SIZE // 4, "num_hidden_layers": 2}
    config = InternVLConfig(
        vision_config=vision, text_config=Qwen2Config(**text), image_token_id=IMAGE_ID, image_seq_length=4
    )
    images = GotOcr2ImageProcessorPil(size=SQUARE, max_patches=3, **PIXELS)
    videos = videos_of(config, images)
    return config, InternVLOwnVideos(images, tokenizer, videos, image_seq_length=4)


def aya_vision(scale: Scale) -> tuple[Any, Any]:
    """Up to three tiles and a thumbnail, each with its name ahead of it in the text."""
    tags = ("<start>", "<end>", "TILE_1", "TILE_2", "TILE_3", "TILE_GLOBAL")
    tokenizer, text = tagged(scale, tags)
    vision = SiglipVisionConfig(**{**scale.vision, "patch_size": SIZE // 4}, num_hidden_layers=2, vision_use_head=False)
    config = AyaVisionConfig(vision_config=vision, text_config=LlamaConfig(**text), image_token_index=IMAGE_ID)
    images = GotOcr2ImageProcessorPil(size=SQUARE, max_patches=3, crop_to_patches=True, **PIXELS)
    processor = AyaVisionProcessor(
        images, tokenizer, patch_size=SIZE // 4, img_size=SIZE, image_token=IMAGE, downsample_factor=2,
        start_of_img_token="<start>", end_of_img_token="<end>", img_patch_token=IMAGE,
    )  # fmt: skip
    return config, processor


class Glm4v(OwnVideos, Glm4vProcessor):
    """Without a video processor, whose videos are not asked for."""


def glm4v(scale: Scale) -> tuple[Any, Any]:
    """Images of their own proportions, whose places and sizes rotary positions follow from."""
    tags = ("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>")
    tokenizer, text = tagged(scale, tags, image_token=IMAGE)
    start, end = tokenizer.convert_tokens_to_ids(list(tags[:2]))
    heads, patch = scale.vision_heads, SIZE // 4
    vision = {
        "hidden_size": scale.vision_width, "num_heads": heads, "depth": 2, "patch_size": patch, "image_size": SIZE,
        "intermediate_size": 2 * scale.vision_width, "out_hidden_size": scale.width,
    }  # fmt: skip
    config = Glm4vConfig(
        vision_config=vision, text_config={**qwen_vl_text(scale), **text}, image_token_id=IMAGE_ID,
        image_start_token_id=start, image_end_token_id=end,
    )  # fmt: skip
    size = {"shortest_edge": 2 * SIZE**2, "longest_edge": 8 * SIZE**2}
    settings: dict[str, Any] = {"patch_size": patch, "size": size, **PIXELS}
    images = Glm4vImageProcessorPil(**settings)
    return config, Glm4v(images, tokenizer, VideoProcessor({}))


def gemma4(scale: Scale) -> tuple[Any, Any]:
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
        scale, (start, end, "<|video|>", *audio), image_token=IMAGE, boi_token=start, eoi_token=end, **named
    )
    heads, patch, size = scale.vision_heads, SIZE // 4, scale.width // HEADS
    kinds = ["full_attention" if layer % 3 == 2 else "sliding_attention" for layer in range(scale.layers - 1)]
    kinds.append("full_attention")  # as the model has it, whatever is asked for
    vision = {
        "hidden_size": scale.vision_width, "num_attention_heads": heads, "num_key_value_heads": heads,
        "num_hidden_layers": 2, "patch_size": patch, "intermediate_size": 2 * scale.vision_width,
        "head_dim": scale.vision_width // heads, "global_head_dim": scale.vision_width // heads,
        "pooling_kernel_size": 2, "position_embedding_size": 80,
    }  # fmt: skip
    of_text = {
        **text, "head_dim": size, "global_head_dim": size, "use_bidirectional_attention": "vision",
        "sliding_window": 40, "layer_types": kinds, "hidden_size_per_layer_input": scale.width // 2,
        "vocab_size_per_layer_input": text["vocab_size"], "max_position_embeddings": max(scale.positions, 1024),
    }  # fmt: skip
    config = Gemma4Config(vision_config=vision, text_config=of_text, audio_config=None, image_token_id=IMAGE_ID)
    images = Gemma4ImageProcessorPil(patch_size=patch, pooling_kernel_size=2, max_soft_tokens=70, **PIXELS)
    # Without a video processor, whose videos are not asked for.
    own: Any = type("Gemma4", (OwnVideos, Gemma4Processor), {})
    return config, own(Gemma4AudioFeatureExtractor(), images, tokenizer, VideoProcessor({}))


def molmo2(scale: Scale) -> tuple[Any, Any]:
    """A view of the whole, and up to two squares that overlap; four patches a token, a line break behind each row."""
    from transformers.models.molmo2.configuration_molmo2 import Molmo2Config
    from transformers.models.molmo2.image_processing_molmo2 import Molmo2ImageProcessor
    from transformers.models.molmo2.processing_molmo2 import Molmo2Processor

    tags = (
        "<im_patch>", "<im_col>", "<im_start>", "<low_res_im_start>", "<frame_start>", "<im_end>", "<frame_end>",
        "<im_low>", "<|video|>",
    )  # fmt: skip
    tokenizer, text = tagged(scale, tags, image_token=IMAGE)
    patch, heads = SIZE // 6, {"num_attention_heads": scale.vision_heads, "num_key_value_heads": scale.vision_heads,
                               "head_dim": scale.vision_width // scale.vision_heads}  # fmt: skip
    vision = {
        **heads, "hidden_size": scale.vision_width, "num_hidden_layers": 2, "intermediate_size": 2 * scale.vision_width,
        "image_size": [6 * patch, 6 * patch], "patch_size": patch,
    }  # fmt: skip
    adapter = {
        **heads, "hidden_size": scale.vision_width, "intermediate_size": 2 * scale.vision_width,
        "text_hidden_size": scale.width, "vision_feature_layer": [-1, 0],
    }  # fmt: skip
    config = Molmo2Config(
        vision_config=vision, adapter_config=adapter,
        text_config={**text, "additional_vocab_size": 0, "head_dim": scale.width // HEADS},
        image_patch_id=tokenizer.convert_tokens_to_ids("<im_patch>"),
    )  # fmt: skip
    images = Molmo2ImageProcessor(
        size={"height": 6 * patch, "width": 6 * patch}, patch_size=patch, max_crops=2, overlap_margins=[1, 1]
    )
    # Without a video processor, whose videos are not asked for.
    own: Any = type("Molmo2", (OwnVideos, Molmo2Processor), {})
    return config, own(images, VideoProcessor({}), tokenizer)


# By the type of the model.
OWN_PROCESSORS: dict[str, Callable[[Scale], tuple[Any, Any]]] = {
    "llava_next": llava_next,
    "llava_next_video": llava_next_video,
    "llava_onevision": llava_onevision,
    "internvl": internvl,
    "aya_vision": aya_vision,
    "glm4v": glm4v,
    "gemma4": gemma4,
    "molmo2": molmo2,
}


def with_own_processor(kind: str, scale: Scale) -> tuple[Any, Any]:
    """The config and the processor of ``OWN_PROCESSORS`` called ``kind``.

    Raises:
        ConfigError: they need what is not installed.
    """
    try:
        config, processor = OWN_PROCESSORS[kind](scale)
    except ImportError as error:
        raise ConfigError(f"the processor of a small {kind} does not load here: {error}") from error
    check_runs(processor.image_processor)
    return config, processor


def model_with_processor(kind: str, scale: Scale) -> PreTrainedModel:
    """Such a model.

    Where scores are as large as the norm of queries leaves them (Gemma 4), that makes them as large as a scale would:
    beside those of a weight of 1, a softmax would see one key alone, and rounding decides which.
    """
    model = AutoModelForImageTextToText.from_config(with_own_processor(kind, scale)[0])
    for module in model.modules():
        norm: Any = getattr(module, "q_norm", None)
        if norm is not None and getattr(module, "scaling", None) == 1.0:
            with torch.no_grad():
                norm.weight.fill_(norm.weight.numel() ** -0.5)
    return model


def processor_alone(kind: str) -> Any:
    """The processor of such a model, which the sizes of the model do not change."""
    return with_own_processor(kind, Scale())[1]
