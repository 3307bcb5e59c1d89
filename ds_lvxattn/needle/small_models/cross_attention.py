"""Small models that read frames through cross-attention."""

from __future__ import annotations

import torch
from transformers import (
    CLIPVisionConfig,
    IdeficsConfig,
    IdeficsForVisionText2Text,
    LlamaConfig,
    MllamaConfig,
    MllamaForConditionalGeneration,
    PreTrainedModel,
)

from ds_lvxattn.families.flamingo.model import OpenFlamingoConfig, OpenFlamingoModel
from ds_lvxattn.families.idefics import with_loss_over_all_tokens
from ds_lvxattn.families.owl.hyper_qwen2 import MPlugOwl3Config, mPLUGOwl3Model
from ds_lvxattn.needle.small_models.scale import IMAGE_ID, SIZE, Scale
from ds_lvxattn.needle.task import EOS, VOCABULARY


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
