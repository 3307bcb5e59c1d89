"""Models with images in their text that have no family of their own, with a processor that stands in for theirs.

Small random models by the sizes that most configs name; what each makes of an image is asked of the model itself.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, rms_norm
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from ds_lvxattn.data.sample import IGNORE, FrameSize, Sample
from tests.support.distributed import run
from tests.support.parity import Gradients, gradients_of, largest_differences, sum_over_ranks
from tests.support.text_models import TEXT_MODELS
from tests.support.tiny_model import MODES, attach, loss_of

SIDE, PATCH, IMAGE, VOCABULARY = 56, 14, 150, 160
ENDS = (151, 152)  # tokens around images: of text, or Ovis 2's indicators
TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "max_position_embeddings": 256,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "depth": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "num_heads": 4, "head_dim": 8, "image_size": SIDE, "patch_size": PATCH,
    "out_hidden_size": 32, "text_hidden_size": 32, "spatial_merge_size": 2, "window_size": 28,
    "fullatt_block_indexes": [1], "drop_path_rate": 0.0,
}  # fmt: skip
AROUND = {
    "image_token_id": IMAGE, "image_token_index": IMAGE, "downsample_factor": 2, "alignment_intermediate_size": 64,
    "vision_feature_layer": -1,
}  # fmt: skip
KINDS = (  # some with the text of another model behind a blank
    "cohere2_vision", "mistral3", "mistral3 mistral4", "lighton_ocr", "vipllava", "video_llava", "qianfan_ocr",
    "exaone4_5", "hyperclovax_vision_v2", "video_llama_3", "got_ocr2", "glm4v_moe", "glm46v", "glm_ocr", "paddleocr_vl",
    "hunyuan_vl", "cosmos3_edge", "llava", "deepseek_vl", "deepseek_vl_hybrid", "janus", "llama4",
    "gemma4", "ovis2", "molmo2", "lfm2_vl", "lfm3_vl",
)  # fmt: skip
# What a config is made with, beside those sizes.
GIVEN: dict[str, dict[str, Any]] = {
    "llava": {"vision_config": {"model_type": "pixtral"}, "vision_feature_select_strategy": "full"},
    "mistral3 mistral4": {  # latent attention, with temperatures by position
        "vision_config": {"model_type": "pixtral"},
        "text_config": {
            "model_type": "mistral4", "kv_lora_rank": 16, "q_lora_rank": 12, "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4, "v_head_dim": 6, "num_key_value_heads": 4, "n_group": 2, "topk_group": 1,
            "first_k_dense_replace": 1, "n_routed_experts": 4,
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 10000.0, "factor": 16.0, "original_max_position_embeddings": 16,
                "beta_fast": 32.0, "beta_slow": 1.0, "mscale_all_dim": 1.0, "mscale": 1.0,
                "llama_4_scaling_beta": 0.5,
            },
        },
    },
    "deepseek_vl": {"vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False}},
    "deepseek_vl_hybrid": {  # two encoders, each with pixels of its own
        "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False},
        "high_res_vision_config": {
            "model_type": "sam_vision_model", "hidden_size": 32, "output_channels": 8, "num_hidden_layers": 2,
            "num_attention_heads": 4, "image_size": 64, "patch_size": 16, "window_size": 2, "global_attn_indexes": [1],
            "mlp_dim": 48, "num_pos_feats": 16,
        },
    },
    "gemma4": {
        "vision_config": {"pooling_kernel_size": 2, "position_embedding_size": 8, "global_head_dim": 8},
        "text_config": {
            "num_hidden_layers": 2, "use_bidirectional_attention": "vision", "sliding_window": 5, "head_dim": 8,
            "global_head_dim": 8,
            "layer_types": ["sliding_attention", "full_attention"], "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY,
        },
        "audio_config": None,
    },
    "ovis2": {
        "vision_config": {"vocab_size": 24, "num_visual_indicator_tokens": 2}, "hidden_size": 32,
        "vocab_size": VOCABULARY, "visual_indicator_token_ids": [*ENDS],
    },
    "llama4": {
        "vision_config": {
            "intermediate_size": 128, "projector_input_dim": 24, "projector_output_dim": 24, "vision_output_dim": 24,
        },
        "text_config": {
            "num_hidden_layers": 2, "no_rope_layers": [1, 0], "attention_chunk_size": 5, "floor_scale": 2,
            "moe_layers": [1], "num_local_experts": 4, "intermediate_size_mlp": 64,
        },
    },
    "molmo2": {
        "adapter_config": {
            "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8,
            "intermediate_size": 64, "text_hidden_size": 32, "vision_feature_layer": [-1, 0],
        },
        "vision_config": {"image_size": [SIDE, SIDE]},
        "text_config": {"num_hidden_layers": 2, "additional_vocab_size": 0},
        "image_patch_id": IMAGE,
    },
    "lfm2_vl": {  # short convolutions along the text
        "vision_config": {"num_patches": 16},
        "text_config": {"model_type": "lfm2", "layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    },
    "lfm3_vl": {"text_config": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}},
    "janus": {
        "vision_config": {"projection_dim": 32},
        "vq_config": {
            "base_channels": 32, "channel_multiplier": [1], "num_embeddings": 16, "latent_channels": 32,
            "projection_dim": 32, "image_token_embed_dim": 32, "num_res_blocks": 1,
        },
    },
}  # fmt: skip
# Where rotary positions follow from the places of images: how many numbers of a head each kind of them turns.
SECTIONS = {
    **{kind: [1, 1, 2] for kind in ("glm4v_moe", "glm46v", "glm_ocr", "paddleocr_vl", "cosmos3_edge")},
    "hunyuan_vl": [1, 1, 1, 1],
}
# Parts of them compute in float32, whatever the model.
SINGLE = ("cohere2_vision", "glm4v_moe", "glm46v", "cosmos3_edge", "llama4", "gemma4", "lfm2_vl", "lfm3_vl")
# Whose norms are computed in float64 here: in float32, a last bit more or less decides which way they round.
NORMS = ("ovis2",)
# Whose images see themselves in both directions, and the tokens that are of an image.
BOTH_WAYS: dict[str, tuple[int, ...]] = {"gemma4": (IMAGE,), "molmo2": (IMAGE, *ENDS)}
TEXT_OF_SAMPLES = ("tt<I>taat<I>ta", "tItaa", "ttata")


class StandIn:
    """A processor of pictures of one size, for a model that has none here."""

    image_processor = object()
    image_token_ids = (IMAGE, *ENDS)

    def __init__(self, model: Any) -> None:
        self.inner, self.tokenizer, self.image_token = getattr(model, "model", model), self, f"<{IMAGE}>"
        self.names = inspect.signature(self.inner.get_image_features).parameters
        self.config, self.vision = model.config, model.config.vision_config

    def convert_ids_to_tokens(self, token: int) -> str:
        return f"<{token}>"

    def decode(self, ids: list[int], **options: Any) -> str:
        return "".join(map(self.convert_ids_to_tokens, ids))

    def arrays(self, picture: np.ndarray) -> dict[str, Tensor]:
        """The model's arguments for one picture."""
        pixels = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].double() / 127.5 - 1
        made = {"pixel_values": pixels, "image_sizes": torch.tensor([[SIDE, SIDE]])}
        made["high_res_pixel_values"] = interpolate(pixels, (64, 64))
        if "image_grid_thw" in self.names:
            rows, times = SIDE // PATCH, getattr(self.vision, "temporal_patch_size", 1)
            patches = pixels[0].unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).permute(1, 2, 0, 3, 4)
            values = patches.flatten(3).flatten(0, 1)[:, :, None].expand(-1, -1, times, -1).flatten(1)
            as_pictures = self.vision.model_type == "paddleocr_vl_vision"
            made = {
                "pixel_values": patches.flatten(0, 1) if as_pictures else values,
                "image_grid_thw": torch.tensor([[1, rows, rows]]), "image_merge_sizes": torch.tensor([2]),
            }  # fmt: skip
        if "spatial_shapes" in self.names:
            rows = SIDE // PATCH
            patches = pixels[0].unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).permute(1, 2, 3, 4, 0)
            made = {
                "pixel_values": patches.flatten(2).flatten(0, 1)[None], "spatial_shapes": torch.tensor([[rows, rows]]),
                "pixel_attention_mask": torch.ones(1, rows**2, dtype=torch.long),
            }  # fmt: skip
        if "image_position_ids" in self.names:
            rows = SIDE // PATCH
            patches = pixels[0].unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).permute(1, 2, 3, 4, 0)
            places = torch.tensor([[column, row] for row in range(rows) for column in range(rows)])
            made = {"pixel_values": patches.flatten(2).flatten(0, 1)[None], "image_position_ids": places[None]}
        if "image_token_pooling" in self.names:  # of the whole picture, and of its one square, whose last is smaller
            rows = SIDE // PATCH
            patches = pixels[0].unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).permute(1, 2, 3, 4, 0)
            values = patches.flatten(2).flatten(0, 1)
            pooled = torch.arange(rows**2).reshape(rows // 2, 2, rows // 2, 2).transpose(1, 2).reshape(-1, 4)
            pooled = torch.cat((pooled, pooled + rows**2))
            pooled[-1, 2:] = -1
            made = {
                "pixel_values": torch.stack((values, values.flip(0))), "image_token_pooling": pooled,
                "image_grids": torch.full((1, 4), rows // 2),
            }  # fmt: skip
        return {key: x for key, x in made.items() if key in self.names}

    @functools.cached_property
    def tokens(self) -> int:
        """Visual tokens of a picture."""
        with torch.no_grad():
            given: dict[str, Any] = self.arrays(picture(0))
            if "vision_feature_select_strategy" in self.names:
                given["vision_feature_select_strategy"] = getattr(self.config, "vision_feature_select_strategy", None)
            answer: Any = self.inner.get_image_features(**given, return_dict=True)
        made = answer.last_hidden_state if answer.pooler_output is None else answer.pooler_output
        return sum(part.shape[:-1].numel() for part in (made if isinstance(made, (list, tuple)) else [made]))

    def __call__(self, pictures: list[np.ndarray], **options: Any) -> dict[str, Any]:
        return {**self.arrays(pictures[0]), "input_ids": torch.tensor([[IMAGE] * self.tokens])}


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def small(kind: str) -> Any:
    given = GIVEN.get(kind, {})
    config = CONFIG_MAPPING[kind.partition(" ")[0]](**given)
    for part, sizes, own in (
        (config.text_config, TEXT, given.get("text_config", {})),
        (config.vision_config, VISION, given.get("vision_config", {})),
        (config, AROUND, {}),
    ):
        for name, value in sizes.items():
            if name not in own and hasattr(part, name):
                of_both_sides = isinstance(getattr(part, name), (list, tuple)) and name.endswith("_size")
                setattr(part, name, [value, value] if of_both_sides else value)
        if getattr(part, "layer_types", None):
            part.layer_types = part.layer_types[:2]
    if kind in SECTIONS:
        rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": SECTIONS[kind]}
        config.text_config.rope_parameters = rope
    experts = {"experts_implementation": "eager"} if hasattr(config.text_config, "n_routed_experts") else {}
    model: Any = AutoModelForImageTextToText.from_config(config, **experts).double()
    model.own_processor = StandIn(model)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.15)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if kind in NORMS and type(module).__name__.endswith("RMSNorm"):
            norm: Any = module
            given = {"normalized_shape": norm.weight.shape, "weight": norm.weight, "eps": norm.variance_epsilon}
            norm.forward = functools.partial(rms_norm, **given)
    return model.train()


def samples() -> list[Sample]:
    made = []
    for seed, pattern in enumerate(TEXT_OF_SAMPLES):
        rng = np.random.default_rng(seed)
        named = {"I": IMAGE, **dict(zip("<>", ENDS, strict=True))}
        ids = [named.get(c) or int(rng.integers(3, 100)) for c in pattern]
        labels = [token if c == "a" else IGNORE for token, c in zip(ids, pattern, strict=True)]
        shown = [picture(10 * seed + n) for n in range(pattern.count("I"))]
        take = functools.partial(_take, shown)
        made.append(Sample(ids, labels, len(shown), take, pattern, [FrameSize(SIDE, SIDE)] * len(shown)))
    return made


def _take(pictures: list[np.ndarray], wanted: list[int]) -> list[np.ndarray]:
    return [pictures[index] for index in wanted]


def in_transformers(kind: str) -> tuple[float, Gradients]:
    """Loss and gradients of the unmodified model, a sample at a time."""
    model, losses, items = small(kind), [], 0
    for sample in samples():
        pictures = [model.own_processor.arrays(x) for x in sample.load_frames(range(sample.num_frames))]
        for number, made in enumerate(pictures):
            if "image_token_pooling" in made:  # places among the patches of all images
                pooled, patches = made["image_token_pooling"], made["pixel_values"].shape[:2].numel()
                made["image_token_pooling"] = torch.where(pooled >= 0, pooled + number * patches, -1)
        arguments = {key: torch.cat([made[key] for made in pictures]) for key in (pictures[0] if pictures else ())}
        repeats = torch.tensor([model.own_processor.tokens if token == IMAGE else 1 for token in sample.input_ids])
        rows, labels = (torch.tensor(x).repeat_interleave(repeats) for x in (sample.input_ids, sample.labels))
        targets = torch.cat((labels[1:], torch.tensor([IGNORE])))
        if kind in BOTH_WAYS or (pictures and kind in SECTIONS):
            of_images = torch.tensor(BOTH_WAYS.get(kind, (IMAGE,)))
            arguments["mm_token_type_ids"] = torch.isin(rows, of_images).long()[None]
        logits = model(input_ids=rows[None], **arguments).logits[0]
        losses.append(cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum"))
        items += int((targets != IGNORE).sum())
    loss = torch.stack(losses).sum() / items
    loss.backward()
    return loss.item(), gradients_of(model)


def on_ranks(kind: str) -> tuple[float, Gradients]:
    model = small(kind)
    loss = loss_of(model, samples(), attach(model, dist.get_world_size(), MODES[1], samples()))
    loss.backward()
    return sum_over_ranks(loss, gradients_of(model))


OF_RELEASE = [kind for kind in KINDS if {*kind.split()} <= {*CONFIG_MAPPING}]
if "lfm2" not in TEXT_MODELS:
    OF_RELEASE.remove("lfm2_vl")


@pytest.mark.parametrize("kind", OF_RELEASE)
def test_loss_and_gradients_are_those_of_the_unmodified_model(kind: str) -> None:
    loss, gradient = largest_differences(run(2, on_ranks, kind)[0], in_transformers(kind))
    assert loss < 1e-12 and gradient < (1e-6 if kind in SINGLE else 1e-11)
