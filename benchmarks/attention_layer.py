"""One attention layer on this rank, and the time of its steps: what the exchange and scaling benchmarks share."""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_lvxattn import KVInterval, SequenceShards, ShardLayout, sp_attention
from ds_lvxattn.exchange.comm import communicator
from ds_lvxattn.exchange.grid import node_size
from ds_lvxattn.exchange.routes import Routes, routed_rows, visible_work
from ds_lvxattn.kernels.operator import local_attention
from ds_lvxattn.plan.cost import Layer as CostedLayer
from ds_lvxattn.plan.traffic import LayerShape
from ds_lvxattn.plan.visibility import of_shape

Step = Callable[[], None]


def start_on_device() -> tuple[torch.device, bool]:
    """This rank's device, and whether ``torch.distributed`` was started for it: it may run already."""
    started = not dist.is_initialized()
    if not torch.cuda.is_available():
        if started:
            dist.init_process_group("gloo")
        return torch.device("cpu"), started
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = torch.device("cuda", torch.cuda.current_device())
    if started:
        dist.init_process_group("nccl", device_id=device)
    return device, started


FRAME = 64  # tokens of a frame of the masks, as in OpenFlamingo
TURN = 4  # steps of one candidate before the next one's turn, after one that is not counted
LONG_SECONDS = 0.1  # of a step; longer ones take turns of one counted step, twice
WARM_UP_SECONDS = 0.05
TOO_SLOW = 4.0  # times the floor: such a candidate has no turns, but three steps in a row


@dataclass(frozen=True)
class Shape:
    """One attention layer: whole sequences, divided evenly over the ranks.

    ``mask``: none; growing, the frames up to a row's; one frame, the one before a row; or causal, self-attention.
    """

    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    mask: str = "none"

    def __str__(self) -> str:
        return f"{self.queries:,} x {self.keys:,}, {self.heads}/{self.kv_heads}/{self.head_dim}, {self.mask}"


@dataclass
class Figure:
    """One candidate's result."""

    shape: str
    candidate: str
    ms: float
    over_floor: float
    extra_mib: float
    received_mib: float


