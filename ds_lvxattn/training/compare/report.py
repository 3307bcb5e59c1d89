"""Runs of the same data and seed side by side: a Markdown table from the files that runs write.

The losses are compared with those of the run called ``single``: one rank, no sequence parallelism.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

SINGLE = "single"
# The first steps allocate memory, compile kernels and set up communicators; their times are not typical.
WARM_UP_STEPS = 3


@dataclass(frozen=True)
class Run:
    """What one run left behind.

    Attributes:
        name: strategy, as the report calls it.
        metrics: objects of ``metrics.jsonl``, by step.
        plan: objects of ``plan.json``.
        evaluation: ``eval.json``.
        failure: why the run is incomplete; None for a complete one.
    """

    name: str
    metrics: Sequence[dict[str, Any]] = ()
    plan: Sequence[dict[str, Any]] = ()
    evaluation: dict[str, Any] = field(default_factory=dict)
    failure: str | None = None

    def column(self, key: str) -> list[float]:
        """A metric of every step that measured it."""
        return [float(step[key]) for step in self.metrics if step.get(key) is not None]


@dataclass(frozen=True)
class Row:
    """A row of the table; a value is None when the run does not give it.

    Attributes:
        steps: steps that were run.
        final_loss: loss of the last step.
        accuracy: share of right answers, in ``[0, 1]``.
        absolute, relative: largest difference of the loss to ``single`` over the steps that both have.
        step_time_s: median, without the first steps.
        received_bytes: mean over the steps, in attention exchanges, of rank 0.
        peak_memory_bytes: largest of the run.
    """

    name: str
    steps: int
    final_loss: float | None
    accuracy: float | None
    absolute: float | None
    relative: float | None
    step_time_s: float | None
    received_bytes: float | None
    peak_memory_bytes: float | None


def read_run(folder: Path, name: str, failure: str | None = None) -> Run:
    """The run in ``folder``, as far as it got.

    Args:
        folder: its output directory.
        name: what the report calls it.
        failure: what went wrong, when that is known; otherwise a missing or broken file is the failure.
    """
    metrics: list[dict[str, Any]] = []
    problems = []
    try:
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            metrics.append(json.loads(line))
    except FileNotFoundError:
        problems.append("no metrics.jsonl")
    except json.JSONDecodeError:
        problems.append(f"metrics.jsonl breaks off after step {len(metrics)}")
    if not metrics and not problems:
        problems.append("metrics.jsonl is empty")
    others: dict[str, Any] = {"plan.json": [], "eval.json": {}}
    for file, nothing in others.items():
        try:
            others[file] = json.loads((folder / file).read_text())
        except FileNotFoundError:
            others[file] = nothing
        except json.JSONDecodeError:
            problems.append(f"{file} is not JSON")
    return Run(name, metrics, others["plan.json"], others["eval.json"], failure or "; ".join(problems) or None)


def unfinished(folder: Path, steps: int) -> str | None:
    """What a run of ``steps`` steps lacks in its folder; None for one that came to its end."""
    run = read_run(folder, folder.name)
    done = int(run.metrics[-1]["step"]) if run.metrics else 0
    if run.failure is None and done >= steps and (folder / "model").exists():
        return None
    return f"the run was ended after step {done} of {steps}, before it had saved its model"


def loss_differences(run: Run, single: Run) -> tuple[list[int], np.ndarray, np.ndarray]:
    """The loss of ``run`` against that of ``single``.

    Returns:
        The steps that both have, and absolute and relative differences, float64 ``[steps]``.
    """
    reference = dict(zip(single.column("step"), single.column("loss"), strict=True))
    shared = [
        (int(step), loss, reference[step])
        for step, loss in zip(run.column("step"), run.column("loss"), strict=True)
        if step in reference
    ]
    steps, losses, expected = zip(*shared, strict=True) if shared else ((), (), ())
    absolute = np.abs(np.array(losses) - np.array(expected))
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.where(absolute == 0, 0.0, absolute / np.abs(np.array(expected)))
    return list(steps), absolute, relative


def compare(runs: Sequence[Run]) -> list[Row]:
    """One row of the table for every run."""
    single = single_run(runs)
    rows = []
    for run in runs:
        absolute = relative = None
        if single is not None and run is not single:
            steps, *differences = loss_differences(run, single)
            if steps:  # NaN stays NaN: a run that diverged must not look equal
                absolute, relative = (float(np.max(difference)) for difference in differences)
        losses, times, received = (run.column(key) for key in ("loss", "step_time_s", "comm_bytes"))
        warm = times[min(WARM_UP_STEPS, len(times) - 1) :] if times else []
        rows.append(
            Row(
                run.name,
                len(run.metrics),
                losses[-1] if losses else None,
                run.evaluation.get("accuracy"),
                absolute,
                relative,
                statistics.median(warm) if warm else None,
                statistics.fmean(received) if received else None,
                max(run.column("peak_memory_bytes"), default=None),
            )
        )
    return rows


def plan_counts(run: Run) -> list[tuple[str, str, str, int]]:
    """``(role, strategy, schedule, layers)`` of the run's plan, most layers first."""
    counts = Counter((layer["role"], layer["strategy"], layer["schedule"]) for layer in run.plan)
    return [(*choice, layers) for choice, layers in counts.most_common()]


