"""The launches of a backward pass over one run of query rows: everything about them but their tensors."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from ds_lvxattn.kernels.triton.backward_kernels import (
    grads_together_kernel,
    key_grads_kernel,
    query_grads_again_kernel,
    query_grads_kernel,
)
from ds_lvxattn.kernels.triton.backward_plan import ChunkPlan, plan_dense
from ds_lvxattn.kernels.triton.backward_rows import pack_rows_kernel
from ds_lvxattn.kernels.triton.forward import units_to_fill
from ds_lvxattn.kernels.triton.launch import KEPT, Launch, Layout, Tiles, fits_copy_engine, row_tiles
from ds_lvxattn.kernels.triton.tiles import BackwardConfig, split_head_backward

Integers = tuple[int, ...]
PACKED_AT_ONCE = 4096  # numbers of a tensor, by a program


class Shapes(NamedTuple):
    """Layouts of the tensors of a run of query rows. Those of the gradients follow from Q, K and V.

    Of ``delta`` and ``out`` one is given. ``bounds`` are the ranges of its rows, None where every key is visible.
    """

    dout: Layout
    q: Layout
    k: Layout
    v: Layout
    lse: Layout
    delta: Layout | None
    out: Layout | None
    bounds: tuple[Layout, Layout] | None


class PackedRows(NamedTuple):
    """``[B, H_q, S_q, D]`` as ``[B, H_kv, S_q * group, D]``: the query heads of a key head side by side, row by row.

    Q and dO are short next to K and V: packing them once, a copy only where heads share keys, lets the copy engine
    fetch a whole tile of rows in one instruction, at any group size.

    Args:
        shape, strides: of the packed rows.
        copied: whether they are a copy; else they are a view.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    copied: bool

    def tiles(self, rows: int, blocks: int = 2) -> Tiles:
        """Descriptors of tiles of ``rows`` packed rows, from the tensor or its copy."""
        of_packed = _tiles(rows, blocks)
        return lambda x: of_packed(x.as_strided(self.shape, self.strides))


def dense_strides(of: Layout) -> tuple[int, ...]:
    """Those of ``torch.empty_like`` of such a tensor."""
    dtype, shape, strides, _ = of
    return torch.empty_like(torch.empty_strided(shape, strides, dtype=dtype, device="meta")).stride()


def _packed(of: Layout, heads_kv: int) -> PackedRows:
    dtype, (batch, heads, rows, dim), (of_batch, of_head, of_row, of_dim), aligned = of
    group = heads // heads_kv
    shape = (batch, heads_kv, rows * group, dim)
    # Rows and heads of a group lie at one distance. (Those of one row do as well: a kernel for it alone would compile
    # in the middle of a run.)
    if group == 1 or of_row == group * of_head:
        strides = (of_batch, group * of_head, of_row if group == 1 else of_head, of_dim)
        if fits_copy_engine((dtype, shape, strides, aligned)):
            return PackedRows(shape, strides, copied=False)
    of_pair = rows * group * dim
    return PackedRows(shape, (heads_kv * of_pair, of_pair, dim, 1), copied=True)


def _tiles(rows: int, blocks: int = 2) -> Tiles:
    return row_tiles(rows, split_head_backward, blocks)


def _tiles_of_matrix(rows: int, columns: int) -> Tiles:
    return lambda x: (TensorDescriptor.from_tensor(x, [rows, columns]),)


