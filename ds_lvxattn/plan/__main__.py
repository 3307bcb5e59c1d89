"""What a cluster would do with a model, before anyone rents it.

    python -m ds_lvxattn.plan --model Llama-3.2-11B-Vision --text 2048 --frames 1024 --gpus 64 --cluster h100

Prints, for every strategy, time and traffic of a layer that attends to visual tokens, the whole step, its memory and
the largest number of frames that fits; and what would be chosen. No GPU and no network is needed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ds_lvxattn.plan.choice import Candidate, choose
from ds_lvxattn.plan.cluster.job import ClusterJob
from ds_lvxattn.plan.cluster.model_sizes import SHIPPED, ModelError, model_sizes
from ds_lvxattn.plan.cluster.step import USABLE, frames_that_fit, layer_candidates, stages, steps
from ds_lvxattn.plan.profile import Profile, ProfileError, load_profile, shipped_profiles
from ds_lvxattn.plan.zero import STAGES, advice

PICTURES = (".png", ".svg", ".pdf")


def report(job: ClusterJob, profile: Profile) -> dict[str, Any]:
    """Everything that is printed, as one JSON object."""
    own = choose(layer_candidates(job.self_attention(), profile))
    assert own is not None
    strategies: dict[str, Any] = {}
    best: tuple[float, str] | None = None
    found = steps(job, profile)
    for name, (candidate, step) in found.items():
        if candidate.cost is None or step is None:
            strategies[name] = {"obstacle": candidate.obstacle}
            continue
        fits = step.memory <= USABLE * profile.memory
        strategies[name] = {
            "schedule": candidate.mode.schedule,
            "layer_ms": layer_milliseconds(candidate),
            "layer_received_bytes": candidate.received,
            "layer_received_between_nodes_bytes": candidate.between,
            "step_s": {"total": step.total, **step.parts},
            "step_received_bytes": step.received,
            "memory_bytes": step.memory,
            "fits": fits,
            "largest_frames": frames_that_fit(job, candidate.mode, own.mode, profile),
        }
        if fits and (best is None or step.total < best[0]):
            best = (step.total, name)
    possible = {name: step for name, (_, step) in found.items() if step is not None}
    fastest = min(possible, key=lambda name: possible[name].total)
    of_stages = stages(job, found[fastest if best is None else best[1]][0], profile)
    return {
        "model": job.model.name,
        "cluster": profile.name,
        "source": profile.source,
        "text": job.text,
        "frames": job.frames,
        "visual_tokens": job.visual,
        "gpus": job.gpus,
        "gpus_per_node": profile.gpus_per_node,
        "keys_in_text": job.model.keys_in_text,
        "recompute": job.recompute,
        "self_attention": {"strategy": own.mode.strategy, "schedule": own.mode.schedule, "layer_ms": own.seconds * 1e3},
        "strategies": strategies,
        "two_levels": two_levels(layer_candidates(job.compared(), profile)),
        "choice": None if best is None else best[1],
        "reason": reason(strategies, best, profile),
        "stage": job.stage,
        "stages": [asdict(stage) for stage in of_stages],
        "warning": advice(job.stage, of_stages),
    }


def two_levels(candidates: Sequence[Candidate]) -> dict[str, Any] | None:
    """The fastest ways of one level and of two for the layer; None where there is but one level, or none that runs."""
    flat, two = (choose([c for c in candidates if c.mode.two_levels is knows]) for knows in (False, True))
    if flat is None or two is None:
        return None
    return {
        "win": two.seconds < flat.seconds,
        **{
            name: {"mode": c.mode.name, "layer_ms": c.seconds * 1e3, "received_between_nodes_bytes": c.between}
            for name, c in (("two_levels", two), ("one_level", flat))
        },
    }


def about_two_levels(found: dict[str, Any] | None, gpus_per_node: int) -> str:
    """One sentence on whether it pays to tell nodes apart."""
    if found is None:
        return "two levels: all GPUs are on one node, or its nodes are not equally full"
    ways = [(way, way["received_between_nodes_bytes"] / 2**20) for way in (found["two_levels"], found["one_level"])]
    two, one = (f"{way['mode']} {way['layer_ms']:.3g} ms with {mib:,.1f} MiB from other nodes" for way, mib in ways)
    verdict = "win" if found["win"] else "do not win"
    return f"two levels, nodes of {gpus_per_node}, {verdict} for this layer: {two}; on one level {one}"


def layer_milliseconds(candidate: Candidate) -> dict[str, float]:
    """A layer's time by parts."""
    cost = candidate.cost
    assert cost is not None
    parts = {
        "kernels": cost.forward.kernel + cost.backward.kernel,
        "passes": cost.forward.passes + cost.backward.passes + cost.repeated.passes,
        "exchange": cost.forward.exchange + cost.backward.exchange + cost.repeated.exchange,
        "projection": cost.projection + cost.projection_repeated,
        "forward": cost.forward.total,
        "backward": cost.backward.total + cost.repeated.total,
        "total": cost.total,
    }
    return {name: seconds * 1e3 for name, seconds in parts.items()}


