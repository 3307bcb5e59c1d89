"""Every mode of one attention layer on nodes of several GPUs, forward and backward, beside what the planner predicts.

    torchrun --nproc_per_node 4 benchmarks/two_levels.py --node_size 2 --output two_levels.json

``--node_size`` makes NCCL take so many consecutive GPUs of one host for a node: NVLink inside, sockets between. Left
out, nodes are hosts. Links of both levels are measured first; of every shape then each mode that can run. ``auto`` is
what the planner would take, with its time over that of the fastest. Ends after ``--seconds``; shapes that are left are
not run. Without GPUs it runs on gloo with small sizes, which checks that everything runs, not how fast.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from attention_layer import Layer, Shape, Step, slowest, timed

from ds_lvxattn.calibrate import calibrate
from ds_lvxattn.calibration.extent import HeadLayout
from ds_lvxattn.plan.choice import candidates, choose
from ds_lvxattn.plan.modes import Mode, eligible_modes
from ds_lvxattn.plan.profile import Profile, profile_to_json

SHAPES = (
    Shape(32_768, 32_768, 32, 8, 128),
    Shape(8_192, 262_144, 32, 8, 128),
    Shape(32_768, 32_768, 32, 8, 128, "growing"),
    Shape(384, 131_072, 32, 8, 128),
    Shape(8_192, 262_144, 28, 4, 128, "growing"),
    Shape(4_096, 262_144, 8, 8, 64, "one frame"),
    Shape(65_536, 65_536, 16, 4, 128),
    Shape(2_048, 262_144, 32, 8, 128),
    Shape(8_192, 8_192, 32, 8, 128),
    Shape(16_384, 65_536, 32, 8, 128),
)
CPU_SCALE = 64  # lengths are divided by this without a GPU
TURN_SECONDS = 0.4  # for each mode of a shape


@dataclass
class Result:
    """Milliseconds of one mode, and bytes that rank 0 received; ``predicted_ms`` by the planner."""

    shape: str
    mode: str
    ms: float
    predicted_ms: float
    received_mib: float
    between_mib: float


def pretend_nodes(size: int) -> None:
    """Let NCCL take each ``size`` consecutive ranks for a host; before it starts."""
    os.environ["NCCL_HOSTID"] = f"node{int(os.environ['RANK']) // size}"
    for name, value in {
        "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1", "NCCL_SOCKET_NTHREADS": "4", "NCCL_NSOCKS_PERTHREAD": "4",
        "NCCL_NVLS_ENABLE": "0",
    }.items():  # fmt: skip
        os.environ.setdefault(name, value)


def options_of(mode: Mode, layer: Layer, profile: Profile) -> dict[str, Any]:
    pipeline = {"head_groups": mode.pipeline(layer.costed, profile)} if mode.pipeline else {}
    return {"strategy": mode.strategy, "schedule": mode.schedule, "inner_size": layer.inner_size, **pipeline}


def milliseconds(step: Step) -> float | None:
    """Median of a few steps, of the slowest rank; None where it does not fit the memory."""
    estimate = float("inf")  # all ranks allocate alike, so that none is left alone in a collective
    with contextlib.suppress(torch.OutOfMemoryError):
        estimate = statistics.median(timed(step, 3))
    estimate = slowest(estimate)
    if estimate == float("inf"):
        return None
    repeats = min(max(int(TURN_SECONDS * 1e3 / estimate), 3), 30)
    return slowest(statistics.median(timed(step, repeats)))


def of_shape(layer: Layer, profile: Profile) -> list[Result]:
    """All modes that can run, fastest first."""
    results = []
    shape, comm = layer.shape, layer.comm
    for mode in eligible_modes():
        if not mode.adds(layer.costed) or mode.why_not(layer.costed.shape) is not None:
            continue
        step = layer.exchange(**options_of(mode, layer, profile))
        ms = milliseconds(step)
        if ms is None:
            continue
        comm.reset()
        step()
        mib = [round(size / 2**20, 2) for size in (comm.bytes_received, comm.bytes_between_nodes)]
        predicted = mode.cost(layer.costed, profile).attention * 1e3
        results.append(Result(str(shape), mode.name, round(ms, 3), round(predicted, 3), *mib))
    return sorted(results, key=lambda result: result.ms)


def show(results: list[Result], auto: dict[str, Any]) -> None:
    print(f"\n{results[0].shape}\n{'':22s}{'ms':>10s}{'predicted':>12s}{'received MiB':>15s}{'between nodes':>15s}")
    for r in results:
        print(f"{r.mode:22s}{r.ms:10.2f}{r.predicted_ms:12.2f}{r.received_mib:15.1f}{r.between_mib:15.1f}")
    print(f"auto: {auto['mode']}, {auto['over_fastest']:.3f} of the fastest", flush=True)


def main() -> None:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--node_size", type=int, help="GPUs of a host that are taken for a node (default: hosts)")
    parser.add_argument("--seconds", type=float, default=150.0, help="start no shape after these (%(default)s)")
    parser.add_argument("--shapes", help="numbers of the shapes to run, such as 0,1 (default: all)")
    parser.add_argument("--output", type=Path, default=Path("two_levels.json"), help="(default: %(default)s)")
    args = parser.parse_args()
    if args.node_size:
        pretend_nodes(args.node_size)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        device = torch.device("cuda", torch.cuda.current_device())
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    shapes = [SHAPES[int(n)] for n in args.shapes.split(",")] if args.shapes else list(SHAPES)
    if not on_gpu:
        shapes = [
            Shape(s.queries // CPU_SCALE, s.keys // CPU_SCALE, s.heads // 4, s.kv_heads // 4 or 1, 16, s.mask)
            for s in shapes
        ]
    # One of each head size: other numbers of heads follow from it, and calibration is half of the time.
    layouts = list({s.head_dim: HeadLayout(s.heads, s.kv_heads, s.head_dim) for s in reversed(shapes)}.values())
    profile = calibrate(dist.group.WORLD, layouts, device, dtype)
    found: list[Result] = []
    choices: list[dict[str, Any]] = []
    links = {
        "inside_gb_per_s": round(profile.intra.bandwidth / 1e9, 1),
        "between_gb_per_s": round(profile.inter.bandwidth / 1e9, 2),
    }
    first = dist.get_rank() == 0
    if first:
        print(f"calibrated in {time.perf_counter() - began:.0f} s: {links}", flush=True)
    for shape in shapes:
        if slowest(time.perf_counter() - began) > args.seconds:
            break
        layer = Layer(shape, dtype, device)
        layer.comm.node_size = layer.inner_size  # for the count of bytes between nodes
        results = of_shape(layer, profile)
        measured = {result.mode: result.ms for result in results}
        possible = [c for c in candidates(layer.costed, profile) if c.mode.name in measured]
        chosen = choose(possible)
        assert chosen is not None
        taken = measured[chosen.mode.name]
        auto = {"shape": str(shape), "mode": chosen.mode.name, "over_fastest": round(taken / results[0].ms, 4)}
        found += results
        choices.append(auto)
        if first:
            show(results, auto)
            about = {
                "device": torch.cuda.get_device_name() if on_gpu else "cpu", "ranks": dist.get_world_size(),
                "node_size": layer.inner_size, "torch": torch.__version__, "links": links, "auto": choices,
                "results": [asdict(result) for result in found], "profile": profile_to_json(profile),
            }  # fmt: skip
            args.output.write_text(json.dumps(about, indent=1) + "\n")
        del layer
        if on_gpu:
            torch.cuda.empty_cache()
    if first:
        print(json.dumps({"links": links, "auto": choices, "shapes": len(choices)}))
        print(f"{time.perf_counter() - began:.0f} s, written to {args.output}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
