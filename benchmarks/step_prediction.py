"""Steps as the planner predicts them, beside those that ``benchmarks/step.py`` measured. No torch, no GPU.

    python benchmarks/step.py --read docs/step_*.json --predict docs/two_levels.json

The profile is a shipped one, or a file of ``ds_lvxattn.calibrate`` (or one that has such a profile under ``profile``),
of the machine that the steps were measured on. Its links are those that it was measured over; for steps over another
link, ``with_link`` puts in its place one that was measured elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from ds_lvxattn.plan.choice import Candidate, choose
from ds_lvxattn.plan.cluster.job import ClusterJob
from ds_lvxattn.plan.cluster.model_sizes import SHIPPED
from ds_lvxattn.plan.cluster.step import Step, layer_candidates, step_of
from ds_lvxattn.plan.cost import Layer
from ds_lvxattn.plan.profile import Profile, load_profile, profile_for_device, profile_from_json

MODEL = "Llama-3.2-11B-Vision"
TWO_LEVELS = Path(__file__).parents[1] / "docs" / "two_levels.json"
SLOW_LINK = "h200-slow-link"
COMPUTED = ("encoder", "projection", "cross-attention", "text", "optimizer")
COPIED = "+"  # behind a strategy: text on every rank, which is not predicted


@dataclass(frozen=True)
class Prediction:
    """A measured step, the median of several, and its prediction, in seconds.

    Attributes:
        name: run and strategy.
        stage: of ZeRO.
        measured: the step.
        memory: its peak, in bytes; 0 where it was not measured.
        parts: of a profiled one, which took longer; empty where none was profiled.
        step: as predicted.
    """

    name: str
    stage: int
    measured: float
    memory: int
    parts: Mapping[str, float]
    step: Step

    @property
    def error(self) -> float:
        return self.step.total / self.measured - 1

    @property
    def computed(self) -> tuple[float, float] | None:
        """Seconds of compute kernels, measured and predicted; None where none were measured."""
        if not self.parts:
            return None
        measured, predicted = (sum(parts[part] for part in COMPUTED) for parts in (self.parts, self.step.parts))
        return measured, predicted


def read_profile(name: str) -> Profile:
    """A shipped profile, or that of a file. What a file has not measured is as in its device's shipped profile."""
    path = Path(name)
    if path.suffix != ".json":
        return load_profile(name)
    data = json.loads(path.read_text())
    found = profile_from_json(data.get("profile", data), name)
    known = profile_for_device(found.device)
    return replace(found, host={**known.host, **found.host}, products=found.products or known.products)


def with_link(profile: Profile, link: str, ranks: int) -> Profile:
    """The machine with one of the links of ``benchmarks/step.py``.

    ``nodes``: that of ``docs/two_levels.json``; ``slow``: that of the shipped profile of a slow link.
    """
    if link == "nodes":
        measured = profile_from_json(json.loads(TWO_LEVELS.read_text())["profile"], str(TWO_LEVELS))
        return replace(
            profile, gpus_per_node=ranks // 2, intra=measured.intra, inter=measured.inter, curves=measured.curves
        )
    if link == "slow":
        return replace(profile, gpus_per_node=ranks, intra=load_profile(SLOW_LINK).intra, curves=())
    whole = profile.gpus_per_node >= ranks
    curves = tuple(curve for curve in profile.curves if whole and curve.ranks == ranks)
    return replace(profile, gpus_per_node=ranks, curves=curves)


def predicted_step(run: Mapping[str, Any], name: str, profile: Profile) -> Step | None:
    """The step of a strategy of ``run``; None where there is no prediction of it: of text on every rank, and of kept
    parameters while those that trained still had DeepSpeed's hooks."""
    if name.endswith(COPIED) or (run.get("kept") and not run.get("kept_trained")):
        return None
    strategy, _, schedule = name.partition(":")
    frames = run["frames"]
    job = ClusterJob(
        SHIPPED[MODEL].with_tiles(run["tiles"]),
        run["text"] + frames,  # an image token a frame
        frames,
        run["ranks"],
        gpus_per_node=profile.gpus_per_node,
        stage=run["stage"],
        keeps_frozen=False,
        kept=run.get("kept", False),
        gradient=2 if run.get("gradients") == "bf16" else 4,
    )

    def chosen(layer: Layer) -> Candidate | None:
        every = layer_candidates(layer, profile)
        if run["ranks"] == 1:
            return every[0]
        return choose([c for c in every if c.mode.strategy == strategy and schedule in ("", c.mode.schedule)])

    cross, own = chosen(job.cross()), chosen(job.self_attention())
    return None if cross is None or own is None else step_of(job, cross, profile, own)


def predictions(runs: Iterable[Mapping[str, Any]], profile: Profile) -> list[Prediction]:
    """Of every strategy of every run that is predicted."""
    found = []
    for run in runs:
        machine = with_link(profile, run["link"], run["ranks"])
        for name, figures in run["strategies"].items():
            step = predicted_step(run, name, machine)
            if step is not None:
                title = f"ZeRO-{run['stage']} {run['link']} {run['frames']}:{run['tiles']}:{run['text']} {name}"
                measured, memory = median(figures["steps"]), figures.get("peak_memory_bytes", 0)
                found.append(Prediction(title, run["stage"], measured, memory, figures.get("parts", {}), step))
    return found


def prediction_report(found: Sequence[Prediction]) -> str:
    """Seconds of the steps, below them of their parts where they are known; for each stage the errors."""
    lines = ["predicted (parts of a profiled step are longer than those of a measured one where it waits)"]
    for each in found:
        lines.append(
            f"{each.name:38}{each.measured:8.3f} s, predicted {each.step.total:7.3f} ({each.error:+.1%}); "
            f"{each.memory / 2**30:.1f} GiB, predicted {each.step.memory / 2**30:.1f}; "
            + ", ".join(f"{part} {seconds:.3f}" for part, seconds in each.step.parts.items())
        )
        if each.computed is not None:
            measured, predicted = each.computed
            lines.append(
                f"{'':38}compute kernels {measured:.3f} s, predicted {predicted:.3f} "
                f"({predicted / measured - 1:+.1%}); measured "
                + ", ".join(f"{part} {each.parts[part]:.3f}" for part in each.step.parts)
            )
    for stage in sorted({each.stage for each in found}):
        some = [each for each in found if each.stage == stage]
        lines.append(f"ZeRO-{stage}: {_errors('steps', [each.error for each in some])}")
        lines.append(_errors("peak memory", [each.step.memory / each.memory - 1 for each in some if each.memory]))
        computed = [each.computed for each in some if each.computed is not None]
        lines.append(_errors("compute kernels", [predicted / measured - 1 for measured, predicted in computed]))
    return "\n".join(lines)


def _errors(what: str, errors: Sequence[float]) -> str:
    if not errors:
        return f"{what}: none"
    sizes = [abs(error) for error in errors]
    return f"{what}: {len(sizes)}, median error {median(sizes):.1%}, largest {max(sizes):.1%}"