def reason(strategies: dict[str, Any], best: tuple[float, str] | None, profile: Profile) -> str:
    """One sentence for the choice."""
    if best is None:
        most = max((s["largest_frames"] for s in strategies.values() if "largest_frames" in s), default=0)
        frames = f"at most {_count(most, 'frame')} would" if most else "not even one frame would"
        return f"nothing fits {profile.memory / 1e9:.0f} GB a GPU; {frames}: take more --gpus or another --stage"
    others = [
        f"{name} {s['step_s']['total'] / best[0]:.2f} times as long" + ("" if s["fits"] else " and too large")
        for name, s in strategies.items()
        if name != best[1] and "step_s" in s
    ]
    barred = [f"{name} cannot run: {s['obstacle']}" for name, s in strategies.items() if "obstacle" in s]
    return "; ".join([f"predicted fastest step that fits{': ' if others else ''}{', '.join(others)}", *barred])


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def refuse_pictures(options: dict[str, Path | None]) -> None:
    """Pictures that could not be drawn, ahead of all that is computed for them.

    Raises:
        ModelError: the key, its value and what to do.
    """
    for name, path in options.items():
        if path is None:
            continue
        if path.suffix not in PICTURES:
            raise ModelError(f"{name} is {path}; give a file whose name ends in one of {', '.join(PICTURES)}")
        if not path.parent.is_dir():
            raise ModelError(f"{name} is {path}; the folder {path.parent} does not exist, make it or give another")
        if importlib.util.find_spec("matplotlib") is None:
            raise ModelError(f"{name} is {path}; it needs matplotlib, install it or leave {name} out")


