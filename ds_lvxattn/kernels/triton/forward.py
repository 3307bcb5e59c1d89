"""Attention of packed query heads over one contiguous key range a row, forward.

Online softmax after FlashAttention-2 (arXiv 2307.08691, algorithm 1); the split over keys, merged afterwards,
after Flash-Decoding. The mask is the interval of LV-XAttn's workloads: row ``i`` sees keys
``[start_i, stop_i)``.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_lvxattn.kernels.base import empty_rows
from ds_lvxattn.kernels.pattern import UNKNOWN
from ds_lvxattn.kernels.triton.launch import KEPT, Launch, Layout, fits_copy_engine, layout, place, row_tiles
from ds_lvxattn.kernels.triton.merge import merge_partials_triton
from ds_lvxattn.kernels.triton.tiles import ForwardConfig, forward_config, is_hopper, split_head

LOG2_E = 1.4426950408889634
MAX_HEAD_DIM = 256
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Above every key position; a tile whose rows all see nothing gets the empty range [FAR, 0).
_FAR = tl.constexpr(2**31 - 1)
_LOG2_E = tl.constexpr(LOG2_E)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def share_of_cap(products, cap):
    """``tanh(products / cap)``, exact to 1e-7 and 1 or -1 where the exponential overflows or vanishes."""
    return 1.0 - 2.0 / (tl.exp2(products * (2.0 * _LOG2_E / cap)) + 1.0)


@triton.jit
def _attend(
    acc, acc_2, row_max, row_sum, q, q_2, k_desc, k_2_desc, v_desc, v_2_desc, batch, head, first_key, row_start,
    row_stop, seq_kv, scale_log2, cap,
    MASKED: tl.constexpr, HAS_INTERVAL: tl.constexpr, CAPPED: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_D_2: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_V_2: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over the keys ``[first_key, first_key + BLOCK_N)``, in base 2."""
    k = k_desc.load([batch, head, first_key, 0]).reshape(BLOCK_N, BLOCK_D)
    scores = tl.dot(q, k.T, input_precision=PRECISION)
    if BLOCK_D_2 > 0:
        k_2 = k_2_desc.load([batch, head, first_key, BLOCK_D]).reshape(BLOCK_N, BLOCK_D_2)
        scores = tl.dot(q_2, k_2.T, scores, input_precision=PRECISION)
    if CAPPED:
        scores = cap * share_of_cap(scores, cap)
    if MASKED:
        key = first_key + tl.arange(0, BLOCK_N)
        if HAS_INTERVAL:
            seen = (key[None, :] >= row_start[:, None]) & (key[None, :] < row_stop[:, None])
        else:
            seen = key[None, :] < seq_kv
        scores = tl.where(seen, scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
    p = tl.exp2(scores * scale_log2 - new_max[:, None])
    shrink = tl.exp2(row_max - new_max)
    row_sum = row_sum * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None]
    v = v_desc.load([batch, head, first_key, 0]).reshape(BLOCK_N, BLOCK_V)
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    if BLOCK_V_2 > 0:
        acc_2 = acc_2 * shrink[:, None]
        v_2 = v_2_desc.load([batch, head, first_key, BLOCK_V]).reshape(BLOCK_N, BLOCK_V_2)
        acc_2 = tl.dot(p.to(v_2.dtype), v_2, acc_2, input_precision=PRECISION)
    return acc, acc_2, new_max, row_sum


@triton.jit
def lead(blocks, first_key, BLOCK_N: tl.constexpr):
    """Block, of a run of key blocks, at which to enter it so that tiles with overlapping runs read keys together.

    Where the mask slides, neighbouring tiles start at different keys: walking from its own first key, each would
    fetch its keys from device memory by itself. They enter at the first key that is a multiple of a common period
    instead, a power of two below the length of their runs, and wrap around.
    """
    period = tl.exp2(tl.floor(tl.log2(tl.maximum(blocks, 1).to(tl.float32)))).to(tl.int32) * BLOCK_N
    ahead = (tl.cdiv(first_key, period) * period - first_key) // BLOCK_N
    return tl.where(ahead < blocks, ahead, 0)


