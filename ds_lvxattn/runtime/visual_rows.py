"""Visual tokens that stand in the text: from the ranks that encode their frames to the ranks that hold their rows.

Models that concatenate (LLaVA and its kin) put the visual tokens of a frame in the place of its image token. A frame
is encoded as a whole, on one rank, while its rows are divided as text is, so once a batch the features travel to their
rows: one all-to-all forward, and one backward with their gradients. Which row takes which token is known on every
host, so the sizes need no exchange.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ds_lvxattn.exchange.comm import AllToAllTensor, Communicator
from ds_lvxattn.exchange.shards import SequenceShards


@dataclass(frozen=True)
class VisualRows:
    """What one rank sends to the rows of all ranks, and where it puts what arrives.

    Attributes:
        sent, received: visual tokens to and from each rank; those that stay count at the own place.
        tokens: int64 ``[sum(sent)]``, which of the tokens that this rank encodes it sends, rank by rank.
        rows: int64 ``[sum(received)]``, the row of each token that arrives, counted over the batch: row ``i`` of
            sample ``b`` is ``b * s + i``.
    """

    sent: tuple[int, ...]
    received: tuple[int, ...]
    tokens: Tensor
    rows: Tensor

    @classmethod
    def build(
        cls, holder: np.ndarray, token: np.ndarray, text: SequenceShards, rank: int, device: torch.device
    ) -> VisualRows:
        """What ``rank`` sends and receives; within a pair of ranks, tokens travel in the order of their rows.

        Args:
            holder: int64 ``[B, S]``, the rank that encodes the visual token of each row, -1 for rows of text.
            token: int64 ``[B, S]``, the number of that token among those that its rank encodes.
            text: shards of the rows.
            rank: rank in the sequence-parallel group.
            device: where the tensors go.
        """
        sent, tokens = [], []
        for to in range(text.ranks):
            rows = text.index(to)
            mine = token[:, rows][holder[:, rows] == rank]
            sent.append(len(mine))
            tokens.append(mine)
        sources = holder[:, text.index(rank)].reshape(-1)
        received = np.bincount(sources[sources >= 0], minlength=text.ranks)
        arriving = np.argsort(sources, kind="stable")[len(sources) - received.sum() :]
        return cls(
            tuple(sent),
            tuple(received.tolist()),
            torch.from_numpy(np.concatenate(tokens)).to(device, non_blocking=True),
            torch.from_numpy(arriving).to(device, non_blocking=True),
        )

    def place(self, text: Tensor, visual: Tensor, comm: Communicator) -> Tensor:
        """``text`` with the visual tokens of its rows; every rank of the group takes part, with or without tokens.

        Args:
            text: ``[B, s, d]``, embeddings of the rank's rows; those of visual tokens are replaced.
            visual: ``[tokens, d]`` or ``[frames, tokens of a frame, d]``, what this rank encoded.
            comm: communicator of the sequence-parallel group.

        Returns:
            ``[B, s, d]``, differentiable in ``text`` and ``visual``.
        """
        arrived = self.travel(visual.to(text.dtype), comm)
        return text.flatten(0, 1).index_copy(0, self.rows, arrived).view_as(text)

    def fetch(self, visual: Tensor, comm: Communicator) -> Tensor:
        """The visual tokens of the rank's rows, ``[sum(received), d]``, in the order of the rows; see ``place``.

        For a model that puts them into its text itself.
        """
        return self.travel(visual, comm).index_select(0, self.rows.argsort())

    def travel(self, visual: Tensor, comm: Communicator) -> Tensor:
        """The visual tokens of the rank's rows, ``[sum(received), d]``, in the order of ``rows``; see ``place``."""
        leaving = visual.reshape(-1, visual.shape[-1]).index_select(0, self.tokens)
        return _Travel.apply(leaving, comm, self.sent, self.received)


class _Travel(torch.autograd.Function):
    """Rows to the ranks that need them; their gradients go the same way back."""

    @staticmethod
    def forward(ctx, x: Tensor, comm: Communicator, sent: tuple[int, ...], received: tuple[int, ...]) -> Tensor:
        ctx.comm, ctx.sizes = comm, (sent, received)
        return _exchange(x, comm, sent, received, "visual rows")

    @staticmethod
    def backward(ctx, grad: Tensor):
        sent, received = ctx.sizes
        return _exchange(grad, ctx.comm, received, sent, "visual row gradients"), None, None, None


def _exchange(x: Tensor, comm: Communicator, sent: tuple[int, ...], received: tuple[int, ...], what: str) -> Tensor:
    if comm.ranks == 1:
        return x  # every row takes a token of this rank
    arriving = x.new_empty((sum(received), *x.shape[1:]))
    comm.start_all_to_all([AllToAllTensor(what, x.contiguous(), arriving, (sent, received))]).wait()
    return arriving
