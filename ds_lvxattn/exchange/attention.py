"""``sp_attention``: exact attention whose queries and keys are divided over a sequence-parallel group."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ds_lvxattn.exchange.arguments import Exchange
from ds_lvxattn.exchange.comm import Communicator, communicator
from ds_lvxattn.exchange.grid import grid_of, node_size
from ds_lvxattn.exchange.interval import KVInterval
from ds_lvxattn.exchange.routes import Routes
from ds_lvxattn.exchange.shards import SequenceShards, ShardLayout
from ds_lvxattn.exchange.strategies import implementation_of
from ds_lvxattn.kernels.base import Call
from ds_lvxattn.kernels.differentiable import refuse_transforms
from ds_lvxattn.kernels.dispatch import select_kernel
from ds_lvxattn.kernels.operator import as_kernels_take
from ds_lvxattn.kernels.settled import settled
from ds_lvxattn.plan.modes import LOCAL, Mode, mode_named, modes


def sp_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    strategy: str = "lv_xattn",
    interval: KVInterval | Sequence[KVInterval] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    queries: str = "sharded",
    gradients: str = "whole",
    schedule: str = "auto",
    kernel: str = "auto",
    shards: ShardLayout | None = None,
    routes: Routes | None = None,
    head_groups: tuple[int, int] | None = None,
    keep_queries: bool | None = None,
    inner_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of the rank's own query rows over the keys and values of all ranks of ``group``.

    Exact (no approximation), differentiable in ``q``, ``k``, ``v`` and through ``lse``. Every rank of the group
    must call it with the same settings, and must use ``lse`` in its loss when any rank does.

    Args:
        q: ``[B, H_q, s_q, D]``, the rank's own rows; float64, float32, bfloat16 or float16, CPU or CUDA.
            Under ``torch.autocast``, ``q``, ``k`` and ``v`` are taken in its dtype, but for float64.
        k, v: ``[B, H_kv, s_kv, D]`` and ``[B, H_kv, s_kv, D_v]``, the rank's own keys and values; ``H_q`` is a
            multiple of ``H_kv``. Shards may be uneven or empty; their numbers are finite, also where no row sees them.
            Values may have another head size than keys (latent attention of DeepSeek); each travels in its own.
        group: sequence-parallel process group; None is one rank.
        strategy: ``lv_xattn`` (queries travel), ``ulysses`` (heads are redistributed), ``ring`` (keys and values
            travel), ``hybrid`` (heads are redistributed inside a node; queries, or keys and values, travel between
            nodes), or ``local`` where no other rank holds a key.
        interval: visible range of each row in global key positions; several, of disjoint keys, as a sequence or as
            ``KVInterval.several`` of it: they cost one exchange. None: every key is visible.
        scale: factor of the scores, ``1 / sqrt(D)`` by default.
        softcap: soft cap of the scores (Gemma 2), which are then ``softcap * tanh(scale * q k / softcap)``; None: none.
        queries: ``sharded``, or ``replicated`` when every rank passes all the (same) rows; then ``out`` is the
            same on every rank.
        gradients: of ``out`` and ``q`` when the queries are replicated. ``whole``: every rank passes the same gradient
            of ``out``, as it computes the whole loss, and gets the same ``dq``. ``parts``: the ranks' losses are parts
            of one sum; what a rank passes, and the ``dq`` that it gets, add up over the ranks.
        schedule: ``auto``, or one that the strategy has: ``gather``, ``ring``, ``routed`` or ``two_level`` for
            ``lv_xattn``; ``gather``, ``kv_gather``, ``kv_ring``, ``ring`` or ``routed`` for ``hybrid``.
        kernel: local kernel: ``auto``, a name to force one, or ``FORWARD/BACKWARD``, names that ``auto`` prefers.
        shards: lengths and placement of every rank's shard. None asks the other ranks (one small collective
            and a host synchronisation) and assumes contiguous shards in rank order.
        routes: for ``routed``, where this rank's rows travel; None makes them from the interval, which takes a host
            synchronisation.
        head_groups: groups of key heads of the forward and of the backward pass, which ``gather`` and ``kv_gather``
            pipeline; divisors of ``H_kv``, the same on every rank. None chooses from sizes.
        keep_queries: for ``gather`` and ``routed``, whether other ranks' queries are kept for the backward pass
            rather than sent again; the same on every rank. None keeps them while they are no larger than K and V.
        inner_size: for ``hybrid`` and for schedule ``two_level``, ranks of a node: those of equal ``r // inner_size``;
            divides the ranks. None asks the ranks for their hosts, once.

    Returns:
        ``out [B, H_q, s_q, D_v]`` like ``q`` (0 for rows that see nothing), and ``lse [B, H_q, s_q]``, the natural
        log-sum-exp in float32, float64 for float64 inputs (``-inf`` for such rows).

    Raises:
        ValueError: shapes, dtypes or settings do not fit; the message says what to change.
    """
    if not torch.compiler.is_compiling():
        refuse_transforms("sp_attention")
    q, k, v = as_kernels_take(q, k, v)
    if interval is not None and not isinstance(interval, KVInterval):
        interval = KVInterval.several(interval)
    comm = communicator(group)
    mode = _checked_mode(
        modes(), strategy, schedule, queries, gradients, comm.ranks, q.shape, k.shape, v.shape,
        (q.dtype, k.dtype, v.dtype), _devices(q, k, v, interval), interval is not None, softcap, kernel,
        None if head_groups is None else tuple(head_groups),
    )  # fmt: skip
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    if shards is None:
        options = (
            strategy, queries, gradients, schedule, kernel, scale, softcap, head_groups, keep_queries, inner_size,
        )  # fmt: skip
        shards = _ask_for_shards(q, k, v, interval, comm, options)
    if mode.two_levels:
        inner_size = node_size(comm) if inner_size is None else inner_size
    ranges = None if interval is None else (interval.start.shape, interval.ranges)
    _check_layout(mode, q.shape, k.shape, ranges, shards, comm.ranks, comm.rank, queries, inner_size)
    grid = grid_of(comm, inner_size) if mode.two_levels and inner_size is not None else None
    interval = _rows_of_all_ranks(interval, shards, comm, queries)
    # One rank, a batch of text alone, or of no samples: nothing travels.
    if comm.ranks == 1 or not shards.kv.total or not q.shape[0]:
        mode = LOCAL
    exchange = Exchange(
        comm, shards, interval, scale, kernel, head_groups, keep_queries, routes, grid, softcap,
        gradient_parts=gradients == "parts",
    )  # fmt: skip
    return implementation_of(mode)(q, k, v, exchange)


