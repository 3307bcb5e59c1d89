"""Pictures of runs side by side: losses, times, traffic, memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from ds_lvxattn.training.compare.report import SINGLE, Run, compare, loss_differences, readable_bytes, single_run

# Okabe and Ito's colours, which colour-blind readers can tell apart; the reference is grey.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
REFERENCE_COLOUR = "#777777"
MARKS = ("o", "s", "^", "D", "v", "P")


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
    single = single_run(runs)
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
