"""Every mode of one attention layer on nodes of several GPUs, forward and backward, beside what the planner predicts.

    torchrun --nproc_per_node 4 benchmarks/two_levels.py --node_size 2 --output two_levels.json
    torchrun --nproc_per_node 4 benchmarks/two_levels.py --node_size 2 --output two_levels.json --cases 10-19
    python benchmarks/two_levels.py --read two_levels.json
    python benchmarks/two_levels.py --predict two_levels.json

``--node_size`` makes NCCL take so many consecutive GPUs of one host for a node: NVLink inside, sockets between. Left
out, nodes are hosts. Links of both levels and kernels are calibrated first; then, of every case, the local compute
(``floor``: all queries against the rank's own keys) and each mode that can run, in turns. ``auto`` is what the planner
takes, with its time over that of the fastest. No case begins after ``--seconds``; those that are left are named, and
``--cases`` runs them in another call, which adds to the same file. ``--read`` prints a file again; ``--predict`` what
the planner makes of its profile in the cases without a mask, which is what there is to gain. Without GPUs it runs on
gloo with small sizes, which checks that everything runs, not how fast.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from attention_layer import Layer, Shape, Step, slowest, start_on_device, timed

from ds_lvxattn.calibrate import calibrate
from ds_lvxattn.calibration.extent import HeadLayout
from ds_lvxattn.exchange.comm import communicator
from ds_lvxattn.exchange.grid import node_size
from ds_lvxattn.plan.choice import candidates, choose
from ds_lvxattn.plan.cost import Layer as CostedLayer
from ds_lvxattn.plan.kernel_choice import kernel_choice
from ds_lvxattn.plan.modes import LOCAL, Mode, eligible_modes
from ds_lvxattn.plan.profile import Profile, load_profile, profile_from_json, profile_to_json
from ds_lvxattn.plan.traffic import LayerShape

# Queries and keys: cross-attention, and self-attention without a mask and causal.
CROSS = ((8_192, 262_144), (384, 262_144), (2_048, 131_072), (4_096, 524_288))
SELF = (8_192, 16_384, 32_768)
HEADS = ((32, 8, 128), (16, 4, 128))
CASES = tuple(
    shape
    for heads in HEADS
    for shape in (
        *(Shape(*lengths, *heads) for lengths in CROSS),
        *(Shape(length, length, *heads, mask) for mask in ("none", "causal") for length in SELF),
    )
)
CPU_SCALE = 128  # lengths are divided by this without a GPU
TURN_SECONDS = 0.15  # of steps of one mode until the next one's turn
ROUNDS = 3
TOO_SLOW = 4.0  # times the fastest: such a mode has one turn of one step


@dataclass
class Result:
    """Milliseconds of one mode, and bytes that rank 0 received; ``predicted_ms`` by the planner."""

    mode: str
    ms: float
    predicted_ms: float
    received_mib: float
    between_mib: float


@dataclass
class Case:
    """One shape: milliseconds of the floor, the choice of ``auto``, its time over the fastest, and every mode."""

    shape: str
    floor_ms: float | None
    auto: str
    over_fastest: float
    results: list[Result] = field(default_factory=list)


def pretend_nodes(size: int) -> None:
    """Let NCCL take each ``size`` consecutive ranks for a host; before it starts."""
    os.environ["NCCL_HOSTID"] = f"node{int(os.environ['RANK']) // size}"
    for name, value in {
        "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1", "NCCL_SOCKET_NTHREADS": "4", "NCCL_NSOCKS_PERTHREAD": "4",
        "NCCL_NVLS_ENABLE": "0",
    }.items():  # fmt: skip
        os.environ.setdefault(name, value)


def options_of(mode: Mode, layer: Layer, profile: Profile) -> dict[str, Any]:
    """Arguments of ``sp_attention`` with which a run would have ``mode``."""
    pipeline = {"head_groups": mode.pipeline(layer.costed, profile)} if mode.pipeline else {}
    kernel = kernel_choice(layer.costed, profile, mode)[0]
    return {
        "strategy": mode.strategy, "schedule": mode.schedule, "inner_size": layer.inner_size, "kernel": kernel,
        **pipeline,
    }  # fmt: skip


def once(step: Step) -> float:
    """Milliseconds of a step, the second, of the slowest rank; infinite where it does not fit the memory."""
    ms = float("inf")  # all ranks allocate alike, so that none is left alone in a collective
    with contextlib.suppress(torch.OutOfMemoryError):
        ms = timed(step, 2)[1]
    return slowest(ms)


def in_turns(steps: Mapping[str, Step], least_steps: int) -> dict[str, float]:
    """Median milliseconds of each step that fits the memory, of the slowest rank."""
    first = {name: ms for name, step in steps.items() if (ms := once(step)) < float("inf")}
    fastest = min(first.values())
    times = {name: [ms] for name, ms in first.items()}
    contenders = [name for name, ms in first.items() if ms <= TOO_SLOW * fastest]
    for name in contenders:
        times[name].clear()  # its connections were new
    for _ in range(ROUNDS):
        for name in contenders:
            count = min(max(int(TURN_SECONDS * 1e3 / first[name]), least_steps), 20)
            times[name] += timed(steps[name], count + 1)[1:]
    return {name: slowest(statistics.median(values)) for name, values in times.items()}


def measured(shape: Shape, profile: Profile, dtype: torch.dtype, device: torch.device) -> Case:
    """All modes that can run, fastest first."""
    layer = Layer(shape, dtype, device)
    comm = layer.comm
    comm.node_size = layer.inner_size  # for the count of bytes between nodes
    possible = [
        mode for mode in eligible_modes() if mode.adds(layer.costed) and mode.why_not(layer.costed.shape) is None
    ]
    steps = {mode.name: layer.exchange(**options_of(mode, layer, profile)) for mode in possible}
    times = in_turns({"floor": layer.floor(), **steps}, 2 if device.type == "cuda" else 1)
    results = []
    for mode in possible:
        if mode.name not in times:
            continue
        comm.reset()
        steps[mode.name]()
        mib = [round(size / 2**20, 2) for size in (comm.bytes_received, comm.bytes_between_nodes)]
        predicted = mode.cost(layer.costed, profile).attention * 1e3
        results.append(Result(mode.name, round(times[mode.name], 3), round(predicted, 3), *mib))
    results.sort(key=lambda result: result.ms)
    chosen = choose([c for c in candidates(layer.costed, profile) if c.mode.name in times])
    assert chosen is not None
    behind = times[chosen.mode.name] / min(result.ms for result in results)
    floor = round(times["floor"], 3) if "floor" in times else None
    return Case(str(shape), floor, chosen.mode.name, round(max(behind, 1.0), 4), results)


def link_rates(profile: Profile) -> dict[str, dict[str, float]]:
    """GB/s that a rank received in the largest transfer of each collective, inside a node and between nodes."""
    rates: dict[str, dict[str, float]] = {}
    for curve in profile.curves:
        size, seconds = curve.points[-1]
        level = {"inner": "inside", "outer": "between"}.get(curve.level, "one group")
        rates.setdefault(level, {})[curve.op] = round(size / seconds / 1e9, 3)
    return rates


def show(case: Case) -> None:
    floor = "" if case.floor_ms is None else f", floor {case.floor_ms:.2f} ms"
    print(f"\n{case.shape}{floor}\n{'':22s}{'ms':>10s}{'predicted':>12s}{'received MiB':>15s}{'between nodes':>15s}")
    for r in case.results:
        print(f"{r.mode:22s}{r.ms:10.2f}{r.predicted_ms:12.2f}{r.received_mib:15.1f}{r.between_mib:15.1f}")
    print(f"auto: {case.auto}, {case.over_fastest:.3f} of the fastest", flush=True)


def read(path: Path) -> tuple[dict[str, Any], list[Case]]:
    """What a run wrote: everything, and its cases."""
    about = json.loads(path.read_text())
    cases = [Case(**{**case, "results": [Result(**r) for r in case["results"]]}) for case in about["cases"]]
    return about, cases


def summary(about: Mapping[str, Any], cases: Sequence[Case]) -> str:
    """How far the choices are behind the fastest, and the ratios between the modes of one level and of two."""
    near = sum(case.over_fastest <= 1.05 for case in cases)
    lines = [
        f"{about['ranks']} x {about['device']}, nodes of {about['node_size']}, torch {about['torch']}; "
        f"GB/s {about['links']}",
        f"auto within 5% of the fastest in {near} of {len(cases)} cases, largest "
        f"{max(case.over_fastest for case in cases):.3f}",
    ]
    for case in cases:
        times = {result.mode: result.ms for result in case.results}
        two = {name: ms for name, ms in times.items() if name.startswith("hybrid") or name.endswith("two_level")}
        if two:
            best = min(two, key=lambda name: two[name])
            flat = ", ".join(f"{ms / two[best]:.2f} of {name}" for name, ms in times.items() if name not in two)
            lines.append(f"{case.shape}: {best} {two[best]:.2f} ms; {flat}")
    return "\n".join(lines)


def predictions(about: Mapping[str, Any]) -> str:
    """Milliseconds of the floor and of every mode in the cases without a mask, by the profile of a run."""
    profile, ranks = profile_from_json(about["profile"]), about["ranks"]
    lines = []
    for shape in (case for case in CASES if case.mask == "none"):
        shards = ((shape.queries // ranks,) * ranks, (shape.keys // ranks,) * ranks)
        sizes = LayerShape(
            1, shape.heads, shape.kv_heads, shape.head_dim, *shards, 2, inner_size=about["node_size"]
        )  # fmt: skip
        layer = CostedLayer(sizes)
        possible = sorted((c for c in candidates(layer, profile) if c.cost), key=lambda c: c.seconds)
        times = ", ".join(f"{c.mode.name} {c.seconds * 1e3:.3g}" for c in possible)
        lines.append(f"{shape}: floor {LOCAL.cost(layer, profile).attention * 1e3:.3g}; {times}")
    return "\n".join(lines)


def numbers(text: str | None, count: int) -> list[int]:
    """``0,3,5-9`` as numbers below ``count``; None: all.

    Raises:
        SystemExit: there are no such cases.
    """
    if text is None:
        return list(range(count))
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    if not found or max(found) >= count:
        raise SystemExit(f"--cases is {text!r}; give numbers from 0 to {count - 1}, such as 0,3,5-9")
    return found


def small(shape: Shape) -> Shape:
    """The shape without a GPU."""
    return Shape(
        max(shape.queries // CPU_SCALE, 8), shape.keys // CPU_SCALE, shape.heads // 4, max(shape.kv_heads // 4, 1), 16,
        shape.mask,
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--node_size", type=int, help="GPUs of a host that are taken for a node (default: hosts)")
    parser.add_argument("--seconds", type=float, default=170.0, help="begin no case after these (%(default)s)")
    parser.add_argument("--cases", help="numbers of the cases to run, such as 0,3,5-9 (default: all)")
    parser.add_argument("--profile", help="an earlier --output of the same machine, or a profile: do not calibrate")
    parser.add_argument("--output", type=Path, default=Path("two_levels.json"), help="(default: %(default)s)")
    parser.add_argument("--read", type=Path, help="print this file, measure nothing")
    parser.add_argument("--predict", type=Path, help="predict from the profile in this file, measure nothing")
    args = parser.parse_args(arguments)
    if args.predict:
        print(predictions(json.loads(args.predict.read_text())))
        return
    if args.read:
        about, cases = read(args.read)
        for case in cases:
            show(case)
        print(f"\n{summary(about, cases)}")
        return
    wanted = numbers(args.cases, len(CASES))
    if args.node_size:
        pretend_nodes(args.node_size)
    device, started = start_on_device()
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    first = dist.get_rank() == 0
    if args.profile:
        given = [profile_of(args.profile) if first else None]
        dist.broadcast_object_list(given, src=0)
        profile = given[0]
        assert profile is not None
    else:
        # The other number of heads follows from one, and calibration is half of the time.
        first_case = CASES[0] if on_gpu else small(CASES[0])
        layout = HeadLayout(first_case.heads, first_case.kv_heads, first_case.head_dim)
        profile = calibrate(dist.group.WORLD, [layout], device, dtype)
    links = link_rates(profile)
    if first:
        print(f"calibrated in {time.perf_counter() - began:.0f} s, GB/s: {links}", flush=True)
    before = read(args.output)[1] if first and args.output.exists() else []
    found: dict[str, Case] = {case.shape: case for case in before}
    about: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu", "ranks": dist.get_world_size(),
        "node_size": node_size(communicator(dist.group.WORLD)), "torch": torch.__version__, "links": links,
        "profile": profile_to_json(profile),
    }  # fmt: skip
    left = list(wanted)
    for number in wanted:
        if slowest(time.perf_counter() - began) > args.seconds:
            break
        left.remove(number)
        case = measured(CASES[number] if on_gpu else small(CASES[number]), profile, dtype, device)
        if first:
            show(case)
            found[case.shape] = case
            cases = [asdict(each) for each in found.values()]
            args.output.write_text(json.dumps({**about, "cases": cases}, indent=1) + "\n")
        if on_gpu:
            torch.cuda.empty_cache()
    if first:
        print(f"\n{summary(about, list(found.values()))}")
        print(f"{time.perf_counter() - began:.0f} s, written to {args.output}; left: {left or 'none'}", flush=True)
    if started:
        dist.destroy_process_group()


def profile_of(name: str) -> Profile:
    """The profile in an earlier output, or a profile by name or path."""
    path = Path(name)
    data = json.loads(path.read_text()) if path.suffix == ".json" else {}
    return profile_from_json(data["profile"], name) if "profile" in data else load_profile(name)


if __name__ == "__main__":
    main()
