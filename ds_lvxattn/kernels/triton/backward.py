"""Attention of packed query heads over one contiguous key range a row, backward.

The gradients of FlashAttention-2 (arXiv 2307.08691, algorithm 2) from the log-sum-exp over all keys of the
group and ``delta = rowsum(dO * O) - dL``, both known before the pass (LV-XAttn, arXiv 2502.02406, section 3).

Two kernels, five matrix products and no atomics. ``key_grads_kernel`` owns a block of keys, walks the query
rows that see it and keeps ``dK`` and ``dV`` in registers; ``dS``, which it has at hand, goes to a workspace
in the input dtype. ``query_grads_kernel`` multiplies the workspace by ``K``. Writing ``dS`` (2 bytes a
score) costs less than computing the scores twice (seven products), and less than float32 partials of ``dQ`` a
key block (``4 * D / BLOCK_N`` bytes a score, read and written). The workspace is bounded: the keys are taken
in chunks that fill it, in a fixed order.

Small heads under a mask are the exception: their products are cheap against ``dS`` traffic and chunk
launches, so ``query_grads_again_kernel`` computes the scores a second time and no workspace is needed.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ds_lvxattn.kernels.derived import derived_of
from ds_lvxattn.kernels.triton.backward_kernels import (
    key_grads_kernel,
    query_grads_again_kernel,
    query_grads_kernel,
)
from ds_lvxattn.kernels.triton.backward_plan import (
    WORKSPACE_BYTES,
    ChunkPlan,
    plan_dense,
    plan_masked,
    rows_at_once,
)
from ds_lvxattn.kernels.triton.backward_rows import pack_ranges_kernel, pack_rows_kernel, seen_tiles_kernel
from ds_lvxattn.kernels.triton.forward import (
    multiprocessors,
    row_descriptors,
    rows_for_copy_engine,
)
from ds_lvxattn.kernels.triton.tiles import BackwardConfig, backward_config, is_hopper, split_head


def interval_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    start: Tensor | None,
    stop: Tensor | None,
    scale: float,
    workspace_bytes: int = WORKSPACE_BYTES,
    config: BackwardConfig | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of attention over the keys at hand, given row terms over all ranks' keys. Deterministic.

    Args:
        dout: ``[B, H_q, S_q, D_v]`` gradient of the whole (merged) output, dtype of ``q``.
        q: ``[B, H_q, S_q, D]`` bfloat16, float16 or float32; any strides.
        k, v: ``[B, H_kv, S_kv, D]`` and ``[B, H_kv, S_kv, D_v]`` of the same dtype; ``H_q`` is a multiple of ``H_kv``.
        lse: float32 ``[B, H_q, S_q]``, natural log-sum-exp over all keys of the group; rows with ``-inf`` add
            nothing.
        delta: float32 ``[B, H_q, S_q]``, ``rowsum(dO * O) - dL`` (``attention_delta``).
        start, stop: int32 ``[B, S_q]`` local key ranges with ``0 <= start <= stop <= S_kv``, or None for all
            visible.
        scale: positive factor of the scores.
        workspace_bytes: upper bound of the ``dS`` workspace (one block of keys at the least); more means
            fewer and fuller launches.
        config: other tiles than the tuned ones.
        softcap: soft cap of the scores, positive; None: none.

    Returns:
        ``dq`` (the part from these keys), ``dk``, ``dv`` in the dtypes and dense strides of the inputs.

    Raises:
        ValueError: ``scale`` is not positive.
    """
    if scale <= 0:
        raise ValueError(f"interval_backward: scale is {scale}; it must be positive (negate q for a negative one)")
    batch, heads_q, seq_q, head_dim = q.shape
    heads_kv, head_dims = k.shape[1], (head_dim, v.shape[3])
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if dq.numel() == 0 or dk.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()

    config = config or backward_config(head_dims, q.element_size(), start is not None, is_hopper(q.device))
    room = workspace_bytes // (heads_kv * config.block_n * config.tile * q.element_size())
    run = seq_q
    if config.keep_ds or start is None:
        units = multiprocessors(q.device)
        group = heads_q // heads_kv
        run = rows_at_once(seq_q, k.shape[2], group, batch, heads_kv, head_dims, config, room, units)
    if run == seq_q:
        _backward_of_rows(dout, q, k, v, lse, delta, start, stop, scale, softcap, config, room, dq, dk, dv, add=False)
        return dq, dk, dv
    dk_sum, dv_sum = (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))
    for first in range(0, seq_q, run):
        x = slice(first, first + run)
        _backward_of_rows(
            dout[:, :, x], q[:, :, x], k, v, lse[:, :, x], delta[:, :, x],
            *_ranges_of_run(start, stop, x), scale, softcap, config, room, dq[:, :, x], dk_sum, dv_sum, add=True,
        )  # fmt: skip
    return dq, dk.copy_(dk_sum), dv.copy_(dv_sum)