# Lengths change from batch to batch: compiling again when one becomes a multiple of 16 would stall a step.
@triton.jit(
    do_not_specialize=[
        "bound_stride_b", "lse_stride_split", "pairs", "tiles", "heads_kv", "seq_q", "seq_kv", "splits",
    ]
)  # fmt: skip
def _interval_forward_kernel(
    k_desc, k_2_desc, v_desc, v_2_desc, q_ptr, start_ptr, stop_ptr, out_ptr, lse_ptr,
    q_stride_b, q_stride_h, q_stride_s, bound_stride_b,
    out_stride_split, out_stride_b, out_stride_h, out_stride_s, lse_stride_split,
    pairs, tiles, heads_kv, seq_q, seq_kv, splits, scale_log2, cap,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_D_2: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_V_2: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_INTERVAL: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_M rows of one key/value head against one share of the keys that the tile sees.

    Row ``r`` of a key/value head is query ``r // GROUP`` of its group's head ``r % GROUP``: neighbouring rows
    have neighbouring intervals, so a tile's union of intervals stays narrow, and each key is read once for
    all heads.

    A soft cap is given as ``cap = softcap / scale``, which caps the products of queries and keys.
    """
    # With a mask, later rows may see more keys: starting with the last tiles of all heads leaves the short ones for
    # the end. Without, all tiles of a head come together and share its keys.
    if HAS_INTERVAL:
        tile = tiles - 1 - tl.program_id(0) // pairs
        pair = tl.program_id(0) % pairs
    else:
        tile = tl.program_id(0) % tiles
        pair = tl.program_id(0) // tiles
    split = tl.program_id(1)
    batch = pair // heads_kv
    head = pair % heads_kv

    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < seq_q * GROUP
    query = row // GROUP
    q_head = head * GROUP + row % GROUP
    dim = tl.arange(0, BLOCK_D)
    tile_mask = inside[:, None] & (dim < HEAD_DIM)[None, :]
    q_row = batch.to(tl.int64) * q_stride_b + q_head.to(tl.int64) * q_stride_h + query.to(tl.int64) * q_stride_s
    q = tl.load(q_ptr + q_row[:, None] + dim[None, :], mask=tile_mask, other=0.0)
    q_2 = 0.0
    if BLOCK_D_2 > 0:  # a head size between powers of two: its last columns
        dim_2 = BLOCK_D + tl.arange(0, BLOCK_D_2)
        tile_mask_2 = inside[:, None] & (dim_2 < HEAD_DIM)[None, :]
        q_2 = tl.load(q_ptr + q_row[:, None] + dim_2[None, :], mask=tile_mask_2, other=0.0)

    # [first, last): keys that some row sees. [all_first, all_last): keys that every row sees, rows that see
    # nothing aside: whatever the unmasked loop adds to those is replaced at the end.
    if HAS_INTERVAL:
        row_start = tl.load(start_ptr + batch * bound_stride_b + query, mask=inside, other=0)
        row_stop = tl.load(stop_ptr + batch * bound_stride_b + query, mask=inside, other=0)
        sees = row_start < row_stop
        last = tl.max(tl.where(sees, row_stop, 0), 0)
        first = tl.minimum(tl.min(tl.where(sees, row_start, _FAR), 0), last)
        all_first = tl.max(tl.where(sees, row_start, 0), 0)
        all_last = tl.min(tl.where(sees, row_stop, _FAR), 0)
    else:
        row_start = 0
        row_stop = 0
        sees = inside
        last = seq_kv
        first = 0
        all_first = 0
        all_last = seq_kv

    share = tl.cdiv(tl.cdiv(last - first, BLOCK_N), splits) * BLOCK_N
    first += split * share
    last = tl.minimum(last, first + share)
    clear_first = first + tl.cdiv(tl.maximum(all_first - first, 0), BLOCK_N) * BLOCK_N
    clear_last = first + tl.maximum(tl.minimum(all_last, last) - first, 0) // BLOCK_N * BLOCK_N
    if clear_last <= clear_first:
        clear_first = first
        clear_last = first
    enter = clear_first
    if HAS_INTERVAL:
        enter += lead((clear_last - clear_first) // BLOCK_N, clear_first, BLOCK_N) * BLOCK_N

    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    acc_2 = 0.0
    if BLOCK_V_2 > 0:
        acc_2 = tl.zeros([BLOCK_M, BLOCK_V_2], tl.float32)
    # Finite, so that a block without one visible key leaves exp2(-inf - row_max) = 0 and not NaN.
    row_max = tl.full([BLOCK_M], -1e30, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    for key in tl.range(enter, clear_last, BLOCK_N):
        acc, acc_2, row_max, row_sum = _attend(
            acc, acc_2, row_max, row_sum, q, q_2, k_desc, k_2_desc, v_desc, v_2_desc, batch, head, key, row_start,
            row_stop, seq_kv, scale_log2, cap, False, HAS_INTERVAL, CAPPED, BLOCK_N, BLOCK_D, BLOCK_D_2,
            BLOCK_V, BLOCK_V_2, PRECISION,
        )  # fmt: skip
    for key in tl.range(clear_last, last, BLOCK_N):
        acc, acc_2, row_max, row_sum = _attend(
            acc, acc_2, row_max, row_sum, q, q_2, k_desc, k_2_desc, v_desc, v_2_desc, batch, head, key, row_start,
            row_stop, seq_kv, scale_log2, cap, True, HAS_INTERVAL, CAPPED, BLOCK_N, BLOCK_D, BLOCK_D_2,
            BLOCK_V, BLOCK_V_2, PRECISION,
        )  # fmt: skip
    if HAS_INTERVAL:
        for key in tl.range(first, clear_first, BLOCK_N):
            acc, acc_2, row_max, row_sum = _attend(
                acc, acc_2, row_max, row_sum, q, q_2, k_desc, k_2_desc, v_desc, v_2_desc, batch, head, key, row_start,
                row_stop, seq_kv, scale_log2, cap, True, HAS_INTERVAL, CAPPED, BLOCK_N, BLOCK_D, BLOCK_D_2,
                BLOCK_V, BLOCK_V_2, PRECISION,
            )  # fmt: skip
        for key in tl.range(clear_first, enter, BLOCK_N):
            acc, acc_2, row_max, row_sum = _attend(
                acc, acc_2, row_max, row_sum, q, q_2, k_desc, k_2_desc, v_desc, v_2_desc, batch, head, key, row_start,
                row_stop, seq_kv, scale_log2, cap, False, HAS_INTERVAL, CAPPED, BLOCK_N, BLOCK_D, BLOCK_D_2,
                BLOCK_V, BLOCK_V_2, PRECISION,
            )  # fmt: skip

    sees = sees & (row_sum > 0)
    weight = tl.where(sees, 1.0 / row_sum, 0.0)[:, None]
    lse = tl.where(sees, (row_max + tl.log2(row_sum)) * _LN_2, float("-inf"))
    out_row = (
        split.to(tl.int64) * out_stride_split
        + batch.to(tl.int64) * out_stride_b
        + q_head.to(tl.int64) * out_stride_h
        + query.to(tl.int64) * out_stride_s
    )
    out = out_ptr + out_row[:, None]
    column = tl.arange(0, BLOCK_V)[None, :]
    acc = (acc * weight).to(out_ptr.dtype.element_ty)
    tl.store(out + column, acc, mask=inside[:, None] & (column < VALUE_DIM))
    if BLOCK_V_2 > 0:
        column_2 = BLOCK_V + tl.arange(0, BLOCK_V_2)[None, :]
        acc_2 = (acc_2 * weight).to(out_ptr.dtype.element_ty)
        tl.store(out + column_2, acc_2, mask=inside[:, None] & (column_2 < VALUE_DIM))
    lse_row = split.to(tl.int64) * lse_stride_split + (batch * heads_kv * GROUP + q_head).to(tl.int64) * seq_q + query
    tl.store(lse_ptr + lse_row, lse, mask=inside)


def interval_forward_supported(q_dtype: torch.dtype, head_dim: int, device_type: str) -> str | None:
    """Why the Triton kernels cannot do a call, or None when they can. Looks at no tensor, so it is free."""
    if device_type != "cuda":
        return f"the Triton kernels run on CUDA devices, not on {device_type}"
    if q_dtype not in DTYPES:
        return f"the Triton kernels take bfloat16, float16 and float32, not {q_dtype}"
    if head_dim % 8 or not 16 <= head_dim <= MAX_HEAD_DIM:
        return f"the Triton kernels take head sizes in multiples of 8, 16 to {MAX_HEAD_DIM}, not {head_dim}"
    return None


def rows_for_copy_engine(x: Tensor) -> Tensor:
    """``x`` as the tensor copy engine reads it.

    Every layout that a projection writes is so already and is returned as it is; only an odd view is copied.
    """
    return x if fits_copy_engine(layout(x)) else x.clone(memory_format=torch.contiguous_format)


@functools.cache
def units_to_fill(device: torch.device) -> int:
    """Multiprocessors to fill; 8 on the interpreter, so that small tests take the split path too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


@functools.lru_cache(maxsize=1024)
def key_splits(tiles: int, key_blocks: int, slots: int) -> int:
    """Shares to cut the keys into so that ``tiles * shares`` programs fill ``slots`` places evenly.

    The time of a launch is its number of full rounds over the slots, divided by the shares; each share also
    writes a float32 partial that is read again, which is counted as a hundredth of a tile's work.
    """
    if tiles >= 4 * slots:
        return 1
    most = max(1, min(key_blocks // 8, triton.cdiv(4 * slots, tiles), 64))
    return min(range(1, most + 1), key=lambda s: triton.cdiv(tiles * s, slots) / s + 0.01 * (s - 1) * tiles / slots)


def interval_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor | None,
    stop: Tensor | None,
    scale: float,
    config: ForwardConfig | None = None,
    softcap: float | None = None,
    pattern: str = UNKNOWN,
) -> tuple[Tensor, Tensor]:
    """Attention of ``q`` over each row's own range of the keys at hand.

    Args:
        q: ``[B, H_q, S_q, D]`` bfloat16, float16 or float32; any strides, unit stride in ``D``.
        k, v: ``[B, H_kv, S_kv, D]`` and ``[B, H_kv, S_kv, D_v]`` of the same dtype; ``H_q`` is a multiple of ``H_kv``.
        start, stop: int32 ``[B, S_q]``, row ``i`` sees the local key positions ``[start_i, stop_i)`` with
            ``0 <= start_i <= stop_i <= S_kv``; None for both when every row sees every key.
        scale: positive factor of the scores, usually ``D ** -0.5``.
        config: other tiles than the tuned ones.
        softcap: soft cap of the scores, positive; None: none.
        pattern: of the ranges, which chooses the tiles.

    Returns:
        ``out [B, H_q, S_q, D_v]`` in the dtype and, where they are dense, the order of the strides of ``q``; float32
        natural log-sum-exp ``[B, H_q, S_q]``. Rows that see no key give 0 and ``-inf``.

    Raises:
        ValueError: ``scale`` is not positive.
    """
    if scale <= 0:
        raise ValueError(f"interval_forward: scale is {scale}; it must be positive (negate q for a negative one)")
    if q.stride(-1) != 1:
        q = q.contiguous()
    out = empty_rows(q, v.shape[3])
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if out.numel() == 0 or k.shape[2] == 0:
        return out.zero_(), lse.fill_(float("-inf"))

    of_bounds = None
    if start is not None and stop is not None:
        start, stop = start.contiguous(), stop.contiguous()
        of_bounds = layout(start), layout(stop)
    plan = _plan(place(q), q.device, layout(q), layout(k), layout(v), of_bounds, softcap is not None, pattern, config)
    if plan.copies:
        k, v = rows_for_copy_engine(k), rows_for_copy_engine(v)
    part_out, part_lse = out, lse
    if plan.splits > 1:
        part_out = torch.empty((plan.splits, *out.shape), dtype=torch.float32, device=q.device)
        part_lse = torch.empty((plan.splits, *lse.shape), dtype=torch.float32, device=q.device)
    plan.launch(
        k, v, q, start, stop, part_out, part_lse, *plan.integers, scale * LOG2_E, (softcap or 0.0) / scale
    )  # fmt: skip
    if plan.splits > 1:
        merge_partials_triton(part_out, part_lse, out, lse)
    return out, lse


class _Plan(NamedTuple):
    """Everything about a call but its tensors.

    Args:
        copies: whether keys or values are copied for the copy engine.
        splits: shares of the keys, whose partial results are merged.
        integers: arguments of the kernel.
        launch: of the kernel.
    """

    copies: bool
    splits: int
    integers: tuple[int, ...]
    launch: Launch


@functools.lru_cache(maxsize=KEPT)
def _plan(
    where: tuple[int, int], device: torch.device, q: Layout, k: Layout, v: Layout,
    bounds: tuple[Layout, Layout] | None, capped: bool, pattern: str, config: ForwardConfig | None,
) -> _Plan:  # fmt: skip
    """``where`` only tells calls apart: a kernel is loaded on one device."""
    dtype, (batch, heads_q, seq_q, head_dim), q_strides, _ = q
    heads_kv, seq_kv, value_dim = v[1][1:]
    has_interval = bounds is not None
    of_ranges = pattern if has_interval else None
    config = config or forward_config((head_dim, value_dim), dtype.itemsize, of_ranges, is_hopper(device))
    group = heads_q // heads_kv
    tiles = triton.cdiv(seq_q * group, config.block_m)
    slots = units_to_fill(device) * config.resident
    splits = key_splits(tiles * heads_kv * batch, triton.cdiv(seq_kv, config.block_n), slots)
    if splits == 1:
        out = empty_rows(torch.empty_strided(q[1], q_strides, device="meta"), value_dim)
        out_strides = (out.numel(), *out.stride()[:3])
    else:
        of_head = seq_q * value_dim
        out_strides = (batch * heads_q * of_head, heads_q * of_head, of_head, value_dim)
    block_v, block_v_2 = split_head(value_dim)
    block_d, block_d_2 = split_head(head_dim)
    launch = Launch(
        _interval_forward_kernel, (tiles * batch * heads_kv, splits), (row_tiles(config.block_n),) * 2,
        GROUP=group, HEAD_DIM=head_dim, VALUE_DIM=value_dim, BLOCK_D=block_d, BLOCK_D_2=block_d_2, BLOCK_V=block_v,
        BLOCK_V_2=block_v_2, BLOCK_M=config.block_m, BLOCK_N=config.block_n, HAS_INTERVAL=has_interval, CAPPED=capped,
        PRECISION="ieee" if dtype == torch.float32 else "tf32",
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    integers = (
        *q_strides[:3], seq_q, *out_strides, batch * heads_q * seq_q, batch * heads_kv, tiles, heads_kv, seq_q, seq_kv,
        splits,
    )  # fmt: skip
    copies = not (fits_copy_engine(k) and fits_copy_engine(v))
    return _Plan(copies, splits, integers, launch)
