"""Small random models of the families, for the vocabulary and the image size of the needle task.

``--model NAME`` trains them as they stand here; tests take them narrower, by a ``Scale`` of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AriaConfig,
    AriaForConditionalGeneration,
    Blip2Config,
    Blip2ForConditionalGeneration,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    IdeficsConfig,
    IdeficsForVisionText2Text,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipVideoConfig,
    InstructBlipVideoForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MllamaConfig,
    MllamaForConditionalGeneration,
    OPTConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.aria.image_processing_pil_aria import AriaImageProcessorPil
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from ds_lvxattn.families.flamingo.model import OpenFlamingoConfig, OpenFlamingoModel
from ds_lvxattn.families.idefics import with_loss_over_all_tokens
from ds_lvxattn.families.instructblip import InstructedImages, with_features_of_frames_alone
from ds_lvxattn.families.owl.hyper_qwen2 import MPlugOwl3Config, mPLUGOwl3Model
from ds_lvxattn.families.processors import ImagesAndVideos
from ds_lvxattn.families.videos import VideoProcessor
from ds_lvxattn.needle.task import BOS, EOS, IMAGE, PAD, VOCABULARY, NeedleTask, build_tokenizer

SIZE = NeedleTask().image_size
SQUARE = {"height": SIZE, "width": SIZE}
IMAGE_ID = VOCABULARY.index(IMAGE)
PIXELS: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
TOKENS: dict[str, Any] = {
    "bos_token_id": VOCABULARY.index(BOS),
    "eos_token_id": VOCABULARY.index(EOS),
    "pad_token_id": VOCABULARY.index(PAD),
}
HEADS, KV_HEADS = 4, 2  # of the language models


@dataclass(frozen=True)
class Scale:
    """What the sizes of a small model follow from.

    Attributes:
        width, layers: of the language model, whose feed-forward layers are twice as wide.
        vision_width, vision_heads: of the vision encoder, likewise.
        spread: standard deviation of random weights. Near ``width ** -0.5`` it keeps activations at unit scale; the
            usual 0.02 suits widths of thousands.
        positions: longest text.
    """

    width: int = 96
    layers: int = 4
    vision_width: int = 96
    vision_heads: int = 4
    spread: float = 0.1
    positions: int = 4096

    @property
    def text(self) -> dict[str, Any]:
        """Sizes of a language model, under the names that most configs have for them."""
        return {
            "vocab_size": len(VOCABULARY), "hidden_size": self.width, "intermediate_size": 2 * self.width,
            "num_hidden_layers": self.layers, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
            "max_position_embeddings": self.positions, "initializer_range": self.spread, **TOKENS,
        }  # fmt: skip

    @property
    def vision(self) -> dict[str, Any]:
        """Sizes of a vision encoder, which makes four patches of a frame."""
        return {
            "hidden_size": self.vision_width, "intermediate_size": 2 * self.vision_width,
            "num_attention_heads": self.vision_heads, "image_size": SIZE, "patch_size": SIZE // 2,
        }  # fmt: skip


def mllama_config(scale: Scale, tiles: int = 1) -> MllamaConfig:
    """Llama 3.2 Vision; with a ``Scale()`` 0.64 M parameters, which learn the needle task on two CPU cores.

    - Tiles of 28 pixels in patches of 14: five vision tokens, which the encoder pads to eight. Patches of 7 make 24 of
      the same frame, and learn more slowly per second.
    - One local and one global vision layer read a digit; a second local layer cost time and gained nothing.
    - Four query heads over two key heads, so that groups of two and of four ranks can share the heads.
    """
    vision = {
        "hidden_size": scale.vision_width, "intermediate_size": 4 * scale.vision_width,
        "attention_heads": scale.vision_heads, "num_hidden_layers": 1, "num_global_layers": 1,
        "intermediate_layers_indices": [0],
        "vision_output_dim": 2 * scale.vision_width,  # the global layer's output beside that of intermediate layer 0
        "image_size": SIZE, "patch_size": SIZE // 2, "max_num_tiles": tiles,
        "supported_aspect_ratios": [[a, b] for a in range(1, tiles + 1) for b in range(1, tiles // a + 1)],
        "initializer_range": scale.spread,
    }  # fmt: skip
    text = {
        **scale.text,
        "vocab_size": IMAGE_ID,  # as in Llama 3.2 Vision, no logit for the image token
        "cross_attention_layers": [1, 3], "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }  # fmt: skip
    return MllamaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_ID)


def mllama(scale: Scale) -> PreTrainedModel:
    """Llama 3.2 Vision with open gates."""
    model = MllamaForConditionalGeneration(mllama_config(scale))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # They start at or near zero, to graft new layers onto trained ones. Nothing is trained here, and a closed
            # gate would also stop the gradient of what lies behind it.
            if name.endswith(("cross_attn_attn_gate", "cross_attn_mlp_gate", "gate_attn", "gate_ffn")):
                parameter.fill_(1.0)
            # Patch embeddings of a few hundred pixels come out at a scale above 1; positions must stand out.
            elif name.endswith("gated_positional_embedding.embedding"):
                parameter.normal_(std=0.5)
    return model


def idefics(scale: Scale, latents: int = 4, norms: bool = True, additional: int = 1) -> PreTrainedModel:
    """Idefics with open gates; the image token is an additional one, as in published models.

    Args:
        latents: of the perceiver, which works on each frame; 0 leaves it out.
        norms: of queries and keys.
        additional: tokens beyond the vocabulary.
    """
    config = IdeficsConfig(
        **{**scale.text, "vocab_size": IMAGE_ID}, additional_vocab_size=additional, cross_layer_interval=2,
        qk_layer_norms=norms, alpha_initializer="ones", alpha_type="vector", use_resampler=latents > 0,
        freeze_text_layers=False, freeze_vision_layers=False,
        vision_config={
            **scale.vision, "embed_dim": scale.vision_width, "num_hidden_layers": 2, "initializer_range": scale.spread,
        },
        perceiver_config={
            "use_resampler": latents > 0, "resampler_n_latents": latents, "resampler_depth": 1,
            "resampler_n_heads": scale.vision_heads, "resampler_head_dim": scale.vision_width // scale.vision_heads,
            "qk_layer_norms_perceiver": norms,
        },
    )  # fmt: skip
    return with_loss_over_all_tokens(IdeficsForVisionText2Text(config))


def open_flamingo(scale: Scale, immediate: bool = False) -> PreTrainedModel:
    """OpenFlamingo around a Llama and a CLIP model, with open gates.

    The package trains no vision encoder, so that of this model stays at its random weights. Heads are always 8 of 64.

    Args:
        immediate: whether text sees the last image alone, or all images before it.
    """
    vision = CLIPVisionConfig(**{**scale.vision, "patch_size": SIZE // 4}, num_hidden_layers=1)
    config = OpenFlamingoConfig(
        vision, LlamaConfig(**scale.text), cross_attn_every_n_layers=2, media_token_id=IMAGE_ID,
        eoc_token_id=VOCABULARY.index(EOS), only_attend_immediate_media=immediate,
    )  # fmt: skip
    model = OpenFlamingoModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("attn_gate", "ff_gate")):  # they start closed
                parameter.fill_(1.0)
    return model


def mplug_owl3(
    scale: Scale, kind: str = "fused", hyper_layers: tuple[int, ...] = (1, 3), head: bool = False
) -> PreTrainedModel:
    """mPLUG-Owl3 with ``kind`` of hyper attention in some of its layers, the first among them.

    Args:
        head: whether the vision encoder has the pooling head that the model does not use.
    """
    vision = {**scale.vision, "num_hidden_layers": 3, "vision_use_head": head}
    config = MPlugOwl3Config(
        **scale.text, vision_config=vision, hyper_layers=list(hyper_layers), hyper_attention=kind,
        projector="mlp" if kind == "fused" else "linear",
    )  # fmt: skip
    return mPLUGOwl3Model(config)


def llava(scale: Scale, feature_layer: int | list[int] = -1) -> PreTrainedModel:
    """LLaVA around a CLIP and a Llama model: four visual tokens a frame, without the class token, in the text."""
    vision = CLIPVisionConfig(**scale.vision, num_hidden_layers=2)
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**scale.text), image_token_index=IMAGE_ID,
        vision_feature_layer=feature_layer,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config)


def qwen_vl_text(scale: Scale) -> dict[str, Any]:
    """The language model of a model of Qwen, whose rotary embedding has three parts."""
    third = scale.width // HEADS // 6
    section = [scale.width // HEADS // 2 - 2 * third, third, third]
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": section}
    return {**scale.text, "rope_parameters": rope}


def qwen2_vl(scale: Scale) -> PreTrainedModel:
    """Qwen2-VL with four visual tokens a frame."""
    config = Qwen2VLConfig(
        image_token_id=IMAGE_ID,
        vision_config={
            "depth": 2, "embed_dim": scale.vision_width, "mlp_ratio": 2, "num_heads": scale.vision_heads,
            "patch_size": SIZE // 4, "hidden_size": scale.width, "image_size": SIZE,
            "initializer_range": scale.spread,
        },
        text_config=qwen_vl_text(scale),
    )  # fmt: skip
    return Qwen2VLForConditionalGeneration(config)


def qwen2_5_vl(scale: Scale) -> PreTrainedModel:
    """Qwen2.5-VL with four visual tokens a frame; the last of its vision layers attends beyond a window."""
    config = Qwen2_5_VLConfig(
        image_token_id=IMAGE_ID,
        vision_config={
            "depth": 2, "hidden_size": scale.vision_width, "intermediate_size": 2 * scale.vision_width,
            "num_heads": scale.vision_heads, "patch_size": SIZE // 4, "window_size": SIZE // 2,
            "out_hidden_size": scale.width, "fullatt_block_indexes": [1], "image_size": SIZE,
            "initializer_range": scale.spread,
        },
        text_config=qwen_vl_text(scale),
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl(scale: Scale) -> PreTrainedModel:
    """Qwen3-VL with four visual tokens a frame, and features of two vision layers added behind two text layers."""
    text = {**qwen_vl_text(scale), "head_dim": scale.width // HEADS}
    config = Qwen3VLConfig(image_token_id=IMAGE_ID, vision_config=qwen3_vl_vision(scale), text_config=text)
    return Qwen3VLForConditionalGeneration(config)


def qwen3_vl_moe(scale: Scale, **options: Any) -> PreTrainedModel:
    """Qwen3-VL with four experts, two for each token."""
    text = {
        **qwen_vl_text(scale), "head_dim": scale.width // HEADS, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": scale.width,
    }  # fmt: skip
    config = Qwen3VLMoeConfig(image_token_id=IMAGE_ID, vision_config=qwen3_vl_vision(scale), text_config=text)
    return Qwen3VLMoeForConditionalGeneration._from_config(config, **options)


def qwen3_vl_vision(scale: Scale) -> dict[str, Any]:
    return {
        "depth": 3, "hidden_size": scale.vision_width, "intermediate_size": 2 * scale.vision_width,
        "num_heads": scale.vision_heads, "patch_size": SIZE // 4, "out_hidden_size": scale.width,
        "num_position_embeddings": 36, "deepstack_visual_indexes": [0, 1], "image_size": SIZE,
        "initializer_range": scale.spread,
    }  # fmt: skip


def qwen_vl_processor(kind: str, pixels: int) -> Any:
    """Images and videos for a model of Qwen.

    Args:
        kind: transformers' class of the video processor.
        pixels: of a frame, or of a video, at most.
    """
    images = Qwen2VLImageProcessorPil(patch_size=SIZE // 4, **PIXELS)
    settings = {
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, **PIXELS, "resample": 3,
        "patch_size": SIZE // 4, "merge_size": 2, "temporal_patch_size": 2, "video_processor_type": kind,
        "size": {"shortest_edge": SQUARE["height"] ** 2, "longest_edge": pixels},
    }  # fmt: skip
    return ImagesAndVideos(images, VideoProcessor(settings))


def blip2(scale: Scale, queries: int = 4) -> PreTrainedModel:
    """BLIP-2 around an OPT model: a Q-Former makes ``queries`` visual tokens of a frame, which stand in the text."""
    config = Blip2Config(**_q_former_around_opt(scale, queries), image_token_index=IMAGE_ID)
    return _with_random_queries(Blip2ForConditionalGeneration(config))


def instructblip(scale: Scale, queries: int = 4, video: bool = False) -> PreTrainedModel:
    """InstructBLIP, likewise; its Q-Former reads the instruction too."""
    parts = _q_former_around_opt(scale, queries)
    parts["qformer_config"]["vocab_size"] = len(VOCABULARY)
    if video:
        of_video = InstructBlipVideoConfig(**parts, video_token_index=IMAGE_ID)
        return _with_random_queries(with_features_of_frames_alone(InstructBlipVideoForConditionalGeneration(of_video)))
    config = InstructBlipConfig(**parts, image_token_index=IMAGE_ID)
    return _with_random_queries(InstructBlipForConditionalGeneration(config))


def _q_former_around_opt(scale: Scale, queries: int) -> dict[str, Any]:
    q_former = {
        "hidden_size": scale.vision_width, "intermediate_size": 2 * scale.vision_width, "num_hidden_layers": 3,
        "num_attention_heads": scale.vision_heads, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        "initializer_range": scale.spread,
    }  # fmt: skip
    text = OPTConfig(
        vocab_size=len(VOCABULARY), hidden_size=scale.width, word_embed_proj_dim=scale.width, ffn_dim=2 * scale.width,
        num_hidden_layers=scale.layers, num_attention_heads=HEADS, max_position_embeddings=scale.positions,
        dropout=0.0, init_std=scale.spread, **TOKENS,
    )  # fmt: skip
    return {
        "vision_config": {**scale.vision, "num_hidden_layers": 2, "initializer_range": scale.spread},
        "qformer_config": q_former, "text_config": text, "num_query_tokens": queries,
        "initializer_range": scale.spread,
    }  # fmt: skip


def _with_random_queries(model: Any) -> PreTrainedModel:
    """They start at 0, and equal queries stay equal."""
    with torch.no_grad():
        model.query_tokens.normal_()
    return model


def instructed_images() -> InstructedImages:
    """The image processor of ``instructblip``, whose Q-Former has the tokenizer of the language model."""
    return InstructedImages(BlipImageProcessorPil(size=SQUARE, **PIXELS), build_tokenizer(), build_tokenizer())


def idefics2(scale: Scale, latents: int = 4) -> PreTrainedModel:
    """Idefics2 around a Mistral model: a perceiver makes ``latents`` of a frame, which stand in the text."""
    perceiver = {
        "hidden_size": scale.width, "resampler_n_latents": latents, "resampler_depth": 1,
        "resampler_n_heads": scale.vision_heads, "resampler_head_dim": scale.vision_width // scale.vision_heads,
        "num_key_value_heads": scale.vision_heads // 2, "initializer_range": scale.spread,
    }  # fmt: skip
    config = Idefics2Config(
        vision_config={**scale.vision, "num_hidden_layers": 2, "initializer_range": scale.spread},
        perceiver_config=perceiver, text_config=MistralConfig(**scale.text, sliding_window=None),
        image_token_id=IMAGE_ID,
    )  # fmt: skip
    model = Idefics2ForConditionalGeneration(config)
    with torch.no_grad():
        model.model.connector.perceiver_resampler.latents.normal_()  # they start at 1, and equal latents stay equal
    return model


def idefics3(scale: Scale, smol: bool = False) -> PreTrainedModel:
    """Idefics3, or SmolVLM, around a Llama model: four visual tokens a square, which stand in the text."""
    vision = {
        **scale.vision, "patch_size": SIZE // 4, "num_hidden_layers": 2, "initializer_range": scale.spread,
    }  # fmt: skip
    sizes: dict[str, Any] = {
        "vision_config": vision, "text_config": LlamaConfig(**scale.text), "image_token_id": IMAGE_ID,
        "scale_factor": 2, "initializer_range": scale.spread,
    }  # fmt: skip
    if smol:
        return SmolVLMForConditionalGeneration(SmolVLMConfig(**sizes))
    return Idefics3ForConditionalGeneration(Idefics3Config(**sizes))


def aria(scale: Scale, queries: int = 4, **options: Any) -> PreTrainedModel:
    """Aria with four experts: its projector makes ``queries`` visual tokens of a frame, which stand in the text.

    Its image processor makes images of 490 pixels at least, so patches are large and the vision encoder is narrow.
    """
    side = 490
    vision = {
        **scale.vision, "model_type": "idefics3_vision", "hidden_size": scale.vision_width // 4,
        "num_hidden_layers": 2, "image_size": side, "patch_size": side // 2, "initializer_range": scale.spread,
    }  # fmt: skip
    text = {
        **scale.text, "model_type": "aria_text", "intermediate_size": scale.width, "moe_num_experts": 4, "moe_topk": 2,
        "moe_num_shared_experts": 1,
    }  # fmt: skip
    config = AriaConfig(
        vision_config=vision, text_config=text, projector_patch_to_query_dict={4: queries},
        image_token_index=IMAGE_ID, initializer_range=scale.spread,
    )  # fmt: skip
    return AriaForConditionalGeneration._from_config(config, **options)


def gemma3(scale: Scale, window: int = 64, head: bool = False) -> PreTrainedModel:
    """Gemma 3 with four visual tokens a frame, which see each other; every third layer sees beyond a window.

    Args:
        head: whether the vision encoder has the pooling head that the model does not use.
    """
    size = scale.width // HEADS
    kinds = ["full_attention" if layer % 3 == 2 else "sliding_attention" for layer in range(scale.layers)]
    config = Gemma3Config(
        vision_config={**scale.vision, "model_type": "siglip_vision_model", "num_hidden_layers": 2,
                       "vision_use_head": head},
        text_config={**scale.text, "head_dim": size, "query_pre_attn_scalar": size, "sliding_window": window,
                     "layer_types": kinds},
        mm_tokens_per_image=4, image_token_index=IMAGE_ID, initializer_range=scale.spread,
        boi_token_index=TOKENS["bos_token_id"], eoi_token_index=TOKENS["eos_token_id"],
    )  # fmt: skip
    return Gemma3ForConditionalGeneration(config)


def paligemma(scale: Scale, **text: Any) -> PreTrainedModel:
    """PaliGemma around Gemma with four visual tokens a frame; what is ahead of the first answer sees each other."""
    config = PaliGemmaConfig(
        vision_config={**scale.vision, "model_type": "siglip_vision_model", "num_hidden_layers": 2,
                       "projection_dim": scale.width, "vision_use_head": False},
        text_config={**scale.text, "model_type": "gemma", "head_dim": scale.width // HEADS, **text},
        projection_dim=scale.width, hidden_size=scale.width, image_token_index=IMAGE_ID,
    )  # fmt: skip
    return PaliGemmaForConditionalGeneration(config)


# The model by its name, and its image processor.
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
    "small-qwen2-vl": (qwen2_vl, lambda: qwen_vl_processor("Qwen2VLVideoProcessor", 16 * SIZE**2)),
    "small-qwen2.5-vl": (qwen2_5_vl, lambda: qwen_vl_processor("Qwen2VLVideoProcessor", 16 * SIZE**2)),
    "small-qwen3-vl": (qwen3_vl, lambda: qwen_vl_processor("Qwen3VLVideoProcessor", 64 * SIZE**2)),
    "small-qwen3-vl-moe": (qwen3_vl_moe, lambda: qwen_vl_processor("Qwen3VLVideoProcessor", 64 * SIZE**2)),
    "small-gemma3": (gemma3, lambda: Gemma3ImageProcessorPil(size=SQUARE, **PIXELS)),
    "small-paligemma": (paligemma, lambda: SiglipImageProcessorPil(size=SQUARE, **PIXELS)),
}


def small_model(name: str, seed: int) -> tuple[PreTrainedModel, Any]:
    """The model called ``name`` in ``SMALL_MODELS`` and its image processor.

    In float32 on the CPU; equal seeds give equal weights on every rank, and the caller's random state stays as it is.
    """
    build, processor = SMALL_MODELS[name]
    return random(lambda: build(Scale()), seed), processor()


def random(build: Callable[[], Any], seed: int) -> Any:
    """What ``build`` makes with the random numbers of ``seed``; the caller's random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()
