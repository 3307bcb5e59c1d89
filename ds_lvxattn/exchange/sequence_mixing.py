"""Tokens that are mixed outside attention (linear attention, convolutions along the text), by heads.

What a recurrence makes of a token follows from all tokens ahead of it, head by head. So the ranks exchange shards of
the sequence for shards of the heads, as DeepSpeed-Ulysses does: each rank mixes all tokens for its heads, and gets the
results of its own tokens back. Ranks may hold any numbers of tokens and heads (``exchange/uneven_heads.py``).

Documents that share a row are mixed apart from one another. What pads a row stands behind its last document, so that
nothing of it reaches a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ds_lvxattn.exchange.comm import Communicator
from ds_lvxattn.exchange.shards import SequenceShards
from ds_lvxattn.exchange.uneven_heads import head_division, redistribute

# Row of the batch, first token and end of a document.
Document = tuple[int, int, int]
Heads = tuple[range, ...]  # of every rank, ascending; ranks may share some of an input


class MixedRows(NamedTuple):
    """Which tokens there are, and who holds them.

    Attributes:
        comm: of the ranks that share the sequence; a single one sends nothing.
        shards: of the rows of the batch.
        documents: that share rows, row by row and in their order, from the first token of the row on and side by side;
            None: a row is one.
    """

    comm: Communicator
    shards: SequenceShards
    documents: tuple[Document, ...] | None = None


def mixed_by_heads(
    tensors: Sequence[Tensor],
    heads: Sequence[Heads],
    result: tuple[Heads, int],
    rows: MixedRows,
    mix: Callable[..., Tensor],
) -> Tensor:
    """What ``mix`` makes of the rank's tokens; differentiable, one exchange each way.

    Args:
        tensors: ``[B, H, s, D]`` each, the rank's own tokens with all heads, in one dtype.
        heads: of each of them, those that each rank mixes.
        result: heads of each rank in what ``mix`` gives, each on one rank, and their size ``D'``.
        mix: takes ``[B, heads, S, D]`` of each tensor, tokens in the order of the sequence; gives
            ``[B, heads, S, D']`` in the same dtype. Called once, or for each document that is not empty.

    Returns:
        ``[B, H', s, D']``, the rank's own tokens with all heads; zeros for what pads rows behind their documents.
    """
    comm, shards = rows.comm, rows.shards
    heads_of_result, size = result
    shape = tensors[0].shape[0], len(heads_of_result[comm.rank]), shards.total, size
    if comm.ranks == 1:
        return _apart(tensors, shape, rows.documents, mix)
    members, device = range(comm.ranks), tensors[0].device
    divisions = [head_division(of_tensor, shards, members, device) for of_tensor in heads]
    own = redistribute(comm, ["mixer inputs"] * len(tensors), divisions, True, *tensors)
    out = _apart(own, shape, rows.documents, mix)
    back = head_division(heads_of_result, shards, members, device)
    return redistribute(comm, ["mixer outputs"], [back], False, out)[0]


def heads_of_all_ranks(x: Tensor, heads: Heads, comm: Communicator) -> Tensor:
    """``[B, H, ...]`` on every rank, of which each rank has ``x [B, heads, ...]``."""
    if comm.ranks == 1:
        return x
    missing = max(map(len, heads)) - x.shape[1]
    gathered = comm.all_gather(pad(x, [0, 0] * (x.dim() - 2) + [0, missing]), "mixer states")
    parts, end = [], 0
    for of_rank, part in zip(heads, gathered, strict=True):
        first = max(end, of_rank.start)
        parts.append(part[:, first - of_rank.start : len(of_rank)])
        end = of_rank.stop
    return torch.cat(parts, dim=1)


def last_tokens(x: Tensor, count: int) -> Tensor:
    """The last ``count`` tokens of ``x [B, heads, S, D]``, zeros ahead of the first one."""
    return pad(x[:, :, -count:], (0, 0, max(count - x.shape[2], 0), 0))


def of_documents(made: Sequence[Tensor], documents: Sequence[Document], nothing: Tensor) -> Tensor:
    """``[documents, ...]``: what was made of each that is not empty, ``[1, ...]``, and ``nothing`` for the others."""
    found = iter(made)
    return torch.cat([next(found) if first < end else nothing for _, first, end in documents])


def _apart(
    tensors: Sequence[Tensor],
    shape: tuple[int, int, int, int],
    documents: tuple[Document, ...] | None,
    mix: Callable[..., Tensor],
) -> Tensor:
    """``mix`` of whole rows, or of each document by itself: ``shape`` is that of the result."""
    if documents is None:
        return mix(*tensors)
    batch, heads, total, size = shape
    lengths: list[list[int]] = [[] for _ in range(batch)]
    for row, first, end in documents:
        lengths[row].append(end - first)
    mixed = []
    # Splits, whose backward pass is one concatenation each, where a slice's fills a whole tensor.
    for of_row, own in zip(lengths, zip(*(x.split(1) for x in tensors), strict=True), strict=True):
        behind = total - sum(of_row)
        parts = zip(*(x.split([*of_row, behind], dim=2) for x in own), strict=True)
        made = [mix(*part) for part, length in zip(parts, of_row, strict=False) if length]
        mixed.append(torch.cat([*made, own[0].new_zeros(1, heads, behind, size)], dim=2))
    return torch.cat(mixed)
