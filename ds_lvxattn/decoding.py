"""Attention of a decoding step: one new token a sample, the same on every rank, over keys that stay where they are.

The visual keys and values that the prefill computed lie on the ranks of their frames and never move. The new tokens are
on every rank, so only partial results travel (``queries="replicated"``), one small message a cross-attention layer. The
text is short: every rank keeps all of its keys and values, and its self-attention exchanges nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ds_lvxattn.attention import sp_attention
from ds_lvxattn.comm import Communicator
from ds_lvxattn.interval import KVInterval
from ds_lvxattn.plan.plan import LayerPlan
from ds_lvxattn.shards import ShardLayout

VisualCache = dict[nn.Module, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class DecodingStep:
    """The argument ``sequence_parallel`` of a forward that takes one new token a sample.

    Attributes:
        comm: communicator of the sequence-parallel group.
        plans: tells the role of each attention module.
        kernel: local attention kernel.
        visual: for each cross-attention module, this rank's keys and values ``[B, H_kv, s_kv, D]``.
        layout: one query row on every rank over the visual keys of all.
        interval: the visual keys that the new tokens see, ``[1, B, 1]``; None when they see all.
        text_start: int32 ``[B, 1]``, the first key of each sample's text, behind its padding; None without padding.
        sees_frame: ``[B, 1, 1, 1]`` in the model's dtype, 1 for samples whose new tokens see a frame.
    """

    comm: Communicator
    plans: Mapping[nn.Module, LayerPlan]
    kernel: str
    visual: VisualCache
    layout: ShardLayout
    interval: KVInterval | None
    text_start: Tensor | None
    sees_frame: Tensor

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Attention of the new tokens, ``query [B, H_q, 1, D]``.

        Args:
            key, value: ``[B, H_kv, s, D]`` of the whole text in self-attention; not read in cross-attention, which
                uses those of the prefill.

        Raises:
            ValueError: more than one new token a sample.
        """
        if query.shape[2] != 1:
            raise ValueError(f"a decoding step has {query.shape[2]} new tokens a sample; generate one at a time")
        if self.plans[module].role == "self":
            interval = None
            if self.text_start is not None:
                interval = KVInterval(self.text_start, torch.full_like(self.text_start, key.shape[2]))
            return sp_attention(query, key, value, interval=interval, scale=scale, kernel=self.kernel)[0]
        key, value = self.visual[module]
        return sp_attention(
            query, key, value, group=self.comm.group, queries="replicated", interval=self.interval, scale=scale,
            kernel=self.kernel, shards=self.layout,
        )[0]  # fmt: skip
