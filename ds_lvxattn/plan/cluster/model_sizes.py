"""Sizes of models, as far as the planner needs them: those that ship, or those of a local ``config.json``."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class ModelError(ValueError):
    """A model whose sizes are not known; the message says what can be given."""


@dataclass(frozen=True)
class ModelSizes:
    """A video-language model, with cross-attention layers or, where it has none, with visual tokens in its text.

    Attributes:
        name, source: what it is, and where its sizes come from.
        width, intermediate, vocabulary: of the text model.
        self_layers, cross_layers: layers with causal self-attention over text, and with attention over visual tokens.
        heads, kv_heads, head_dim: of self-attention.
        cross_heads, cross_kv_heads, cross_head_dim: of cross-attention.
        cross_intermediate: inner size of the feed-forward part that a cross-attention layer brings; 0 for none.
        gated: whether feed-forward parts have a third matrix, the gate.
        features: width of the visual features, from which cross-attention projects K and V.
        frame_tokens: visual tokens of a frame in the language model.
        mask: which frames a text token sees in cross-attention: ``full``, ``growing`` or ``frame``.
        vision_layers, vision_width, vision_intermediate: the encoder.
        vision_tokens: tokens of a frame in the encoder; more than ``frame_tokens`` where blank tiles or a resampler's
            inputs pass through it too.
        most_tiles: tiles of a frame, at most; ``frame_tokens`` is that of one, and the encoder always takes all.
        tiles_apart: instead, the encoder takes each tile by itself; ``vision_tokens`` is then that of one too.
        encoded: pictures that the encoder takes of a frame.
        token_side: pixels along a side of a visual token, where a frame may have any size; 0: it has one size.
        vision_head_dim: head size of the encoder.
        vision_output: width of what the projector takes; 0: that of the encoder.
        key_norm: whether cross-attention normalises its keys, in single operations.
    """

    name: str
    source: str
    width: int
    intermediate: int
    vocabulary: int
    self_layers: int
    cross_layers: int
    heads: int
    kv_heads: int
    head_dim: int
    cross_heads: int
    cross_kv_heads: int
    cross_head_dim: int
    cross_intermediate: int
    gated: bool
    features: int
    frame_tokens: int
    mask: str
    vision_layers: int
    vision_width: int
    vision_intermediate: int
    vision_tokens: int
    most_tiles: int = 1
    tiles_apart: bool = False
    encoded: int = 1
    token_side: int = 0
    vision_head_dim: int = 64
    vision_output: int = 0
    key_norm: bool = False

    def with_tiles(self, tiles: int) -> ModelSizes:
        """The model with frames of so many tiles.

        Raises:
            ModelError: its frames have no such number.
        """
        if not 1 <= tiles <= self.most_tiles:
            frames = f"1 to {self.most_tiles} tiles" if self.most_tiles > 1 else "one tile"
            raise ModelError(f"--tiles is {tiles}; a frame of {self.name} has {frames}")
        encoded = tiles if self.tiles_apart else 1
        return dataclasses.replace(self, frame_tokens=tiles * self.frame_tokens, encoded=encoded)

    def with_image_size(self, side: int) -> ModelSizes:
        """The model with frames scaled to squares of ``side`` pixels.

        Raises:
            ModelError: its frames have one size, or ``side`` holds no whole number of tokens.
        """
        if not self.token_side:
            raise ModelError(f"--image-size is {side}, and frames of {self.name} have one size; leave it out")
        if side < self.token_side or side % self.token_side:
            raise ModelError(f"--image-size is {side}; give a multiple of {self.token_side}, the side of a token")
        tokens = (side // self.token_side) ** 2
        return dataclasses.replace(
            self, frame_tokens=tokens, vision_tokens=tokens * self.vision_tokens // self.frame_tokens
        )

    @property
    def keys_in_text(self) -> bool:
        """Whether visual tokens stand in the text, where self-attention is all there is."""
        return not self.cross_layers

    @property
    def self_parameters(self) -> int:
        """Of one self-attention layer."""
        attention = self.width * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + (3 if self.gated else 2) * self.width * self.intermediate

    @property
    def cross_parameters(self) -> int:
        """Of one cross-attention layer, its projections of K and V included."""
        queries = 2 * self.width * self.cross_heads * self.cross_head_dim
        keys = 2 * self.features * self.cross_kv_heads * self.cross_head_dim
        return queries + keys + (3 if self.gated else 2) * self.width * self.cross_intermediate

    @property
    def projected(self) -> int:
        """Width of what the projector takes."""
        return self.vision_output or self.vision_width

    @property
    def vision_parameters(self) -> int:
        return self.vision_layers * self.vision_width * (4 * self.vision_width + 2 * self.vision_intermediate)

    @property
    def parameters(self) -> int:
        """Of the whole model, small vectors left out."""
        text = self.self_layers * self.self_parameters + self.cross_layers * self.cross_parameters
        return text + 2 * self.vocabulary * self.width + self.vision_parameters

    @property
    def trainable(self) -> int:
        """What trains by default: cross-attention layers, or else the whole language model, and the projector."""
        projector = self.projected * self.features
        if self.keys_in_text:
            return self.self_layers * self.self_parameters + 2 * self.vocabulary * self.width + projector
        return self.cross_layers * self.cross_parameters + projector


SIDE = 10  # visual tokens along a side of a frame, where it may have any size and the config does not say
LLAMA_DEFAULTS = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "vocab_size": 32000,
}  # fmt: skip
CLIP_DEFAULTS = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "image_size": 224, "patch_size": 32,
}  # fmt: skip


def _llama(name: str, width: int, intermediate: int, self_layers: int, cross_layers: int, heads: int) -> ModelSizes:
    return ModelSizes(
        name, "the model's config.json", width, intermediate, 128256, self_layers, cross_layers, heads, 8, 128,
        heads, 8, 128, intermediate, True, width, 1601, "full", 40, 1280, 5120, 4 * 1601, most_tiles=4,
        vision_head_dim=80, vision_output=7680, key_norm=True,
    )  # fmt: skip


def _flamingo(name: str, width: int, self_layers: int, cross_layers: int, heads: int) -> ModelSizes:
    return ModelSizes(
        name, "OpenFlamingo (arXiv 2308.01390), table 1, with MPT's and CLIP ViT-L/14's configs", width, 4 * width,
        50280, self_layers, cross_layers, heads, heads, 128, 8, 8, 64, 4 * width, False, 1024, 64, "frame",
        24, 1024, 4096, 257, most_tiles=13, tiles_apart=True,  # twelve and a thumbnail
    )  # fmt: skip


def _concatenation(
    name: str,
    source: str,
    width: int,
    intermediate: int,
    vocabulary: int,
    layers: int,
    heads: tuple[int, int, int],
    frame_tokens: int,
    vision: tuple[int, int, int, int],
    token_side: int = 0,
    vision_head_dim: int = 64,
) -> ModelSizes:
    return ModelSizes(
        name,
        source,
        width,
        intermediate,
        vocabulary,
        layers,
        0,
        *heads,
        *heads,
        0,
        True,
        width,
        frame_tokens,
        "growing",
        *vision,
        token_side=token_side,
        vision_head_dim=vision_head_dim,
    )


SHIPPED = {
    sizes.name: sizes
    for sizes in (
        _llama("Llama-3.2-11B-Vision", 4096, 14336, 32, 8, 32),
        _llama("Llama-3.2-90B-Vision", 8192, 28672, 80, 20, 64),
        _flamingo("OpenFlamingo-3B", 2048, 24, 24, 16),
        _flamingo("OpenFlamingo-9B", 4096, 32, 8, 32),
        ModelSizes(
            "mPLUG-Owl3-7B", "the model's config.json (240728); Qwen2-7B and SigLIP so400m", 3584, 18944, 152064,
            28, 4, 28, 4, 128, 28, 4, 128, 0, True, 3584, 729, "growing", 27, 1152, 4304, 729, vision_head_dim=72,
        ),
        ModelSizes(
            "NVLM-H-72B", "sizes like those of NVLM (arXiv 2409.11402) on Qwen2-72B and InternViT-6B", 8192, 29568,
            152064, 80, 10, 64, 8, 128, 64, 8, 128, 29568, True, 8192, 256, "growing", 45, 3200, 12800, 1024,
            most_tiles=6, tiles_apart=True, vision_head_dim=128,  # the thumbnail stands in the text
        ),
        _concatenation(
            "LLaVA-1.5-7B", "the model's config.json", 4096, 11008, 32064, 32, (32, 32, 128), 576, (24, 1024, 4096, 577)
        ),
        _concatenation(
            "Qwen2.5-VL-7B", "the model's config.json; frames of 280 pixels", 3584, 18944, 152064, 28, (28, 4, 128),
            100, (32, 1280, 5130, 400), token_side=28, vision_head_dim=80,
        ),
        _concatenation(
            "Qwen2-VL-7B", "the model's config.json; frames of 280 pixels", 3584, 18944, 152064, 28, (28, 4, 128),
            100, (32, 1280, 5120, 400), token_side=28, vision_head_dim=80,
        ),
        _concatenation(
            "Qwen2-VL-72B", "the model's config.json; frames of 280 pixels", 8192, 29568, 152064, 80, (64, 8, 128),
            100, (32, 1280, 5120, 400), token_side=28, vision_head_dim=80,
        ),
        _concatenation(
            "Qwen3-VL-8B", "the model's config.json; frames of 320 pixels", 4096, 12288, 151936, 36, (32, 8, 128),
            100, (27, 1152, 4304, 400), token_side=32, vision_head_dim=72,
        ),
        _concatenation(
            "Qwen3-VL-32B", "the model's config.json; frames of 320 pixels", 5120, 25600, 151936, 64, (64, 8, 128),
            100, (27, 1152, 4304, 400), token_side=32, vision_head_dim=72,
        ),
    )
}  # fmt: skip


def model_sizes(name: str) -> ModelSizes:
    """Sizes by the name of a shipped model (capitals do not count) or the path of a ``config.json`` or its folder.

    A local file is a transformers config of Llama 3.2 Vision, mPLUG-Owl3, OpenFlamingo with Llama, LLaVA with a CLIP
    tower, Qwen2-VL, Qwen2.5-VL or Qwen3-VL, or has the fields of ``ModelSizes``.

    Raises:
        ModelError: neither.
    """
    for known, sizes in SHIPPED.items():
        if name.lower() == known.lower():
            return sizes
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ModelError(f"--model {name}: no such file, and the models that ship are {list(SHIPPED)}")
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ModelError(f"--model {path}: not valid JSON ({error})") from error
    try:
        return _from_config(config, path)
    except KeyError as error:
        raise ModelError(f"--model {path}: the key {error} is missing") from error


def _from_config(config: dict[str, Any], path: Path) -> ModelSizes:
    kind = config.get("model_type")
    named = str(config.get("_name_or_path") or path.parent.name), str(path)
    if read := READ.get(str(kind)):
        return read(config, named)
    fields = {field.name for field in dataclasses.fields(ModelSizes)}
    optional = {"name", "source", *(field.name for field in dataclasses.fields(ModelSizes) if _optional(field))}
    if fields - optional <= set(config):
        given = {key: config[key] for key in fields & set(config)}
        return ModelSizes(**{"name": named[0], "source": named[1], **given})
    raise ModelError(
        f"--model {path}: model_type is {kind!r}; the planner reads 'mllama', 'mplugowl3', 'open_flamingo', 'llava', "
        f"'qwen2_vl', 'qwen2_5_vl' and 'qwen3_vl' configs, or a JSON object with the keys {sorted(fields - optional)}"
    )


def _optional(field: dataclasses.Field[Any]) -> bool:
    return field.default is not dataclasses.MISSING


def _qwen_vision(kind: str, vision: dict[str, Any]) -> tuple[int, int]:
    """Width and inner size of Qwen's encoders, each of which names them in its own way."""
    if kind == "qwen2_vl":
        return vision["embed_dim"], int(vision["embed_dim"] * vision["mlp_ratio"])
    if kind == "qwen2_5_vl":  # its feed-forward parts have a gate: three matrices, where others have two
        return vision["hidden_size"], 3 * vision["intermediate_size"] // 2
    return vision["hidden_size"], vision["intermediate_size"]


