"""What the integration must know of a model family.

A family is one file: which modules play which role, how key ranges follow from the text, how images become the
model's pixel arguments, and which hooks fit sharded inputs to the unmodified model code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

from ds_lvxattn.plan.plan import AttentionLayer
from ds_lvxattn.recompute import Recomputation


class Family(Protocol):
    """Facts of one model family. ``model_config`` is the model's transformers config.

    Attributes:
        name: how errors call it.
        attention_config: the sub-config (a key of ``model_config.sub_configs``) whose attention is exchanged.
    """

    name: str
    attention_config: str

    def matches(self, model: nn.Module) -> bool:
        """Whether ``model`` belongs to the family."""

    def attention_layers(self, model: nn.Module) -> dict[nn.Module, AttentionLayer]:
        """Every attention module of ``model`` with its role and sizes."""

    def install_hooks(self, model: nn.Module, recomputation: Recomputation) -> None:
        """Register the hooks that fit sharded inputs to the model's own forward.

        They encode the rank's frames in ``batch.portions`` portions; ``recomputation`` says whether a portion that
        trains is computed again in the backward pass.
        """

    def frame_tokens(self, model_config: Any) -> int:
        """Visual tokens of a frame."""

    def visual_widths(self, model_config: Any) -> tuple[int, ...]:
        """Sizes of a visual token's vectors that are kept once for all layers: feature, and input of the projector."""

    def frames_at_once(self, model_config: Any) -> int:
        """Frames of a portion, at most: what the vision encoder takes at once."""

    def frame_ranges(self, input_ids: Sequence[int], model_config: Any) -> list[tuple[int, int]]:
        """For each text token the half-open range of frames that it sees; empty when it sees none."""

    def hidden_rows_see_all(self) -> bool:
        """Whether a token that sees no frame attends to every key (and its feed-forward output is dropped)."""

    def pixels(self, frames: Sequence[np.ndarray], processor: Any, model_config: Any) -> Mapping[str, Tensor]:
        """The model's pixel arguments, ``[1, frames, 1, ...]``, for uint8 ``[H, W, 3]`` frames: one tile a frame."""

    def pad_tiles(self, pixels: Mapping[str, Tensor], model_config: Any) -> Mapping[str, Tensor]:
        """``pixels`` with the blank tiles that the unmodified model wants beside a frame's own."""

    def blank_pixels(self, model_config: Any) -> Mapping[str, Tensor]:
        """Pixel arguments of one blank frame, for a rank that has none."""

    def dense_mask(
        self, ranges: Sequence[Sequence[tuple[int, int]]], frames: int, model_config: Any
    ) -> Mapping[str, Tensor]:
        """The model's own dense mask argument for ``frame_ranges`` of each sample: the path without exchange."""

    def trainable_by_default(self, model_config: Any) -> tuple[str, ...]:
        """Parameter-name patterns (``fnmatch``) that a pretrained model trains unless the config says otherwise."""
