"""The planner's predictions against measured times of one attention layer, on shapes that no calibration used.

    deepspeed --num_gpus 2 benchmarks/planner.py --output planner.json --seconds 300
    python benchmarks/planner.py --compare planner.json --map map.png

Projects K and V, exchanges and attends, forward and backward, under every strategy and schedule that can run; prints
predicted and measured milliseconds and the quantiles of the error. ``--compare`` predicts again for saved measurements,
from the profile saved with them or from ``--profile``, without a GPU; ``--map`` draws what was measured fastest over
the map of what is predicted fastest, one panel a file.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ds_lvxattn.plan.choice import candidates, choose
from ds_lvxattn.plan.cluster.job import ClusterJob
from ds_lvxattn.plan.cluster.model_sizes import model_sizes
from ds_lvxattn.plan.cluster.plots import Panel, choice_map
from ds_lvxattn.plan.cost import Layer
from ds_lvxattn.plan.modes import LOCAL, Mode, eligible_modes, mode_named
from ds_lvxattn.plan.profile import Profile, load_profile, profile_from_json, profile_to_json, write_profile
from ds_lvxattn.plan.traffic import LayerShape
from ds_lvxattn.plan.visibility import FULL, Visibility, of_mask

FEATURES = 4096
LAYOUTS = ((32, 8, 128), (28, 4, 128), (8, 8, 64))


@dataclass(frozen=True)
class Case:
    """One attention layer of one sequence. Its lengths are those of all ranks together."""

    text: int
    visual: int
    heads: int
    kv_heads: int
    head_dim: int
    mask: str | None
    recompute: str

    @property
    def frame(self) -> int:
        """Visual tokens of a frame, for the mask ``frame``."""
        return max(self.visual // 64, 1)

    def operations(self) -> float:
        return 4.0 * self.heads * self.head_dim * self.text * self.visual

    def layer(self, ranks: int, element: int) -> Layer:
        rows, keys = self.text // ranks, self.visual // ranks
        shape = LayerShape(
            1, self.heads, self.kv_heads, self.head_dim, (rows,) * ranks, (keys,) * ranks, element,
            recompute=self.recompute,
        )  # fmt: skip
        return Layer(shape, self.visibility(ranks), FEATURES)

    def visibility(self, ranks: int) -> Visibility:
        if self.mask is None:
            return FULL
        return of_mask(self.mask, self.text, self.visual, ranks, self.frame)

    def bounds(self, row: Any) -> tuple[Any, Any]:
        """First key and one past the last that each of the global rows ``row`` sees."""
        if self.mask == "growing":
            return row * 0, (row + 1) * self.visual // self.text
        if self.mask == "frame":
            start = row * (self.visual // self.frame) // self.text * self.frame
            return start, start + self.frame
        return row * 0, row * 0 + self.visual


def grid(largest: float, most_features: float, policies: Sequence[str]) -> list[Case]:
    """The cases, those that differ most first, so that a run cut short covers them all thinly.

    Args:
        largest: forward operations above which a case is left out.
        most_features: visual tokens above which a case is left out.
        policies: of recomputation, in turn.
    """
    texts = (128, 384, 1024, 3072, 12288, 65536)
    visuals = (8192, 49152, 196608, 1048576)
    masks = (None, "growing", None, "full", "frame")
    cases = []
    for i, text in enumerate(texts):
        for j, visual in enumerate(visuals):
            for k, layout in enumerate(LAYOUTS):
                number = i * 12 + j * 3 + k
                case = Case(text, visual, *layout, masks[number % 5], policies[(i + j + k) % len(policies)])
                if case.operations() <= largest and visual <= most_features:
                    cases.append(case)
    return [case for start in range(7) for case in cases[start::7]]


def tiny_grid() -> list[Case]:
    """For a machine without a GPU."""
    return [
        Case(text, visual, heads, 4, 16, mask, recompute)
        for text, visual in ((64, 512), (64, 4096), (512, 1024))
        for heads, mask, recompute in ((8, None, "none"), (4, "growing", "kv"))
    ]


# Measuring


def measure(cases: Sequence[Case], profile: Profile, device: Any, dtype: Any, seconds: float) -> list[dict[str, Any]]:
    """Milliseconds of every case and mode, of the slowest rank; stops after ``seconds``."""
    import torch
    import torch.distributed as dist

    ranks = dist.get_world_size()
    began, rows = time.perf_counter(), []
    for case in cases:
        spent = torch.tensor([time.perf_counter() - began], device=device)
        dist.all_reduce(spent, op=dist.ReduceOp.MAX)
        if spent.item() > seconds:
            break
        row: dict[str, Any] = {"case": asdict(case), "ranks": ranks, "element": dtype.itemsize, "ms": {}}
        for mode in eligible_modes() if ranks > 1 else (mode_named("lv_xattn"),):
            layer = case.layer(ranks, dtype.itemsize)
            if mode.adds(layer) and mode.why_not(layer.shape) is None:
                row["ms"][mode.name] = measure_layer(case, mode, device, dtype)
        rows.append(row)
        if dist.get_rank() == 0:
            print(line(row, profile), flush=True)
    return rows


def measure_layer(case: Case, mode: Mode, device: Any, dtype: Any) -> float | None:
    """Median milliseconds of a forward and backward pass; None where it does not fit the memory."""
    import torch
    import torch.distributed as dist

    def timed(step: Callable[[], None], repeats: int) -> float:
        dist.barrier()
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            step()
        _synchronize(device)
        return (time.perf_counter() - start) / repeats

    guess = float("inf")  # all ranks allocate alike, so that none is left alone in a collective
    try:
        step = training_step(case, mode, device, dtype)
        for _ in range(2):
            step()
        guess = timed(step, 2)
    except torch.OutOfMemoryError:
        pass
    agreed = torch.tensor([guess], dtype=torch.float64, device=device)
    dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
    if agreed.item() == float("inf"):
        return None
    repeats = min(max(int(0.05 / agreed.item()), 2), 30)
    times = [timed(step, repeats) for _ in range(3 if agreed.item() < 0.1 else 1)]
    slowest = torch.tensor([statistics.median(times)], dtype=torch.float64, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    del step
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return slowest.item() * 1e3


def training_step(case: Case, mode: Mode, device: Any, dtype: Any) -> Callable[[], None]:
    """Forward and backward pass of the case's layer on this rank."""
    import torch
    import torch.distributed as dist

    from ds_lvxattn import KVInterval, SequenceShards, ShardLayout, sp_attention
    from ds_lvxattn.calibration.extent import HeadLayout
    from ds_lvxattn.calibration.layers import CrossAttention, layer_step
    from ds_lvxattn.exchange.routes import Routes

    ranks, rank = dist.get_world_size(), dist.get_rank()
    shards = ShardLayout(SequenceShards((case.text // ranks,) * ranks), SequenceShards((case.visual // ranks,) * ranks))
    interval, routes = None, None
    if case.mask is not None:
        row = torch.arange(case.text, dtype=torch.int64).reshape(ranks, 1, -1)
        start, stop = (bound.int() for bound in case.bounds(row))
        interval = KVInterval.from_host(start, stop, device)
        if mode.routes_by_mask:
            routes = Routes.build(start, stop, shards, rank, device)
    attend = functools.partial(
        sp_attention, group=dist.group.WORLD if ranks > 1 else None, strategy=mode.strategy, schedule=mode.schedule,
        interval=interval, shards=shards, routes=routes,
    )  # fmt: skip
    make = {"device": device, "dtype": dtype}
    layer = CrossAttention(HeadLayout(case.heads, case.kv_heads, case.head_dim), FEATURES, attend, **make)
    rows = torch.randn(1, case.text // ranks, case.heads * case.head_dim, requires_grad=True, **make)
    features = torch.randn(1, case.visual // ranks, FEATURES, requires_grad=True, **make)
    return layer_step(layer, rows, features, case.recompute != "none")


def _synchronize(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


# Comparing


def predicted_ms(row: dict[str, Any], profile: Profile) -> dict[str, float]:
    layer = Case(**row["case"]).layer(row["ranks"], row["element"])
    modes = {name: LOCAL if row["ranks"] == 1 else mode_named(*name.split("/")) for name in row["ms"]}
    return {name: mode.cost(layer, profile).total * 1e3 for name, mode in modes.items()}


def line(row: dict[str, Any], profile: Profile) -> str:
    case, predicted = Case(**row["case"]), predicted_ms(row, profile)
    shown = "  ".join(
        f"{name} {predicted[name]:.2f}/{'no memory' if ms is None else f'{ms:.2f}'}" for name, ms in row["ms"].items()
    )
    layout = f"{case.heads}/{case.kv_heads}/{case.head_dim}"
    return f"{case.text:6} x {case.visual:8} {layout:9} {case.mask or 'none':8} {case.recompute:6} {shown}"


def summary(rows: Sequence[dict[str, Any]], profile: Profile) -> dict[str, Any]:
    """Quantiles of the relative error of every prediction, and how often the choice is the best or close to it."""
    errors: dict[str, list[float]] = {}
    losses = []
    for row in rows:
        predicted = predicted_ms(row, profile)
        measured = {name: ms for name, ms in row["ms"].items() if ms is not None}
        for name, ms in measured.items():
            errors.setdefault(name, []).append(abs(predicted[name] - ms) / ms)
        if measured:
            losses.append(measured[_choice(row, measured, profile)] / min(measured.values()) - 1)
    everything = sorted(error for found in errors.values() for error in found)
    return {
        "shapes": len(rows),
        "predictions": len(everything),
        "error_median": _quantile(everything, 0.5),
        "error_90": _quantile(everything, 0.9),
        "error_median_by_mode": {name: _quantile(sorted(found), 0.5) for name, found in errors.items()},
        "error_90_by_mode": {name: _quantile(sorted(found), 0.9) for name, found in errors.items()},
        "choice_is_best": sum(loss <= 0 for loss in losses) / max(len(losses), 1),
        "choice_within_5_percent": sum(loss <= 0.05 for loss in losses) / max(len(losses), 1),
        "choice_worst_loss": max(losses, default=0.0),
    }


def compare(files: Sequence[Path], name: str | None, picture: Path | None) -> None:
    """Print predictions beside the measurements of ``files``; draw the map of the first layout of the grid."""
    panels = []
    for file in files:
        saved = json.loads(file.read_text())
        profile = load_profile(name) if name else profile_from_json(saved["profile"])
        for row in saved["rows"]:
            print(line(row, profile))
        print(json.dumps(summary(saved["rows"], profile), indent=1))
        fastest = {}
        for row in saved["rows"]:
            measured = {mode: ms for mode, ms in row["ms"].items() if ms is not None}
            if measured and (row["case"]["heads"], row["case"]["kv_heads"]) == LAYOUTS[0][:2]:
                best = min(measured, key=lambda mode: measured[mode])
                fastest[row["case"]["text"], row["case"]["visual"]] = best.split("/")[0]
        panels.append(Panel(profile, f"{profile.intra.bandwidth / 1e9:.0f} GB/s", fastest))
    if picture:
        ranks = saved["rows"][0]["ranks"]
        choice_map(ClusterJob(model_sizes("Llama-3.2-11B-Vision"), 2048, 64, ranks, "kv"), panels, picture)


def _choice(row: dict[str, Any], measured: Mapping[str, float], profile: Profile) -> str:
    """What ``auto`` takes of the modes that were measured."""
    if row["ranks"] == 1:
        return next(iter(measured))
    found = candidates(Case(**row["case"]).layer(row["ranks"], row["element"]), profile)
    chosen = choose([candidate for candidate in found if candidate.mode.name in measured])
    assert chosen is not None
    return chosen.mode.name


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("planner.json"), help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=600.0, help="stop after the case at hand (%(default)s)")
    parser.add_argument(
        "--largest", type=float, default=1.2e14, help="leave out larger cases, operations (%(default)s)"
    )
    parser.add_argument("--policies", default="none,kv,layer", help="recompute policies, by comma (%(default)s)")
    parser.add_argument("--profile", help="a profile, by name or file; else measured, or the one of the measurements")
    parser.add_argument("--compare", type=Path, nargs="+", help="predict again for these measurements")
    parser.add_argument("--map", type=Path, help="for --compare: where to draw")
    parser.add_argument("--local_rank", type=int, default=0, help="given by the launcher")
    args = parser.parse_args()
    if args.compare:
        compare(args.compare, args.profile, args.map)
        return
    run_on_ranks(args)


def run_on_ranks(args: argparse.Namespace) -> None:
    """Calibrate, unless a profile is given, and measure."""
    import torch
    import torch.distributed as dist

    from ds_lvxattn.calibrate import calibrate, start_on_device
    from ds_lvxattn.calibration.extent import DEFAULT_LAYOUTS, HeadLayout

    device = start_on_device(args.local_rank)
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    if args.profile:
        profile = load_profile(args.profile)
    else:
        layouts = DEFAULT_LAYOUTS if on_gpu else (HeadLayout(8, 4, 16),)
        profile = calibrate(dist.group.WORLD, layouts, device, dtype)
    if dist.get_rank() == 0:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_profile(profile, args.output.with_suffix(".profile.json"))
        print(f"predicted/measured milliseconds\n{profile.source}", flush=True)
    ranks = dist.get_world_size()
    # The features of a rank, their gradient and what is kept of them take four times their bytes.
    most = 0.3 * profile.memory * ranks / (FEATURES * dtype.itemsize) / 2
    cases = grid(args.largest * ranks / 2, most, args.policies.split(",")) if on_gpu else tiny_grid()
    rows = measure(cases, profile, device, dtype, args.seconds)
    if dist.get_rank() == 0:
        found = summary(rows, profile)
        saved = {"profile": profile_to_json(profile), "summary": found, "rows": rows}
        args.output.write_text(json.dumps(saved, indent=1) + "\n")
        print(json.dumps(found, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
