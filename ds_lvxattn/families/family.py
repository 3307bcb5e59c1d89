"""What the integration must know of a model family.

A family is one file: which modules play which role and which hooks fit sharded inputs to the unmodified model code; for
models that see, also how key ranges follow from the text, and how images become the model's pixel arguments.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, GenerationMixin, PreTrainedModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from ds_lvxattn.data.sample import FrameShape, FrameSize, Sample
from ds_lvxattn.errors import ConfigError
from ds_lvxattn.plan.layer_plan import AttentionLayer
from ds_lvxattn.runtime.recompute import Recomputation

# Tokens that a vision encoder takes at once: some hold the hidden states of all their layers until they return, so
# that all frames at once would be the peak of the whole step.
TOKENS_AT_ONCE = 1 << 15

# Names that models give to their vision encoder.
ENCODERS = ("vision_model", "vision_tower", "visual", "vision_encoder")


@dataclass(frozen=True)
class FrameLimits:
    """How large pictures may be, in the units of the image processor; None: as the processor has it.

    Attributes:
        image_tiles, frame_tiles: tiles of an image and of a frame of a video, at most.
        frame_padding: whether text that sees no frame sees what pads the frames of a video, as it sees the padding of
            images, where the model has it so (Llama 3.2 Vision): it costs the keys of all tiles for every frame.
        frame_pixels: pixels of a frame of a video, at most, for models that take any size; None: as the model's video
            processor has it. Images have the size that they are decoded with.
    """

    image_tiles: int | None = None
    frame_tiles: int | None = 1
    frame_padding: bool = False
    frame_pixels: int | None = None


ANY_SIZE = FrameLimits()
# What only some models follow, with what each is unless it is set.
TILE_LIMITS = {name: getattr(ANY_SIZE, name) for name in ("image_tiles", "frame_tiles", "frame_padding")}


class Family(ABC):
    """Facts of the models of one family that have one transformers config; a family whose models take text alone.

    Args:
        config: the model's transformers config.

    Attributes:
        name: how errors call it.
        model_class: the class of its models; its ``config_class`` is that of their configs.
        attention_config: the sub-config (a key of ``config.sub_configs``) of the language model, whose attention is
            exchanged; empty for the model's own config. None: that config too, but ``reach_attention`` reaches all of
            it, and no implementation is set.
        keys_in_text: whether all that text attends to is the text itself: the visual tokens of a frame, if the model
            takes frames, stand in the place of its image token, and attention of the role ``self`` is all there is.
        blocks_in_full: whether the rows of a block (see ``blocks``) see each other in layers without a sliding window.
        blocks_in_window: whether a sliding window also limits what a row of a block sees of it.
        blocks_joined: whether the blocks of a sample are one: each of their rows sees all rows of all of them. A window
            then limits what is ahead.
    """

    name: str
    model_class: type[PreTrainedModel]
    attention_config: str | None = ""
    keys_in_text: bool = False
    blocks_in_full: bool = True
    blocks_in_window: bool = True
    blocks_joined: bool = False

    def __init__(self, config: Any) -> None:
        self.config = config

    @classmethod
    def has_model(cls, model: nn.Module) -> bool:
        """Whether ``model`` is of this family."""
        return isinstance(model, cls.model_class)

    @classmethod
    def has_config(cls, config: Any) -> bool:
        """Whether the models of such a config are of this family."""
        return cls.model_class.config_class is not None and isinstance(config, cls.model_class.config_class)

    @property
    def text_config(self) -> Any:
        """The config of the language model."""
        return getattr(self.config, self.attention_config) if self.attention_config else self.config

    @property
    def has_blocks(self) -> bool:
        """Whether some rows see each other in both directions; see ``blocks``."""
        return type(self).blocks is not Family.blocks

    # Modules

    @abstractmethod
    def role_of(self, module: nn.Module) -> str | None:
        """``cross``, ``self`` or ``local`` for an attention module of the family, None for any other module."""

    def sizes_of(self, module: Any) -> tuple[int, int, int]:
        """Query heads, key heads and head size of an attention module that has a role."""
        return module.num_heads, getattr(module, "num_key_value_heads", module.num_heads), module.head_dim

    def value_dim_of(self, module: Any) -> int | None:
        """Head size of the values of such a module; None: that of its keys."""
        return getattr(module, "v_head_dim", None)

    def window_of(self, module: Any) -> int | None:
        """Of a module with the role ``self``, the last keys that a row sees, its own included; None: all before it."""
        return None

    def chunk_of(self, module: Any) -> int | None:
        """Of such a module, the rows of a chunk, where a row sees its own chunk alone, up to itself; None: no chunks.

        Chunks are counted from the first row of a sample.
        """
        return None

    def capped(self, module: Any) -> bool:
        """Whether the scores of an attention module have a soft cap, which not every kernel computes."""
        return getattr(module, "attn_logit_softcapping", None) is not None

    def attention_layers(self, model: nn.Module) -> dict[nn.Module, AttentionLayer]:
        """Every attention module of ``model`` with its role and sizes.

        A module that attends twice, in two roles, is there for one of them, and for the other a part of it that
        serves that one alone.

        Raises:
            ConfigError: the model has a class of attention that the family does not know, or self-attention of text
                that is not causal.
        """
        layers = {}
        for name, module in model.named_modules():
            role = self.role_of(module)
            causal = getattr(module, "is_causal", True) or self.has_blocks
            if role == "self" and not causal:
                raise ConfigError(
                    f"{name}.is_causal is False, and sequence-parallel self-attention is causal; leave it at True, or "
                    "set 'sequence_parallel_size' to 1"
                )
            if role is not None:
                layers[module] = AttentionLayer(
                    name, role, *self.sizes_of(module), window=self.window_of(module), chunk=self.chunk_of(module),
                    capped=self.capped(module), value_dim=self.value_dim_of(module),
                )  # fmt: skip
        given = {*layers, *self.mixers(model)}
        inside = {part for module in given for part in module.modules()}
        for name, module in model.named_modules():
            known = module in inside or not given.isdisjoint(module.modules())
            if "Attention" in type(module).__name__ and not known:
                raise ConfigError(
                    f"module {name} is of class {type(module).__name__}, an attention that the family {self.name} "
                    f"gives no role; add the class in {type(self).__module__} as 'cross' (visual keys, divided by "
                    "frames), 'self' (text over text) or 'local' (nothing exchanged), see docs/adding-a-family.md"
                )
        return layers

    def reach_attention(self, model: nn.Module) -> None:
        """Let attention modules that do not look up transformers' registry call ``exchanged_attention``, and those of
        ``mixers`` take divided text.

        Called once, ahead of everything that wraps those modules.
        """
        return None

    def mixers(self, model: nn.Module) -> dict[nn.Module, AttentionLayer]:
        """Modules that mix tokens outside attention, exchanged by heads as Ulysses exchanges those of self-attention,
        with their sizes: each rank takes a query head or more."""
        return {}

    def recomputed(self, layers: Mapping[nn.Module, AttentionLayer]) -> list[nn.Module]:
        """The modules that project visual keys and attend to them, which policy ``kv`` computes again."""
        return [module for module, layer in layers.items() if layer.role == "cross"]

    @abstractmethod
    def install_hooks(self, model: nn.Module, recomputation: Recomputation) -> None:
        """Register the hooks that fit sharded inputs to the model's own forward.

        They encode the rank's frames in ``batch.portions`` portions; ``recomputation`` says whether a portion that
        trains is computed again in the backward pass.
        """

    def decoder(self, model: nn.Module) -> Any:
        """The module whose ``generate``, that of transformers, runs the decoding steps."""
        return model

    def generates(self, model: nn.Module) -> bool:
        """Whether transformers generates with ``model``, over a cache of its keys and values."""
        return isinstance(self.decoder(model), GenerationMixin)

    @abstractmethod
    def trainable_by_default(self) -> tuple[str, ...]:
        """Parameter-name patterns (``fnmatch``) that a pretrained model trains unless the config says otherwise."""

    # Data

    def positions(self, visual: np.ndarray, shapes: Sequence[FrameShape]) -> np.ndarray:
        """Position ids of a sample's rows ``[..., S]``, int64, or float32 where they have fractions.

        Here their places in the sequence.

        Args:
            visual: int64 ``[S]``, for each row the visual token that it takes, counted over the sample's frames, -1 for
                a row of text; all -1 unless ``keys_in_text``.
            shapes: of the sample's frames.
        """
        return np.arange(len(visual))

    def blocks(
        self, ids: np.ndarray, labels: np.ndarray, visual: np.ndarray, shapes: Sequence[FrameShape]
    ) -> Sequence[tuple[int, int]]:
        """Runs ``[first, last)`` of a sample's rows that see each other in both directions, ascending; here none.

        Args:
            ids, labels: int64 ``[S]``, token ids and labels of the rows themselves.
            visual, shapes: see ``positions``.
        """
        return ()

    def block_arguments(self, in_block: np.ndarray) -> Mapping[str, np.ndarray]:
        """The model's own arguments that say so, ``[B, S]`` each.

        Args:
            in_block: bool ``[B, S]``, rows of a block.
        """
        return {}

    @abstractmethod
    def load_model(self, name: str, dtype: torch.dtype) -> PreTrainedModel:
        """The model of a local path or hub name. Raises ``OSError`` or ``ValueError`` when nothing loads."""


class VisualFamily(Family):
    """Facts of one model family whose models take frames, each an image; see ``Family``.

    Attributes:
        image_token: the token that stands for a frame in the text.
        frame_text: how a conversation writes a frame, its image token included; empty: by that token alone.
        video_token, video_text: likewise of a model that takes a video as such, merging frames of it; empty: frame by
            frame. A token of its own stands for a video only until its parts are written (``video_parts``).
        video_template: chat template of conversations with such videos; empty: the tokenizer's.
        needs_frames: whether the unmodified model fails on a batch without any frame; it is then given a blank one
            that no row sees.
        image_processor: class of the models' image processors; None: transformers looks it up.
        pixels_apart: whether the pixels of a frame are the same whatever frames are beside it, so that threads may
            share the frames of a call of ``pixels`` and ``joined`` puts theirs together.
    """

    image_token: str
    frame_text: str = ""
    video_token: str = ""
    video_text: str = ""
    video_template: str = ""
    needs_frames: bool = False
    pixels_apart: bool = False
    image_processor: Any = None

    def load_model(self, name: str, dtype: torch.dtype) -> PreTrainedModel:
        return AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, trust_remote_code=False)

    def encoder(self, model: nn.Module) -> nn.Module | None:
        """The vision encoder of ``model``, if each of its calls is one of the whole module; None otherwise."""
        named = ((name.rpartition(".")[2], module) for name, module in model.named_modules())
        return next((module for name, module in named if name in ENCODERS), None)

    def token_of(self, tokenizer: Any) -> str:
        """The token of ``tokenizer`` that stands for a frame in the text."""
        return self.image_token

    # Visual tokens

    @abstractmethod
    def frame_tokens(self) -> int:
        """Visual tokens of a frame, as the language model sees it; of the smallest one, where sizes differ."""

    @abstractmethod
    def encoder_tokens(self) -> int:
        """Tokens of such a frame inside the vision encoder, padding included: what encoding it costs."""

    def tile_limits(self, processor: Any) -> tuple[str, ...]:
        """Which of ``TILE_LIMITS`` the family follows with ``processor``."""
        return ()

    def refuse_unheeded(self, processor: Any, limits: FrameLimits) -> None:
        """Raise ``ConfigError`` where ``limits`` asks for what ``tile_limits`` does not have."""
        for name, usual in TILE_LIMITS.items():
            value = getattr(limits, name)
            if value not in (usual, None) and name not in self.tile_limits(processor):
                raise ConfigError(
                    f"'finetuning.{name}' is {value!r}, which {self.name} with a {type(processor).__name__} does not "
                    "follow; leave it out, and change the processor's own settings (preprocessor_config.json) instead"
                )

    def shape_of(self, size: FrameSize | None, processor: Any, limits: FrameLimits) -> FrameShape:
        """What the model makes of a frame. Here: of every frame the same.

        Args:
            size: of its picture; None: not known, a frame of the smallest kind.
            processor: the image processor.
            limits: how large frames may be.
        """
        return FrameShape(self.frame_tokens(), self.encoder_tokens())

    def crops_of(self, size: FrameSize | None, processor: Any, limits: FrameLimits) -> list[FrameShape]:
        """What the model makes of the images that the processor cuts a frame into, numbered as ``FrameShape.crop``.

        Each has an image token of its own, and is encoded by itself. Here: the frame stays whole.
        """
        return [self.shape_of(size, processor, limits)]

    def told(self, shapes: list[FrameShape], sample: Sample, processor: Any) -> list[FrameShape]:
        """``shapes`` of a sample's frames with what the encoder reads of its text (``FrameShape.told``); here nothing.

        Raises:
            SampleError: it is longer than the encoder takes.
        """
        return shapes

    def cut(self, frame: np.ndarray, processor: Any) -> list[np.ndarray]:
        """The images of a uint8 ``[H, W, 3]`` frame that has several, in the order of ``crops_of``."""
        return [frame]

    def write(self, text: str, sizes: Sequence[FrameSize], processor: Any, limits: FrameLimits) -> str:
        """A rendered conversation as the model's own processor writes it: here as it is.

        Args:
            text: with one ``image_token`` for each frame.
            sizes: of all frames; ``text`` may end ahead of the last ones.

        Returns:
            The text with an image token for each of ``crops_of``, and whatever the processor writes around them. What
            it makes of the beginning of a text is the beginning of what it makes of the text.
        """
        return text

    @abstractmethod
    def visual_widths(self) -> tuple[int, ...]:
        """Sizes of a visual token's vectors that are kept once for all layers: feature, and input of the projector."""

    def frame_ranges(self, input_ids: Sequence[int], image_id: int) -> list[tuple[int, int]]:
        """For each text token the half-open range of frames that it sees; empty when it sees none.

        Here: the last group of adjacent image tokens at or before the token.
        """
        ranges, first, last, adjacent = [], 0, 0, False
        for token in input_ids:
            is_image = token == image_id
            if is_image:
                first = first if adjacent else last
                last += 1
            adjacent = is_image
            ranges.append((first, last))
        return ranges

    def hidden_rows_see_all(self) -> bool:
        """Whether a token that sees no frame attends to every key of its sample."""
        return False

    # Videos

    def merged_frames(self) -> int:
        """Frames of a video that the model merges to one, where it takes a video as such."""
        return 1

    def video_parts(self, times: Sequence[float], seconds: float) -> str:
        """The text in the place of ``video_token``: an image token for each part of the video.

        Args:
            times: when the parts are shown, in seconds.
            seconds: that the whole video lasts.
        """
        raise NotImplementedError

    def videos_otherwise(self) -> str:
        """What the model makes of a video itself, where its frames go in as images and that is another way."""
        return ""

    def refuses_videos(self) -> str:
        """Why no video may go in, and what to do; empty: it may."""
        return ""

    def tokens_of_videos(self, tokenizer: Any) -> tuple[str, ...]:
        """Tokens without which a tokenizer writes no video, whose frames then go in one by one."""
        return self.token_of(tokenizer), self.video_token

    def limited(self, processor: Any, limits: FrameLimits) -> Any:
        """The image processor with what it can say of ``limits``, for an export that serves what was trained."""
        return processor

    # Pixels

    def load_processor(self, name: str) -> Any:
        """The image processor of a local path or hub name; raises like ``load_model``."""
        if self.image_processor is not None:
            return self.image_processor.from_pretrained(name)
        return AutoImageProcessor.from_pretrained(name, backend="pil", trust_remote_code=False)

    def complete_processor(self, processor: Any, image_token: str) -> None:
        """Fill in what the model's whole processor, as transformers saves it beside the model, has to know of it.

        Args:
            image_token: the token that stands for a frame, by which the processor finds images in a text.
        """
        return None

    def pixels(
        self, frames: Sequence[np.ndarray], shapes: Sequence[FrameShape], processor: Any
    ) -> Mapping[str, Tensor]:
        """The model's pixel arguments, ``[1, frames, ...]``, for frames of such shapes.

        Args:
            frames: uint8 ``[H, W, 3]``, or ``[merged, H, W, 3]`` of a part of a video; of a frame that has been cut,
                each of its images.
        """
        return {"pixel_values": processor(list(frames), return_tensors="pt")["pixel_values"][None]}

    def joined(self, parts: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """``pixels`` of all frames of what it made of parts of them; with ``pixels_apart``."""
        return {key: torch.cat([part[key] for part in parts], dim=1) for key in parts[0]}

    def blank_pixels(self) -> Mapping[str, Tensor]:
        """Pixel arguments of one blank frame, for a rank that has none."""
        vision = self.config.vision_config
        return {"pixel_values": torch.zeros(1, 1, vision.num_channels, vision.image_size, vision.image_size)}

    def blank(self, processor: Any, limits: FrameLimits) -> Mapping[str, Tensor]:
        """The same, where it takes the image processor to make them."""
        return self.blank_pixels()

    # The unmodified model, without exchange

    def fit_unattached(self, model: nn.Module) -> None:
        """Let ``model`` take what ``pixels`` gives and its own code does not; it may have been called before."""
        return None

    def prompt_arguments(self, positions: np.ndarray) -> Mapping[str, Tensor]:
        """What its ``generate`` wants of prompts beside tokens and pixels.

        Args:
            positions: int64 ``[..., B, S]``, those of the prompts; see ``Family.positions``.
        """
        return {}

    def pad_tiles(self, pixels: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """``pixels`` with the blank tiles that the unmodified model wants beside a frame's own.

        With ``keys_in_text``, pixels of the frames of all samples, as the model wants them: without a batch dimension.
        """
        return pixels

    @abstractmethod
    def dense_mask(
        self, ranges: Sequence[Sequence[tuple[int, int]]], shapes: Sequence[Sequence[FrameShape]]
    ) -> Mapping[str, Tensor]:
        """The model's own dense mask argument for ``frame_ranges`` of each sample, and the shapes of its frames."""


def portions_of(costs: Sequence[int]) -> int:
    """In how many portions a vision encoder takes frames of such ``encoder_tokens``, in their order; at least one."""
    portions, filled = 1, 0
    for cost in costs:
        if filled and filled + cost > TOKENS_AT_ONCE:
            portions, filled = portions + 1, 0
        filled += cost
    return portions


def dense_frame_mask(ranges: Sequence[Sequence[tuple[int, int]]], frames: int) -> Tensor:
    """``frame_ranges`` of each sample as int64 ``[B, S, frames]``, 1 where a token sees a frame."""
    mask = torch.zeros(len(ranges), max(len(sample) for sample in ranges), frames, dtype=torch.long)
    for sample, rows in enumerate(ranges):
        for token, (first, last) in enumerate(rows):
            mask[sample, token, first:last] = 1
    return mask