def _ranges_of_run(start: Tensor | None, stop: Tensor | None, rows: slice) -> tuple[Tensor | None, Tensor | None]:
    """Cut out once for all layers of a batch."""
    if start is None or stop is None:
        return None, None
    key = ("rows", rows.start, rows.stop)
    return derived_of(start, stop, key, lambda: (start[:, rows].clone(), stop[:, rows].clone()))


class _Ranges(NamedTuple):
    """What the kernels must know of the ranges of the rows: see ``backward_rows`` and ``backward_plan``."""

    packed_start: Tensor | None
    packed_stop: Tensor | None
    bounds: Tensor | None
    seen: Tensor | None
    seen_count: Tensor | None
    plan: ChunkPlan | None


NO_RANGES = _Ranges(None, None, None, None, None, None)


def _ranges(start: Tensor, stop: Tensor, group: int, blocks: int, tile: int, block_n: int, room: int | None) -> _Ranges:
    """Made once for all layers of a batch. ``room`` is None where no ``dS`` is kept."""
    batch, seq_q = start.shape
    tiles = triton.cdiv(seq_q * group, tile)
    packed_start, packed_stop = start.new_empty((2, batch, tiles * tile)).unbind(0)
    bounds = start.new_empty((batch, 4, tiles))
    pack_ranges_kernel[(tiles, batch)](
        start.contiguous(), stop.contiguous(), packed_start, packed_stop, bounds, seq_q, tiles, GROUP=group, TILE=tile
    )  # fmt: skip
    seen, count = bounds.new_empty((batch, blocks, tiles)), bounds.new_empty((batch, blocks, 2))
    seen_tiles_kernel[(blocks, batch)](bounds, seen, count, tiles, BLOCK_N=block_n, BLOCK_T=256)
    plan = None if room is None else plan_masked(bounds, count, block_n, room)
    return _Ranges(packed_start, packed_stop, bounds, seen, count, plan)