def markdown(runs: Sequence[Run], setting: str, pictures: Sequence[str] = ()) -> str:
    """The report as Markdown; ``pictures`` are paths relative to it."""
    rows = compare(runs)
    parts = ["# Sequence-parallel strategies compared", setting, markdown_table(rows)]
    if single_run(runs) is None:
        parts.append(f"No losses of `{SINGLE}` (one rank, no sequence parallelism) to compare with.")
    parts.append(
        f"Step time: median without the first {WARM_UP_STEPS} steps. Received: mean of rank 0's attention "
        "exchanges a step, forward and backward. Peak memory: rank 0."
    )
    failed = [run for run in runs if run.failure]
    if failed:
        parts.append("## Failed runs")
        parts += [f"`{run.name}`:\n\n```\n{run.failure}\n```" for run in failed]
    counts = [(run.name, *choice) for run in runs for choice in plan_counts(run)]
    if counts:
        parts.append("## Plan: attention layers by choice")
        parts.append(_table(("run", "role", "strategy", "schedule", "layers"), counts))
    parts += [f"![{Path(picture).stem.replace('_', ' ')}]({picture})" for picture in pictures]
    return "\n\n".join(parts) + "\n"


COLUMNS = (
    "strategy", "steps", "final loss", "accuracy", "largest loss difference", "relative",
    "step time (s)", "received a step", "peak memory",
)  # fmt: skip


def table_cells(row: Row) -> tuple[str, ...]:
    """The row as text, in the order of ``COLUMNS``."""

    def show(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    return (
        row.name,
        str(row.steps),
        show(row.final_loss, ".6f"),
        show(row.accuracy, ".1%"),
        show(row.absolute, ".2e"),
        show(row.relative, ".2e"),
        show(row.step_time_s, ".3f"),
        "-" if row.received_bytes is None else readable_bytes(row.received_bytes),
        "-" if row.peak_memory_bytes is None else readable_bytes(row.peak_memory_bytes),
    )


def markdown_table(rows: Sequence[Row]) -> str:
    """The table of ``compare`` as Markdown."""
    return _table(COLUMNS, [table_cells(row) for row in rows])


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def readable_bytes(count: float) -> str:
    """Bytes in the binary unit that leaves one to four digits before the point."""
    if not math.isfinite(count):
        return str(count)
    power = min(int(math.log2(count) // 10), 4) if count >= 1 else 0
    return f"{count / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def single_run(runs: Sequence[Run]) -> Run | None:
    return next((run for run in runs if run.name == SINGLE and run.metrics), None)
