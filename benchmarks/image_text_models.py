"""What the families make of every class of the installed transformers that takes images and text.

    python benchmarks/image_text_models.py

Each class is built by the defaults of its config, or by ``GIVEN`` where those build none, without memory for its
weights, in two layers where that goes.
A line says which family takes it, or why none does. Classes whose defaults build no model are listed with what
transformers says of them. The command fails where a family neither takes a model nor says why.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from ds_lvxattn.errors import ConfigError
from ds_lvxattn.families import family_of, family_of_config

LAYERS = ("num_hidden_layers", "depth")
ROPE = {"rope_type": "default", "rope_theta": 1e4}
WORDS = {"<image>": 4, "<|extra_200|>": 5, "<|image start|>": 6, "<|image end|>": 7, "<|image token|>": 8}
EXPERTS = {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "mlp_layer_types": ["dense", "sparse"]}
# Of configs whose defaults build no model, what builds one.
GIVEN: dict[str, dict[str, Any]] = {
    "aya_vision": {"vision_config": {"model_type": "siglip_vision_model"}},
    "chameleon": {"vocabulary_map": WORDS},
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}}},
    "deepseek_ocr2": {
        "text_config": {**EXPERTS, "num_hidden_layers": 2},
        "vision_config": {"sam_config": {"downsample_channels": [64, 64]}},
    },
    "diffusion_gemma": {"text_config": {"num_experts": 2, "top_k_experts": 1, "moe_intermediate_size": 16}},
    "emu3": {"vocabulary_map": WORDS},
    "granite4_vision": {
        "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 128, "num_attention_heads": 4},
        "qformer_config": {"model_type": "blip_2_qformer", "hidden_size": 64, "num_attention_heads": 4},
        "deepstack_layer_map": [[0, 0]], "spatial_target_layers": [], "downsample_rate": "1/2",
    },
    "hunyuan_vl": {"text_config": {"head_dim": 128, "rope_parameters": {**ROPE, "mrope_section": [16, 16, 16, 16]}}},
    "qwen4_exp": {
        "text_config": {
            "head_dim": 16, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
            "indexer_compress_ratio": 2, "ple_embed_dim": 16, "ple_layer_ids": [], "num_hidden_layers": 2,
        },
    },
}  # fmt: skip
REMEDIES = ("; docs/adding-a-family.md", ". Set 'sequence_parallel_size'")  # behind the reason in an error


def parts(config: Any) -> Iterator[Any]:
    """``config`` and the configs in it."""
    yield config
    for part in vars(config).values():
        if isinstance(part, PreTrainedConfig):
            yield from parts(part)


def built(config_class: type[PreTrainedConfig]) -> Any:
    """A model of two layers, or as many as its config wants."""
    given = GIVEN.get(config_class.model_type, {})
    config = config_class(**given)
    for part in parts(config):
        for name in LAYERS:
            # A list with an entry for each layer counts them as well.
            if isinstance(getattr(part, name, None), int) and getattr(part, "layer_types", None) is None:
                setattr(part, name, min(getattr(part, name), 2))
    made = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[config_class]
    try:
        with torch.device("meta"):
            return made(config)
    except Exception:  # some layers are counted elsewhere too
        with torch.device("meta"):
            return made(config_class(**given))


def verdict(config_class: type[PreTrainedConfig]) -> tuple[str, str]:
    """``taken``, ``refused``, ``not built`` or ``fails``, and what there is to say of it."""
    try:
        model = built(config_class)
    except Exception as error:
        return "not built", f"{type(error).__name__}: {error}"
    try:
        family_of_config(model.config)
        family = family_of(model)
        family.attention_layers(model)
        family.trainable_by_default()
    except ConfigError as error:
        reason = str(error)
        for behind in REMEDIES:
            reason = reason.partition(behind)[0]
        return "refused", "no family knows it" if "belongs to no known model family" in reason else reason
    except Exception as error:
        return "fails", f"{type(error).__name__}: {error}"
    return "taken", family.name


def main() -> int:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    failed = False
    for config_class in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        kind, text = verdict(config_class)
        failed |= kind == "fails"
        print(f"{config_class.__name__:34} {kind:9} {' '.join(text.split())[:200]}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
