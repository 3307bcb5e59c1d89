"""Every strategy and schedule of one attention layer, forward and backward, beside the floor of local compute.

    torchrun --nproc_per_node 2 benchmarks/exchange.py --output exchange.json
    NCCL_P2P_DISABLE=1 torchrun --nproc_per_node 2 benchmarks/exchange.py --output exchange_slow_link.json

The floor is the local compute of query exchange alone: all queries against the rank's own keys, nothing sent. All
candidates of a shape take turns within one run; a figure is the median of its iterations, of the slowest rank. Queries,
keys and values lie in memory as a model's projections leave them, ``[B, s, H, D]``. What the planner would take, from a
calibration of these shapes at the start or a profile, is named with its time over that of the fastest.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from attention_layer import Figure, Layer, Shape, Step, measure, start_on_device

from ds_lvxattn import SequenceShards, ShardLayout, sp_attention
from ds_lvxattn.calibrate import calibrated
from ds_lvxattn.calibration.extent import HeadLayout
from ds_lvxattn.kernels.operator import local_attention
from ds_lvxattn.plan.choice import candidates as plan_candidates
from ds_lvxattn.plan.choice import choose
from ds_lvxattn.plan.modes import Mode, eligible_modes, schedules
from ds_lvxattn.plan.profile import Profile, load_profile

GRAPH = "lv_xattn gather, one CUDA graph"
SHAPES = (
    Shape(384, 262_144, 32, 8, 128),
    Shape(4_096, 262_144, 32, 8, 128),
    Shape(8_192, 262_144, 28, 4, 128),
    Shape(65_536, 65_536, 32, 8, 128),
    Shape(4_096, 262_144, 32, 8, 128, "growing"),
    Shape(4_096, 262_144, 8, 8, 64, "one frame"),
)


@dataclass
class Choice:
    """What ``auto`` takes for a shape, and its time over that of the fastest strategy and schedule."""

    shape: str
    candidate: str
    over_fastest: float


def candidates(layer: Layer, profile: Profile, sweep: bool) -> dict[str, Step]:
    """The floor, and every strategy and schedule."""
    shape = layer.shape
    chosen = layer.costed.head_groups(profile)
    steps = {
        "floor": layer.floor(),
        GRAPH: captured(layer.exchange(schedule="gather", head_groups=chosen)),
    }
    for mode in eligible_modes():
        if mode.adds(layer.costed) and mode.why_not(layer.costed.shape) is None:
            pipeline = {"head_groups": chosen} if mode.pipeline else {}
            steps[named(mode, chosen)] = layer.exchange(strategy=mode.strategy, schedule=mode.schedule, **pipeline)
    if sweep:
        divisors = [count for count in (1, 2, 4, 8) if shape.kv_heads % count == 0]
        for groups in ((f, b) for f in divisors for b in divisors if f == b or 1 in (f, b)):
            if groups != chosen:
                steps[f"lv_xattn gather {groups[0]}/{groups[1]}"] = layer.exchange(
                    schedule="gather", head_groups=groups
                )
        steps["lv_xattn gather, queries again"] = layer.exchange(
            schedule="gather", head_groups=chosen, keep_queries=False
        )
    return steps


def named(mode: Mode, groups: tuple[int, int]) -> str:
    """A mode as the table shows it: schedules only where a strategy has several."""
    name = f"{mode.strategy} {mode.schedule}" if len(schedules(mode.strategy)) > 1 else mode.strategy
    return f"{name} {groups[0]}/{groups[1]}" if mode.pipeline else name


def choice(layer: Layer, profile: Profile, figures: list[Figure]) -> Choice:
    """What the planner takes for ``layer``, judged by ``figures``."""
    chosen = choose(plan_candidates(layer.costed, profile))
    assert chosen is not None
    name = named(chosen.mode, layer.costed.head_groups(profile))
    ms = {figure.candidate: figure.ms for figure in figures if figure.candidate not in ("floor", GRAPH)}
    return Choice(str(layer.shape), name, round(ms[name] / min(ms.values()), 4))


def decoding(seconds: float) -> list[Figure]:
    """One new token against sharded keys, no gradient: beside the local kernel and one all-reduce of its output.

    Both are replayed as CUDA graphs, as serving does: launched one by one, the host's time would be measured.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    layer = Layer(Shape(1, 262_144, 32, 8, 128), torch.bfloat16, device)
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
    parser.add_argument("--profile", type=load_profile, help="what ds_lvxattn.calibrate wrote; nothing is calibrated")
    parser.add_argument("--sweep", action="store_true", help="other numbers of head groups too")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    device, _ = start_on_device()
    figures: list[Figure] = []
    shapes = SHAPES if args.shapes is None else [SHAPES[int(number)] for number in args.shapes.split(",")]
    layouts = {HeadLayout(shape.heads, shape.kv_heads, shape.head_dim) for shape in shapes}
    profile = args.profile or calibrated(dist.group.WORLD, layouts, device, torch.bfloat16)
    choices: list[Choice] = []
    for shape in shapes:
        layer = Layer(shape, torch.bfloat16, device)
        measured = measure(layer, candidates(layer, profile, args.sweep), args.seconds)
        figures += measured
        choices.append(choice(layer, profile, measured))
        if dist.get_rank() == 0:
            report(figures, figures[-1].shape)
            print(f"auto: {choices[-1].candidate}, {choices[-1].over_fastest:.3f} of the fastest", flush=True)
    figures += decoding(args.seconds)
    if dist.get_rank() == 0:
        report(figures, figures[-1].shape)
        about = {
            "device": torch.cuda.get_device_name(),
            "ranks": dist.get_world_size(),
            "torch": torch.__version__,
            "link_gb_per_s": round(profile.intra.bandwidth / 1e9, 1),
            "NCCL_P2P_DISABLE": os.environ.get("NCCL_P2P_DISABLE", "0"),
            "auto": [asdict(choice) for choice in choices],
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
