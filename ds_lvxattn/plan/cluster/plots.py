"""Pictures of the planner: scaling curves, and the map of the fastest strategy. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from ds_lvxattn.plan.choice import best_of_each, candidates
from ds_lvxattn.plan.cluster.job import ClusterJob
from ds_lvxattn.plan.cluster.step import USABLE, steps
from ds_lvxattn.plan.cost import Layer
from ds_lvxattn.plan.modes import mode_named, strategies
from ds_lvxattn.plan.profile import Profile
from ds_lvxattn.plan.traffic import LayerShape
from ds_lvxattn.plan.visibility import of_mask

MOST_GPUS = 4096
MOST_TOKENS = 10_000_000


def colour_of(strategy: str) -> str:
    """Colour of a strategy: that of its first schedule."""
    return mode_named(strategy).colour


def scaling(job: ClusterJob, profile: Profile, path: Path) -> None:
    """Step time over GPUs, for the job's sample, and over frames, on the job's GPUs; dotted where memory lacks."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    gpus = [2**k for k in range(1, MOST_GPUS.bit_length())]
    _curves(left, gpus, [replace(job, gpus=n) for n in gpus], profile)
    left.set(xlabel="GPUs", title=f"{job.text:,} text and {job.visual:,} visual tokens")
    most = MOST_TOKENS // job.model.frame_tokens
    frames = sorted({max(round(most ** (k / 24)), 1) for k in range(6, 25)})
    visual = [count * job.model.frame_tokens for count in frames]
    _curves(right, visual, [replace(job, frames=count) for count in frames], profile)
    right.set(xlabel="visual tokens", title=f"{job.text:,} text tokens, {job.gpus:,} GPUs")
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", ylabel="predicted step time, s")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"{job.model.name} on {profile.name}, recompute {job.recompute}; dotted: does not fit the memory")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _curves(axes, places: Sequence[int], jobs: Sequence[ClusterJob], profile: Profile) -> None:
    found = [steps(job, profile) for job in jobs]
    for name in strategies():
        points = [(x, s[name][1]) for x, s in zip(places, found, strict=True) if name in s]
        there = [(x, step.total, step.memory) for x, step in points if step is not None]
        if not there:
            continue
        axes.plot([x for x, _, _ in there], [t for _, t, _ in there], ":", color=colour_of(name))
        fits = [(x, t) for x, t, memory in there if memory <= USABLE * profile.memory]
        axes.plot([x for x, _ in fits], [t for _, t in fits], "o-", ms=3, color=colour_of(name), label=name)


class Panel(NamedTuple):
    """One map: a machine, and where it was measured the fastest strategy by ``(text, visual)``."""

    profile: Profile
    title: str
    measured: Mapping[tuple[int, int], str]


def slower_links(job: ClusterJob, profile: Profile) -> list[Panel]:
    """Panels of the machine, and of ones with a quarter and a sixteenth of its bandwidth."""
    link = profile.intra if job.gpus <= profile.gpus_per_node else profile.inter
    panels = [Panel(profile, f"{link.bandwidth / 1e9:.0f} GB/s, as in the profile", {})]
    for divide in (4, 16):
        panels.append(Panel(_slower(profile, divide), f"{link.bandwidth / divide / 1e9:.1f} GB/s", {}))
    return panels


def choice_map(job: ClusterJob, panels: Sequence[Panel], path: Path) -> None:
    """The fastest strategy of a cross-attention layer by text and visual tokens, a panel for each machine.

    Args:
        job: model and GPUs; its text and frames are not used.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    texts = [2 ** (k / 2) for k in range(14, 33)]
    visuals = [2 ** (k / 2) for k in range(26, 41)]
    figure, all_axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 4.2), sharey=True)
    for axes, (machine, title, measured) in zip(all_axes, panels, strict=True):
        for text in texts:
            for visual in visuals:
                name, gain = _fastest(job, machine, round(text), round(visual))
                axes.plot(text, visual, "s", ms=7, color=colour_of(name), alpha=0.35 + 0.65 * min(gain / 0.3, 1.0))
        for (text, visual), name in measured.items():
            axes.plot(text, visual, "o", ms=9, mfc=colour_of(name), mec="black")
        axes.set(xscale="log", yscale="log", xlabel="text tokens", title=title)
    all_axes[0].set_ylabel("visual tokens")
    for name in strategies():
        all_axes[-1].plot([], [], "s", color=colour_of(name), label=name)
    if any(panel.measured for panel in panels):
        all_axes[-1].plot([], [], "o", mfc="white", mec="black", label="measured fastest")
    all_axes[-1].legend(loc="upper right")
    figure.suptitle(
        f"fastest strategy of a cross-attention layer of {job.model.name} on {job.gpus} GPUs\n"
        "pale: the next is nearly as fast"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _fastest(job: ClusterJob, profile: Profile, text: int, visual: int) -> tuple[str, float]:
    """The fastest strategy, and by what share the next one is slower."""
    m = job.model
    rows, keys = max(text // job.gpus, 1), max(visual // job.gpus, 1)
    shape = LayerShape(
        1, m.cross_heads, m.cross_kv_heads, m.cross_head_dim, (rows,) * job.gpus, (keys,) * job.gpus, 2,
        recompute=job.recompute, inner_size=job.inner_size,
    )  # fmt: skip
    mask = of_mask(m.mask, rows * job.gpus, keys * job.gpus, job.gpus, m.frame_tokens)
    layer = Layer(shape, mask, m.features)
    found = best_of_each(candidates(layer, profile))
    order = sorted((c.seconds, name) for name, c in found.items())
    return order[0][1], order[1][0] / order[0][0] - 1 if len(order) > 1 else 1.0


def _slower(profile: Profile, divide: float) -> Profile:
    """``profile`` with links of ``1/divide`` of the bandwidth."""
    intra, inter = (
        replace(link, bandwidth=link.bandwidth / divide, shared=link.shared and link.shared / divide)
        for link in (profile.intra, profile.inter)
    )
    return replace(profile, intra=intra, inter=inter, curves=())
