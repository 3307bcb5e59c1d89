"""Weak and strong scaling of one cross-attention layer, forward and backward, on 1 to all GPUs of the launch.

    torchrun --nproc_per_node 8 benchmarks/scaling.py --output scaling.json --calibrate
    NCCL_P2P_DISABLE=1 torchrun --nproc_per_node 8 benchmarks/scaling.py --output scaling_slow_link.json --ranks 2,4,8
    python benchmarks/scaling.py --compare scaling.json --plot scaling.png

Weak: 64K visual tokens a GPU. Strong: 1M visual tokens in all. The first 1, 2, 4, ... ranks work while the others wait.
The floor is the local compute of query exchange: all queries against the rank's own keys. In weak scaling that is what
one GPU does, so efficiency against one GPU is floor over time. Each shape is written when it is measured; no shape
begins after ``--limit`` seconds, and a call with the same ``--output`` goes on with those that are left. Without GPUs
it runs on gloo with small sizes, which checks that everything runs, not how fast. ``--compare`` prints how far the
planner's times are from saved ones: from the profile that ``--calibrate`` measured in the run, or from ``--profile``.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from attention_layer import Figure, Layer, Shape, Step, link_speed, measure, slowest, start_on_device

from ds_lvxattn.calibrate import calibrate
from ds_lvxattn.calibration.extent import HeadLayout
from ds_lvxattn.plan.cost import Layer as CostedLayer
from ds_lvxattn.plan.modes import Mode, eligible_modes, mode_named
from ds_lvxattn.plan.pipeline import head_groups
from ds_lvxattn.plan.profile import Profile, load_profile, profile_from_json, profile_to_json
from ds_lvxattn.plan.traffic import LayerShape

# Query heads, key heads, head size; the last has more ranks than key heads from 8 GPUs on.
HEADS = ((32, 8, 128), (28, 4, 128), (16, 4, 128))
TEXT = (384, 2_048, 8_192)
WEAK, STRONG = 65_536, 1_048_576
CPU_SCALE = 1_024  # visual tokens are divided by this without a GPU


@dataclass
class Point:
    """One candidate on so many ranks; ``efficiency`` is floor over time."""

    scaling: str
    ranks: int
    efficiency: float
    shape: Shape
    figure: Figure


def shapes(ranks: int, on_gpu: bool) -> Iterator[tuple[str, Shape]]:
    for heads in HEADS:
        for text in TEXT if on_gpu and heads != HEADS[-1] else TEXT[1:2]:
            for scaling, keys in (("weak", WEAK * ranks), ("strong", STRONG)):
                if on_gpu:
                    yield scaling, Shape(text, keys, *heads)
                else:
                    yield scaling, Shape(text // 32, keys // CPU_SCALE, heads[0] // 4, heads[1] // 4, 16)


def candidates(layer: Layer, link: float) -> dict[str, Step]:
    shape = layer.shape
    lengths = (layer.shards.q.lengths, layer.shards.kv.lengths)
    groups = head_groups(1, shape.heads, shape.kv_heads, shape.head_dim, 2, *lengths, link)
    steps = {"floor": layer.floor()}
    if layer.comm.ranks > 1:
        for mode in eligible_modes():
            if mode.adds(layer.costed) and mode.why_not(layer.costed.shape) is None:
                pipeline = {"head_groups": groups} if mode.pipeline else {}
                steps[mode.name] = layer.exchange(strategy=mode.strategy, schedule=mode.schedule, **pipeline)
    return steps


def run(
    seconds: float,
    ends: float,
    device: torch.device,
    counts: Sequence[int],
    done: Collection[tuple[int, str, Shape]],
    save: Callable[[list[Point]], None],
) -> int:
    """Measure what is not ``done``; rank 0, which takes part in all, hands the points of each shape to ``save``.

    Args:
        seconds: for each candidate of a shape.
        ends: of ``time.perf_counter``; no shape begins later.

    Returns:
        Shapes that are left, on rank 0.
    """
    rank, left = dist.get_rank(), 0
    for ranks in counts:
        group = dist.new_group(list(range(ranks)))
        if rank < ranks:
            link = link_speed(group) if ranks > 1 else float("inf")
            for scaling, shape in shapes(ranks, device.type == "cuda"):
                if (ranks, scaling, shape) in done:
                    continue
                if slowest(time.perf_counter() - ends, group) > 0:
                    left += 1
                    continue
                layer = Layer(shape, torch.bfloat16 if device.type == "cuda" else torch.float32, device, group)
                figures = measure(layer, candidates(layer, link), seconds)
                points = [Point(scaling, ranks, round(1 / figure.over_floor, 4), shape, figure) for figure in figures]
                if rank == 0:
                    report(points)
                    save(points)
                if device.type == "cuda":
                    del layer
                    torch.cuda.empty_cache()
        dist.barrier()
    return left


def report(points: list[Point]) -> None:
    print(f"\n{points[0].scaling}, {points[0].ranks} ranks, {points[0].figure.shape}")
    for point in points:
        print(f"{point.figure.candidate:20s}{point.figure.ms:10.3f} ms, efficiency {point.efficiency:.3f}", flush=True)


def mode_of(candidate: str) -> Mode:
    """The mode of a figure's candidate; earlier files have a blank between strategy and schedule, or no schedule."""
    return mode_named(*candidate.replace(" ", "/").split("/"))