class RowLaunches:
    """The launches for tensors of some layouts.

    Args:
        device: their device.
        of: their layouts.
        capped: whether the scores have a soft cap.
        config: the tiles.
        room: slots of ``dS`` that the workspace holds for one key/value head.
        of_dq: strides of ``dQ``.
        add: whether the gradients of K and V are added to what is there.

    Attributes:
        of_ranges: what packed ranges depend on, see ``backward._ranges``.
        terms, dq_sums: shapes of the row terms and of the float32 ``dQ / scale`` of several chunks, by packed rows.
        pack, pack_integers: the launch of ``pack_rows_kernel``, and its integers.
        together, again: whether one launch makes all gradients, or a second one computes the scores again.
        q_rows, dout_rows: shapes of the copies of ``Q`` and ``dO`` by packed rows, None where they are not copied.
    """

    def __init__(
        self, device: torch.device, of: Shapes, of_dq: tuple[int, ...], capped: bool, config: BackwardConfig,
        room: int, add: bool,
    ) -> None:  # fmt: skip
        dtype, (batch, heads_q, seq_q, head_dim), *_ = of.q
        _, (_, heads_kv, seq_kv, value_dim), *_ = of.v
        group = heads_q // heads_kv
        has_interval = of.bounds is not None
        pairs = batch * heads_kv
        tiles = triton.cdiv(seq_q * group, config.tile)
        rows = tiles * config.tile
        blocks = triton.cdiv(seq_kv, config.block_n)
        self.of_ranges = (group, blocks, config.tile, config.block_n, room if config.keep_ds else None)
        self.terms = (pairs * 2, rows)
        self.dq_sums = (batch, heads_kv, rows, head_dim)
        packed_q, packed_dout = _packed(of.q, heads_kv), _packed(of.dout, heads_kv)
        self.q_rows = packed_q.shape if packed_q.copied else None
        self.dout_rows = packed_dout.shape if packed_dout.copied else None
        self.pack = _pack(of, (tiles, pairs), config.tile, packed_q.copied, packed_dout.copied)
        self.pack_integers = (
            *of.q[2], *of.dout[2], *_strides(of.out, 4), *of.lse[2], *_strides(of.delta, 3), heads_kv, seq_q, tiles,
        )  # fmt: skip
        of_keys = _tiles(config.block_n)
        self._tiles_of_all = (packed_q.tiles(config.block_m), packed_dout.tiles(config.block_m), of_keys, of_keys)
        first_of_keys = _tiles(config.block_n, 1)
        first_of_all = (packed_q.tiles(config.tile, 1), packed_dout.tiles(config.tile, 1), first_of_keys, first_of_keys)
        block_d, block_d_2 = split_head_backward(head_dim)
        block_v, block_v_2 = split_head_backward(value_dim)
        self._tile = dict(
            HEAD_DIM=head_dim, BLOCK_D=block_d, TILE=config.tile, BLOCK_N=config.block_n,
            PRECISION="ieee" if dtype == torch.float32 else "tf32",
        )  # fmt: skip
        self._of_keys = dict(
            BLOCK_D_2=block_d_2, VALUE_DIM=value_dim, BLOCK_V=block_v, BLOCK_V_2=block_v_2, BLOCK_M=config.block_m,
            HAS_INTERVAL=has_interval, CAPPED=capped, ADD=add,
            num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=config.max_registers, **self._tile,
        )  # fmt: skip
        self._of_queries = dict(
            GROUP=group, num_warps=config.query_warps, num_stages=config.query_stages, **self._tile
        )  # fmt: skip
        self._query_integers = (*of_dq, heads_kv, seq_q, tiles)
        strides_of_keys = (of.k[2], of.v[2], dense_strides(of.k), dense_strides(of.v))
        self._key_strides = tuple(stride for strides in strides_of_keys for stride in strides[:3])
        self._config, self._block_d_2, self._has_interval = config, block_d_2, has_interval
        self._pairs, self._heads_kv, self._seq_kv, self._tiles, self._blocks = pairs, heads_kv, seq_kv, tiles, blocks
        programs = units_to_fill(device) * config.resident
        self.dense = None if has_interval else plan_dense(blocks, batch, heads_kv, tiles, room, programs)
        self.together = has_interval and config.together
        self.again = has_interval and not config.keep_ds and not config.together
        if self.together:
            self.grads_together = Launch(
                grads_together_kernel, ((tiles + blocks) * pairs,), first_of_all, GROUP=group, VALUE_DIM=value_dim,
                BLOCK_V=block_v, CAPPED=capped, ADD=add, num_warps=config.num_warps, num_stages=config.num_stages,
                maxnreg=config.max_registers, **self._tile,
            )  # fmt: skip
            self.together_integers = (*self._key_strides, *of_dq, batch, heads_kv, seq_kv, seq_q, tiles, blocks)
        elif self.again:
            self.key_grads = Launch(
                key_grads_kernel, (blocks * pairs,), self._tiles_of_all, KEEP_DS=False, **self._of_keys
            )
            self.key_integers = (*self._key_strides, pairs, heads_kv, seq_kv, tiles, blocks, 0, blocks, 0)
            self.query_grads_again = Launch(
                query_grads_again_kernel, (tiles, pairs), first_of_all, BLOCK_V=block_v, CAPPED=capped,
                **self._of_queries,
            )  # fmt: skip
            self.query_integers = self._query_integers
        self._chunks: list[tuple[Launch, Integers, Launch, Integers]] = []

    def ds(self, plan: ChunkPlan) -> tuple[int, int]:
        """Shape of the workspace of ``dS``."""
        return self._heads_kv * plan.slots * self._config.block_n, self._config.tile

    def chunks(self, plan: ChunkPlan) -> list[tuple[Launch, Integers, Launch, Integers]]:
        """For each chunk of keys the kernel that owns keys and the one that owns rows, with their integers.

        What a plan says to the host depends on nothing but layouts: the plan of any batch will do.
        """
        if not self._chunks:
            self._chunks = [self._chunk(plan, chunk) for chunk in range(plan.chunks)]
        return self._chunks

    def _chunk(self, plan: ChunkPlan, chunk: int) -> tuple[Launch, Integers, Launch, Integers]:
        programs = plan.launched_blocks(chunk, self._blocks) * self._pairs
        config = self._config
        written = _tiles_of_matrix(config.block_n, config.block_m)
        read = _tiles_of_matrix(config.block_n, config.tile)
        return (
            Launch(key_grads_kernel, (programs,), (*self._tiles_of_all, written), KEEP_DS=True, **self._of_keys),
            (
                *self._key_strides, self._pairs, self._heads_kv, self._seq_kv, self._tiles, self._blocks, chunk,
                plan.blocks, plan.slots,
            ),
            Launch(
                query_grads_kernel, (self._tiles, self._pairs), (read, _tiles(config.block_n)),
                BLOCK_D_2=self._block_d_2, HAS_INTERVAL=self._has_interval,
                maxnreg=config.query_registers,
                **self._of_queries,
            ),
            (*self._query_integers, self._blocks, chunk, plan.chunks, plan.blocks, plan.slots),
        )  # fmt: skip


