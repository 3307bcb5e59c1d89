"""OpenFlamingo as a model of transformers: ``Flamingo`` of the package ``open-flamingo`` 2.0.1, unmodified.

The package's model is no ``PreTrainedModel`` and takes no keyword beside its own, so ``OpenFlamingoModel`` holds one
and gives it a config, a loss, and arguments of transformers. The package has images of one tile alone: see
``tiled_cross_attention``.

The package pins torch 2.0.1 and its ``__init__`` wants open-clip: install it with ``--no-deps``, beside ``einops`` and
``einops-exts``. Only its ``src/flamingo.py`` and what that imports is loaded.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

from ds_lvxattn.errors import ConfigError
from ds_lvxattn.runtime.batch import SequenceParallelBatch

SOURCE = "open_flamingo_src"  # the package's folder src, imported without its __init__
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
            if is_cross_attention(module):
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


def _name_mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The package wants the argument that ``generate`` leaves out where no token is padding."""
    return args, {"attention_mask": None, **kwargs}


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
    q, k, v = heads_of(module, query, *module.to_kv(media.features.flatten(1, 2)).chunk(2, dim=-1))
    out = scaled_dot_product_attention(q, k, v, mask, scale=module.scale).transpose(1, 2).flatten(2)
    return module.to_out(out.masked_fill(hidden, 0) if immediate else out)


def heads_of(module: Any, *rows: Tensor) -> tuple[Tensor, ...]:
    """``[B, s, heads * D]`` each as ``[B, heads, s, D]``."""
    return tuple(x.unflatten(-1, (module.heads, -1)).transpose(1, 2) for x in rows)


def is_cross_attention(module: nn.Module) -> bool:
    return type(module).__name__ == "MaskedCrossAttention"


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
