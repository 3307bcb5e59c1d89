"""What the backward kernels must know of the query rows: packed row terms, and which tiles of rows see which keys."""

from __future__ import annotations

import triton
import triton.language as tl

from ds_lvxattn.kernels.triton.forward import LOG2_E

_FAR = tl.constexpr(2**31 - 1)
_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit
def _row_pointers(
    ptr, stride_b, stride_h, stride_s, stride_d, batch, head, query, BLOCK: tl.constexpr
):  # fmt: skip
    """Of ``[B, H, S, D]``, ``BLOCK`` columns of some rows."""
    rows = ptr + batch * stride_b + head * stride_h + query * stride_s
    return rows[:, None] + (tl.arange(0, BLOCK) * stride_d)[None, :]


@triton.jit(
    do_not_specialize=[
        "lse_stride_b", "lse_stride_h", "lse_stride_s", "delta_stride_b", "delta_stride_h", "delta_stride_s",
        "heads_kv", "seq_q", "tiles",
    ]
)  # fmt: skip
def pack_rows_kernel(
    q_ptr, dout_ptr, out_ptr, lse_ptr, delta_ptr, start_ptr, stop_ptr, q_rows_ptr, dout_rows_ptr, terms_ptr,
    q_stride_b, q_stride_h, q_stride_s, q_stride_d, dout_stride_b, dout_stride_h, dout_stride_s, dout_stride_d,
    out_stride_b, out_stride_h, out_stride_s, out_stride_d, lse_stride_b, lse_stride_h, lse_stride_s,
    delta_stride_b, delta_stride_h, delta_stride_s, heads_kv, seq_q, tiles,
    GROUP: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, HAS_INTERVAL: tl.constexpr, COPY_Q: tl.constexpr,
    COPY_DOUT: tl.constexpr, SUM_DELTA: tl.constexpr,
):  # fmt: skip
    """Row terms in the packed order (query ``r // GROUP``, head ``r % GROUP``), padded to whole tiles, and copies of
    the rows of Q and dO in it, ``[B, H_kv, S_q * GROUP, D]``, where they do not lie so.

    ``terms [B * H_kv, 2, rows]`` holds the log-sum-exp in base 2, then delta, which is given or summed up from dO and
    O. The log-sum-exp is ``+inf`` for padding and for rows that see no key here or anywhere: their probabilities are
    then ``exp2(s - inf) = 0`` and no loop needs a row mask.
    """
    pair = tl.program_id(1)
    batch = (pair // heads_kv).to(tl.int64)
    terms_ptr += pair.to(tl.int64) * 2 * tiles * TILE
    for first in tl.static_range(0, TILE, STEP):
        row = tl.program_id(0) * TILE + first + tl.arange(0, STEP)
        query = (row // GROUP).to(tl.int64)
        head = (pair % heads_kv * GROUP + row % GROUP).to(tl.int64)
        inside = row < seq_q * GROUP
        packed = pair.to(tl.int64) * seq_q * GROUP + row
        if COPY_Q:
            mask = inside[:, None] & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
            q = _row_pointers(q_ptr, q_stride_b, q_stride_h, q_stride_s, q_stride_d, batch, head, query, BLOCK_D)
            copy = q_rows_ptr + packed[:, None] * HEAD_DIM + tl.arange(0, BLOCK_D)[None, :]
            tl.store(copy, tl.load(q, mask=mask), mask=mask)
        if COPY_DOUT or SUM_DELTA:
            mask = inside[:, None] & (tl.arange(0, BLOCK_V) < VALUE_DIM)[None, :]
            dout = tl.load(
                _row_pointers(
                    dout_ptr, dout_stride_b, dout_stride_h, dout_stride_s, dout_stride_d, batch, head, query, BLOCK_V
                ),
                mask=mask, other=0.0,
            )  # fmt: skip
            if COPY_DOUT:
                copy = dout_rows_ptr + packed[:, None] * VALUE_DIM + tl.arange(0, BLOCK_V)[None, :]
                tl.store(copy, dout, mask=mask)
        if SUM_DELTA:
            out = _row_pointers(
                out_ptr, out_stride_b, out_stride_h, out_stride_s, out_stride_d, batch, head, query, BLOCK_V
            )
            delta = tl.sum(dout.to(tl.float32) * tl.load(out, mask=mask, other=0.0).to(tl.float32), 1)
        else:
            of_delta = batch * delta_stride_b + head * delta_stride_h + query * delta_stride_s
            delta = tl.load(delta_ptr + of_delta, mask=inside, other=0.0)
        of_lse = batch * lse_stride_b + head * lse_stride_h + query * lse_stride_s
        lse = tl.load(lse_ptr + of_lse, mask=inside, other=float("-inf"))
        sees = inside & (lse > float("-inf"))
        if HAS_INTERVAL:
            bound = batch * seq_q + query
            start = tl.load(start_ptr + bound, mask=inside, other=0)
            stop = tl.load(stop_ptr + bound, mask=inside, other=0)
            sees = sees & (start < stop)
        tl.store(terms_ptr + row, tl.where(sees, lse * _LOG2_E, float("inf")))
        tl.store(terms_ptr + tiles * TILE + row, tl.where(sees, delta, 0.0))


@triton.jit(do_not_specialize=["seq_q", "tiles"])
def pack_ranges_kernel(
    start_ptr, stop_ptr, packed_start_ptr, packed_stop_ptr, bounds_ptr, seq_q, tiles,
    GROUP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Ranges in the packed order; padding sees nothing.

    ``bounds [B, 4, tiles]`` holds each tile's first key that some row sees, last, first key that all rows see, last;
    rows that see nothing are left out.
    """
    tile = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    row = tile * TILE + tl.arange(0, TILE)
    inside = row < seq_q * GROUP
    start = tl.load(start_ptr + batch * seq_q + row // GROUP, mask=inside, other=0)
    stop = tl.load(stop_ptr + batch * seq_q + row // GROUP, mask=inside, other=0)
    sees = inside & (start < stop)
    packed = batch * tiles * TILE + row
    tl.store(packed_start_ptr + packed, start)
    tl.store(packed_stop_ptr + packed, stop)
    tile_bounds = bounds_ptr + batch * 4 * tiles + tile
    tl.store(tile_bounds, tl.min(tl.where(sees, start, _FAR), 0))
    tl.store(tile_bounds + tiles, tl.max(tl.where(sees, stop, 0), 0))
    tl.store(tile_bounds + 2 * tiles, tl.max(tl.where(sees, start, 0), 0))
    tl.store(tile_bounds + 3 * tiles, tl.min(tl.where(sees, stop, _FAR), 0))


@triton.jit(do_not_specialize=["tiles"])
def seen_tiles_kernel(bounds_ptr, seen_ptr, count_ptr, tiles, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr):
    """For one block of keys, the tiles of rows that see it: those that see all of it from the front of
    ``seen [B, key blocks, tiles]``, those that see part of it from the back; ``count [B, key blocks, 2]``."""
    block = tl.program_id(0)
    here = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + block
    bounds_ptr += tl.program_id(1).to(tl.int64) * 4 * tiles
    seen_ptr += here * tiles
    key_first = block * BLOCK_N
    key_last = key_first + BLOCK_N
    whole_count = 0
    part_count = 0
    for base in range(0, tiles, BLOCK_T):
        tile = base + tl.arange(0, BLOCK_T)
        inside = tile < tiles
        first = tl.load(bounds_ptr + tile, mask=inside, other=_FAR)
        last = tl.load(bounds_ptr + tiles + tile, mask=inside, other=0)
        all_first = tl.load(bounds_ptr + 2 * tiles + tile, mask=inside, other=_FAR)
        all_last = tl.load(bounds_ptr + 3 * tiles + tile, mask=inside, other=0)
        some = (first < key_last) & (last > key_first)
        whole = (some & (all_first <= key_first) & (all_last >= key_last)).to(tl.int32)
        part = some.to(tl.int32) - whole
        tl.store(seen_ptr + whole_count + tl.cumsum(whole, 0) - 1, tile, mask=whole > 0)
        tl.store(seen_ptr + tiles - part_count - tl.cumsum(part, 0), tile, mask=part > 0)
        whole_count += tl.sum(whole, 0)
        part_count += tl.sum(part, 0)
    tl.store(count_ptr + here * 2, whole_count)
    tl.store(count_ptr + here * 2 + 1, part_count)
