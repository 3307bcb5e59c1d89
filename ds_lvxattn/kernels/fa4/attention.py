"""Forward and backward pass of FlashAttention-4 with intervals. Importing this needs the extra ``fa4``."""

import functools
import math
import types
from collections.abc import Callable
from typing import Any, Optional

import cutlass
import cutlass.cute as cute
import torch
from torch import Tensor

from ds_lvxattn.kernels.base import empty_results
from ds_lvxattn.kernels.derived import derived_of
from ds_lvxattn.kernels.fa4.block_lists import as_lists, block_lists, padded_ranges
from ds_lvxattn.kernels.fa4.kept import keeping_compiled
from ds_lvxattn.kernels.fa4.shares import forward_in_shares
from ds_lvxattn.kernels.triton.forward import key_splits, units_to_fill

with keeping_compiled():
    from flash_attn.cute import interface, utils
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch, compute_dq_write_order
    from flash_attn.cute.interface import _flash_attn_fwd

KEYS_OF_BLOCK = 128
BACKWARD_ROWS = 128  # of a tile; its kernels work on divisors of it
PADDING = 768  # rows that the ranges are padded to: a multiple of every tile's, which are read whole


@cute.jit
def interval_mask(batch, head, row, key, seqlen_info, bounds):
    """Whether ``row`` sees ``key``; ``bounds`` are start and stop, int32 ``[B, S]``."""
    start = utils.scalar_to_ssa(bounds[0][batch[0], row[0]], cutlass.Int32)
    stop = utils.scalar_to_ssa(bounds[1][batch[0], row[0]], cutlass.Int32)
    return (key >= start) & (key < stop)


def _share_of_cap(score, softcap):
    """``tanh(score / softcap)``, exact to 1e-7: the chip's own is off by 5e-4 of it."""
    return 1.0 - 2.0 / (cute.math.exp2(score * (2.0 / (math.log(2.0) * softcap)), fastmath=True) + 1.0)


