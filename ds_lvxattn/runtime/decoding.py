"""Attention of a decoding step: one new token a sample, the same on every rank, over keys that stay where they are.

Keys and values that the prefill left divided over the ranks never move. The new tokens are on every rank, so only
partial results travel (``queries="replicated"``), one small message a layer. Where visual tokens are keys of their own,
the text is short, so every rank has all of its keys and values, and its self-attention exchanges nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from ds_lvxattn.exchange.attention import sp_attention
from ds_lvxattn.exchange.comm import Communicator
from ds_lvxattn.exchange.interval import KVInterval
from ds_lvxattn.exchange.merge_attention import merge_attention
from ds_lvxattn.exchange.shards import ShardLayout
from ds_lvxattn.plan.layer_plan import LayerPlan
from ds_lvxattn.runtime.one_sequence import as_one_sequence, by_sample

KeyCache = dict[nn.Module, tuple[Tensor, Tensor]]
# Of modules that mix tokens outside attention, with a state that goes on from token to token: what a convolution
# reaches back to, ``[B, channels, kernel]``, and the state of a recurrence, ``[B, H, D, D_v]``, if there is one.
MixerStates = dict[nn.Module, tuple[Tensor, Tensor | None]]


class NewTokens(DynamicLayer):
    """A layer of the model's cache that holds the new tokens alone, behind a prompt whose keys are divided.

    Args:
        before: tokens of the prompt that it counts as its own.
    """

    def __init__(self, before: int) -> None:
        super().__init__()
        self.before = before

    def get_seq_length(self) -> int:
        """Tokens so far, those of the prompt included."""
        return self.before + super().get_seq_length()


@dataclass(frozen=True)
class DecodingStep:
    """The argument ``sequence_parallel`` of a forward that takes one new token a sample.

    Attributes:
        comm: communicator of the sequence-parallel group.
        plans: tells the role and the sliding window of each attention module.
        kernel: local attention kernel.
        divided: for the modules whose keys stay divided, this rank's keys and values ``[B, H_kv, s_kv, D]``; of
            cross-attention ``[1, H_kv, s_kv, D]``, those of all samples.
        layout: the query rows, the same on every rank, over the divided keys of all: one, or in cross-attention those
            of all samples.
        interval: the divided keys that the new tokens see, ``[1, B, 1]`` or ``[1, 1, B]``, apart from a sliding window;
            None when they see all.
        text_start: int32 ``[B, 1]``, the first key of each sample's text in self-attention over the whole text, behind
            its padding; None without padding.
        sees_frame: ``[B, 1, 1, 1]`` in the model's dtype, 1 for samples whose new tokens see a frame.
        position: int64 ``[..., B, 1]``, position ids of the first new token.
        position_ids: those of the new token at hand; None ahead of the first one.
        first_start: int32 ``[1, B, 1]``, the first key that the first new token, the last one of the prompt, sees in
            spite of a sliding window: where it is of a block that does (``Family.blocks_in_window``); None: of none.
    """

    comm: Communicator
    plans: Mapping[nn.Module, LayerPlan]
    kernel: str
    divided: KeyCache
    layout: ShardLayout
    interval: KVInterval | None
    text_start: Tensor | None
    sees_frame: Tensor
    position: Tensor
    first_start: Tensor | None = None
    position_ids: Tensor | None = None

    brings_frames: ClassVar[bool] = False

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attention of the new tokens, ``query [B, H_q, 1, D]``, and its log-sum-exp.

        Args:
            key, value: ``[B, H_kv, s, D]``: in cross-attention not read; in self-attention of the whole text, or of
                the new tokens where those of the prompt are divided.

        Raises:
            ValueError: more than one new token a sample.
        """
        if query.shape[2] != 1:
            raise ValueError(f"a decoding step has {query.shape[2]} new tokens a sample; generate one at a time")
        plan = self.plans[module]
        if plan.role == "cross":
            out, lse = self._over_divided(module, as_one_sequence(query), self.interval, scale, softcap)
            return by_sample(out, query.shape[0]), by_sample(lse, query.shape[0])
        if module not in self.divided:
            return self._over_text(query, key, value, plan.window, scale, softcap)
        interval = self.interval
        if plan.window is not None and interval is not None:
            # The prompt ends ahead of the new tokens, of which ``key`` has all.
            start = torch.maximum(interval.start, interval.stop - max(plan.window - key.shape[2], 0))
            if self.first_start is not None and key.shape[2] == 1:
                start = torch.minimum(start, self.first_start)
            interval = KVInterval(start, interval.stop)
            key, value = key[:, :, -plan.window :], value[:, :, -plan.window :]
        own = None
        if plan.chunk is not None and interval is not None:
            place = interval.stop + key.shape[2] - 1  # of this token in its sample
            first = place - place % plan.chunk
            interval = KVInterval(torch.maximum(interval.start, torch.minimum(first, interval.stop)), interval.stop)
            start = (first - interval.stop).clamp(min=0)[0]
            own = KVInterval(start, torch.full_like(start, key.shape[2]))
        before = self._over_divided(module, query, interval, scale, softcap)
        new = sp_attention(query, key, value, interval=own, scale=scale, softcap=softcap, kernel=self.kernel)
        return merge_attention([before, new])

    def _over_divided(
        self,
        module: nn.Module,
        query: Tensor,
        interval: KVInterval | None,
        scale: float | None,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor]:
        key, value = self.divided[module]
        return sp_attention(
            query, key, value, group=self.comm.group, queries="replicated", interval=interval, scale=scale,
            softcap=softcap, kernel=self.kernel, shards=self.layout,
        )  # fmt: skip

    def _over_text(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        window: int | None,
        scale: float | None,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor]:
        out_of_sight = 0 if window is None else max(key.shape[2] - window, 0)
        key, value = key[:, :, out_of_sight:], value[:, :, out_of_sight:]
        interval = None
        if self.text_start is not None:
            start = (self.text_start - out_of_sight).clamp(min=0)
            interval = KVInterval(start, torch.full_like(start, key.shape[2]))
        return sp_attention(query, key, value, interval=interval, scale=scale, softcap=softcap, kernel=self.kernel)
