"""Attention of packed query heads over one contiguous key range a row, backward.

The gradients of FlashAttention-2 (arXiv 2307.08691, algorithm 2) from the log-sum-exp over all keys of the
group and ``delta = rowsum(dO * O) - dL``, both known before the pass (LV-XAttn, arXiv 2502.02406, section 3).

Two kernels, five matrix products and no atomics. ``key_grads_kernel`` owns a block of keys, walks the query
rows that see it and keeps ``dK`` and ``dV`` in registers; ``dS``, which it has at hand, goes to a workspace
in the input dtype. ``query_grads_kernel`` multiplies the workspace by ``K`` and writes ``dQ``. Writing ``dS``
(2 bytes a score) costs less than computing the scores twice (seven products), and less than float32 partials of ``dQ``
a key block (``4 * D / BLOCK_N`` bytes a score, read and written). The workspace is bounded: the keys are taken
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

from ds_lvxattn.kernels.derived import derived_of
from ds_lvxattn.kernels.pattern import UNKNOWN
from ds_lvxattn.kernels.triton.backward_launches import Shapes, row_launches
from ds_lvxattn.kernels.triton.backward_plan import WORKSPACE_BYTES, ChunkPlan, plan_masked, rows_at_once
from ds_lvxattn.kernels.triton.backward_rows import pack_ranges_kernel, seen_tiles_kernel
from ds_lvxattn.kernels.triton.forward import multiprocessors, rows_for_copy_engine
from ds_lvxattn.kernels.triton.launch import KEPT, layout, place
from ds_lvxattn.kernels.triton.tiles import BackwardConfig, backward_config, is_hopper


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
    pattern: str = UNKNOWN,
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
        pattern: of the ranges, which chooses the tiles.

    Returns:
        ``dq`` (the part from these keys), ``dk``, ``dv`` in the dtypes and dense strides of the inputs.

    Raises:
        ValueError: ``scale`` is not positive.
    """
    if scale <= 0:
        raise ValueError(f"interval_backward: scale is {scale}; it must be positive (negate q for a negative one)")
    k, v = rows_for_copy_engine(k), rows_for_copy_engine(v)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if dq.numel() == 0 or dk.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()

    of_ranges = None if start is None else pattern
    how = _divided(q.device, q.dtype, q.shape, v.shape, of_ranges, workspace_bytes, config)
    seq_q, run = q.shape[2], how.run
    if run == seq_q:
        _backward_of_rows(dout, q, k, v, lse, delta, start, stop, scale, softcap, how, dq, dk, dv, add=False)
        return dq, dk, dv
    dk_sum, dv_sum = (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))
    for first in range(0, seq_q, run):
        x = slice(first, first + run)
        _backward_of_rows(
            dout[:, :, x], q[:, :, x], k, v, lse[:, :, x], delta[:, :, x],
            *_ranges_of_run(start, stop, x), scale, softcap, how, dq[:, :, x], dk_sum, dv_sum, add=True,
        )  # fmt: skip
    return dq, dk.copy_(dk_sum), dv.copy_(dv_sum)


class _Division(NamedTuple):
    """How the work is divided.

    Args:
        config: the tiles.
        room: slots of ``dS`` that the workspace holds for one key/value head.
        run: query rows at once.
    """

    config: BackwardConfig
    room: int
    run: int


@functools.lru_cache(maxsize=KEPT)
def _divided(
    device: torch.device, dtype: torch.dtype, q: tuple[int, ...], v: tuple[int, ...], pattern: str | None,
    workspace_bytes: int, config: BackwardConfig | None,
) -> _Division:  # fmt: skip
    """``q`` and ``v`` are shapes; ``pattern`` is None where all is visible."""
    batch, heads_q, seq_q, head_dim = q
    _, heads_kv, seq_kv, value_dim = v
    head_dims = (head_dim, value_dim)
    config = config or backward_config(head_dims, dtype.itemsize, pattern, is_hopper(device))
    room = workspace_bytes // (heads_kv * config.block_n * config.tile * dtype.itemsize)
    run = seq_q
    if config.keep_ds or pattern is None:
        group, units = heads_q // heads_kv, multiprocessors(device)
        run = rows_at_once(seq_q, seq_kv, group, batch, heads_kv, head_dims, config, room, units)
    return _Division(config, room, run)


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
    how: _Division,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    add: bool,
) -> None:
    """Gradients of one run of query rows: ``dq`` is set, ``dk`` and ``dv`` are set or added to."""
    ranges, of_bounds = NO_RANGES, None
    if start is not None and stop is not None:
        start, stop = start.contiguous(), stop.contiguous()
        of_bounds = layout(start), layout(stop)
    of = Shapes(
        layout(dout), layout(q), layout(k), layout(v), layout(lse), layout(delta), dq.stride(), of_bounds
    )  # fmt: skip
    plan = row_launches(place(q), q.device, of, softcap is not None, how.config, how.room, add)
    if start is not None and stop is not None:
        ranges = derived_of(start, stop, plan.of_ranges, functools.partial(_ranges, start, stop, *plan.of_ranges))
    packed_start, packed_stop, bounds, seen, count, masked_plan = ranges
    terms = torch.empty(plan.terms, dtype=torch.float32, device=q.device)
    plan.pack(lse, delta, start, stop, terms, *plan.pack_integers)

    q_rows, dout_rows = plan.q_rows(q), plan.dout_rows(dout)
    row_tiles = (*plan.q_tiles(q_rows), *plan.dout_tiles(dout_rows))
    k_tiles, v_tiles = plan.k_tiles(k), plan.v_tiles(v)
    cap = (softcap or 0.0) / scale  # of the products of queries and keys

    if bounds is not None and how.config.together:
        plan.grads_together(
            row_tiles[0], row_tiles[2], k_tiles[0], v_tiles[0], terms, packed_start, packed_stop, bounds, seen, count,
            k, v, dk, dv, dq, *plan.together_integers, scale, cap,
        )  # fmt: skip
    elif bounds is not None and not how.config.keep_ds:
        plan.key_grads(
            *row_tiles, *k_tiles, *v_tiles, None, terms, packed_start, packed_stop, seen, count, None, None, k, v, dk,
            dv, *plan.key_integers, scale, cap,
        )  # fmt: skip
        plan.query_grads_again(
            plan.q_tiles_again(q_rows)[0], plan.dout_tiles_again(dout_rows)[0], k_tiles[0], v_tiles[0], terms,
            packed_start, packed_stop, bounds, dq, *plan.query_integers, scale, cap,
        )  # fmt: skip
    else:
        chunks = masked_plan or plan.dense
        assert chunks is not None
        # One chunk adds up in registers: what it is given for its sums is not touched.
        sums = terms if chunks.chunks == 1 else torch.empty(plan.dq_sums, dtype=torch.float32, device=q.device)
        ds_out, ds_in = plan.ds_tiles(torch.empty(plan.ds(chunks), dtype=q.dtype, device=q.device))
        for key_grads, key_integers, query_grads, query_integers in plan.chunks(chunks):
            key_grads(
                *row_tiles, *k_tiles, *v_tiles, ds_out, terms, packed_start, packed_stop, seen, count, chunks.edges,
                chunks.base, k, v, dk, dv, *key_integers, scale, cap,
            )  # fmt: skip
            query_grads(ds_in, *k_tiles, bounds, chunks.edges, chunks.base, sums, dq, *query_integers, scale)
