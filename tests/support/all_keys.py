"""The torch side of the mode ``all_keys``: keys and values of all ranks are gathered on each; queries stay."""

from typing import Sequence

import torch
from torch import Tensor

from ds_lvxattn.exchange.arguments import Exchange
from ds_lvxattn.exchange.comm import AllToAllTensor, Communicator, communicator_by_name
from ds_lvxattn.exchange.shards import SequenceShards
from ds_lvxattn.kernels.differentiable import attention_operator
from ds_lvxattn.kernels.local import BackwardPass, LocalAttention


def all_keys_attention(q: Tensor, k: Tensor, v: Tensor, exchange: Exchange) -> tuple[Tensor, Tensor]:
    """Attention of the rank's rows over the keys of all ranks; see ``exchange.arguments``."""
    keys = exchange.layout.kv
    return _operator(
        q, k, v, *exchange.own_ranges(q.shape[2]), *exchange.settings, exchange.comm.name, keys.lengths,
        keys.deal,
    )  # fmt: skip


def _order(keys: SequenceShards, device: torch.device) -> Tensor:
    """Where each global key lies among the shards, rank by rank and padded."""
    order = keys.order_from_padded()
    return torch.arange(keys.total, device=device) if order is None else torch.tensor(order, device=device)


def _gathered(k: Tensor, v: Tensor, keys: SequenceShards, comm: Communicator) -> list[Tensor]:
    """K and V of all ranks in the global order, ``[B, H_kv, S_kv, D]`` and ``[B, H_kv, S_kv, D_v]``."""
    both = torch.cat((k, v), dim=3).movedim(2, 0)  # keys first
    padded = both.new_zeros((keys.longest, *both.shape[1:]))
    padded[: len(both)] = both
    whole = comm.all_gather(padded, "keys and values").flatten(0, 1)
    whole = whole.index_select(0, _order(keys, k.device)).movedim(0, 2)
    return list(whole.split([k.shape[3], v.shape[3]], dim=3))


def all_keys(
    q: Tensor, k: Tensor, v: Tensor, local: LocalAttention, group: str, kv_lengths: Sequence[int],
    kv_deal: Sequence[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Forward pass; ``local`` has the ranges of the own rows."""
    keys, comm = SequenceShards.of_deal(kv_lengths, kv_deal), communicator_by_name(group)
    return local.forward(q, *_gathered(k, v, keys, comm))


def all_keys_backward(
    given: BackwardPass, group: str, kv_lengths: Sequence[int], kv_deal: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward pass: gradients of other ranks' keys go home and are added up there."""
    keys, comm = SequenceShards.of_deal(kv_lengths, kv_deal), communicator_by_name(group)
    dq, *parts = given.of_own_rows(*_gathered(given.k, given.v, keys, comm))
    both = torch.cat(parts, dim=3).to(given.lse.dtype).movedim(2, 0)
    wire = both.new_zeros((keys.ranks * keys.longest, *both.shape[1:]))
    wire[_order(keys, dq.device)] = both
    home = torch.empty_like(wire)
    comm.start_all_to_all([AllToAllTensor("key and value gradients", wire, home)]).wait()
    summed = home.unflatten(0, (keys.ranks, -1)).sum(dim=0)[: given.k.shape[2]].movedim(0, 2)
    dk, dv = summed.split([given.k.shape[3], given.v.shape[3]], dim=3)
    return dq, dk, dv


_operator = attention_operator("all_keys", all_keys, all_keys_backward)
