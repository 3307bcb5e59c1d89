"""OpenFlamingo: ``Flamingo`` of the package ``open-flamingo`` 2.0.1, unmodified, in a transformers model.

The package's model is no ``PreTrainedModel`` and takes no keyword beside its own, so ``OpenFlamingoModel`` holds one
and gives it a config, a loss, and arguments of transformers. Its masked cross-attention computes its scores itself;
``reach_attention`` lets it call the exchanged attention with its own norms and projections.

Where the image processor cuts images into tiles and a thumbnail, as in NVLM, the perceiver resamples each tile, and
the text sees those of an image as one medium. The package has images of one tile alone: see ``tiled_cross_attention``.

The package pins torch 2.0.1 and its ``__init__`` wants open-clip: install it with ``--no-deps``, beside ``einops`` and
``einops-exts``. Only its ``src/flamingo.py`` and what that imports is loaded.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.clip.modeling_clip import CLIPAttention

from ds_lvxattn.data.sample import FrameShape, FrameSize
from ds_lvxattn.errors import ConfigError
from ds_lvxattn.families.family import FrameLimits, VisualFamily
from ds_lvxattn.families.frames import encode_in_portions, in_samples, patches_of
from ds_lvxattn.families.processors import cut_into, cuts, limited_to
from ds_lvxattn.families.rotary import (
    self_attention_chunk,
    self_attention_role,
    self_attention_sizes,
    self_attention_window,
)
from ds_lvxattn.families.text_only import OF_LAYERS, refuse
from ds_lvxattn.plan.layer_plan import AttentionLayer
from ds_lvxattn.runtime.batch import Exchanging, SequenceParallelBatch
from ds_lvxattn.runtime.recompute import Recomputation
from ds_lvxattn.runtime.registration import exchanged_attention

SOURCE = "open_flamingo_src"  # the package's folder src, imported without its __init__
LATENTS = 64  # of a tile: the package leaves its perceiver's number at that
DECODER_LAYERS = {"OPT": "model.decoder.layers", "GPTNeoX": "gpt_neox.layers", "GPTJ": "transformer.h"}


class OpenFlamingoConfig(PreTrainedConfig):
    """Config of ``OpenFlamingoModel``.

    Args:
        vision_config: of a ``CLIPVisionModel``.
        text_config: of a causal language model of transformers.
        cross_attn_every_n_layers: a gated cross-attention stands before every so many decoder layers.
        media_token_id, eoc_token_id: tokens of an image and of the end of a chunk.
        only_attend_immediate_media: whether a token sees the last image alone, or all images up to it.
    """

    model_type = "open_flamingo"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}  # noqa: RUF012

    def __init__(
        self,
        vision_config: Any = None,
        text_config: Any = None,
        cross_attn_every_n_layers: int = 1,
        media_token_id: int = 0,
        eoc_token_id: int = 0,
        only_attend_immediate_media: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vision_config = _config(vision_config, "clip_vision_model")
        self.text_config = _config(text_config, "llama")
        self.cross_attn_every_n_layers = cross_attn_every_n_layers
        self.media_token_id, self.eoc_token_id = media_token_id, eoc_token_id
        self.only_attend_immediate_media = only_attend_immediate_media
        super().__init__(**kwargs)


# So that a saved model's config loads like any other.
AutoConfig.register(OpenFlamingoConfig.model_type, OpenFlamingoConfig, exist_ok=True)


def _config(given: Any, model_type: str) -> PreTrainedConfig:
    if isinstance(given, PreTrainedConfig):
        return given
    values = dict(given or {})
    return AutoConfig.for_model(values.pop("model_type", model_type), **values)


class OpenFlamingoModel(PreTrainedModel):
    """The package's ``Flamingo`` around a ``CLIPVisionModel`` and a causal language model of transformers.

    Raises:
        ConfigError: the package is not installed.
    """

    config_class = OpenFlamingoConfig
    base_model_prefix = "flamingo"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    # The package names the same modules twice.
    _keys_to_ignore_on_load_missing = [  # noqa: RUF012
        r"old_decoder_blocks",
        r"decoder_layer\.",
        r"gated_cross_attn_layer\.",
    ]

    def __init__(self, config: OpenFlamingoConfig) -> None:
        super().__init__(config)
        package = _source("flamingo")
        language: Any = AutoModelForCausalLM.from_config(config.text_config)
        base = type(language)
        _source("utils").extend_instance(language, _source("flamingo_lm").FlamingoLMMixin)
        type(language).__module__ = base.__module__  # where transformers looks up how it attends
        layers = (place for prefix, place in DECODER_LAYERS.items() if base.__name__.startswith(prefix))
        language.set_decoder_layers_attr_name(next(layers, "model.layers"))
        self.flamingo = package.Flamingo(
            types.SimpleNamespace(visual=_ClipTokens(CLIPVisionModel._from_config(config.vision_config))),
            language,
            config.eoc_token_id,
            config.media_token_id,
            vis_dim=config.vision_config.hidden_size,
            cross_attn_every_n_layers=config.cross_attn_every_n_layers,
        )
        self.flamingo.vision_encoder.requires_grad_(False)  # the package encodes images without gradients
        language.generation_config.eos_token_id = config.eoc_token_id  # where the package ends an answer
        language.register_forward_pre_hook(_name_mask, with_kwargs=True)
        module: Any
        for module in self.modules():
            if _is_cross_attention(module):
                module.only_attend_immediate_media = config.only_attend_immediate_media
                module.forward = functools.partial(tiled_cross_attention, module, module.forward)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        vision_x: Tensor | None = None,
        tiles: Tensor | None = None,
        media: tuple[Tensor, SequenceParallelBatch] | None = None,
        attention_mask: Tensor | None = None,
        clear_conditioned_layers: bool = True,
        **kwargs: Any,
    ) -> Any:
        """As ``Flamingo.forward``, with further keyword arguments for the language model.

        Args:
            vision_x: images, ``[B, images, 1, C, H, W]``; with ``tiles``, those of the images one after another.
            tiles: int64 ``[B, images]``, tiles of each image; 0 behind the last one of a sample.
            media: instead, the rank's features and its batch; made by ``encode_frames``.
        """
        flamingo = self.flamingo
        if media is None:
            self._show(vision_x, tiles)
        else:
            for layer in flamingo.lang_encoder._get_decoder_layers():
                layer.condition_vis_x(media)
        output = flamingo.lang_encoder(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        if clear_conditioned_layers:
            flamingo.lang_encoder.clear_conditioned_layers()
        return output

    def _show(self, vision_x: Tensor | None, tiles: Tensor | None) -> None:
        """Encode images for the layers to attend to."""
        flamingo = self.flamingo
        flamingo._encode_vision_x(vision_x=vision_x)
        if tiles is None:
            return
        for layer in flamingo.lang_encoder._get_decoder_layers():
            layer.condition_vis_x(TiledMedia.of(layer.vis_x, tiles))

    def generate(
        self, input_ids: Tensor, vision_x: Tensor, tiles: Tensor | None = None, num_beams: int = 1, **settings: Any
    ) -> Tensor:
        """As ``Flamingo.generate``: the prompts ``[B, S]`` with the new tokens behind them."""
        if tiles is None:
            return self.flamingo.generate(vision_x, input_ids, num_beams=num_beams, **settings)
        language = self.flamingo.lang_encoder
        language._use_cached_vision_x = True
        try:
            self._show(*(x.repeat_interleave(num_beams, dim=0) for x in (vision_x, tiles)))
            return language.generate(input_ids=input_ids, num_beams=num_beams, **settings)
        finally:
            language.clear_conditioned_layers()
            language._use_cached_vision_x = False

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As of transformers, with each parameter under one of its names."""
        if len(args) < 2 and kwargs.get("state_dict") is None:
            kwargs["state_dict"] = dict(self.named_parameters())
        super().save_pretrained(save_directory, *args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.flamingo.lang_encoder.get_input_embeddings()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the package and the two models initialise their own."""


class _ClipTokens(nn.Module):
    """A ``CLIPVisionModel`` with the interface of an open-clip one: pooled output and the tokens of the patches."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        output = self.clip(pixel_values=pixels)
        return output.pooler_output, output.last_hidden_state[:, 1:]


@dataclass(frozen=True)
class TiledMedia:
    """Images of several tiles, as the layers of a model see them that is not attached.

    Attributes:
        features: ``[B, tiles, latents, d]``.
        image: int64 ``[B, tiles]``, the number of each tile's image in its sample, from 1; 0 for what fills up.
    """

    features: Tensor
    image: Tensor

    @classmethod
    def of(cls, features: Tensor, tiles: Tensor) -> TiledMedia:
        """``tiles [B, images]`` of each image lie one after another in ``features``."""
        number = torch.arange(features.shape[1], device=tiles.device).expand(len(tiles), -1).contiguous()
        ends = tiles.cumsum(dim=1)
        image = torch.searchsorted(ends, number, right=True) + 1
        return cls(features, image.masked_fill(number >= ends[:, -1:], 0))


class OpenFlamingo(VisualFamily):
    """The OpenFlamingo family; see ``VisualFamily``.

    ``FrameShape.grid``, where the image processor cuts images: tiles, the thumbnail among them, and how many the
    processor may make at most.
    """

    name = "OpenFlamingo"
    model_class = OpenFlamingoModel
    image_token = "<image>"
    attention_config = "text_config"
    needs_frames = True
    pixels_apart = True

    def role_of(self, module: nn.Module) -> str | None:
        if _is_cross_attention(module):
            return "cross"
        if isinstance(module, CLIPAttention) or type(module).__name__ == "PerceiverAttention":
            return "local"
        return self_attention_role(module)

    def attention_layers(self, model: Any) -> dict[nn.Module, AttentionLayer]:
        """See ``Family``. A text whose layers would be computed wrongly is refused, with the reason."""
        refuse(model, (hinders(model.flamingo.lang_encoder) for hinders in OF_LAYERS))
        return super().attention_layers(model)

    def sizes_of(self, module: Any) -> tuple[int, int, int]:
        if self.role_of(module) == "self":
            return self_attention_sizes(module)
        if isinstance(module, CLIPAttention):
            return super().sizes_of(module)
        return module.heads, module.heads, module.to_q.out_features // module.heads

    def window_of(self, module: Any) -> int | None:
        return self_attention_window(module) if self.role_of(module) == "self" else None

    def chunk_of(self, module: Any) -> int | None:
        return self_attention_chunk(module) if self.role_of(module) == "self" else None

    def reach_attention(self, model: nn.Module) -> None:
        module: Any
        for module in model.modules():
            if _is_cross_attention(module):
                module.forward = functools.partial(exchanged_cross_attention, module, module.forward)

    def install_hooks(self, model: nn.Module, recomputation: Recomputation) -> None:
        model.register_forward_pre_hook(functools.partial(encode_frames, recomputation), with_kwargs=True)
        decoder = self.decoder(model)
        decoder.register_forward_pre_hook(condition_on_step, with_kwargs=True)
        decoder.register_forward_hook(end_step, with_kwargs=True)

    def decoder(self, model: nn.Module) -> Any:
        return model.get_submodule("flamingo.lang_encoder")

    def trainable_by_default(self) -> tuple[str, ...]:
        return ("*perceiver.*", "*gated_cross_attn_layer.*")

    def visual_widths(self) -> tuple[int, ...]:
        return (self.config.vision_config.hidden_size,)

    def frame_tokens(self) -> int:
        return LATENTS

    def encoder_tokens(self) -> int:
        return patches_of(self.config.vision_config) + 1

    def frame_ranges(self, input_ids: Sequence[int], image_id: int) -> list[tuple[int, int]]:
        """The last image at or before the token, or all of them."""
        ranges, seen = [], 0
        for token in input_ids:
            seen += token == image_id
            first = max(seen - 1, 0) if self.config.only_attend_immediate_media else 0
            ranges.append((first, seen))
        return ranges

    def hidden_rows_see_all(self) -> bool:
        # Where text sees all previous images, the package hides all keys alike from a token ahead of the first one,
        # which then gets the mean of all values.
        return not self.config.only_attend_immediate_media

    def load_model(self, name: str, dtype: torch.dtype) -> PreTrainedModel:
        return OpenFlamingoModel.from_pretrained(name, dtype=dtype)

    def tile_limits(self, processor: Any) -> tuple[str, ...]:
        return ("image_tiles", "frame_tiles") if cuts(processor) else ()

    def limited(self, processor: Any, limits: FrameLimits) -> Any:
        return limited_to(limits.image_tiles, processor) if cuts(processor) else processor

    def shape_of(self, size: FrameSize | None, processor: Any, limits: FrameLimits) -> FrameShape:
        if not cuts(processor):
            return super().shape_of(size, processor, limits)
        most, tiles = 1, 1
        if size is not None:
            limit = limits.frame_tiles if size.video else limits.image_tiles
            most = limit or (processor.max_patches if processor.crop_to_patches else 1)
            tiles = processor.get_number_of_image_patches(size.height, size.width, cut_into(most, processor))
        return FrameShape(tiles * LATENTS, tiles * self.encoder_tokens(), (tiles, most))

    def pixels(
        self, frames: Sequence[np.ndarray], shapes: Sequence[FrameShape], processor: Any
    ) -> Mapping[str, Tensor]:
        """``vision_x [1, images, 1, C, H, W]``; of a processor that cuts them, their tiles, and how many each has."""
        if not cuts(processor):
            return {"vision_x": processor(list(frames), return_tensors="pt")["pixel_values"][None, :, None]}
        images = [
            processor([frame], **cut_into(shape.grid[1], processor), return_tensors="pt")["pixel_values"]
            for frame, shape in zip(frames, shapes, strict=True)
        ]
        return {"vision_x": torch.cat(images)[None, :, None], "tiles": torch.tensor([[len(x) for x in images]])}

    def blank(self, processor: Any, limits: FrameLimits) -> Mapping[str, Tensor]:
        pixels = self.blank_pixels()
        return {**pixels, "tiles": torch.ones(1, 1, dtype=torch.long)} if cuts(processor) else pixels

    def blank_pixels(self) -> Mapping[str, Tensor]:
        vision = self.config.vision_config
        return {"vision_x": torch.zeros(1, 1, 1, vision.num_channels, vision.image_size, vision.image_size)}

    def dense_mask(
        self, ranges: Sequence[Sequence[tuple[int, int]]], shapes: Sequence[Sequence[FrameShape]]
    ) -> Mapping[str, Tensor]:
        return {}  # the model finds the image tokens itself


def _name_mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The package wants the argument that ``generate`` leaves out where no token is padding."""
    return args, {"attention_mask": None, **kwargs}


def encode_frames(
    recomputation: Recomputation, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Before the model: features ``[B, rows, d]`` of the rank's frames, in the portions the batch asks for."""
    batch: SequenceParallelBatch | None = kwargs.get("sequence_parallel")
    if batch is None:
        return None
    rest = dict(kwargs)
    rest.pop("tiles", None)  # the batch has them
    flamingo: Any = module.flamingo
    batch_of_tiles = replace(batch, shapes=tuple(tile for shape in batch.shapes for tile in _tiles(shape)))
    with torch.no_grad():  # as the package has it
        vision = functools.partial(_patches, flamingo.vision_encoder)
        patches = encode_in_portions(
            flamingo.vision_encoder, vision, [rest.pop("vision_x")[0, :, 0]], batch_of_tiles, recomputation
        )
    resample = functools.partial(_resample, flamingo.perceiver)
    features = encode_in_portions(flamingo.perceiver, resample, [patches], batch_of_tiles, recomputation)
    samples = batch.sees_frame.shape[0]
    return args, {**rest, "media": (in_samples(features.flatten(0, 1), samples), batch)}


def condition_on_step(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before the language model in a decoding step: its layers get the step in the place of features."""
    step: Exchanging | None = kwargs.get("sequence_parallel")
    if step is not None and not step.brings_frames:
        for layer in module._get_decoder_layers():
            layer.condition_vis_x((None, step))


def end_step(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """After it: the layers hold on to nothing."""
    step: Exchanging | None = kwargs.get("sequence_parallel")
    if step is not None and not step.brings_frames:
        module.clear_conditioned_layers()


def exchanged_cross_attention(
    module: Any, forward: Any, x: Tensor, media: Any, media_locations: Any = None, use_cached_media: bool = False
) -> Tensor:
    """``MaskedCrossAttention.forward`` over keys that are divided over the ranks.

    Args:
        forward: the module's own, for features that are not divided.
        media: from ``encode_frames``, features and batch; in a decoding step None and the step.
    """
    if not isinstance(media, tuple):
        return forward(x, media, media_locations=media_locations, use_cached_media=use_cached_media)
    features, batch = media
    query = module.to_q(module.norm(x))
    if not module.only_attend_immediate_media:
        # Equal scores for tokens that see nothing: they get the mean of the values, and give no other gradient.
        query = query * batch.sees_frame[:, 0]
    # Where no frames come, the keys and values of the prefill are used.
    key, value = module.to_kv(features).chunk(2, dim=-1) if batch.brings_frames else (query, query)
    q, k, v = _heads(module, query, key, value)
    out, _ = exchanged_attention(module, q, k, v, None, scaling=module.scale, sequence_parallel=batch)
    return module.to_out(out.flatten(2))


def tiled_cross_attention(
    module: Any, forward: Any, x: Tensor, media: Any, media_locations: Any = None, use_cached_media: bool = False
) -> Tensor:
    """``MaskedCrossAttention.forward``, which takes images of one tile, for ``TiledMedia`` too.

    A token sees all tiles of the images that it sees; one that sees no image gets what the module's own gives it: 0, or
    where text sees all previous images the mean of the values of all tiles.

    Args:
        forward: the module's own.
        media_locations, use_cached_media: see there.
    """
    if not isinstance(media, TiledMedia):
        return forward(x, media, media_locations=media_locations, use_cached_media=use_cached_media)
    immediate, image = module.only_attend_immediate_media, media.image[:, None]
    images = media_locations.cumsum(dim=1)[..., None]  # so far, [B, S, 1]
    if use_cached_media:
        images = images[:, -1:].expand(-1, x.shape[1], -1)
    seen = ((image == images) if immediate else (image <= images)) & (image > 0)
    hidden = ~seen.any(dim=2, keepdim=True)
    query = module.to_q(module.norm(x))
    if not immediate:
        query = query.masked_fill(hidden, 0)
    latents = media.features.shape[2]
    mask = (seen | hidden & (image > 0)).repeat_interleave(latents, dim=2)[:, None]
    q, k, v = _heads(module, query, *module.to_kv(media.features.flatten(1, 2)).chunk(2, dim=-1))
    out = scaled_dot_product_attention(q, k, v, mask, scale=module.scale).transpose(1, 2).flatten(2)
    return module.to_out(out.masked_fill(hidden, 0) if immediate else out)


def _heads(module: Any, *rows: Tensor) -> tuple[Tensor, ...]:
    """``[B, s, heads * D]`` each as ``[B, heads, s, D]``."""
    return tuple(x.unflatten(-1, (module.heads, -1)).transpose(1, 2) for x in rows)


def _is_cross_attention(module: nn.Module) -> bool:
    return type(module).__name__ == "MaskedCrossAttention"


def _tiles(shape: FrameShape) -> list[FrameShape]:
    """An image by its tiles, each of which the encoder and the perceiver take by itself."""
    count = shape.tokens // LATENTS
    return [replace(shape, tokens=LATENTS, encoder_tokens=shape.encoder_tokens // count)] * count


def _patches(vision: nn.Module, pixels: Tensor) -> Tensor:
    return vision(pixels)[1]


def _resample(perceiver: nn.Module, patches: Tensor) -> Tensor:
    """``[f, v, d]`` to ``[f, 64, d]``; the perceiver takes ``[B, images, frames, v, d]``."""
    return perceiver(patches[:, None, None])[:, 0]


def _source(name: str) -> types.ModuleType:
    """Module ``src/NAME.py`` of the package, without the package's ``__init__``.

    Raises:
        ConfigError: the package is not installed.
    """
    if SOURCE not in sys.modules:
        package = importlib.util.find_spec("open_flamingo")
        if package is None or not package.submodule_search_locations:
            raise ConfigError(
                "OpenFlamingo needs the package open-flamingo: pip install einops-exts, then "
                "pip install --no-deps open-flamingo==2.0.1 (it pins another torch)"
            )
        parent = types.ModuleType(SOURCE)
        parent.__path__ = [str(Path(place) / "src") for place in package.submodule_search_locations]
        sys.modules[SOURCE] = parent
    return importlib.import_module(f"{SOURCE}.{name}")
