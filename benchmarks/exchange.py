"""Every strategy and schedule of one attention layer, forward and backward, beside the floor of local compute.

    torchrun --nproc_per_node 2 benchmarks/exchange.py --output exchange.json
    NCCL_P2P_DISABLE=1 torchrun --nproc_per_node 2 benchmarks/exchange.py --output exchange_slow_link.json

The floor is the local compute of query exchange alone: all queries against the rank's own keys, nothing sent. All
candidates of a shape take turns within one run; a figure is the median of its iterations, of the slowest rank. Queries,
keys and values lie in memory as a model's projections leave them, ``[B, s, H, D]``.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_lvxattn import KVInterval, SequenceShards, ShardLayout, sp_attention
from ds_lvxattn.comm import communicator
from ds_lvxattn.kernels.operator import local_attention
from ds_lvxattn.plan.pipeline import head_groups
from ds_lvxattn.routes import Routes
from ds_lvxattn.strategies import strategy_named

Step = Callable[[], None]


@dataclass(frozen=True)
class Shape:
    """One attention layer: whole sequences, divided evenly over the ranks. ``mask``: none, growing or one frame."""

    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    mask: str = "none"

    def __str__(self) -> str:
        return f"{self.queries:,} x {self.keys:,}, {self.heads}/{self.kv_heads}/{self.head_dim}, {self.mask}"


SHAPES = (
    Shape(384, 262_144, 32, 8, 128),
    Shape(4_096, 262_144, 32, 8, 128),
    Shape(8_192, 262_144, 28, 4, 128),
    Shape(65_536, 65_536, 32, 8, 128),
    Shape(4_096, 262_144, 32, 8, 128, "growing"),
    Shape(4_096, 262_144, 8, 8, 64, "one frame"),
)
TURN = 4  # steps of one candidate before the next one's turn, after one that is not counted
WARM_UP_SECONDS = 0.05
FRAME = 64  # tokens of a frame of the one-frame mask, as in OpenFlamingo


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
    """This rank's tensors of a shape and the candidates to run on them."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device, link: float) -> None:
        self.shape, self.link, self.comm = shape, link, communicator(dist.group.WORLD)
        ranks, rank = self.comm.ranks, self.comm.rank
        # Frames are dealt out where masks would make the work of contiguous ones uneven.
        keys = SequenceShards.contiguous(shape.keys, ranks)
        if shape.mask == "growing":
            keys = SequenceShards.striped(shape.keys, ranks, FRAME)
        self.shards = ShardLayout(SequenceShards.contiguous(shape.queries, ranks), keys)
        generator = torch.Generator(device).manual_seed(rank)

        def projected(heads: int, rows: int) -> Tensor:
            x = torch.randn(1, rows, heads, shape.head_dim, dtype=dtype, device=device, generator=generator)
            return x.transpose(1, 2).requires_grad_()

        own_rows = self.shards.q.lengths[rank]
        self.q, self.dout = projected(shape.heads, own_rows), projected(shape.heads, own_rows).detach()
        self.q_all, self.dout_all = (projected(shape.heads, shape.queries) for _ in range(2))
        self.k, self.v = (projected(shape.kv_heads, self.shards.kv.lengths[rank]) for _ in range(2))
        self.interval, self.routes = None, None
        if shape.mask != "none":
            row = torch.arange(shape.queries, dtype=torch.int64)
            seen = row * (shape.keys // FRAME) // shape.queries  # the frame before the row
            start = seen * FRAME if shape.mask == "one frame" else torch.zeros_like(seen)
            ranges = [x.int().view(ranks, 1, -1) for x in (start, (seen + 1) * FRAME)]
            self.routes = Routes.build(*ranges, self.shards, rank, device)
            self.interval = KVInterval(*(x.to(device) for x in ranges))

    def exchange(self, **options: Any) -> Step:
        def step() -> None:
            out, _ = sp_attention(
                self.q, self.k, self.v, group=self.comm.group, interval=self.interval, shards=self.shards,
                routes=self.routes, **options,
            )  # fmt: skip
            torch.autograd.grad(out, (self.q, self.k, self.v), self.dout)

        return step

    def floor(self) -> Step:
        first, last = None, None
        if self.interval is not None:
            first, last = self.interval.local_to(self.shards.kv, self.comm.rank)

        def step() -> None:
            out, _ = local_attention(self.q_all, self.k, self.v, first, last, self.shape.head_dim**-0.5, "auto")
            torch.autograd.grad(out, (self.q_all, self.k, self.v), self.dout_all)

        return step

    def candidates(self, sweep: bool) -> dict[str, Step]:
        shape, ranks = self.shape, self.comm.ranks
        lengths = (self.shards.q.lengths, self.shards.kv.lengths)
        chosen = head_groups(1, shape.heads, shape.kv_heads, shape.head_dim, 2, *lengths, self.link)
        steps = {
            "floor": self.floor(),
            f"lv_xattn gather {chosen[0]}/{chosen[1]}": self.exchange(schedule="gather", head_groups=chosen),
            "lv_xattn gather, one CUDA graph": captured(self.exchange(schedule="gather", head_groups=chosen)),
            "lv_xattn ring": self.exchange(schedule="ring"),
        }
        if shape.mask != "none":
            steps["lv_xattn routed"] = self.exchange(schedule="routed")
        for strategy in ("ulysses", "ring"):
            if strategy_named(strategy).unsupported(shape.heads, shape.kv_heads, ranks, False) is None:
                steps[strategy] = self.exchange(strategy=strategy)
        if sweep:
            divisors = [count for count in (1, 2, 4, 8) if shape.kv_heads % count == 0]
            for groups in ((f, b) for f in divisors for b in divisors if f == b or 1 in (f, b)):
                if groups != chosen:
                    steps[f"lv_xattn gather {groups[0]}/{groups[1]}"] = self.exchange(
                        schedule="gather", head_groups=groups
                    )
            steps["lv_xattn gather, queries again"] = self.exchange(
                schedule="gather", head_groups=chosen, keep_queries=False
            )
        return steps


def measure(layer: Layer, steps: dict[str, Step], seconds: float) -> list[Figure]:
    """All candidates in turns of a few steps, each for about ``seconds`` in all: clocks and temperature drift."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    extra, received = {}, {}
    for name, step in steps.items():
        step()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        layer.comm.reset()
        step()
        torch.cuda.synchronize()
        extra[name] = torch.cuda.max_memory_allocated() - before
        received[name] = layer.comm.bytes_received
    once = slowest(statistics.median(timed(steps["floor"], 3))) * 1e-3
    warm_up = max(1, int(WARM_UP_SECONDS / once))
    for _ in range(max(3, int(seconds / (TURN * once + WARM_UP_SECONDS)))):
        for name, step in steps.items():
            # A chip that has just idled runs faster for a moment: every turn follows the same work.
            timed(steps["floor"], warm_up)
            times[name] += timed(step, TURN + 1)[1:]
    medians = {name: slowest(statistics.median(values)) for name, values in times.items()}
    return [
        Figure(
            str(layer.shape), name, round(ms, 3), round(ms / medians["floor"], 4),
            round(extra[name] / 2**20, 1), round(received[name] / 2**20, 2),
        )
        for name, ms in medians.items()
    ]  # fmt: skip


def timed(step: Step, iterations: int) -> list[float]:
    """Milliseconds of each of ``iterations`` steps in a row; the ranks start together."""
    torch.cuda.synchronize()
    dist.barrier()
    edges = [torch.cuda.Event(enable_timing=True) for _ in range(iterations + 1)]
    edges[0].record()
    for edge in edges[1:]:
        step()
        edge.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(edges)]


def slowest(ms: float) -> float:
    x = torch.tensor(ms, device="cuda")
    dist.all_reduce(x, dist.ReduceOp.MAX)
    return x.item()


def link_speed() -> float:
    """Bytes a second that a rank receives in an all-gather of 64 MiB a rank."""
    comm = communicator(dist.group.WORLD)
    buffer = torch.empty((comm.ranks, 2**26), dtype=torch.uint8, device="cuda")

    def step() -> None:
        comm.start_all_gather([("link", buffer)]).wait()

    timed(step, 3)
    return (comm.ranks - 1) * 2**26 / (slowest(statistics.median(timed(step, 10))) * 1e-3)


def decoding(seconds: float, link: float) -> list[Figure]:
    """One new token against sharded keys, no gradient: beside the local kernel and one all-reduce of its output.

    Both are replayed as CUDA graphs, as serving does: launched one by one, the host's time would be measured.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    layer = Layer(Shape(1, 262_144, 32, 8, 128), torch.bfloat16, device, link)
    rows = layer.q_all.detach()
    shards = ShardLayout(SequenceShards((1,) * layer.comm.ranks), layer.shards.kv)
    out = torch.zeros_like(rows)

    @torch.no_grad()
    def floor() -> None:
        local_attention(rows, layer.k, layer.v, None, None, layer.shape.head_dim**-0.5, "auto")
        dist.all_reduce(out)

    @torch.no_grad()
    def replicated() -> None:
        sp_attention(rows, layer.k, layer.v, group=layer.comm.group, queries="replicated", shards=shards)

    steps = {"floor": floor, "lv_xattn replicated": replicated}
    return measure(layer, {name: captured(step) for name, step in steps.items()}, seconds)


def captured(step: Step) -> Step:
    """``step`` as one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph.replay


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.6, help="for each candidate of a shape (%(default)s)")
    parser.add_argument("--shapes", help="numbers of the shapes to run, such as 0,1 (default: all)")
    parser.add_argument("--sweep", action="store_true", help="other numbers of head groups too")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = torch.device("cuda", torch.cuda.current_device())
    dist.init_process_group("nccl", device_id=device)
    figures: list[Figure] = []
    link = link_speed()
    numbers = range(len(SHAPES)) if args.shapes is None else map(int, args.shapes.split(","))
    for number in numbers:
        layer = Layer(SHAPES[number], torch.bfloat16, device, link)
        figures += measure(layer, layer.candidates(args.sweep), args.seconds)
        if dist.get_rank() == 0:
            report(figures, figures[-1].shape)
    figures += decoding(args.seconds, link)
    if dist.get_rank() == 0:
        report(figures, figures[-1].shape)
        about = {
            "device": torch.cuda.get_device_name(),
            "ranks": dist.get_world_size(),
            "torch": torch.__version__,
            "link_gb_per_s": round(link / 1e9, 1),
            "NCCL_P2P_DISABLE": os.environ.get("NCCL_P2P_DISABLE", "0"),
            "figures": [asdict(figure) for figure in figures],
        }
        args.output.write_text(json.dumps(about, indent=1) + "\n")
    # A graph that holds collectives must be gone before their group.
    gc.collect()
    dist.destroy_process_group()


def report(figures: list[Figure], shape: str) -> None:
    print(f"\n{shape}\n{'':34s}{'ms':>10s}{'of floor':>10s}{'extra MiB':>11s}{'received MiB':>14s}")
    for figure in figures:
        if figure.shape == shape:
            print(
                f"{figure.candidate:34s}{figure.ms:10.3f}{figure.over_floor:10.3f}{figure.extra_mib:11.1f}"
                f"{figure.received_mib:14.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