class Layer:
    """This rank's tensors of a shape, and steps to run on them; of a group, or of all ranks.

    ``costed`` is the layer as the planner knows it.
    """

    def __init__(
        self, shape: Shape, dtype: torch.dtype, device: torch.device, group: dist.ProcessGroup | None = None
    ) -> None:
        self.shape, self.comm = shape, communicator(dist.group.WORLD if group is None else group)
        ranks, rank = self.comm.ranks, self.comm.rank
        # Frames, or the tokens of self-attention, are dealt out where masks would make the work of runs uneven.
        rows, keys = (SequenceShards.contiguous(length, ranks) for length in (shape.queries, shape.keys))
        if shape.mask == "growing":
            keys = SequenceShards.striped(shape.keys, ranks, FRAME)
        elif shape.mask == "causal":
            rows = keys = SequenceShards.balanced(shape.keys, ranks)
        self.shards = ShardLayout(rows, keys)
        generator = torch.Generator(device).manual_seed(rank)

        def projected(heads: int, rows: int) -> Tensor:
            x = torch.randn(1, rows, heads, shape.head_dim, dtype=dtype, device=device, generator=generator)
            return x.transpose(1, 2).requires_grad_()

        own_rows = self.shards.q.lengths[rank]
        self.q, self.dout = projected(shape.heads, own_rows), projected(shape.heads, own_rows).detach()
        self.q_all, self.dout_all = (projected(shape.heads, shape.queries) for _ in range(2))
        self.k, self.v = (projected(shape.kv_heads, self.shards.kv.lengths[rank]) for _ in range(2))
        self.inner_size = node_size(self.comm)
        self.interval, self.routes, self.routes_between = None, None, None
        routed, between, work = None, None, None
        if shape.mask != "none":
            ranges = [x.int().unsqueeze(1) for x in _ranges(shape, self.shards.q)]
            self.routes = Routes.build(*ranges, self.shards, rank, device)
            self.interval = KVInterval.from_host(*ranges, device)
            routed, work = routed_rows(*ranges, self.shards), visible_work(*ranges, keys)
            nodes = self.shards.of_nodes(self.inner_size)
            of_nodes = KVInterval(*ranges).of_nodes(self.shards.q, self.inner_size)
            between = routed_rows(of_nodes.start, of_nodes.stop, nodes)
            self.routes_between = Routes.build(of_nodes.start, of_nodes.stop, nodes, rank // self.inner_size, device)
        sizes = LayerShape(
            1, shape.heads, shape.kv_heads, shape.head_dim, self.shards.q.lengths, keys.lengths, dtype.itemsize,
            routed, work, inner_size=self.inner_size, routed_between=between,
        )  # fmt: skip
        self.costed = CostedLayer(sizes, of_shape(sizes))

    def attend(self, **options: Any) -> Tensor:
        """The forward pass, with ``options`` of ``sp_attention``."""
        two_levels = options.get("strategy") == "hybrid" and 1 < self.inner_size < self.comm.ranks
        out, _ = sp_attention(
            self.q, self.k, self.v, group=self.comm.group, interval=self.interval, shards=self.shards,
            routes=self.routes_between if two_levels else self.routes, **options,
        )  # fmt: skip
        return out

    def exchange(self, **options: Any) -> Step:
        def step() -> None:
            torch.autograd.grad(self.attend(**options), (self.q, self.k, self.v), self.dout)

        return step

    def floor(self) -> Step:
        first, last, how = None, None, (self.shape.head_dim**-0.5, "auto", None)
        if self.interval is not None:
            first, last = self.interval.local_to(self.shards.kv, self.comm.rank)
            how = *how, self.interval.pattern

        def step() -> None:
            out, _ = local_attention(self.q_all, self.k, self.v, first, last, *how)
            torch.autograd.grad(out, (self.q_all, self.k, self.v), self.dout_all)

        return step


def _ranges(shape: Shape, rows: SequenceShards) -> tuple[Tensor, Tensor]:
    """First visible key of each row and the one behind the last, int64 ``[n, rows of a rank]``."""
    row = torch.tensor([list(rows.positions(rank)) for rank in range(rows.ranks)])
    if shape.mask == "causal":
        return torch.zeros_like(row), row + 1
    seen = row * (shape.keys // FRAME) // shape.queries  # the frame before the row
    return seen * FRAME if shape.mask == "one frame" else torch.zeros_like(seen), (seen + 1) * FRAME


def measure(layer: Layer, steps: dict[str, Step], seconds: float) -> list[Figure]:
    """All candidates in turns of a few steps, each for about ``seconds`` in all: clocks and temperature drift.

    The first of ``steps`` is the floor. A figure is the median, of the slowest rank of the layer's group; of a
    candidate that is far behind, of three steps.
    """
    group, on_gpu = layer.comm.group, layer.q.is_cuda
    times: dict[str, list[float]] = {name: [] for name in steps}
    extra, received = {}, {}
    for name, step in steps.items():
        step()
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if on_gpu else 0
        layer.comm.reset()
        step()
        if on_gpu:
            torch.cuda.synchronize()
        extra[name] = (torch.cuda.max_memory_allocated() if on_gpu else 0) - before
        received[name] = layer.comm.bytes_received
    floor = next(iter(steps))
    once = slowest(statistics.median(timed(steps[floor], 3, group)), group) * 1e-3
    warm_up = max(1, int(WARM_UP_SECONDS / once)) if on_gpu else 1
    turn, least = (TURN, 3) if once < LONG_SECONDS else (1, 2)
    for name, step in steps.items():
        if name != floor and slowest(timed(step, 1, group)[0], group) * 1e-3 > TOO_SLOW * once and on_gpu:
            times[name] = timed(step, 3, group)
    turns = {name: step for name, step in steps.items() if not times[name]}
    for _ in range(max(least if on_gpu else 1, int(seconds / (turn * once + WARM_UP_SECONDS)))):
        for name, step in turns.items():
            # A chip that has just idled runs faster for a moment: every turn follows the same work.
            timed(steps[floor], warm_up, group)
            times[name] += timed(step, turn + 1, group)[1:]
    medians = {name: slowest(statistics.median(values), group) for name, values in times.items()}
    return [
        Figure(
            str(layer.shape), name, round(ms, 3), round(ms / medians[floor], 4),
            round(extra[name] / 2**20, 1), round(received[name] / 2**20, 2),
        )
        for name, ms in medians.items()
    ]  # fmt: skip


def timed(step: Step, iterations: int, group: dist.ProcessGroup | None = None) -> list[float]:
    """Milliseconds of each of ``iterations`` steps in a row; the ranks of the group start together."""
    if not torch.cuda.is_available():
        dist.barrier(group)
        moments = [time.perf_counter()]
        for _ in range(iterations):
            step()
            moments.append(time.perf_counter())
        return [(b - a) * 1e3 for a, b in itertools.pairwise(moments)]
    torch.cuda.synchronize()
    dist.barrier(group)
    edges = [torch.cuda.Event(enable_timing=True) for _ in range(iterations + 1)]
    edges[0].record()
    for edge in edges[1:]:
        step()
        edge.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(edges)]


def slowest(ms: float, group: dist.ProcessGroup | None = None) -> float:
    """The largest of what the ranks of the group measured."""
    x = torch.tensor(ms, device="cuda" if torch.cuda.is_available() else "cpu")
    dist.all_reduce(x, dist.ReduceOp.MAX, group)
    return x.item()


def link_speed(group: dist.ProcessGroup | None = None) -> float:
    """Bytes a second that a rank receives in an all-gather of 64 MiB a rank."""
    comm = communicator(dist.group.WORLD if group is None else group)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    buffer = torch.empty((comm.ranks, 2**26), dtype=torch.uint8, device=device)

    def step() -> None:
        comm.start_all_gather([("link", buffer)]).wait()

    timed(step, 3, comm.group)
    return (comm.ranks - 1) * 2**26 / (slowest(statistics.median(timed(step, 10, comm.group)), comm.group) * 1e-3)
