"""The small models of the families, narrower and with every parameter random, for the samples of ``tiny_model``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import Qwen2_5OmniThinkerForConditionalGeneration, Qwen2Config, Qwen2ForCausalLM

from ds_lvxattn.families import family_of
from ds_lvxattn.needle import small_models
from ds_lvxattn.needle.small_models import SMALL_MODELS, random
from ds_lvxattn.needle.task import build_tokenizer
from tests.support.tiny_model import FOUR_LAYERS, TINY


def text_only() -> nn.Module:
    """The second and third layer see the last five tokens."""
    config = Qwen2Config(**TINY.text, use_sliding_window=True, sliding_window=5, max_window_layers=1)
    return Qwen2ForCausalLM(config)


def mplug_owl3(kind: str) -> Callable[[], Any]:
    return functools.partial(small_models.mplug_owl3, FOUR_LAYERS, kind, hyper_layers=(1, 2, 4), head=True)


GEMMA2 = {
    "model_type": "gemma2", "query_pre_attn_scalar": 6, "sliding_window": 5, "attn_logit_softcapping": 1.5,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}  # fmt: skip
# Odd numbers of visual tokens, so that frames do not divide as ranks do.
FAMILIES: dict[str, Callable[[], Any]] = {
    "idefics": functools.partial(small_models.idefics, FOUR_LAYERS, latents=0, norms=False),
    "idefics, perceiver, norms": functools.partial(small_models.idefics, FOUR_LAYERS, latents=3),
    "open_flamingo, immediate": functools.partial(small_models.open_flamingo, FOUR_LAYERS, immediate=True),
    "open_flamingo, all previous": functools.partial(small_models.open_flamingo, FOUR_LAYERS),
    "llava": functools.partial(small_models.llava, TINY, [-2, -1]),
    "blip2": functools.partial(small_models.blip2, TINY, queries=3),
    "instructblip": functools.partial(small_models.instructblip, TINY, queries=3),
    "instructblip video": functools.partial(small_models.instructblip, TINY, queries=3, video=True),
    "idefics2": functools.partial(small_models.idefics2, TINY, latents=3),
    # torch's grouped products of the experts have no float64.
    "aria": functools.partial(small_models.aria, TINY, queries=3, experts_implementation="eager"),
    "qwen-vl": functools.partial(small_models.qwen1_vl, TINY, queries=9),
    "qwen2-vl": functools.partial(small_models.qwen2_vl, TINY),
    "qwen2.5-vl": functools.partial(small_models.qwen2_5_vl, TINY),
    "qwen3-vl": functools.partial(small_models.qwen3_vl, TINY),
    "qwen3-vl-moe": functools.partial(small_models.qwen3_vl_moe, TINY, experts_implementation="eager"),
    "cosmos3": functools.partial(small_models.cosmos3_omni, TINY),
    "cohere-compass": functools.partial(small_models.cohere_compass, TINY, window=5),
    "qwen2.5-omni": functools.partial(small_models.qwen2_5_omni, TINY),
    "qwen3-omni": functools.partial(small_models.qwen3_omni, TINY, experts_implementation="eager"),
    "qwen3.5": functools.partial(small_models.qwen3_5, TINY),
    "qwen3.5-moe": functools.partial(small_models.qwen3_5_moe, TINY, experts_implementation="eager"),
    "gemma3": functools.partial(small_models.gemma3, TINY, window=5, head=True),
    "paligemma": functools.partial(small_models.paligemma, TINY),
    "paligemma2": functools.partial(small_models.paligemma, TINY, **GEMMA2),
    "text only": text_only,
    "mplug_owl3, fused": mplug_owl3("fused"),
    "mplug_owl3, gate": mplug_owl3("gate"),
    "mplug_owl3, gate_proj": mplug_owl3("gate_proj"),
}
# Made in another way before transformers 5.21, and refused there.
REFUSED = (
    () if Qwen2_5OmniThinkerForConditionalGeneration.base_model_prefix == "model" else ("qwen2.5-omni", "qwen3-omni")
)
for refused in REFUSED:
    del FAMILIES[refused]


# Those whose image processor cuts pictures, with the tokens that it writes around them.
CUTTING: dict[str, Callable[[], Any]] = {
    "idefics2": FAMILIES["idefics2"],
    "idefics3": functools.partial(small_models.idefics3, TINY),
    "smolvlm": functools.partial(small_models.idefics3, TINY, smol=True),
    "mplug-owl3": FAMILIES["mplug_owl3, fused"],
    "aria": FAMILIES["aria"],
}
TAGS = (
    "<|img|>", "<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", "\n",
    "<|start_cut|>", "<|end_cut|>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)),
)  # fmt: skip


# What the tokenizers of some names must name, as arguments of ``tagged_tokenizer``.
TOKENS: dict[str, Any] = {"aria": {"extra_special_tokens": {"image_token": "<|img|>"}}}


def tagged_tokenizer(**options: Any) -> Any:
    """That of the needle task, which also knows ``TAGS``.

    Args:
        options: further arguments of a tokenizer.
    """
    needle = build_tokenizer()
    special = {key: getattr(needle, key) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
    tokenizer = type(needle)(tokenizer_object=needle._tokenizer, **special, **options)
    tokenizer.add_special_tokens({"additional_special_tokens": list(TAGS)})
    return tokenizer


def cutting_processor(name: str, cut: bool = True) -> Any:
    """The image processor of a model by its name in ``CUTTING``, which cuts pictures, or leaves them whole."""
    processor = SMALL_MODELS[f"small-{name}"][1]()
    if name == "mplug-owl3":
        processor.cut_prompt = "v3" if cut else None
    else:
        setattr(processor, "split_image" if name == "aria" else "do_image_splitting", cut)
    return processor


def cutting(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model by its name in ``CUTTING`` or ``FAMILIES``, with a vocabulary for ``tagged_tokenizer``; see ``tiny``."""
    tokenizer = tagged_tokenizer()

    def build() -> Any:
        if name == "idefics":
            return small_models.idefics(FOUR_LAYERS, additional=len(tokenizer) - small_models.IMAGE_ID)
        model = CUTTING.get(name, FAMILIES.get(name))()
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        model.config.image_token_id = tokenizer.convert_tokens_to_ids(family_of(model).image_token)
        return model

    return tiny(build, dtype)


# Their norms, or their linear attention, compute in float32, whatever the model.
SINGLE = ("gemma3", "paligemma", "paligemma2", "qwen3.5", "qwen3.5-moe", "cohere-compass")


def tiny(name: str | Callable[[], Any], dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model called ``name``, with the same weights at every call: norms and embeddings at random too."""
    made = FAMILIES[name] if isinstance(name, str) else name

    def build() -> nn.Module:
        model = made()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    return nn.Module.to(random(build, seed=1), dtype)
