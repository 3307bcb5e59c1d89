"""The kernels of the backward pass; ``backward.py`` says how they work together, and launches them."""

from __future__ import annotations

import triton
import triton.language as tl

from ds_lvxattn.kernels.triton.forward import LOG2_E, lead, share_of_cap

_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit
def _visit_rows(
    dk, dk_2, dv, dv_2, k, k_2, v, v_2, q_desc, q_2_desc, dout_desc, dout_2_desc, ds_desc, terms_ptr, start_ptr,
    stop_ptr, batch, head, row, seq_rows, key_first, ds_row, ds_column, seq_kv, scale_log2, cap,
    MASKED: tl.constexpr, HAS_INTERVAL: tl.constexpr, CAPPED: tl.constexpr, KEEP_DS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_D_2: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_V_2: tl.constexpr, PRECISION: tl.constexpr,
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
    slope = 1.0
    if CAPPED:
        share = share_of_cap(scores, cap)
        scores = cap * share
        slope -= share * share
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
    p_slope = p
    if CAPPED:
        p_slope *= slope
    dout = dout_desc.load([batch, head, row, 0]).reshape(BLOCK_M, BLOCK_V)
    dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
    delta = tl.load(terms_ptr + seq_rows + rows)
    dp = tl.dot(v, dout.T, input_precision=PRECISION)
    if BLOCK_V_2 > 0:
        dout_2 = dout_2_desc.load([batch, head, row, BLOCK_V]).reshape(BLOCK_M, BLOCK_V_2)
        dv_2 = tl.dot(p.to(dout.dtype), dout_2, dv_2, input_precision=PRECISION)
        dp = tl.dot(v_2, dout_2.T, dp, input_precision=PRECISION)
    ds = (p_slope * (dp - delta[None, :])).to(q.dtype)
    dk = tl.dot(ds, q, dk, input_precision=PRECISION)
    if BLOCK_D_2 > 0:
        dk_2 = tl.dot(ds, q_2, dk_2, input_precision=PRECISION)
    if KEEP_DS:
        ds_desc.store([ds_row, ds_column], ds)
    return dk, dk_2, dv, dv_2


@triton.jit
def _key_block_grads(
    q_desc, q_2_desc, dout_desc, dout_2_desc, k_desc, k_2_desc, v_desc, v_2_desc, ds_desc, terms_ptr, start_ptr,
    stop_ptr, seen_ptr, count_ptr, base_ptr, k_ptr, v_ptr, dk_ptr, dv_ptr,
    k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    dk_stride_b, dk_stride_h, dk_stride_s, dv_stride_b, dv_stride_h, dv_stride_s,
    pair, block, first_block, batches, heads_kv, seq_kv, tiles, blocks, chunk, chunk_blocks, slots, scale, cap,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_D_2: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_V_2: tl.constexpr, TILE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_INTERVAL: tl.constexpr, CAPPED: tl.constexpr, KEEP_DS: tl.constexpr, ADD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``dK`` and ``dV`` of one block of keys of a key head, and its ``dS`` against all rows that see it."""
    STEPS: tl.constexpr = TILE // BLOCK_M
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
    dim_v = tl.arange(0, BLOCK_V)
    mask = (key < seq_kv)[:, None] & (dim < HEAD_DIM)[None, :]
    mask_v = (key < seq_kv)[:, None] & (dim_v < VALUE_DIM)[None, :]
    # Few visits follow where dS is not kept, so the start counts: plain loads overlap, while the copy
    # engine outside a loop is waited for once a tensor. Elsewhere registers count, and it needs fewer.
    if KEEP_DS:
        k = k_desc.load([batch, head, key_first, 0]).reshape(BLOCK_N, BLOCK_D)
        v = v_desc.load([batch, head, key_first, 0]).reshape(BLOCK_N, BLOCK_V)
    else:
        k_rows = k_ptr + batch.to(tl.int64) * k_stride_b + head.to(tl.int64) * k_stride_h
        v_rows = v_ptr + batch.to(tl.int64) * v_stride_b + head.to(tl.int64) * v_stride_h
        k = tl.load(k_rows + key.to(tl.int64)[:, None] * k_stride_s + dim[None, :], mask=mask, other=0.0)
        v = tl.load(v_rows + key.to(tl.int64)[:, None] * v_stride_s + dim_v[None, :], mask=mask_v, other=0.0)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    k_2 = 0.0
    v_2 = 0.0
    dk_2 = 0.0
    dv_2 = 0.0
    if BLOCK_D_2 > 0:  # a head size between powers of two: its last columns
        k_2 = k_2_desc.load([batch, head, key_first, BLOCK_D]).reshape(BLOCK_N, BLOCK_D_2)
        dk_2 = tl.zeros([BLOCK_N, BLOCK_D_2], tl.float32)
    if BLOCK_V_2 > 0:
        v_2 = v_2_desc.load([batch, head, key_first, BLOCK_V]).reshape(BLOCK_N, BLOCK_V_2)
        dv_2 = tl.zeros([BLOCK_N, BLOCK_V_2], tl.float32)
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
            (head * slots + slot) * BLOCK_N, column, seq_kv, scale * _LOG2_E, cap, False, HAS_INTERVAL, CAPPED,
            KEEP_DS, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_D_2, BLOCK_V, BLOCK_V_2, PRECISION,
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
            (head * slots + slot) * BLOCK_N, column, seq_kv, scale * _LOG2_E, cap, True, HAS_INTERVAL, CAPPED,
            KEEP_DS, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_D_2, BLOCK_V, BLOCK_V_2, PRECISION,
        )  # fmt: skip

    key = key.to(tl.int64)[:, None]
    dk_rows = dk_ptr + batch.to(tl.int64) * dk_stride_b + head.to(tl.int64) * dk_stride_h + key * dk_stride_s
    dv_rows = dv_ptr + batch.to(tl.int64) * dv_stride_b + head.to(tl.int64) * dv_stride_h + key * dv_stride_s
    dk *= scale
    if ADD:
        dk += tl.load(dk_rows + dim[None, :], mask=mask, other=0.0)
        dv += tl.load(dv_rows + dim_v[None, :], mask=mask_v, other=0.0)
    tl.store(dk_rows + dim[None, :], dk.to(dk_ptr.dtype.element_ty), mask=mask)
    tl.store(dv_rows + dim_v[None, :], dv.to(dv_ptr.dtype.element_ty), mask=mask_v)
    if BLOCK_D_2 > 0:
        dim_2 = BLOCK_D + tl.arange(0, BLOCK_D_2)
        mask_2 = (key < seq_kv) & (dim_2 < HEAD_DIM)[None, :]
        dk_2 *= scale
        if ADD:
            dk_2 += tl.load(dk_rows + dim_2[None, :], mask=mask_2, other=0.0)
        tl.store(dk_rows + dim_2[None, :], dk_2, mask=mask_2)
    if BLOCK_V_2 > 0:
        dim_v_2 = BLOCK_V + tl.arange(0, BLOCK_V_2)
        mask_v_2 = (key < seq_kv) & (dim_v_2 < VALUE_DIM)[None, :]
        if ADD:
            dv_2 += tl.load(dv_rows + dim_v_2[None, :], mask=mask_v_2, other=0.0)
        tl.store(dv_rows + dim_v_2[None, :], dv_2, mask=mask_v_2)


@triton.jit(do_not_specialize=["pairs", "heads_kv", "seq_kv", "tiles", "blocks", "chunk", "chunk_blocks", "slots"])
def key_grads_kernel(
    q_desc, q_2_desc, dout_desc, dout_2_desc, k_desc, k_2_desc, v_desc, v_2_desc, ds_desc, terms_ptr, start_ptr,
    stop_ptr, seen_ptr, count_ptr, edge_ptr, base_ptr, k_ptr, v_ptr, dk_ptr, dv_ptr,
    k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    dk_stride_b, dk_stride_h, dk_stride_s, dv_stride_b, dv_stride_h, dv_stride_s,
    pairs, heads_kv, seq_kv, tiles, blocks, chunk, chunk_blocks, slots, scale, cap,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_D_2: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_V_2: tl.constexpr, TILE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_INTERVAL: tl.constexpr, CAPPED: tl.constexpr, KEEP_DS: tl.constexpr, ADD: tl.constexpr,
    PRECISION: tl.constexpr,
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
    item = tl.program_id(0)
    if item < here * pairs:
        _key_block_grads(
            q_desc, q_2_desc, dout_desc, dout_2_desc, k_desc, k_2_desc, v_desc, v_2_desc, ds_desc, terms_ptr,
            start_ptr, stop_ptr, seen_ptr, count_ptr, base_ptr, k_ptr, v_ptr, dk_ptr, dv_ptr,
            k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
            dk_stride_b, dk_stride_h, dk_stride_s, dv_stride_b, dv_stride_h, dv_stride_s,
            item // here, first_block + item % here, first_block, batches, heads_kv, seq_kv, tiles, blocks, chunk,
            chunk_blocks, slots, scale, cap,
            HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_D_2, BLOCK_V, BLOCK_V_2, TILE, BLOCK_M, BLOCK_N,
            HAS_INTERVAL, CAPPED, KEEP_DS, ADD, PRECISION,
        )  # fmt: skip


@triton.jit
def _query_rows(dq_ptr, stride_b, stride_h, stride_s, batch, head, row, GROUP: tl.constexpr):
    """Where ``dQ`` of the packed rows ``row`` of a key head lies."""
    query_head = head * GROUP + row % GROUP
    query = row // GROUP
    dq_ptr += batch.to(tl.int64) * stride_b
    return dq_ptr + query_head.to(tl.int64) * stride_h + query.to(tl.int64) * stride_s


@triton.jit(do_not_specialize=["heads_kv", "seq_q", "tiles", "blocks", "chunk", "chunks", "chunk_blocks", "slots"])
def query_grads_kernel(
    ds_desc, k_desc, k_2_desc, bounds_ptr, edge_ptr, base_ptr, sum_ptr, dq_ptr,
    dq_stride_b, dq_stride_h, dq_stride_s, dq_stride_d,
    heads_kv, seq_q, tiles, blocks, chunk, chunks, chunk_blocks, slots, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_D_2: tl.constexpr, TILE: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_INTERVAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds ``dS K`` of one chunk of keys to the float32 ``dQ / scale`` of one tile's packed rows; the first chunk sets
    it. The last chunk writes ``dQ`` instead.

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
    if (low < high) | (chunk == 0) | (chunk == chunks - 1):
        dim = tl.arange(0, BLOCK_D)
        row = (tl.program_id(1) * tiles + tile).to(tl.int64) * TILE + tl.arange(0, TILE)
        sums = sum_ptr + row[:, None] * HEAD_DIM + dim[None, :]
        mask = (dim < HEAD_DIM)[None, :] & (row >= 0)[:, None]
        acc = tl.zeros([TILE, BLOCK_D], tl.float32)
        acc_2 = 0.0
        if BLOCK_D_2 > 0:
            dim_2 = BLOCK_D + tl.arange(0, BLOCK_D_2)
            sums_2 = sum_ptr + row[:, None] * HEAD_DIM + dim_2[None, :]
            mask_2 = (dim_2 < HEAD_DIM)[None, :] & (row >= 0)[:, None]
            acc_2 = tl.zeros([TILE, BLOCK_D_2], tl.float32)
        if chunk > 0:
            acc = tl.load(sums, mask=mask, other=0.0)
            if BLOCK_D_2 > 0:
                acc_2 = tl.load(sums_2, mask=mask_2, other=0.0)
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
        if chunk == chunks - 1:
            rows = tile * TILE + tl.arange(0, TILE)
            inside = (rows < seq_q * GROUP)[:, None]
            dq = _query_rows(dq_ptr, dq_stride_b, dq_stride_h, dq_stride_s, batch, head, rows, GROUP)[:, None]
            out = (acc * scale).to(dq_ptr.dtype.element_ty)
            tl.store(dq + (dim * dq_stride_d)[None, :], out, mask=mask & inside)
            if BLOCK_D_2 > 0:
                out_2 = (acc_2 * scale).to(dq_ptr.dtype.element_ty)
                tl.store(dq + (dim_2 * dq_stride_d)[None, :], out_2, mask=mask_2 & inside)
        else:
            tl.store(sums, acc, mask=mask)
            if BLOCK_D_2 > 0:
                tl.store(sums_2, acc_2, mask=mask_2)


@triton.jit
def _add_query_grads(
    acc, q, dout, lse, delta, k_desc, v_desc, batch, head, key_first, row_start, row_stop, scale_log2, cap,
    MASKED: tl.constexpr, CAPPED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``dS K`` of one block of keys, from the scores computed again."""
    k = k_desc.load([batch, head, key_first, 0]).reshape(BLOCK_N, BLOCK_D)
    scores = tl.dot(q, k.T, input_precision=PRECISION)
    slope = 1.0
    if CAPPED:
        share = share_of_cap(scores, cap)
        scores = cap * share
        slope -= share * share
    scores *= scale_log2
    if MASKED:
        key = key_first + tl.arange(0, BLOCK_N)
        seen = (key[None, :] >= row_start[:, None]) & (key[None, :] < row_stop[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    p = tl.exp2(scores - lse[:, None])
    if CAPPED:
        p *= slope
    v = v_desc.load([batch, head, key_first, 0]).reshape(BLOCK_N, BLOCK_V)
    ds = p * (tl.dot(dout, v.T, input_precision=PRECISION) - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)


@triton.jit
def _query_tile_grads(
    q_desc, dout_desc, k_desc, v_desc, terms_ptr, start_ptr, stop_ptr, bounds_ptr, dq_ptr,
    dq_stride_b, dq_stride_h, dq_stride_s, dq_stride_d, pair, tile, heads_kv, seq_q, tiles, scale, cap,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, TILE: tl.constexpr,
    BLOCK_N: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``dQ`` of one tile of rows of a key head, from only the keys that it sees and their scores computed again."""
    batch = pair // heads_kv
    head = pair % heads_kv
    rows = tile * TILE + tl.arange(0, TILE)
    q = q_desc.load([batch, head, tile * TILE, 0]).reshape(TILE, BLOCK_D)
    dout = dout_desc.load([batch, head, tile * TILE, 0]).reshape(TILE, BLOCK_V)
    terms_ptr += pair.to(tl.int64) * 2 * tiles * TILE
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
            cap, False, CAPPED, BLOCK_N, BLOCK_D, BLOCK_V, PRECISION,
        )  # fmt: skip
    for block in tl.range(0, masked_blocks):
        after = clear_last + (block - blocks_before) * BLOCK_N
        key = tl.where(block < blocks_before, first + block * BLOCK_N, after)
        acc = _add_query_grads(
            acc, q, dout, lse, delta, k_desc, v_desc, batch, head, key, row_start, row_stop, scale * _LOG2_E,
            cap, True, CAPPED, BLOCK_N, BLOCK_D, BLOCK_V, PRECISION,
        )  # fmt: skip
    dim = tl.arange(0, BLOCK_D)
    mask = (rows < seq_q * GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
    dq = _query_rows(dq_ptr, dq_stride_b, dq_stride_h, dq_stride_s, batch, head, rows, GROUP)[:, None]
    tl.store(dq + (dim * dq_stride_d)[None, :], (acc * scale).to(dq_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["heads_kv", "seq_q", "tiles"])
def query_grads_again_kernel(
    q_desc, dout_desc, k_desc, v_desc, terms_ptr, start_ptr, stop_ptr, bounds_ptr, dq_ptr,
    dq_stride_b, dq_stride_h, dq_stride_s, dq_stride_d, heads_kv, seq_q, tiles, scale, cap,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, TILE: tl.constexpr,
    BLOCK_N: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``dQ`` without a workspace, one tile of rows a program."""
    _query_tile_grads(
        q_desc, dout_desc, k_desc, v_desc, terms_ptr, start_ptr, stop_ptr, bounds_ptr, dq_ptr,
        dq_stride_b, dq_stride_h, dq_stride_s, dq_stride_d, tl.program_id(1),
        tl.num_programs(0) - 1 - tl.program_id(0), heads_kv, seq_q, tiles, scale, cap,
        GROUP, HEAD_DIM, BLOCK_D, BLOCK_V, TILE, BLOCK_N, CAPPED, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["heads_kv", "seq_kv", "seq_q", "tiles", "blocks"])
def grads_together_kernel(
    q_desc, dout_desc, k_desc, v_desc, terms_ptr, start_ptr, stop_ptr, bounds_ptr, seen_ptr, count_ptr,
    k_ptr, v_ptr, dk_ptr, dv_ptr, dq_ptr,
    k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    dk_stride_b, dk_stride_h, dk_stride_s, dv_stride_b, dv_stride_h, dv_stride_s,
    dq_stride_b, dq_stride_h, dq_stride_s, dq_stride_d, batches, heads_kv, seq_kv, seq_q, tiles, blocks, scale, cap,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, TILE: tl.constexpr, BLOCK_N: tl.constexpr, CAPPED: tl.constexpr, ADD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """All gradients without a workspace in one launch: where ranges are short, reading the keys takes the time.

    Of each key head, programs that own a block of keys and those that own a tile of rows alternate in proportion:
    those that see each other run at about the same time where ranges move along the keys evenly, and the keys come
    from device memory once.
    """
    of_pair = tiles + blocks
    pair = tl.program_id(0) // of_pair
    place = (tl.program_id(0) % of_pair).to(tl.int64)
    tile = (place * tiles // of_pair).to(tl.int32)
    if ((place + 1) * tiles // of_pair).to(tl.int32) > tile:
        _query_tile_grads(
            q_desc, dout_desc, k_desc, v_desc, terms_ptr, start_ptr, stop_ptr, bounds_ptr, dq_ptr,
            dq_stride_b, dq_stride_h, dq_stride_s, dq_stride_d, pair, tile, heads_kv, seq_q, tiles, scale, cap,
            GROUP, HEAD_DIM, BLOCK_D, BLOCK_V, TILE, BLOCK_N, CAPPED, PRECISION,
        )  # fmt: skip
    else:
        _key_block_grads(
            q_desc, None, dout_desc, None, k_desc, None, v_desc, None, None, terms_ptr,
            start_ptr, stop_ptr, seen_ptr, count_ptr, None, k_ptr, v_ptr, dk_ptr, dv_ptr,
            k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
            dk_stride_b, dk_stride_h, dk_stride_s, dv_stride_b, dv_stride_h, dv_stride_s,
            pair, place.to(tl.int32) - tile, 0, batches, heads_kv, seq_kv, tiles, blocks, 0, blocks, 0, scale, cap,
            HEAD_DIM, VALUE_DIM, BLOCK_D, 0, BLOCK_V, 0, TILE, TILE, BLOCK_N,
            True, CAPPED, False, ADD, PRECISION,
        )  # fmt: skip
