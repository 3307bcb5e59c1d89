"""Small random models of the families, for the vocabulary and the image size of the needle task.

``--model NAME`` trains them as they stand here; tests take them narrower, by a ``Scale`` of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel
from transformers.models.aria.image_processing_pil_aria import AriaImageProcessorPil
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from ds_lvxattn.needle.small_models.cross_attention import idefics, mllama, mllama_config, mplug_owl3, open_flamingo
from ds_lvxattn.needle.small_models.in_text import (
    aria,
    blip2,
    gemma3,
    idefics2,
    idefics3,
    instructblip,
    instructed_images,
    llava,
    paligemma,
)
from ds_lvxattn.needle.small_models.own_processors import OWN_PROCESSORS, model_with_processor, processor_alone
from ds_lvxattn.needle.small_models.qwen import (
    cohere_compass,
    cosmos3_omni,
    qwen1_vl,
    qwen2_5_omni,
    qwen2_5_vl,
    qwen2_vl,
    qwen3_5,
    qwen3_5_moe,
    qwen3_omni,
    qwen3_vl,
    qwen3_vl_moe,
    qwen3_vl_vision,
    qwen_vl_processor,
    qwen_vl_text,
)
from ds_lvxattn.needle.small_models.scale import HEADS, IMAGE_ID, PIXELS, SIZE, SQUARE, Scale, random

__all__ = [
    "HEADS",
    "IMAGE_ID",
    "PIXELS",
    "SIZE",
    "SMALL_MODELS",
    "SQUARE",
    "Scale",
    "aria",
    "blip2",
    "cohere_compass",
    "cosmos3_omni",
    "gemma3",
    "idefics",
    "idefics2",
    "idefics3",
    "instructblip",
    "instructed_images",
    "llava",
    "mllama",
    "mllama_config",
    "mplug_owl3",
    "open_flamingo",
    "paligemma",
    "qwen1_vl",
    "qwen2_5_omni",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_omni",
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen3_vl_vision",
    "qwen_vl_processor",
    "qwen_vl_text",
    "random",
    "small_model",
]


SMALL_MODELS: dict[str, tuple[Callable[[Scale], PreTrainedModel], Callable[[], Any]]] = {
    "quickstart": (
        mllama,
        lambda: MllamaImageProcessorPil(size=SQUARE, max_image_tiles=1, **PIXELS),
    ),
    "small-idefics": (idefics, lambda: IdeficsImageProcessorPil(image_size=SIZE, **PIXELS)),
    "small-openflamingo": (open_flamingo, lambda: CLIPImageProcessorPil(size=SQUARE, crop_size=SQUARE, **PIXELS)),
    "small-mplug-owl3": (mplug_owl3, lambda: SiglipImageProcessorPil(size=SQUARE, **PIXELS)),
    "small-llava": (llava, lambda: CLIPImageProcessorPil(size=SQUARE, crop_size=SQUARE, **PIXELS)),
    "small-blip2": (blip2, lambda: BlipImageProcessorPil(size=SQUARE, **PIXELS)),
    "small-instructblip": (instructblip, instructed_images),
    "small-instructblip-video": (functools.partial(instructblip, video=True), instructed_images),
    "small-idefics2": (
        idefics2,
        lambda: Idefics2ImageProcessorPil(
            size={"shortest_edge": SIZE, "longest_edge": SIZE}, do_image_splitting=False, **PIXELS
        ),
    ),
    "small-idefics3": (
        idefics3,
        lambda: Idefics3ImageProcessorPil(
            size={"longest_edge": 4 * SIZE}, max_image_size={"longest_edge": SIZE}, **PIXELS
        ),
    ),
    "small-smolvlm": (
        functools.partial(idefics3, smol=True),
        lambda: SmolVLMImageProcessorPil(
            size={"longest_edge": 4 * SIZE}, max_image_size={"longest_edge": SIZE}, **PIXELS
        ),
    ),
    "small-aria": (aria, lambda: AriaImageProcessorPil(max_image_size=490, **PIXELS)),
    "small-qwen-vl": (
        qwen1_vl,
        lambda: CLIPImageProcessorPil(size=SQUARE, crop_size=SQUARE, do_center_crop=False, **PIXELS),
    ),
    "small-qwen2-vl": (qwen2_vl, lambda: qwen_vl_processor("Qwen2VLVideoProcessor", 16 * SIZE**2)),
    "small-qwen2.5-vl": (qwen2_5_vl, lambda: qwen_vl_processor("Qwen2VLVideoProcessor", 16 * SIZE**2)),
    "small-qwen3-vl": (qwen3_vl, lambda: qwen_vl_processor("Qwen3VLVideoProcessor", 64 * SIZE**2)),
    "small-qwen3-vl-moe": (qwen3_vl_moe, lambda: qwen_vl_processor("Qwen3VLVideoProcessor", 64 * SIZE**2)),
    "small-cosmos3": (cosmos3_omni, lambda: qwen_vl_processor("Qwen3VLVideoProcessor", 64 * SIZE**2)),
    "small-cohere-compass": (
        cohere_compass,
        lambda: qwen_vl_processor("CohereCompassVideoProcessor", 64 * SIZE**2),
    ),
    "small-qwen2.5-omni": (qwen2_5_omni, lambda: qwen_vl_processor("Qwen2VLVideoProcessor", 16 * SIZE**2)),
    "small-qwen3-omni": (qwen3_omni, lambda: qwen_vl_processor("Qwen2VLVideoProcessor", 16 * SIZE**2)),
    "small-qwen3.5": (qwen3_5, lambda: qwen_vl_processor("Qwen3VLVideoProcessor", 64 * SIZE**2)),
    "small-qwen3.5-moe": (qwen3_5_moe, lambda: qwen_vl_processor("Qwen3VLVideoProcessor", 64 * SIZE**2)),
    "small-gemma3": (gemma3, lambda: Gemma3ImageProcessorPil(size=SQUARE, **PIXELS)),
    "small-paligemma": (paligemma, lambda: SiglipImageProcessorPil(size=SQUARE, **PIXELS)),
    **{
        f"small-{kind.replace('_', '-')}": (
            functools.partial(model_with_processor, kind),
            functools.partial(processor_alone, kind),
        )
        for kind in OWN_PROCESSORS
    },
}


def small_model(name: str, seed: int) -> tuple[PreTrainedModel, Any]:
    """The model called ``name`` in ``SMALL_MODELS`` and its image processor, or its whole one.

    In float32 on the CPU; equal seeds give equal weights on every rank, and the caller's random state stays as it is.
    """
    build, processor = SMALL_MODELS[name]
    return random(lambda: build(Scale()), seed), processor()
