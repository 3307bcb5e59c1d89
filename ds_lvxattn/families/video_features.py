"""Models that are given a ``get_image_features`` which takes frames of videos too, each frame one square.

Of itself such a model takes videos by another function, and those of a batch only if they are equally long.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from ds_lvxattn.families.image_features import ImageFeatures
from ds_lvxattn.runtime.recompute import Recomputation


class Features:
    """``get_image_features`` of a model, which also takes pictures of other kinds; a family writes its ``__call__``.

    Called as by the model's forward with what the model's own processor made, it is the model's own.

    Args:
        inner: the module inside the model for conditional generation.
    """

    def __init__(self, inner: Any) -> None:
        self.inner, self.own = inner, inner.get_image_features

    def squares(self, size: Sequence[int]) -> int:
        """Squares of an image of that height and width, cut as one that is alone in its row."""
        config = self.inner.config
        return image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)


class VideoFeatures(ImageFeatures):
    """A family whose model has such ``Features``, attached or not; see ``ImageFeatures``."""

    video_token = video_text = "<video>"
    features: type[Features]

    def install_hooks(self, model: nn.Module, recomputation: Recomputation) -> None:
        self.fit_unattached(model)
        super().install_hooks(model, recomputation)

    def fit_unattached(self, model: nn.Module) -> None:
        inner: Any = model.get_submodule("model")
        if not isinstance(inner.get_image_features, self.features):
            inner.get_image_features = self.features(inner)

    def video_parts(self, times: Sequence[float], seconds: float) -> str:
        return self.image_token * len(times)