def compare(points: list[Point], profile: Profile) -> None:
    """Predicted over measured time of every point, and how far off they are by number of ranks."""
    errors: dict[int, list[float]] = {}
    for point in points:
        if point.figure.candidate == "floor":
            continue
        shape, n = point.shape, point.ranks
        shards = (tuple([shape.queries // n] * n), tuple([shape.keys // n] * n))
        layer = CostedLayer(LayerShape(1, shape.heads, shape.kv_heads, shape.head_dim, *shards, 2))
        predicted = mode_of(point.figure.candidate).cost(layer, profile).attention * 1e3
        error = predicted / point.figure.ms - 1
        errors.setdefault(n, []).append(abs(error))
        print(f"{n} ranks  {point.figure.shape:40s}{point.figure.candidate:16s}{point.figure.ms:10.2f} ms {error:+.1%}")
    for n, found in errors.items():
        print(f"{n} ranks: {len(found)} points, median {median(found):.1%}, largest {max(found):.1%}")


def draw(points: list[Point], path: Path) -> None:
    """Efficiency over ranks, one panel for each weak-scaling layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    weak = [point for point in points if point.scaling == "weak" and point.figure.candidate != "floor"]
    panels = sorted({_layer_of(point) for point in weak}, key=lambda name: name.split(", ")[1])
    counts = sorted({1, *(point.ranks for point in weak)})
    columns = min(len(panels), 4)
    rows = -(-len(panels) // columns)
    size = (3.2 * columns, 3 * rows)
    figure, grid = pyplot.subplots(rows, columns, figsize=size, sharey=True, squeeze=False)
    for axis in grid.flat[len(panels) :]:
        axis.axis("off")
    for axis, panel in zip(grid.flat, panels, strict=False):
        for candidate in sorted({point.figure.candidate for point in weak}):
            line = [(p.ranks, p.efficiency) for p in weak if _layer_of(p) == panel and p.figure.candidate == candidate]
            axis.plot(*zip((1, 1.0), *line, strict=True), marker="o", label=candidate)
        axis.set(title=panel, xlabel="GPUs", ylim=(0, 1.05))
        axis.set_xscale("log", base=2)
        axis.set_xticks(counts, [str(count) for count in counts])
    grid[0][0].set_ylabel("floor / time")
    grid[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def _layer_of(point: Point) -> str:
    """Text length and heads: a shape without its keys, which grow with the ranks."""
    queries, rest = point.figure.shape.split(" x ", 1)
    return f"{queries} text, {rest.split(', ')[1]}"


def main(arguments: Sequence[str] | None = None) -> None:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.2, help="for each candidate of a shape (%(default)s)")
    parser.add_argument("--limit", type=float, default=550.0, help="begin no shape after these seconds (%(default)s)")
    parser.add_argument("--ranks", help="numbers of ranks, such as 1,4 (default: 1, 2, 4, ... to all)")
    parser.add_argument("--calibrate", action="store_true", help="measure the machine first, for --compare")
    parser.add_argument("--output", type=Path, default=Path("scaling.json"), help="(default: %(default)s)")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--compare", type=Path, help="predict for the points of this file instead of measuring")
    parser.add_argument("--profile", help="for --compare: name or file (default: what the file has, or h200)")
    args = parser.parse_args(arguments)
    if args.compare:
        points, profile = read(args.compare)
        compare(points, load_profile(args.profile) if args.profile else profile or load_profile("h200"))
        if args.plot:
            draw(points, args.plot)
        return
    device, started = start_on_device()
    on_gpu = device.type == "cuda"
    world, rank = dist.get_world_size(), dist.get_rank()
    counts = [int(n) for n in args.ranks.split(",")] if args.ranks else [1 << i for i in range(world.bit_length())]
    # What other ranks know of the file is what rank 0 found.
    before = [read(args.output) if rank == 0 and args.output.exists() else ([], None)]
    dist.broadcast_object_list(before, src=0)
    points, profile = before[0]
    if args.calibrate and profile is None:
        dtype = torch.bfloat16 if on_gpu else torch.float32
        profile = calibrate(dist.group.WORLD, [HeadLayout(*HEADS[0])], device, dtype)

    def save(new: list[Point]) -> None:
        points.extend(new)
        about: dict[str, Any] = {
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "ranks": world,
            "torch": torch.__version__,
            "NCCL_P2P_DISABLE": os.environ.get("NCCL_P2P_DISABLE", "0"),
            "points": [asdict(point) for point in points],
        }
        if profile is not None:
            about["profile"] = profile_to_json(profile)
        args.output.write_text(json.dumps(about, indent=1) + "\n")

    done = {(point.ranks, point.scaling, point.shape) for point in points}
    left = run(args.seconds, began + args.limit, device, counts, done, save)
    if rank == 0:
        print(f"{time.perf_counter() - began:.0f} s, written to {args.output}; {left} shapes are left", flush=True)
        if args.plot:
            draw(points, args.plot)
    if started:
        dist.destroy_process_group()


def read(path: Path) -> tuple[list[Point], Profile | None]:
    """The points of a file that a run wrote, and the profile where it measured one."""
    about = json.loads(path.read_text())
    points = [
        Point(p["scaling"], p["ranks"], p["efficiency"], Shape(**p["shape"]), Figure(**p["figure"]))
        for p in about["points"]
    ]
    return points, profile_from_json(about["profile"], str(path)) if "profile" in about else None


if __name__ == "__main__":
    main()