def show(found: dict[str, Any]) -> None:
    """The report as tables."""
    from rich.console import Console
    from rich.table import Column, Table

    console = Console()
    console.width = max(console.width, 140)
    console.print(
        f"{found['model']}, {_count(found['text'], 'text token')}, {_count(found['frames'], 'frame')} = "
        f"{_count(found['visual_tokens'], 'visual token')}, {_count(found['gpus'], 'GPU')}, "
        f"recompute {found['recompute']}\n{found['cluster']}: {found['source']}",
        highlight=False,
    )
    kind = "self" if found["keys_in_text"] else "cross"
    layer = Table(
        Column("strategy", no_wrap=True), "schedule", "forward", "backward", "kernels", "passes", "exchange",
        "projection", "total", "received", "from other nodes",
        title=f"one {kind}-attention layer, ms (exchange: what is not hidden); MiB a GPU",
    )  # fmt: skip
    parts = {
        "encoder": "encoder", "projection": "projector", "cross-attention": "cross", "text": "text",
        "exchange": "exchange", "parameters and gradients": "ZeRO", "optimizer": "optimizer", "idle": "host",
        "total": "total",
    }  # fmt: skip
    step = Table(
        Column("strategy", no_wrap=True), *parts.values(), "received", "memory", "most frames",
        title=f"training step with ZeRO-{found['stage']}, s (exchange, ZeRO: not hidden; host: waiting for it); "
        "GiB a GPU",
    )  # fmt: skip
    for name, s in found["strategies"].items():
        if "obstacle" in s:
            continue
        ms, seconds = s["layer_ms"], s["step_s"]
        keys = ("forward", "backward", "kernels", "passes", "exchange", "projection", "total")
        received = f"{s['layer_received_bytes'] / 2**20:,.1f}"
        between = f"{s['layer_received_between_nodes_bytes'] / 2**20:,.1f}"
        layer.add_row(name, s["schedule"], *(f"{ms[key]:.3g}" for key in keys), received, between)
        memory = f"{s['memory_bytes'] / 2**30:.1f}" + ("" if s["fits"] else " too large")
        step.add_row(
            name, *(f"{seconds[key]:.3f}" for key in parts), f"{s['step_received_bytes'] / 2**30:.2f}", memory,
            f"{s['largest_frames']:,}",
        )  # fmt: skip
    console.print(layer)
    console.print(step)
    console.print(about_two_levels(found["two_levels"], found["gpus_per_node"]), highlight=False)
    console.print(f"choice: {found['choice'] or 'none'}; {found['reason']}", highlight=False)
    zero = Table("ZeRO", "step, s", "memory, GiB", title="stages of ZeRO, with that strategy")
    for each in found["stages"]:
        memory = f"{each['memory'] / 2**30:.1f}" + ("" if each["fits"] else " too large")
        zero.add_row(f"{each['stage']}", f"{each['seconds']:.3g}", memory)
    console.print(zero)
    if found["warning"]:
        console.print(f"warning: {found['warning']}", highlight=False)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="ds-lvxattn plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help=f"one of {', '.join(SHIPPED)}, or a local config.json")
    parser.add_argument("--text", type=int, required=True, help="text tokens of a sample")
    parser.add_argument("--frames", type=int, required=True, help="frames of a sample")
    parser.add_argument(
        "--tiles", type=int, help="tiles of a frame, for a model whose frames have several (default: 1)"
    )
    parser.add_argument(
        "--image-size", type=int, help="pixels along a side of a frame, for a model that takes any size"
    )
    parser.add_argument("--gpus", type=int, required=True, help="GPUs, all of one sequence-parallel group")
    parser.add_argument("--cluster", default="h200", help=f"{', '.join(shipped_profiles())} or a file (%(default)s)")
    parser.add_argument("--recompute", choices=("none", "kv", "layer"), default="kv", help="(default: %(default)s)")
    parser.add_argument("--stage", type=int, choices=STAGES, default=3, help="of ZeRO (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw scaling curves over GPUs and frames")
    parser.add_argument("--map", type=Path, metavar="FILE", help="draw the fastest strategy by text and visual tokens")
    args = parser.parse_args(arguments)
    try:
        for name in ("text", "frames", "gpus"):
            if getattr(args, name) < 1:
                raise ModelError(f"--{name} is {getattr(args, name)}; give at least 1")
        profile = load_profile(args.cluster)
        model = model_sizes(args.model)
        if args.tiles is not None:
            model = model.with_tiles(args.tiles)
        if args.image_size is not None:
            model = model.with_image_size(args.image_size)
        job = ClusterJob(
            model, args.text, args.frames, args.gpus, args.recompute, gpus_per_node=profile.gpus_per_node,
            stage=args.stage,
        )  # fmt: skip
        refuse_pictures({"--plot": args.plot, "--map": args.map})
        if args.map and job.model.keys_in_text:
            raise ModelError("--map is of cross-attention layers, which this model has not; leave it out")
    except (ModelError, ProfileError) as error:
        print(f"plan: {error}", file=sys.stderr)
        return 2
    found = report(job, profile)
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        show(found)
    if args.plot or args.map:
        from ds_lvxattn.plan.cluster import plots

        if args.plot:
            plots.scaling(job, profile, args.plot)
        if args.map:
            plots.choice_map(job, plots.slower_links(job, profile), args.map)
    return 0


if __name__ == "__main__":
    sys.exit(main())
