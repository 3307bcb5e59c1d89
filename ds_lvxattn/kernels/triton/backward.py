"""Attention of packed query heads over one contiguous key range a row, backward.

The gradients of FlashAttention-2 (arXiv 2307.08691, algorithm 2) from the log-sum-exp over all keys of the
group and ``delta = rowsum(dO * O) - dL``, both known before the pass (LV-XAttn, arXiv 2502.02406, section 3).

Two kernels, five matrix products and no atomics. ``_key_grads_kernel`` owns a block of keys, walks the query
rows that see it and keeps ``dK`` and ``dV`` in registers; ``dS``, which it has at hand, goes to a workspace
in the input dtype. ``_query_grads_kernel`` multiplies the workspace by ``K``. Writing ``dS`` (2 bytes a
score) costs less than computing the scores twice (seven products), and less than float32 partials of ``dQ`` a
key block (``4 * D / BLOCK_N`` bytes a score, read and written). The workspace is bounded: the keys are taken
in chunks that fill it, in a fixed order.

Small heads under a mask are the exception: their products are cheap against ``dS`` traffic and chunk
launches, so ``_query_grads_again_kernel`` computes the scores a second time and no workspace is needed.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ds_lvxattn.kernels.derived import derived_of
from ds_lvxattn.kernels.triton.backward_plan import (
    WORKSPACE_BYTES,
    ChunkPlan,
    plan_dense,
    plan_masked,
    rows_at_once,
)
from ds_lvxattn.kernels.triton.backward_rows import pack_ranges_kernel, pack_rows_kernel, seen_tiles_kernel
from ds_lvxattn.kernels.triton.forward import (
    LOG2_E,
    lead,
    multiprocessors,
    row_descriptors,
    rows_for_copy_engine,
)
from ds_lvxattn.kernels.triton.tiles import BackwardConfig, backward_config, is_hopper, split_head

_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit
def _visit_rows(
    dk, dk_2, dv, dv_2, k, k_2, v, v_2, q_desc, q_2_desc, dout_desc, dout_2_desc, ds_desc, terms_ptr, start_ptr,
    stop_ptr, batch, head, row, seq_rows, key_first, ds_row, ds_column, seq_kv, scale_log2,
    MASKED: tl.constexpr, HAS_INTERVAL: tl.constexpr, KEEP_DS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_D_2: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the rows ``[row, row + BLOCK_M)`` add to ``dK`` and ``dV``; keys along the first axis throughout,
    so that ``P`` and ``dS`` feed the next product from registers.

    The row terms come by plain asynchronous copies: each fetch by the copy engine costs a barrier.
    """
    rows = row + tl.arange(0, BLOCK_M)
    q = q_desc.load([batch, head, row, 0]).reshape(BLOCK_M, BLOCK_D)
    lse = tl.load(terms_ptr + rows)
    scores = tl.dot(k, q.T, input_precision=PRECISION)
    if BLOCK_D_2 > 0:
        q_2 = q_2_desc.load([batch, head, row, BLOCK_D]).reshape(BLOCK_M, BLOCK_D_2)
        scores = tl.dot(k_2, q_2.T, scores, input_precision=PRECISION)
    scores *= scale_log2
    if MASKED:
        key = key_first + tl.arange(0, BLOCK_N)
        if HAS_INTERVAL:
            start = tl.load(start_ptr + rows)
            stop = tl.load(stop_ptr + rows)
            seen = (key[:, None] >= start[None, :]) & (key[:, None] < stop[None, :])
        else:
            seen = (key < seq_kv)[:, None]
        scores = tl.where(seen, scores, float("-inf"))
    p = tl.exp2(scores - lse[None, :])
    dout = dout_desc.load([batch, head, row, 0]).reshape(BLOCK_M, BLOCK_D)
    dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
    delta = tl.load(terms_ptr + seq_rows + rows)
    dp = tl.dot(v, dout.T, input_precision=PRECISION)
    if BLOCK_D_2 > 0:
        dout_2 = dout_2_desc.load([batch, head, row, BLOCK_D]).reshape(BLOCK_M, BLOCK_D_2)
        dv_2 = tl.dot(p.to(dout.dtype), dout_2, dv_2, input_precision=PRECISION)
        dp = tl.dot(v_2, dout_2.T, dp, input_precision=PRECISION)
    ds = (p * (dp - delta[None, :])).to(q.dtype)
    dk = tl.dot(ds, q, dk, input_precision=PRECISION)
    if BLOCK_D_2 > 0:
        dk_2 = tl.dot(ds, q_2, dk_2, input_precision=PRECISION)
    if KEEP_DS:
        ds_desc.store([ds_row, ds_column], ds)
    return dk, dk_2, dv, dv_2


