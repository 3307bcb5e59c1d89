"""What the small models have in common: sizes, tokens, and weights from a seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ds_lvxattn.needle.task import BOS, EOS, IMAGE, PAD, VOCABULARY, NeedleTask

SIZE = NeedleTask().image_size
SQUARE = {"height": SIZE, "width": SIZE}
IMAGE_ID = VOCABULARY.index(IMAGE)
PIXELS: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
TOKENS: dict[str, Any] = {
    "bos_token_id": VOCABULARY.index(BOS),
    "eos_token_id": VOCABULARY.index(EOS),
    "pad_token_id": VOCABULARY.index(PAD),
}
HEADS, KV_HEADS = 4, 2  # of the language models


@dataclass(frozen=True)
class Scale:
    """What the sizes of a small model follow from.

    Attributes:
        width, layers: of the language model, whose feed-forward layers are twice as wide.
        vision_width, vision_heads: of the vision encoder, likewise.
        spread: standard deviation of random weights. Near ``width ** -0.5`` it keeps activations at unit scale; the
            usual 0.02 suits widths of thousands.
        positions: longest text.
    """

    width: int = 96
    layers: int = 4
    vision_width: int = 96
    vision_heads: int = 4
    spread: float = 0.1
    positions: int = 4096

    @property
    def text(self) -> dict[str, Any]:
        """Sizes of a language model, under the names that most configs have for them."""
        return {
            "vocab_size": len(VOCABULARY), "hidden_size": self.width, "intermediate_size": 2 * self.width,
            "num_hidden_layers": self.layers, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
            "max_position_embeddings": self.positions, "initializer_range": self.spread, **TOKENS,
        }  # fmt: skip

    @property
    def vision(self) -> dict[str, Any]:
        """Sizes of a vision encoder, which makes four patches of a frame."""
        return {
            "hidden_size": self.vision_width, "intermediate_size": 2 * self.vision_width,
            "num_attention_heads": self.vision_heads, "image_size": SIZE, "patch_size": SIZE // 2,
        }  # fmt: skip


def random(build: Callable[[], Any], seed: int) -> Any:
    """What ``build`` makes with the random numbers of ``seed``; the caller's random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()