@settled
def _checked_mode(
    known: tuple[Mode, ...], strategy: str, schedule: str, queries: str, gradients: str, ranks: int, q: torch.Size,
    k: torch.Size, v: torch.Size, dtypes: tuple[torch.dtype, ...], devices: tuple[torch.device, ...], masked: bool,
    softcap: float | None, kernel: str, head_groups: tuple[int, ...] | None,
) -> Mode:  # fmt: skip
    """The mode of a call with these shapes and settings, which are right; ``known`` are the modes to choose from."""
    _check_tensors(q, k, v, dtypes, devices)
    if queries not in ("sharded", "replicated"):
        raise ValueError(f"queries is '{queries}'; choose 'sharded' or 'replicated'")
    if gradients not in ("whole", "parts") or (gradients == "parts" and queries != "replicated"):
        raise ValueError(
            f"gradients is '{gradients}'; choose 'whole', or 'parts' with queries='replicated' (now '{queries}')"
        )
    mode = mode_named(strategy, schedule, queries if ranks > 1 else "sharded")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap is {softcap}; give a positive one, or None for none")
    select_kernel(
        kernel, Call.of_shapes(devices[0].type, dtypes[0], q, k, v, masked, softcap is not None, backward=False)
    )
    if head_groups is not None and any(count < 1 or k[1] % count for count in head_groups):
        raise ValueError(f"head_groups is {head_groups}; give two divisors of the {k[1]} key heads")
    return mode


def _devices(q: Tensor, k: Tensor, v: Tensor, interval: KVInterval | None) -> tuple[torch.device, ...]:
    ranges = () if interval is None else (interval.start.device, interval.stop.device)
    return q.device, k.device, v.device, *ranges


def _check_tensors(
    q: torch.Size, k: torch.Size, v: torch.Size, dtypes: tuple[torch.dtype, ...], devices: tuple[torch.device, ...]
) -> None:
    if not len(q) == len(k) == len(v) == 4 or k[:3] != v[:3]:
        raise ValueError(
            f"q, k, v have shapes {tuple(q)}, {tuple(k)}, {tuple(v)}; "
            "give [B, H_q, s_q, D], [B, H_kv, s_kv, D] and [B, H_kv, s_kv, D_v]"
        )
    if not (k[1] and q[1] and q[3] and v[3]):
        raise ValueError(f"q, k, v have shapes {tuple(q)}, {tuple(k)}, {tuple(v)}; give heads, and numbers in each")
    if q[0] != k[0] or q[3] != k[3] or q[1] % k[1]:
        raise ValueError(
            f"q {tuple(q)} does not fit k {tuple(k)}: batch and head size must be equal and H_q a multiple of H_kv"
        )
    if not dtypes[0] == dtypes[1] == dtypes[2] or not dtypes[0].is_floating_point:
        raise ValueError(f"q, k, v have dtypes {', '.join(map(str, dtypes))}; give one floating dtype")
    if len({*devices}) > 1:
        raise ValueError(
            f"q, k, v and start and stop of the interval are on the devices {', '.join(map(str, devices))}; move them "
            "to one"
        )
    if devices[0].type == "meta":
        raise ValueError("q, k, v are on the device 'meta', which has no numbers; to trace, run under FakeTensorMode")