# Sizes by the transformers config of a model type, which when it is saved leaves out what has the default of its class.
# ``named`` are the name and source of what is made.


def _mllama(config: dict[str, Any], named: tuple[str, str]) -> ModelSizes:
    text, vision = config["text_config"], config["vision_config"]
    heads = text["num_attention_heads"]
    cross = len(text["cross_attention_layers"])
    per_tile = (vision["image_size"] // vision["patch_size"]) ** 2 + 1
    width, head_dim = text["hidden_size"], text["hidden_size"] // heads
    vision_width = vision["hidden_size"]
    return ModelSizes(
        *named, width, text["intermediate_size"], text["vocab_size"],
        text["num_hidden_layers"] - cross, cross, heads, text["num_key_value_heads"], head_dim,
        heads, text["num_key_value_heads"], head_dim, text["intermediate_size"], True, width, per_tile, "full",
        vision["num_hidden_layers"] + vision["num_global_layers"], vision_width, vision["intermediate_size"],
        per_tile * vision["max_num_tiles"], vision["max_num_tiles"],
        vision_head_dim=vision_width // vision.get("attention_heads", 16),
        vision_output=vision.get("vision_output_dim", 7680), key_norm=True,
    )  # fmt: skip


def _mplug_owl3(config: dict[str, Any], named: tuple[str, str]) -> ModelSizes:
    vision = config["vision_config"]
    heads, width = config["num_attention_heads"], config["hidden_size"]
    tokens = (vision["image_size"] // vision["patch_size"]) ** 2
    return ModelSizes(
        *named, width, config["intermediate_size"], config["vocab_size"], config["num_hidden_layers"],
        len(config["hyper_layers"]), heads, config["num_key_value_heads"], width // heads,
        heads, config["num_key_value_heads"], width // heads, 0, True, width, tokens, "growing",
        vision["num_hidden_layers"], vision["hidden_size"], vision["intermediate_size"], tokens,
        vision_head_dim=vision["hidden_size"] // vision.get("num_attention_heads", 16),
    )  # fmt: skip


def _open_flamingo(config: dict[str, Any], named: tuple[str, str]) -> ModelSizes:
    text, vision = {**LLAMA_DEFAULTS, **config["text_config"]}, {**CLIP_DEFAULTS, **config["vision_config"]}
    heads, width, layers = text["num_attention_heads"], text["hidden_size"], text["num_hidden_layers"]
    return ModelSizes(
        *named, width, text["intermediate_size"], text["vocab_size"], layers,
        layers // config.get("cross_attn_every_n_layers", 1), heads, text.get("num_key_value_heads", heads),
        width // heads, 8, 8, 64,
        8 * width // 3,  # of three matrices, as large as the two of 4 * width that it has
        True, vision["hidden_size"], 64, "frame" if config.get("only_attend_immediate_media", True) else "growing",
        vision["num_hidden_layers"], vision["hidden_size"], vision["intermediate_size"],
        (vision["image_size"] // vision["patch_size"]) ** 2 + 1, most_tiles=13, tiles_apart=True,
        vision_head_dim=vision["hidden_size"] // vision["num_attention_heads"],
    )  # fmt: skip


def _llava(config: dict[str, Any], named: tuple[str, str]) -> ModelSizes:
    text, vision = {**LLAMA_DEFAULTS, **config["text_config"]}, config["vision_config"]
    heads = text["num_attention_heads"]
    layout = heads, text.get("num_key_value_heads", heads), text["hidden_size"] // heads
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    return _concatenation(
        *named, text["hidden_size"], text["intermediate_size"], text["vocab_size"],
        text["num_hidden_layers"], layout, patches,
        (vision["num_hidden_layers"], vision["hidden_size"], vision["intermediate_size"], patches + 1),
        vision_head_dim=vision["hidden_size"] // vision.get("num_attention_heads", 16),
    )  # fmt: skip


def _qwen(config: dict[str, Any], named: tuple[str, str]) -> ModelSizes:
    text, vision = {**config, **config.get("text_config", {})}, config["vision_config"]
    heads, head_dim = text["num_attention_heads"], text.get("head_dim")
    token_side = vision["patch_size"] * vision["spatial_merge_size"]
    side = vision.get("image_size", SIDE * token_side) // vision["patch_size"]
    encoder = vision["depth"], *_qwen_vision(config["model_type"], vision), side**2
    return _concatenation(
        *named, text["hidden_size"], text["intermediate_size"], text["vocab_size"],
        text["num_hidden_layers"], (heads, text["num_key_value_heads"], head_dim or text["hidden_size"] // heads),
        (side // vision["spatial_merge_size"]) ** 2, encoder, token_side=token_side,
        vision_head_dim=encoder[1] // vision.get("num_heads", 16),
    )  # fmt: skip


READ = {
    "mllama": _mllama,
    "mplugowl3": _mplug_owl3,
    "open_flamingo": _open_flamingo,
    "llava": _llava,
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), _qwen),
}