@functools.cache  # kernels are compiled by their functions, whose hash is kept with them
def soft_cap(softcap: float) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What becomes of a scaled score, and of the gradient of what it becomes."""

    @cute.jit
    def capped(score, batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
        return softcap * _share_of_cap(score, softcap)

    @cute.jit
    def uncapped(gradient, score, batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
        share = _share_of_cap(score, softcap)
        return gradient * (1.0 - share * share)

    return capped, uncapped


def forward_rows(head_dim: int, capability: int) -> int:
    """Rows of a forward tile, of which the block lists are made.

    Args:
        capability: major compute capability.
    """
    if capability > 9:
        return 256
    return 192 if head_dim <= 96 else 128


@functools.cache
def _backward_kernels() -> Callable[..., Any]:
    """``_flash_attn_bwd``, but for the kernel behind it that rounds ``dQ`` to its dtype.

    On Hopper that one reads the float32 ``dQ`` in tiles whose columns are rounded up to 32, where they were written
    rounded up to 16: ``dQ`` is wrong where the two differ (72, 80). Here it reads them as they were written.
    """

    def convert(*args: Any, **options: Any) -> None:
        interface._bwd_postprocess_convert(*args, **{**options, "hdim_multiple_of": 16})

    theirs = interface._flash_attn_bwd
    if torch.cuda.get_device_capability()[0] != 9:
        return theirs
    names = {**vars(interface), "_bwd_postprocess_convert": convert}
    return types.FunctionType(theirs.__code__, names, theirs.__name__, theirs.__defaults__)


def fa4_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Optional[Tensor],
    stop: Optional[Tensor],
    scale: float,
    softcap: Optional[float] = None,
) -> tuple[Tensor, Tensor]:
    """See ``Kernel.forward``. Few rows that see all keys take them in shares beside each other."""
    q = q if q.stride(-1) == 1 else q.contiguous()
    tile = forward_rows(q.shape[3], torch.cuda.get_device_capability(q.device)[0])
    capped = None if softcap is None else soft_cap(softcap)[0]
    visible = _masked(start, stop, k.shape[2], tile)

    def forward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
        _flash_attn_fwd(
            *(x.transpose(1, 2) for x in (q, k, v)), softmax_scale=scale, return_lse=True, out=out.transpose(1, 2),
            lse=lse, score_mod=capped, **visible,
        )  # fmt: skip

    shares = 1 if visible else _shares(q, k, tile)
    if shares > 1:
        return forward_in_shares(forward, shares, q, k, v)
    out, lse = empty_results(q, v)
    forward(q, k, v, out, lse)
    return out, lse


def _shares(q: Tensor, k: Tensor, tile: int) -> int:
    """Shares of the keys that fill the chip: 1 where the sequences do together, else those of one sequence."""
    batch, heads, rows, _ = q.shape
    kv_heads, keys = k.shape[1:3]
    tiles = kv_heads * -(-rows * (heads // kv_heads) // tile)
    blocks, units = -(-keys // KEYS_OF_BLOCK), units_to_fill(q.device)
    return 1 if key_splits(batch * tiles, blocks, units) == 1 else key_splits(tiles, blocks, units)


def fa4_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    start: Optional[Tensor],
    stop: Optional[Tensor],
    scale: float,
    softcap: Optional[float] = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``Kernel.backward``. Deterministic where ``torch.use_deterministic_algorithms`` asks for it."""
    dq, dk, dv = (torch.empty_like(x) if x.stride(-1) == 1 else x.new_empty(x.shape) for x in (q, k, v))
    deterministic = torch.are_deterministic_algorithms_enabled()
    capped, uncapped = (None, None) if softcap is None else soft_cap(softcap)
    # It computes rowsum(dO * O) - dlse itself: an O of zeros, one row that all share, and dlse = -delta make that
    # delta, whosever keys it is of.
    zeros = dout.new_zeros(dout.shape[3]).expand(dout.shape)
    _backward_kernels()(
        *(x.transpose(1, 2) for x in (q, k, v, zeros, dout)), lse, scale, dlse=delta.neg(),
        dq=dq.transpose(1, 2), dk=dk.transpose(1, 2), dv=dv.transpose(1, 2), deterministic=deterministic,
        score_mod=capped, score_mod_bwd=uncapped,
        **_masked(start, stop, k.shape[2], BACKWARD_ROWS, transposed=True, ordered=deterministic),
    )  # fmt: skip
    return dq, dk, dv


def _masked(
    start: Optional[Tensor],
    stop: Optional[Tensor],
    keys: int,
    rows: int,
    transposed: bool = False,
    ordered: bool = False,
) -> dict[str, object]:
    """The arguments that say what is visible, made once for all layers of a batch."""
    if start is None or stop is None:
        return {}
    how = (keys, rows, transposed, ordered)
    ranges, lists = derived_of(start, stop, ("fa4", *how), lambda: _lists(start, stop, *how))
    return {"mask_mod": interval_mask, "aux_tensors": ranges, "block_sparse_tensors": lists}


def _lists(
    start: Tensor, stop: Tensor, keys: int, rows: int, transposed: bool, ordered: bool
) -> tuple[list[Tensor], BlockSparseTensorsTorch]:
    bounds = padded_ranges(start, stop, PADDING)
    tiled = -(-start.shape[1] // rows) * rows
    part, whole = block_lists(bounds[0][:, :tiled], bounds[1][:, :tiled], keys, rows, KEYS_OF_BLOCK)
    by_rows = as_lists(part, whole)
    lists = as_lists(part.transpose(1, 2), whole.transpose(1, 2)) if transposed else by_rows
    order: dict[str, object] = {}
    if ordered:
        of_part, of_whole = compute_dq_write_order(*by_rows, *lists)
        order = {"dq_write_order": of_part, "dq_write_order_full": of_whole, "spt": False}
    return list(bounds), BlockSparseTensorsTorch(*lists, block_size=(rows, KEYS_OF_BLOCK), **order)
