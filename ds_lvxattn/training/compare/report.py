"""Runs of the same data and seed side by side: a Markdown table and pictures from the files that runs write.

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

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

SINGLE = "single"
# The first steps allocate memory, compile kernels and set up communicators; their times are not typical.
WARM_UP_STEPS = 3

# Okabe and Ito's colours, which colour-blind readers can tell apart; the reference is grey.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
REFERENCE_COLOUR = "#777777"
MARKS = ("o", "s", "^", "D", "v", "P")


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
    single = _single(runs)
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


def write_report(runs: Sequence[Run], folder: Path, setting: str) -> list[Path]:
    """Write ``report.md`` and its pictures.

    Args:
        runs: in the order of the table.
        folder: where they go.
        setting: a sentence on what was run, for the head of the report.

    Returns:
        The pictures.
    """
    pictures = plot(runs, folder)
    (folder / "report.md").write_text(markdown(runs, setting, [picture.name for picture in pictures]))
    return pictures


def markdown(runs: Sequence[Run], setting: str, pictures: Sequence[str] = ()) -> str:
    """The report as Markdown; ``pictures`` are paths relative to it."""
    rows = compare(runs)
    parts = ["# Sequence-parallel strategies compared", setting, markdown_table(rows)]
    if _single(runs) is None:
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


def plot(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Draw losses, step time, bytes received and peak memory of the runs, as PNG files in ``folder``."""
    drawn = [run for run in runs if run.metrics]
    if not drawn:
        return []
    colours, others = {}, 0
    for run in runs:  # by place among all runs, so that a failure changes no other run's colour
        colours[run.name] = REFERENCE_COLOUR if run.name == SINGLE else COLOURS[others % len(COLOURS)]
        others += run.name != SINGLE
    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        rows = [row for row in compare(runs) if row.steps]
        names = [row.name for row in rows]
        pictures = [_plot_losses(drawn, colours, folder / "losses.png")]
        for file, title, values, text in (
            ("step_time", "Median step time", [row.step_time_s for row in rows], "{:.3f} s".format),
            ("bytes_received", "Received a step", [row.received_bytes for row in rows], readable_bytes),
            ("peak_memory", "Peak memory", [row.peak_memory_bytes for row in rows], readable_bytes),
        ):
            heights = [float("nan") if value is None else value for value in values]
            pictures.append(_plot_bars(names, heights, text, colours, title, folder / f"{file}.png"))
    return pictures


def _plot_losses(runs: Sequence[Run], colours: dict[str, str], path: Path) -> Path:
    """The losses over each other, and below them the relative difference to ``single``, if it was run."""
    single = _single(runs)
    panels = 1 if single is None else 2
    figure, axes = plt.subplots(panels, 1, figsize=(8, 3.2 * panels), sharex=True, squeeze=False, layout="constrained")
    # Equal losses hide each other, so the reference is a broad band and the marks of the runs take turns.
    ends = []
    for number, run in enumerate(runs):
        steps, losses = run.column("step"), run.column("loss")
        band = run is single
        axes[0, 0].plot(
            steps, losses, color=colours[run.name], zorder=1 if band else 2,
            alpha=0.4 if band else 1, linewidth=6 if band else 1.2,
            marker=None if band else MARKS[number % len(MARKS)], markersize=5,
            markevery=(number * max(len(steps) // 40, 1), max(len(steps) // 8, len(runs))),
        )  # fmt: skip
        ends.append((losses[-1], run.name, run.name))
    axes[0, 0].set_ylabel("loss")
    _label_ends(axes[0, 0], ends, colours)
    if single is not None:
        _plot_differences(axes[1, 0], runs, single, colours)
    axes[-1, 0].set_xlabel("step")
    return _save(figure, path)


def _plot_differences(axes: Axes, runs: Sequence[Run], single: Run, colours: dict[str, str]) -> None:
    axes.set_yscale("log")
    axes.set_ylabel(f"relative difference\nto {SINGLE}")
    ends = []
    for number, run in enumerate(runs):
        if run is single:
            continue
        steps, _, relative = loss_differences(run, single)
        shown = np.where(relative > 0, relative, np.nan)  # a logarithm has no place for equal losses
        axes.plot(
            steps,
            shown,
            color=colours[run.name],
            linewidth=1.2,
            marker=MARKS[number % len(MARKS)],
            markersize=3,
        )
        visible = shown[np.isfinite(shown)]
        differs = bool(np.any(relative != 0))
        label = f"{run.name} (max {np.max(relative):.1e})" if differs else f"{run.name} (equal)"
        ends.append((visible[-1] if len(visible) else float("nan"), label, run.name))
    if not any(math.isfinite(end) for end, _, _ in ends):
        axes.set_yticks([])
    _label_ends(axes, ends, colours)


def _label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]], colours: dict[str, str]) -> None:
    """Name curves at the right of where they end, moved apart so that no label covers another.

    Args:
        ends: the curve's last value, its label and its run.
    """
    gap = 0.09  # of the height of the axes: a line of text
    axes.autoscale_view()
    to_axes = axes.transData + axes.transAxes.inverted()
    left = axes.get_xlim()[0]
    heights = [float(to_axes.transform((left, end))[1]) if math.isfinite(end) else 0.0 for end, _, _ in ends]
    placed = -gap
    top = 1 - gap * (len(ends) - 1)  # the lowest label stays low enough for the others to fit above it
    for rank, at in enumerate(sorted(range(len(ends)), key=heights.__getitem__)):
        _, label, run = ends[at]
        placed = max(min(heights[at], top + gap * rank), placed + gap)
        axes.text(1.01, placed, label, transform=axes.transAxes, color=colours[run], va="center", clip_on=False)


def _plot_bars(
    names: Sequence[str], values: Sequence[float], text: Any, colours: dict[str, str], title: str, path: Path
) -> Path:
    """One horizontal bar a run, with its value written at its end instead of an axis."""
    figure, axes = plt.subplots(figsize=(7, 0.8 + 0.45 * len(names)), layout="constrained")
    places = range(len(names))
    axes.barh(places, np.nan_to_num(values), color=[colours[name] for name in names], height=0.65)
    for place, value in zip(places, values, strict=True):
        axes.annotate(
            text(value) if math.isfinite(value) else "not measured",
            (value if math.isfinite(value) else 0, place),
            xytext=(4, 0), textcoords="offset points", va="center",
        )  # fmt: skip
    axes.set_yticks(list(places), names)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlim(left=0)
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_title(title, loc="left")
    return _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> Path:
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _single(runs: Sequence[Run]) -> Run | None:
    return next((run for run in runs if run.name == SINGLE and run.metrics), None)
