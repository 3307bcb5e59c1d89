"""What modules have in common in which a causal convolution along the text, channel by channel, leads to a recurrence
over it, head by head: both for a share of the heads, exchanged as in ``exchange/sequence_mixing.py``.

Some of what the convolution takes belongs to the heads of the recurrence (values), some to heads that equally many of
those read (keys, or groups). Ranks share the former, and each gets the latter that its own read, as in Ulysses. A rank
takes its heads' part of the parameters too, so that their gradients are parts that add up over the ranks, as those of
all parameters do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ds_lvxattn.exchange.sequence_mixing import heads_of_all_ranks, last_tokens, mixed_by_heads, of_documents
from ds_lvxattn.plan.head_shards import head_shards
from ds_lvxattn.runtime.batch import SequenceParallelBatch


@dataclass(frozen=True)
class Channels:
    """A part of the channels of a convolution, one behind another in its order.

    Attributes:
        heads, size: how many heads they are of, and channels of each.
        read: whether heads of the recurrence read them; otherwise they are those heads.
    """

    heads: int
    size: int
    read: bool


class HeadMixer(ABC):
    """Convolution and recurrence of a module over the text of a batch, for this rank's heads.

    Args:
        module: the module, with ``conv1d``, ``conv_kernel_size`` and ``activation``.
        channels: parts of what its convolution takes.
        size: numbers of each head in what the recurrence gives.
        convolve: ``(x [B, C, S], weight, bias, activation=...)``, causal.
        repeats: whether the recurrence wants the heads that others read once for each of those.
        batch: the batch.

    Attributes:
        values: heads of the recurrence that each rank has.
        own: those of this rank.
    """

    def __init__(
        self,
        module: Any,
        channels: Sequence[Channels],
        size: int,
        convolve: Callable[..., Tensor],
        repeats: bool,
        batch: SequenceParallelBatch,
    ) -> None:
        self.module, self.channels, self.size, self.convolve, self.batch = module, channels, size, convolve, batch
        heads = {part.read: part.heads for part in channels}
        shards = head_shards(heads[False], heads[True], batch.comm.ranks)
        self.keys, self.values = tuple(x.keys for x in shards), tuple(x.queries for x in shards)
        self.share = shards[batch.comm.rank]
        self.own = slice(self.share.queries.start, self.share.queries.stop)
        # Where runs of heads differ, the function could not do it.
        several = len(self.share.queries) > len(self.share.keys)
        self.repeats = len(self.share.parts) > 1 or (several and repeats)
        convolution: nn.Conv1d = module.conv1d
        self.weights = self._of_own(convolution.weight.squeeze(1))
        bias = convolution.bias
        self.biases: Sequence[Tensor | None] = [None] * len(channels) if bias is None else self._of_own(bias)
        self.states: list[tuple[list[Tensor], Tensor]] = []

    @abstractmethod
    def recur(self, channels: Sequence[Tensor], rates: Tensor, keeps: bool) -> tuple[Tensor, Tensor | None]:
        """The recurrence over a text, for this rank's heads, from a state of zeros.

        Args:
            channels: of each part, ``[B, S, heads, size]``, convolved.
            rates: ``[B, S, heads, n]``, the same of what is not convolved.
            keeps: whether to give the state behind the last token.

        Returns:
            ``[B, S, heads, size]`` and, where it is kept, the state.
        """

    @property
    @abstractmethod
    def sizes_of_state(self) -> tuple[int, int]:
        """Sizes of the state of a head, which is float32."""

    def mixed(self, channels: Sequence[Tensor], rates: Tensor) -> Tensor:
        """What the recurrence makes of the rank's tokens, with all heads.

        Args:
            channels: of each part, ``[B, s, heads, size]``.
            rates: ``[B, s, heads, n]``.

        Returns:
            ``[B, s, heads, size]``.
        """
        tensors = [x.transpose(1, 2) for x in (*channels, rates)]
        heads = [*map(self._of_ranks, self.channels), self.values]
        out = mixed_by_heads(tensors, heads, (self.values, self.size), self.batch.mixed_rows, self._mix)
        if self.batch.states is not None:
            self.batch.states[self.module] = self._all_states(tensors)
        return out.transpose(1, 2)

    def _of_ranks(self, part: Channels) -> tuple[range, ...]:
        """Heads of a part that each rank has."""
        return self.keys if part.read else self.values

    def _of_own(self, parameter: Tensor) -> list[Tensor]:
        """``[C, ...]`` of the convolution, of this rank's channels part by part."""
        found = []
        parts = parameter.split([part.heads * part.size for part in self.channels])
        for part, some in zip(self.channels, parts, strict=True):
            own = self._of_ranks(part)[self.batch.comm.rank]
            found.append(some[own.start * part.size : own.stop * part.size])
        return found

    def _mix(self, *tensors: Tensor) -> Tensor:
        """Channels and rates ``[B, heads, S, size]`` of this rank's heads to what the recurrence makes of them."""
        keeps = self.batch.states is not None
        *channels, rates = tensors
        convolved = [
            self._repeated(x) if part.read and self.repeats else x
            for part, x in zip(self.channels, map(self._convolved, channels, self.weights, self.biases), strict=True)
        ]
        out, state = self.recur(convolved, rates.transpose(1, 2), keeps)
        if state is not None:
            self.states.append(([last_tokens(x, self.module.conv_kernel_size) for x in channels], state))
        return out.transpose(1, 2)

    def _convolved(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``x [B, heads, S, size]``, convolved along ``S``, as ``[B, S, heads, size]``."""
        sizes = x.shape[1], x.shape[3]
        made = self.convolve(x.transpose(2, 3).flatten(1, 2), weight, bias, activation=self.module.activation)
        return made.unflatten(1, sizes).permute(0, 3, 1, 2)

    def _repeated(self, x: Tensor) -> Tensor:
        """Heads of ``x [B, S, heads, size]`` that others read, once for each of those."""
        parts = self.share.parts
        runs = zip(x.split([keys for _, keys in parts], dim=2), parts, strict=True)
        return torch.cat([run.repeat_interleave(values // keys, dim=2) for run, (values, keys) in runs], dim=2)

    def _all_states(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Behind each document, on every rank: the last channels ``[B, C, kernel]`` that the convolution took, and the
        state of the recurrence ``[B, H, ...]``.

        Args:
            tensors: of the rank's tokens with all heads.
        """
        comm, documents, kernel = self.batch.comm, self.batch.documents, self.module.conv_kernel_size
        assert documents is not None
        tails = []
        for place, part in enumerate(self.channels):
            heads = self._of_ranks(part)
            nothing = tensors[place].new_zeros(1, len(heads[comm.rank]), kernel, part.size)
            own = of_documents([made[place] for made, _ in self.states], documents, nothing)
            tails.append(heads_of_all_ranks(own, heads, comm).transpose(2, 3).flatten(1, 2))
        nothing = tensors[0].new_zeros(1, len(self.share.queries), *self.sizes_of_state, dtype=torch.float32)
        state = of_documents([state for _, state in self.states], documents, nothing)
        return torch.cat(tails, dim=1), heads_of_all_ranks(state, self.values, comm)