def _ask_for_shards(
    q: Tensor, k: Tensor, v: Tensor, interval: KVInterval | None, comm: Communicator, options: tuple[object, ...]
) -> ShardLayout:
    """The shard lengths of every rank, and a check that all ranks make the same call."""
    if comm.ranks == 1:
        return _alone(q.shape[2], k.shape[2])
    own_rows = interval is not None and not interval.of_all_ranks
    ranges = 0 if interval is None else interval.ranges or 1
    # A rank without a backward pass would let those with one wait for it.
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    sizes = (*q.shape[:2], k.shape[1], q.shape[3], v.shape[3], ranges, int(own_rows), int(trains))
    names = zlib.crc32(repr((q.dtype, *options)).encode())
    mine = torch.tensor([q.shape[2], k.shape[2], *sizes, names], device=q.device)
    everyone = comm.all_gather(mine, "shard lengths").tolist()
    for rank, theirs in enumerate(everyone):
        if theirs[2:] != everyone[0][2:]:
            raise ValueError(
                "the ranks of the group call sp_attention with different settings; give all of them the same "
                "[batch, query heads, key heads, head size, that of values, intervals given, intervals of own rows, "
                "whether a gradient is wanted of q, k or v, hash of dtype, strategy, queries, gradients, schedule, "
                "kernel, scale, softcap, head_groups, keep_queries and inner_size]: "
                f"rank 0 {everyone[0][2:]}, rank {rank} {theirs[2:]}"
            )
    rows, keys = zip(*(theirs[:2] for theirs in everyone), strict=True)
    return ShardLayout(SequenceShards(rows), SequenceShards(keys))


@settled
def _alone(rows: int, keys: int) -> ShardLayout:
    """All rows and keys on one rank."""
    return ShardLayout(SequenceShards((rows,)), SequenceShards((keys,)))


@settled
def _check_layout(
    mode: Mode, q: torch.Size, k: torch.Size, ranges: tuple[torch.Size, int | None] | None, shards: ShardLayout,
    ranks: int, rank: int, queries: str, inner_size: int | None,
) -> None:  # fmt: skip
    """Refuse shapes that the shards are not of, and a mode that cannot run them. ``ranges`` are those of the interval:
    its shape and ``KVInterval.ranges``."""
    if shards.kv.ranks != ranks:
        raise ValueError(f"shards describes {shards.kv.ranks} ranks, the group has {ranks}")
    rows, keys = q[2], k[2]
    want = (shards.q.lengths[rank], shards.kv.lengths[rank])
    if want != (rows, keys):
        raise ValueError(
            f"rank {rank} passes {rows} query rows and {keys} keys, but shards says {want[0]} and {want[1]}"
        )
    replicated = queries == "replicated"
    if replicated and not shards.q.even:
        raise ValueError(f"replicated queries must have one length on every rank, not {shards.q.lengths}")
    reason = mode.obstacle(q[1], k[1], ranks, inner_size or ranks)
    if reason is not None and ranks > 1:
        raise ValueError(f"strategy '{mode.strategy}' cannot run this attention: {reason}")
    if ranges is None:
        return
    shape, several = ranges
    of_all_ranks = len(shape) - (several is not None) == 3
    of_rows = (1 if replicated else ranks, q[0], shards.q.longest) if of_all_ranks else (q[0], rows)
    wanted = (*of_rows, *(() if several is None else (several,)))
    if tuple(shape) != wanted:
        raise ValueError(f"interval has shape {tuple(shape)}; this call needs {wanted}")


def _rows_of_all_ranks(
    interval: KVInterval | None, shards: ShardLayout, comm: Communicator, queries: str
) -> KVInterval | None:
    """The ranges of the rows of every rank, ``[n, B, s_max, ...]`` (``[1, B, s_q, ...]`` for replicated queries).

    The layers of a batch, which share an interval, get one and the same, unless it takes a collective.
    """
    if interval is None or interval.of_all_ranks or queries == "replicated" or comm.ranks == 1:
        return None if interval is None else interval.within(shards.kv.total)
    missing = shards.q.longest - shards.q.lengths[comm.rank]
    padding = (*((0, 0) if interval.ranges is not None else ()), 0, missing)
    padded = torch.nn.functional.pad(torch.stack((interval.start, interval.stop)), padding)
    everyone = KVInterval(
        *comm.all_gather(padded, "intervals").unbind(1), ranges=interval.ranges, pattern=interval.pattern
    )
    return everyone.within(shards.kv.total)