def _strides(of: Layout | None, dims: int) -> Integers:
    return (0,) * dims if of is None else of[2]


def _pack(of: Shapes, grid: tuple[int, int], tile: int, copy_q: bool, copy_dout: bool) -> Launch:
    """Of ``pack_rows_kernel``."""
    head_dim, value_dim = of.q[1][3], of.v[1][3]
    block_d, block_v = triton.next_power_of_2(head_dim), triton.next_power_of_2(value_dim)
    whole_rows = copy_q or copy_dout or of.delta is None
    step = min(tile, max(1, PACKED_AT_ONCE // max(block_d, block_v))) if whole_rows else tile
    return Launch(
        pack_rows_kernel, grid, GROUP=of.q[1][1] // of.v[1][1], TILE=tile, STEP=step, HEAD_DIM=head_dim,
        VALUE_DIM=value_dim, BLOCK_D=block_d, BLOCK_V=block_v, HAS_INTERVAL=of.bounds is not None, COPY_Q=copy_q,
        COPY_DOUT=copy_dout, SUM_DELTA=of.delta is None,
    )  # fmt: skip


@functools.lru_cache(maxsize=KEPT)
def row_launches(
    where: tuple[int, int], device: torch.device, of: Shapes, of_dq: tuple[int, ...], capped: bool,
    config: BackwardConfig, room: int, add: bool,
) -> RowLaunches:  # fmt: skip
    """The launches, made once; ``where`` only tells calls apart, as a kernel is loaded on one device."""
    return RowLaunches(device, of, of_dq, capped, config, room, add)