@triton.jit(do_not_specialize=["pairs", "heads_kv", "seq_kv", "tiles", "blocks", "chunk", "chunk_blocks", "slots"])
def _key_grads_kernel(
    q_desc, q_2_desc, dout_desc, dout_2_desc, k_desc, k_2_desc, v_desc, v_2_desc, ds_desc, terms_ptr, start_ptr,
    stop_ptr, seen_ptr, count_ptr, edge_ptr, base_ptr, k_ptr, v_ptr, dk_ptr, dv_ptr,
    k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    dk_stride_b, dk_stride_h, dk_stride_s, dv_stride_b, dv_stride_h, dv_stride_s,
    pairs, heads_kv, seq_kv, tiles, blocks, chunk, chunk_blocks, slots, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_D_2: tl.constexpr, TILE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_INTERVAL: tl.constexpr, KEEP_DS: tl.constexpr,
    ADD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``dK``, ``dV`` of one chunk's key blocks, and their ``dS`` against all rows that see them.

    One program a (head, key block) item; with a mask the launch may hold more programs than the chunk has
    items. ``dS`` of key block ``n`` and row tile ``t`` fills slot ``base[t] + n``. ``ADD`` adds to the ``dK`` and
    ``dV`` at hand.
    """
    batches = pairs // heads_kv
    if HAS_INTERVAL and KEEP_DS:
        first_block = tl.load(edge_ptr + chunk)
        here = tl.load(edge_ptr + chunk + 1) - first_block
    else:
        first_block = chunk * chunk_blocks
        here = tl.minimum(chunk_blocks, blocks - first_block)
    STEPS: tl.constexpr = TILE // BLOCK_M
    item = tl.program_id(0)
    if item < here * pairs:
        pair = item // here
        block = first_block + item % here
        batch = pair // heads_kv
        head = pair % heads_kv
        key_first = block * BLOCK_N
        terms = terms_ptr + pair.to(tl.int64) * 2 * tiles * TILE
        rows_start = start_ptr
        rows_stop = stop_ptr
        tile_list = seen_ptr
        base = base_ptr
        if HAS_INTERVAL:
            rows_start += batch.to(tl.int64) * tiles * TILE
            rows_stop += batch.to(tl.int64) * tiles * TILE
            entry = batch.to(tl.int64) * blocks + block
            tile_list += entry * tiles
            if KEEP_DS:
                base += (chunk * batches + batch).to(tl.int64) * tiles
            whole = tl.load(count_ptr + entry * 2)
            part = tl.load(count_ptr + entry * 2 + 1)
        else:
            whole = tl.where(key_first + BLOCK_N <= seq_kv, tiles, 0)
            part = tiles - whole

        key = key_first + tl.arange(0, BLOCK_N)
        dim = tl.arange(0, BLOCK_D)
        mask = (key < seq_kv)[:, None] & (dim < HEAD_DIM)[None, :]
        # Few visits follow where dS is not kept, so the start counts: plain loads overlap, while the copy
        # engine outside a loop is waited for once a tensor. Elsewhere registers count, and it needs fewer.
        if KEEP_DS:
            k = k_desc.load([batch, head, key_first, 0]).reshape(BLOCK_N, BLOCK_D)
            v = v_desc.load([batch, head, key_first, 0]).reshape(BLOCK_N, BLOCK_D)
        else:
            k_rows = k_ptr + batch.to(tl.int64) * k_stride_b + head.to(tl.int64) * k_stride_h
            v_rows = v_ptr + batch.to(tl.int64) * v_stride_b + head.to(tl.int64) * v_stride_h
            k = tl.load(k_rows + key.to(tl.int64)[:, None] * k_stride_s + dim[None, :], mask=mask, other=0.0)
            v = tl.load(v_rows + key.to(tl.int64)[:, None] * v_stride_s + dim[None, :], mask=mask, other=0.0)
        dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        k_2 = 0.0
        v_2 = 0.0
        dk_2 = 0.0
        dv_2 = 0.0
        if BLOCK_D_2 > 0:  # a head size between powers of two: its last columns
            k_2 = k_2_desc.load([batch, head, key_first, BLOCK_D]).reshape(BLOCK_N, BLOCK_D_2)
            v_2 = v_2_desc.load([batch, head, key_first, BLOCK_D]).reshape(BLOCK_N, BLOCK_D_2)
            dk_2 = tl.zeros([BLOCK_N, BLOCK_D_2], tl.float32)
            dv_2 = tl.zeros([BLOCK_N, BLOCK_D_2], tl.float32)
        for step in tl.range(0, whole * STEPS):
            tile = step // STEPS
            if HAS_INTERVAL:
                tile = tl.load(tile_list + tile)
            if HAS_INTERVAL and KEEP_DS:
                slot = tl.load(base + tile) + block
            else:
                slot = (batch * tiles + tile) * chunk_blocks + block - first_block
            column = step % STEPS * BLOCK_M
            dk, dk_2, dv, dv_2 = _visit_rows(
                dk, dk_2, dv, dv_2, k, k_2, v, v_2, q_desc, q_2_desc, dout_desc, dout_2_desc, ds_desc, terms,
                rows_start, rows_stop, batch, head, tile * TILE + column, tiles * TILE, key_first,
                (head * slots + slot) * BLOCK_N, column, seq_kv, scale * _LOG2_E, False, HAS_INTERVAL, KEEP_DS,
                BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_D_2, PRECISION,
            )  # fmt: skip
        for step in tl.range(0, part * STEPS):
            tile = step // STEPS
            if HAS_INTERVAL:
                tile = tl.load(tile_list + tiles - 1 - tile)
            if HAS_INTERVAL and KEEP_DS:
                slot = tl.load(base + tile) + block
            else:
                slot = (batch * tiles + tile) * chunk_blocks + block - first_block
            column = step % STEPS * BLOCK_M
            dk, dk_2, dv, dv_2 = _visit_rows(
                dk, dk_2, dv, dv_2, k, k_2, v, v_2, q_desc, q_2_desc, dout_desc, dout_2_desc, ds_desc, terms,
                rows_start, rows_stop, batch, head, tile * TILE + column, tiles * TILE, key_first,
                (head * slots + slot) * BLOCK_N, column, seq_kv, scale * _LOG2_E, True, HAS_INTERVAL, KEEP_DS,
                BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_D_2, PRECISION,
            )  # fmt: skip

        key = key.to(tl.int64)[:, None]
        dk_rows = dk_ptr + batch.to(tl.int64) * dk_stride_b + head.to(tl.int64) * dk_stride_h + key * dk_stride_s
        dv_rows = dv_ptr + batch.to(tl.int64) * dv_stride_b + head.to(tl.int64) * dv_stride_h + key * dv_stride_s
        dk *= scale
        if ADD:
            dk += tl.load(dk_rows + dim[None, :], mask=mask, other=0.0)
            dv += tl.load(dv_rows + dim[None, :], mask=mask, other=0.0)
        tl.store(dk_rows + dim[None, :], dk.to(dk_ptr.dtype.element_ty), mask=mask)
        tl.store(dv_rows + dim[None, :], dv.to(dv_ptr.dtype.element_ty), mask=mask)
        if BLOCK_D_2 > 0:
            dim_2 = BLOCK_D + tl.arange(0, BLOCK_D_2)
            mask_2 = (key < seq_kv) & (dim_2 < HEAD_DIM)[None, :]
            dk_2 *= scale
            if ADD:
                dk_2 += tl.load(dk_rows + dim_2[None, :], mask=mask_2, other=0.0)
                dv_2 += tl.load(dv_rows + dim_2[None, :], mask=mask_2, other=0.0)
            tl.store(dk_rows + dim_2[None, :], dk_2, mask=mask_2)
            tl.store(dv_rows + dim_2[None, :], dv_2, mask=mask_2)


@triton.jit(do_not_specialize=["heads_kv", "tiles", "blocks", "chunk", "chunk_blocks", "slots"])
def _query_grads_kernel(
    ds_desc, k_desc, k_2_desc, bounds_ptr, edge_ptr, base_ptr, dq_ptr,
    heads_kv, tiles, blocks, chunk, chunk_blocks, slots,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_D_2: tl.constexpr, TILE: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_INTERVAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds ``dS K`` of one chunk of keys to the float32 ``dQ / scale`` of one tile; the first chunk sets it.

    The rows of a tile see a contiguous run of key blocks, each of which wrote its ``dS``: nothing here is
    masked.
    """
    tile = tl.program_id(0)
    batch = tl.program_id(1) // heads_kv
    head = tl.program_id(1) % heads_kv
    if HAS_INTERVAL:
        batches = tl.num_programs(1) // heads_kv
        bounds_ptr += batch.to(tl.int64) * 4 * tiles + tile
        last = tl.load(bounds_ptr + tiles)
        low = tl.maximum(tl.minimum(tl.load(bounds_ptr), last) // BLOCK_N, tl.load(edge_ptr + chunk))
        high = tl.minimum(tl.cdiv(last, BLOCK_N), tl.load(edge_ptr + chunk + 1))
        base = tl.load(base_ptr + (chunk * batches + batch).to(tl.int64) * tiles + tile)
    else:
        low = chunk * chunk_blocks
        high = tl.minimum(low + chunk_blocks, blocks)
        base = (batch * tiles + tile) * chunk_blocks - low
    if (low < high) | (chunk == 0):
        dim = tl.arange(0, BLOCK_D)
        row = (tl.program_id(1) * tiles + tile).to(tl.int64) * TILE + tl.arange(0, TILE)
        dq = dq_ptr + row[:, None] * HEAD_DIM + dim[None, :]
        mask = (dim < HEAD_DIM)[None, :] & (row >= 0)[:, None]
        acc = tl.zeros([TILE, BLOCK_D], tl.float32)
        acc_2 = 0.0
        if BLOCK_D_2 > 0:
            dim_2 = BLOCK_D + tl.arange(0, BLOCK_D_2)
            dq_2 = dq_ptr + row[:, None] * HEAD_DIM + dim_2[None, :]
            mask_2 = (dim_2 < HEAD_DIM)[None, :] & (row >= 0)[:, None]
            acc_2 = tl.zeros([TILE, BLOCK_D_2], tl.float32)
        if chunk > 0:
            acc = tl.load(dq, mask=mask, other=0.0)
            if BLOCK_D_2 > 0:
                acc_2 = tl.load(dq_2, mask=mask_2, other=0.0)
        ahead = 0
        if HAS_INTERVAL:
            ahead = lead(high - low, low * BLOCK_N, BLOCK_N)
        for step in tl.range(low, high):
            block = tl.where(step + ahead < high, step + ahead, step + ahead - high + low)
            ds = ds_desc.load([(head * slots + base + block) * BLOCK_N, 0])
            k = k_desc.load([batch, head, block * BLOCK_N, 0]).reshape(BLOCK_N, BLOCK_D)
            acc = tl.dot(ds.T, k, acc, input_precision=PRECISION)
            if BLOCK_D_2 > 0:
                k_2 = k_2_desc.load([batch, head, block * BLOCK_N, BLOCK_D]).reshape(BLOCK_N, BLOCK_D_2)
                acc_2 = tl.dot(ds.T, k_2, acc_2, input_precision=PRECISION)
        tl.store(dq, acc, mask=mask)
        if BLOCK_D_2 > 0:
            tl.store(dq_2, acc_2, mask=mask_2)


@triton.jit
def _add_query_grads(
    acc, q, dout, lse, delta, k_desc, v_desc, batch, head, key_first, row_start, row_stop, scale_log2,
    MASKED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``dS K`` of one block of keys, from the scores computed again."""
    k = k_desc.load([batch, head, key_first, 0]).reshape(BLOCK_N, BLOCK_D)
    scores = tl.dot(q, k.T, input_precision=PRECISION) * scale_log2
    if MASKED:
        key = key_first + tl.arange(0, BLOCK_N)
        seen = (key[None, :] >= row_start[:, None]) & (key[None, :] < row_stop[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    p = tl.exp2(scores - lse[:, None])
    v = v_desc.load([batch, head, key_first, 0]).reshape(BLOCK_N, BLOCK_D)
    ds = p * (tl.dot(dout, v.T, input_precision=PRECISION) - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=["heads_kv", "tiles"])
def _query_grads_again_kernel(
    q_desc, dout_desc, k_desc, v_desc, terms_ptr, start_ptr, stop_ptr, bounds_ptr, dq_ptr,
    heads_kv, tiles, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``dQ / scale`` of one tile of rows without a workspace, from only the keys that the tile sees."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    batch = tl.program_id(1) // heads_kv
    head = tl.program_id(1) % heads_kv
    rows = tile * TILE + tl.arange(0, TILE)
    q = q_desc.load([batch, head, tile * TILE, 0]).reshape(TILE, BLOCK_D)
    dout = dout_desc.load([batch, head, tile * TILE, 0]).reshape(TILE, BLOCK_D)
    terms_ptr += tl.program_id(1).to(tl.int64) * 2 * tiles * TILE
    lse = tl.load(terms_ptr + rows)
    delta = tl.load(terms_ptr + tiles * TILE + rows)
    row_start = tl.load(start_ptr + batch.to(tl.int64) * tiles * TILE + rows)
    row_stop = tl.load(stop_ptr + batch.to(tl.int64) * tiles * TILE + rows)
    bounds_ptr += batch.to(tl.int64) * 4 * tiles + tile
    last = tl.load(bounds_ptr + tiles)
    first = tl.minimum(tl.load(bounds_ptr), last)
    clear_first = first + tl.cdiv(tl.load(bounds_ptr + 2 * tiles) - first, BLOCK_N) * BLOCK_N
    clear_last = first + tl.maximum(tl.minimum(tl.load(bounds_ptr + 3 * tiles), last) - first, 0) // BLOCK_N * BLOCK_N
    if clear_last <= clear_first:
        clear_first = first
        clear_last = first
    blocks_before = (clear_first - first) // BLOCK_N
    masked_blocks = blocks_before + tl.cdiv(last - clear_last, BLOCK_N)

    acc = tl.zeros([TILE, BLOCK_D], tl.float32)
    for key in tl.range(clear_first, clear_last, BLOCK_N):
        acc = _add_query_grads(
            acc, q, dout, lse, delta, k_desc, v_desc, batch, head, key, row_start, row_stop, scale * _LOG2_E,
            False, BLOCK_N, BLOCK_D, PRECISION,
        )  # fmt: skip
    for block in tl.range(0, masked_blocks):
        after = clear_last + (block - blocks_before) * BLOCK_N
        key = tl.where(block < blocks_before, first + block * BLOCK_N, after)
        acc = _add_query_grads(
            acc, q, dout, lse, delta, k_desc, v_desc, batch, head, key, row_start, row_stop, scale * _LOG2_E,
            True, BLOCK_N, BLOCK_D, PRECISION,
        )  # fmt: skip
    dim = tl.arange(0, BLOCK_D)
    row = (tl.program_id(1) * tiles + tile).to(tl.int64) * TILE + tl.arange(0, TILE)
    tl.store(dq_ptr + row[:, None] * HEAD_DIM + dim[None, :], acc, mask=(dim < HEAD_DIM)[None, :])


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of attention over the keys at hand, given row terms over all ranks' keys. Deterministic.

    Args:
        dout: ``[B, H_q, S_q, D]`` gradient of the whole (merged) output, dtype of ``q``.
        q: ``[B, H_q, S_q, D]`` bfloat16, float16 or float32; any strides.
        k, v: ``[B, H_kv, S_kv, D]`` of the same dtype; ``H_q`` is a multiple of ``H_kv``.
        lse: float32 ``[B, H_q, S_q]``, natural log-sum-exp over all keys of the group; rows with ``-inf`` add
            nothing.
        delta: float32 ``[B, H_q, S_q]``, ``rowsum(dO * O) - dL`` (``attention_delta``).
        start, stop: int32 ``[B, S_q]`` local key ranges with ``0 <= start <= stop <= S_kv``, or None for all
            visible.
        scale: positive factor of the scores.
        workspace_bytes: upper bound of the ``dS`` workspace (one block of keys at the least); more means
            fewer and fuller launches.
        config: other tiles than the tuned ones.

    Returns:
        ``dq`` (the part from these keys), ``dk``, ``dv`` in the dtypes and dense strides of the inputs.

    Raises:
        ValueError: ``scale`` is not positive.
    """
    if scale <= 0:
        raise ValueError(f"interval_backward: scale is {scale}; it must be positive (negate q for a negative one)")
    batch, heads_q, seq_q, head_dim = q.shape
    heads_kv = k.shape[1]
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if dq.numel() == 0 or dk.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()

    config = config or backward_config(head_dim, q.element_size(), start is not None, is_hopper(q.device))
    room = workspace_bytes // (heads_kv * config.block_n * config.tile * q.element_size())
    run = seq_q
    if config.keep_ds or start is None:
        units = multiprocessors(q.device)
        group = heads_q // heads_kv
        run = rows_at_once(seq_q, k.shape[2], group, batch, heads_kv, head_dim, config, room, units)
    if run == seq_q:
        _backward_of_rows(dout, q, k, v, lse, delta, start, stop, scale, config, room, dq, dk, dv, add=False)
        return dq, dk, dv
    dk_sum, dv_sum = (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))
    for first in range(0, seq_q, run):
        x = slice(first, first + run)
        _backward_of_rows(
            dout[:, :, x], q[:, :, x], k, v, lse[:, :, x], delta[:, :, x],
            None if start is None else start[:, x], None if stop is None else stop[:, x],
            scale, config, room, dq[:, :, x], dk_sum, dv_sum, add=True,
        )  # fmt: skip
    return dq, dk.copy_(dk_sum), dv.copy_(dv_sum)


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
    block_d, block_d_2 = split_head(head_dim)
    dq_rows = torch.empty((batch, heads_kv, rows, head_dim), dtype=torch.float32, device=q.device)
    tile_args = dict(
        HEAD_DIM=head_dim, BLOCK_D=block_d, TILE=config.tile, BLOCK_N=config.block_n,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
    )  # fmt: skip
    key_args = dict(
        BLOCK_D_2=block_d_2, BLOCK_M=config.block_m, HAS_INTERVAL=has_interval, ADD=add, num_warps=config.num_warps,
        num_stages=config.num_stages, maxnreg=config.max_registers, **tile_args,
    )  # fmt: skip
    query_args = dict(num_warps=config.query_warps, num_stages=config.query_stages, **tile_args)
    key_tensors = (k, v, dk, dv, *k.stride()[:3], *v.stride()[:3], *dk.stride()[:3], *dv.stride()[:3])

    if has_interval and not config.keep_ds:
        _key_grads_kernel[(blocks * pairs,)](
            *row_tiles, *k_tiles, *v_tiles, None, terms, packed_start, packed_stop, seen, count, None,
            None, *key_tensors, pairs, heads_kv, seq_kv, tiles, blocks, 0, blocks, 0, scale, KEEP_DS=False,
            **key_args,
        )  # fmt: skip
        _query_grads_again_kernel[(tiles, pairs)](
            row_descriptors(q_rows, config.tile)[0], row_descriptors(dout_rows, config.tile)[0], k_tiles[0], v_tiles[0],
            terms, packed_start, packed_stop, bounds,
            dq_rows, heads_kv, tiles, scale, **query_args,
        )  # fmt: skip
    else:
        plan = masked_plan or plan_dense(blocks, batch, heads_kv, tiles, room, programs)
        ds = torch.empty((heads_kv * plan.slots * config.block_n, config.tile), dtype=q.dtype, device=q.device)
        ds_out = TensorDescriptor.from_tensor(ds, [config.block_n, config.block_m])
        ds_in = TensorDescriptor.from_tensor(ds, [config.block_n, config.tile])
        for chunk in range(plan.chunks):
            _key_grads_kernel[(plan.launched_blocks(chunk, blocks) * pairs,)](
                *row_tiles, *k_tiles, *v_tiles, ds_out, terms, packed_start, packed_stop, seen, count, plan.edges,
                plan.base, *key_tensors, pairs, heads_kv, seq_kv, tiles, blocks, chunk,
                plan.blocks, plan.slots, scale, KEEP_DS=True, **key_args,
            )  # fmt: skip
            _query_grads_kernel[(tiles, pairs)](
                ds_in, *k_tiles, bounds, plan.edges, plan.base, dq_rows, heads_kv, tiles, blocks, chunk,
                plan.blocks, plan.slots, BLOCK_D_2=block_d_2, HAS_INTERVAL=has_interval, **query_args,
            )  # fmt: skip
    dq_groups = dq_rows[:, :, : seq_q * group].unflatten(2, (seq_q, group)).transpose(2, 3)
    torch.mul(dq_groups, scale, out=dq.unflatten(1, (heads_kv, group)))
