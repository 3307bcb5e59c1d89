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
from ds_lvxattn.kernels.triton.backward_launches import RowLaunches, Shapes, dense_strides, row_launches
from ds_lvxattn.kernels.triton.backward_plan import WORKSPACE_BYTES, ChunkPlan, plan_masked, rows_at_once
from ds_lvxattn.kernels.triton.backward_rows import pack_ranges_kernel, seen_tiles_kernel
from ds_lvxattn.kernels.triton.forward import rows_for_copy_engine, units_to_fill
from ds_lvxattn.kernels.triton.launch import KEPT, fits_copy_engine, layout, place
from ds_lvxattn.kernels.triton.tiles import BackwardConfig, backward_config, is_hopper


def interval_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor | None,
    start: Tensor | None,
    stop: Tensor | None,
    scale: float,
    workspace_bytes: int = WORKSPACE_BYTES,
    config: BackwardConfig | None = None,
    softcap: float | None = None,
    pattern: str = UNKNOWN,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of attention over the keys at hand, given row terms over all ranks' keys. Deterministic.

    Args:
        dout: ``[B, H_q, S_q, D_v]`` gradient of the whole (merged) output, dtype of ``q``.
        q: ``[B, H_q, S_q, D]`` bfloat16, float16 or float32; any strides.
        k, v: ``[B, H_kv, S_kv, D]`` and ``[B, H_kv, S_kv, D_v]`` of the same dtype; ``H_q`` is a multiple of ``H_kv``.
        lse: float32 ``[B, H_q, S_q]``, natural log-sum-exp over all keys of the group; rows with ``-inf`` add
            nothing.
        delta: float32 ``[B, H_q, S_q]``, ``rowsum(dO * O) - dL`` (``attention_delta``); None where ``out`` is given.
        start, stop: int32 ``[B, S_q]`` local key ranges with ``0 <= start <= stop <= S_kv``, or None for all
            visible.
        scale: positive factor of the scores.
        workspace_bytes: upper bound of the ``dS`` workspace (one block of keys at the least); more means
            fewer and fuller launches.
        config: other tiles than the tuned ones.
        softcap: soft cap of the scores, positive; None: none.
        pattern: of the ranges, which chooses the tiles.
        out: ``[B, H_q, S_q, D_v]`` the whole output, any strides; ``delta`` is summed up from it where it is None.

    Returns:
        ``dq`` (the part from these keys), ``dk``, ``dv`` in the dtypes and dense strides of the inputs.

    Raises:
        ValueError: ``scale`` is not positive.
    """
    if scale <= 0:
        raise ValueError(f"interval_backward: scale is {scale}; it must be positive (negate q for a negative one)")
    if start is not None and stop is not None:
        start, stop = start.contiguous(), stop.contiguous()
    out = out if delta is None else None
    of = _shapes(dout, q, k, v, lse, delta, out, start, stop)
    plan = _plan(place(q), q.device, of, softcap is not None, pattern, workspace_bytes, config)
    if plan.copies:
        k, v = rows_for_copy_engine(k), rows_for_copy_engine(v)
        return interval_backward(
            dout, q, k, v, lse, delta, start, stop, scale, workspace_bytes, config, softcap, pattern, out
        )  # fmt: skip
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if plan.config is None:
        return dq.zero_(), dk.zero_(), dv.zero_()
    if plan.whole is not None:
        _backward_of_rows(dout, q, k, v, lse, delta, out, start, stop, scale, softcap, plan.whole, dq, dk, dv)
        return dq, dk, dv
    dk_sum, dv_sum = (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))
    for first in range(0, q.shape[2], plan.run):
        x = slice(first, first + plan.run)
        delta_x, out_x = (None if each is None else each[:, :, x] for each in (delta, out))
        given = (dout[:, :, x], q[:, :, x], k, v, lse[:, :, x], delta_x, out_x, *_ranges_of_run(start, stop, x))
        launches = row_launches(
            place(q), q.device, _shapes(*given), dq.stride(), softcap is not None, plan.config, plan.room, True
        )
        _backward_of_rows(*given, scale, softcap, launches, dq[:, :, x], dk_sum, dv_sum)
    return dq, dk.copy_(dk_sum), dv.copy_(dv_sum)


def _shapes(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor | None, out: Tensor | None,
    start: Tensor | None, stop: Tensor | None,
) -> Shapes:  # fmt: skip
    return Shapes(
        layout(dout), layout(q), layout(k), layout(v), layout(lse), None if delta is None else layout(delta),
        None if out is None else layout(out), None if start is None or stop is None else (layout(start), layout(stop)),
    )  # fmt: skip


class _Plan(NamedTuple):
    """Everything about a call but its tensors.

    Args:
        copies: whether keys or values are copied for the copy engine first; then the rest is left open.
        config: the tiles; None where there are no rows or no keys.
        room: slots of ``dS`` that the workspace holds for one key/value head.
        run: query rows at once.
        whole: the launches, where all rows are one run.
    """

    copies: bool
    config: BackwardConfig | None = None
    room: int = 0
    run: int = 0
    whole: RowLaunches | None = None


@functools.lru_cache(maxsize=KEPT)
def _plan(
    where: tuple[int, int], device: torch.device, of: Shapes, capped: bool, pattern: str, workspace_bytes: int,
    config: BackwardConfig | None,
) -> _Plan:  # fmt: skip
    """``where`` only tells calls apart: a kernel is loaded on one device."""
    if not (fits_copy_engine(of.k) and fits_copy_engine(of.v)):
        return _Plan(copies=True)
    dtype, (batch, heads_q, seq_q, head_dim), *_ = of.q
    _, (_, heads_kv, seq_kv, value_dim), *_ = of.v
    if not (batch and seq_q and seq_kv):
        return _Plan(copies=False)
    head_dims = (head_dim, value_dim)
    of_ranges = None if of.bounds is None else pattern
    config = config or backward_config(head_dims, dtype.itemsize, of_ranges, is_hopper(device))
    room = workspace_bytes // (heads_kv * config.block_n * config.tile * dtype.itemsize)
    run = seq_q
    if config.keep_ds or of_ranges is None:
        group, units = heads_q // heads_kv, units_to_fill(device)
        run = rows_at_once(seq_q, seq_kv, group, batch, heads_kv, head_dims, config, room, units)
    whole = None
    if run == seq_q:
        whole = row_launches(where, device, of, dense_strides(of.q), capped, config, room, False)
    return _Plan(False, config, room, run, whole)


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
    delta: Tensor | None,
    out: Tensor | None,
    start: Tensor | None,
    stop: Tensor | None,
    scale: float,
    softcap: float | None,
    launches: RowLaunches,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Gradients of one run of query rows: ``dq`` is set, ``dk`` and ``dv`` are set or added to."""
    ranges = NO_RANGES
    if start is not None and stop is not None:
        of_ranges = launches.of_ranges
        ranges = derived_of(start, stop, of_ranges, functools.partial(_ranges, start, stop, *of_ranges))
    packed_start, packed_stop, bounds, seen, count, masked_plan = ranges
    terms = torch.empty(launches.terms, dtype=torch.float32, device=q.device)
    q_rows = q if launches.q_rows is None else q.new_empty(launches.q_rows)
    dout_rows = dout if launches.dout_rows is None else dout.new_empty(launches.dout_rows)
    launches.pack(q, dout, out, lse, delta, start, stop, q_rows, dout_rows, terms, *launches.pack_integers)

    cap = (softcap or 0.0) / scale  # of the products of queries and keys

    if launches.together:
        launches.grads_together(
            q_rows, dout_rows, k, v, terms, packed_start, packed_stop, bounds, seen, count, k, v, dk, dv, dq,
            *launches.together_integers, scale, cap,
        )  # fmt: skip
    elif launches.again:
        launches.key_grads(
            q_rows, dout_rows, k, v, None, terms, packed_start, packed_stop, seen, count, None, None, k, v, dk, dv,
            *launches.key_integers, scale, cap,
        )  # fmt: skip
        launches.query_grads_again(
            q_rows, dout_rows, k, v, terms, packed_start, packed_stop, bounds, dq, *launches.query_integers, scale, cap,
        )  # fmt: skip
    else:
        chunks = masked_plan or launches.dense
        assert chunks is not None
        # One chunk adds up in registers: what it is given for its sums is not touched.
        sums = terms if chunks.chunks == 1 else torch.empty(launches.dq_sums, dtype=torch.float32, device=q.device)
        ds = q.new_empty(launches.ds(chunks))
        for key_grads, key_integers, query_grads, query_integers in launches.chunks(chunks):
            key_grads(
                q_rows, dout_rows, k, v, ds, terms, packed_start, packed_stop, seen, count, chunks.edges, chunks.base,
                k, v, dk, dv, *key_integers, scale, cap,
            )  # fmt: skip
            query_grads(ds, k, bounds, chunks.edges, chunks.base, sums, dq, *query_integers, scale)
