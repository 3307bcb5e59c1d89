"""What a run tells: ``metrics.jsonl``, ``plan.json``, ``eval.json``, a tracker and the console. Rank 0 writes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ds_lvxattn.plan.layer_plan import LayerPlan, write_plan
from ds_lvxattn.training.files import aside, replace_text, sync, writing
from ds_lvxattn.training.memory_plan import MemoryPlan
from ds_lvxattn.training.metrics import METRICS, keep_metrics, lines_of, text_digest
from ds_lvxattn.training.trackers import start_tracker

MIB = 1 << 20
LINE_SECONDS = 10.0  # of steps, for each of which a log without a terminal gets a line
LOG_WIDTH = 140  # characters of such a log, at least: names of layers and reasons do not fit 80


class RunLog:
    """The log of one run; on ranks other than 0 every method does nothing.

    Args:
        output_dir: where the files go.
        rank: global rank.
        steps: steps of the run, for the progress bar.
        settings: the DeepSpeed config, for the tracker.
        report_to: the tracker; None: wandb where it is installed.
        done: steps of an earlier run that goes on; what its metrics file says of later ones is dropped. None: a run
            that begins; a metrics file that is there keeps its content under another name.
        digest: of the lines of those steps, when they were written; a file that has others is kept too.

    Attributes:
        zero: what ``plan.json`` says of the stages of ZeRO.
    """

    zero: Mapping[str, Any] | None = None

    def __init__(
        self,
        output_dir: Path,
        rank: int,
        steps: int,
        settings: dict[str, Any],
        done: int | None,
        report_to: str | None = None,
        digest: str | None = None,
    ) -> None:
        self.active = rank == 0
        if not self.active:
            return
        self.output_dir = output_dir
        self.console = Console()
        if not self.console.is_terminal:
            self.console.width = max(self.console.width, LOG_WIDTH)
        self._path = output_dir / METRICS
        if done is None and self._path.exists():
            keep_metrics(self._path, "an earlier run that left no checkpoint wrote metrics here")
        elif done is not None:
            lines = lines_of(self._path, done)
            if digest not in (None, text_digest(lines)):
                problem = f"{self._path} is not what it was at step {done}: lines are lost or changed"
                keep_metrics(self._path, problem)
            replace_text(self._path, lines)
        with writing(self._path):
            self._metrics = self._path.open("a", encoding="utf-8")
        self._tracker = start_tracker(report_to, output_dir, settings)
        self._progress = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(), console=self.console, disable=not self.console.is_terminal,
        )  # fmt: skip
        self._steps, self._since_line = steps, LINE_SECONDS
        self._task = self._progress.add_task("train", total=steps, note="")
        self._progress.start()

    def plan(self, plan: Sequence[LayerPlan]) -> None:
        """Write ``plan.json`` and show the plan on the console and in the tracker."""
        if not self.active:
            return
        path = self.output_dir / "plan.json"
        with writing(path):
            write_plan(plan, aside(path), self.zero)
            os.replace(aside(path), path)
        exchanged = [layer for layer in plan if layer.role != "local"]
        columns = ["layer", "role", "strategy", "schedule", "predicted_ms", "measured_ms", "reason"]
        rows = [
            [layer.layer, layer.role, layer.strategy, layer.schedule, layer.expected_ms, layer.took_ms, layer.reason]
            for layer in exchanged
        ]
        self._tracker.table("plan", columns, rows)
        if any(layer.took_ms is not None for layer in exchanged):
            self._compare(exchanged)
            return
        table = Table(
            "layers", "role", "strategy", "schedule", "predicted ms", "why",
            title="attention plan, layers that exchange",
        )  # fmt: skip
        for (*choice, reason), layers in _grouped(exchanged).items():
            table.add_row(_names(layers), *choice, _range(layer.expected_ms for layer in layers), reason)
        self.console.print(table)

    def _compare(self, exchanged: Sequence[LayerPlan]) -> None:
        """The plan's times beside those of the first steps, so that a wrong prediction is seen."""
        table = Table(
            "layers", "role", "strategy", "schedule", "predicted ms", "measured ms",
            title="attention and its exchange, forward and backward",
        )  # fmt: skip
        for (*choice, _), layers in _grouped(exchanged).items():
            expected, took = (_range(getattr(x, key) for x in layers) for key in ("expected_ms", "took_ms"))
            table.add_row(_names(layers), *choice, expected, took)
        self.console.print(table)

    def memory(self, plan: MemoryPlan) -> None:
        """Show on the console what the layers keep for each recompute policy, and the frames that would fit."""
        if not self.active:
            return
        roles = list(plan.kept[plan.policy])
        title = (
            f"memory of the rank with most, MiB: model states {plan.states / MIB:,.1f}, visual features, shared by all "
            f"layers, {plan.shared / MIB:,.1f}"
        )
        table = Table("recompute", *(f"kept by {role} layers" for role in roles), "frames that fit", title=title)
        for policy, kept in plan.kept.items():
            name = f"{policy} (this run)" if policy == plan.policy else policy
            fit = "no GPU" if plan.frames is None else f"{plan.frames[policy]:,}"
            table.add_row(name, *(f"{kept[role] / MIB:,.1f}" for role in roles), fit)
        self.console.print(table)
        if plan.frozen is not None:
            fate = "stay gathered for the whole run" if plan.frozen.kept else "are gathered for each use"
            once = ", those that train are gathered once a step" if plan.frozen.trained else ""
            self.say(f"ZeRO-3: parameters that do not train {fate}{once} ({plan.frozen.why})")
            if plan.buckets:
                self.say("ZeRO-3 sends " + ", ".join(f"{key} {size:,}" for key, size in plan.buckets.items()))
        if plan.warning is not None:
            self.say(f"warning: {plan.warning}")

    def step(self, metrics: dict[str, Any]) -> None:
        """One object of ``metrics.jsonl``."""
        if not self.active:
            return
        with writing(self._path):
            self._metrics.write(json.dumps(metrics) + "\n")
            self._metrics.flush()
        self._tracker.log({f"train/{key}": value for key, value in metrics.items() if key != "step"}, metrics["step"])
        keys = ("loss", "step_time_s", "data_wait_s", "frames_per_s")
        loss, seconds, waited, frames = (metrics[key] for key in keys)
        note = f"loss {loss:.4f}  {seconds:.3f} s/step ({waited:.3f} s for data)  {frames:.0f} frames/s"
        self._progress.update(self._task, completed=metrics["step"], note=note)
        self._since_line += seconds
        if not self.console.is_terminal and (metrics["step"] == self._steps or self._since_line >= LINE_SECONDS):
            self.console.print(f"step {metrics['step']}  {note}")
            self._since_line = 0.0

    def sync(self) -> None:
        """Bring the metrics to the disk: a checkpoint must not outlive those of its steps."""
        if self.active:
            with writing(self._path):
                sync(self._metrics)

    def evaluation(self, step: int, result: dict[str, Any]) -> None:
        """Write ``eval.json``; the last evaluation counts."""
        if not self.active:
            return
        replace_text(self.output_dir / "eval.json", json.dumps({"step": step, **result}, indent=2) + "\n")
        self._tracker.log({f"eval/{key}": value for key, value in result.items()}, step)
        self.console.print(
            f"step {step}: accuracy {result['accuracy']:.3f} on {result['examples']} answers, loss {result['loss']:.4f}"
        )

    def say(self, text: str) -> None:
        """A line on the console."""
        if self.active:
            self.console.print(text)

    def close(self) -> None:
        """Finish the files and the tracker."""
        if self.active:
            self._progress.stop()
            self._metrics.close()
            self._tracker.close()


def _grouped(plan: Sequence[LayerPlan]) -> dict[tuple[str, str, str, str], list[LayerPlan]]:
    """Layers by role, strategy, schedule and reason: most layers of a model share them."""
    groups: dict[tuple[str, str, str, str], list[LayerPlan]] = {}
    for layer in plan:
        groups.setdefault((layer.role, layer.strategy, layer.schedule, layer.reason), []).append(layer)
    return groups


def _names(layers: Sequence[LayerPlan]) -> str:
    first = layers[0].layer
    return first if len(layers) == 1 else f"{len(layers)}, first {first}"


def _range(values: Iterable[float | None]) -> str:
    """Smallest to largest of what is known."""
    known = sorted(value for value in values if value is not None)
    if not known:
        return ""
    low, high = f"{known[0]:.3g}", f"{known[-1]:.3g}"
    return low if low == high else f"{low} to {high}"