def _backward_of_rows(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    start: Tensor | None,
    stop: Tensor | None,
    scale: float,
    softcap: float | None,
    config: BackwardConfig,
    room: int,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    add: bool,
) -> None:
    """Gradients of one run of query rows: ``dq`` is set, ``dk`` and ``dv`` are set or added to.

    ``room`` is the slots of ``dS`` that the workspace holds for one key/value head.
    """
    batch, heads_q, seq_q, head_dim = q.shape
    heads_kv, seq_kv = k.shape[1], k.shape[2]
    has_interval = start is not None and stop is not None
    group = heads_q // heads_kv
    pairs = batch * heads_kv
    tiles = triton.cdiv(seq_q * group, config.tile)
    rows = tiles * config.tile
    blocks = triton.cdiv(seq_kv, config.block_n)
    programs = multiprocessors(q.device) * config.resident

    terms = torch.empty((pairs * 2, rows), dtype=torch.float32, device=q.device)
    ranges = NO_RANGES
    if start is not None and stop is not None:
        how = (group, blocks, config.tile, config.block_n, room if config.keep_ds else None)
        ranges = derived_of(start, stop, how, functools.partial(_ranges, start, stop, *how))
        start, stop = start.contiguous(), stop.contiguous()
    packed_start, packed_stop, bounds, seen, count, masked_plan = ranges
    pack_rows_kernel[(tiles, pairs)](
        lse.contiguous(), delta.contiguous(), start, stop, terms, heads_kv, seq_q, tiles,
        GROUP=group, TILE=config.tile, HAS_INTERVAL=has_interval,
    )  # fmt: skip

    # Q and dO are short next to K and V: packing them once (a copy only where heads share keys) lets the copy
    # engine fetch a whole tile of rows in one instruction, at any group size.
    q_rows, dout_rows = (
        rows_for_copy_engine(x.unflatten(1, (heads_kv, group)).transpose(2, 3).flatten(2, 3)) for x in (q, dout)
    )
    row_tiles = (*row_descriptors(q_rows, config.block_m), *row_descriptors(dout_rows, config.block_m))
    k_tiles, v_tiles = (row_descriptors(rows_for_copy_engine(x), config.block_n) for x in (k, v))
    value_dim = v.shape[3]
    block_d, block_d_2 = split_head(head_dim)
    block_v, block_v_2 = split_head(value_dim)
    dq_rows = torch.empty((batch, heads_kv, rows, head_dim), dtype=torch.float32, device=q.device)
    tile_args = dict(
        HEAD_DIM=head_dim, BLOCK_D=block_d, TILE=config.tile, BLOCK_N=config.block_n,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
    )  # fmt: skip
    key_args = dict(
        BLOCK_D_2=block_d_2, VALUE_DIM=value_dim, BLOCK_V=block_v, BLOCK_V_2=block_v_2, BLOCK_M=config.block_m,
        HAS_INTERVAL=has_interval, CAPPED=softcap is not None, ADD=add,
        num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=config.max_registers, **tile_args,
    )  # fmt: skip
    query_args = dict(num_warps=config.query_warps, num_stages=config.query_stages, **tile_args)
    cap = (softcap or 0.0) / scale  # of the products of queries and keys
    key_tensors = (k, v, dk, dv, *k.stride()[:3], *v.stride()[:3], *dk.stride()[:3], *dv.stride()[:3])

    if has_interval and not config.keep_ds:
        key_grads_kernel[(blocks * pairs,)](
            *row_tiles, *k_tiles, *v_tiles, None, terms, packed_start, packed_stop, seen, count, None,
            None, *key_tensors, pairs, heads_kv, seq_kv, tiles, blocks, 0, blocks, 0, scale, cap, KEEP_DS=False,
            **key_args,
        )  # fmt: skip
        query_grads_again_kernel[(tiles, pairs)](
            row_descriptors(q_rows, config.tile)[0], row_descriptors(dout_rows, config.tile)[0], k_tiles[0], v_tiles[0],
            terms, packed_start, packed_stop, bounds,
            dq_rows, heads_kv, tiles, scale, cap, BLOCK_V=block_v, CAPPED=softcap is not None, **query_args,
        )  # fmt: skip
    else:
        plan = masked_plan or plan_dense(blocks, batch, heads_kv, tiles, room, programs)
        ds = torch.empty((heads_kv * plan.slots * config.block_n, config.tile), dtype=q.dtype, device=q.device)
        ds_out = TensorDescriptor.from_tensor(ds, [config.block_n, config.block_m])
        ds_in = TensorDescriptor.from_tensor(ds, [config.block_n, config.tile])
        for chunk in range(plan.chunks):
            key_grads_kernel[(plan.launched_blocks(chunk, blocks) * pairs,)](
                *row_tiles, *k_tiles, *v_tiles, ds_out, terms, packed_start, packed_stop, seen, count, plan.edges,
                plan.base, *key_tensors, pairs, heads_kv, seq_kv, tiles, blocks, chunk,
                plan.blocks, plan.slots, scale, cap, KEEP_DS=True, **key_args,
            )  # fmt: skip
            query_grads_kernel[(tiles, pairs)](
                ds_in, *k_tiles, bounds, plan.edges, plan.base, dq_rows, heads_kv, tiles, blocks, chunk,
                plan.blocks, plan.slots, BLOCK_D_2=block_d_2, HAS_INTERVAL=has_interval, **query_args,
            )  # fmt: skip
    dq_groups = dq_rows[:, :, : seq_q * group].unflatten(2, (seq_q, group)).transpose(2, 3)
    torch.mul(dq_groups, scale, out=dq.unflatten(1, (heads_kv, group)))
