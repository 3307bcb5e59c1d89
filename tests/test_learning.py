"""The loss of a step is that of its tokens however they are divided; a run that learns nothing ends and says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ds_lvxattn.data.sample import Sample, SampleError
from ds_lvxattn.errors import ConfigError
from ds_lvxattn.training.learning import Learning
from ds_lvxattn.training.tokens import StepCounts
from tests.support.distributed import run
from tests.support.tiny_model import ListSource, tiny_sample
from tests.support.training import Case, metrics_in, train

GATHER = ("lv_xattn", "gather", "contiguous")
# Supervised tokens differ a sample: 1, 4, 2, 3.
SAMPLES = [tiny_sample(pattern, n) for n, pattern in enumerate(["tIIta", "tItaaaa", "IIItaa", "tttaaa"] * 2)]


def curve(case: Case, samples: list[Sample], folder: Path) -> list[tuple[float, float]]:
    run(case.ranks, train, case, folder, ListSource(samples))
    return list(zip(metrics_in(folder), metrics_in(folder, "grad_norm"), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_micro_batches_and_groups_divide_a_step_without_changing_it(stage: int, tmp_path: Path) -> None:
    whole = Case(2, 2, stage, GATHER, steps=2, micro_batch=4)
    cut = replace(whole, micro_batch=1, accumulation=4)
    groups = Case(4, 2, stage, GATHER, steps=2, micro_batch=1, accumulation=2)
    want = curve(whole, SAMPLES, tmp_path / "whole")
    for name, case in (("cut", cut), ("groups", groups)):
        for got, expected in zip(curve(case, SAMPLES, tmp_path / name), want, strict=True):
            assert got == pytest.approx(expected, rel=1e-4)


def _fail(frames: Sequence[int]) -> list[np.ndarray]:
    raise SampleError("broken")


def test_a_skipped_sample_changes_neither_loss_nor_gradient_of_the_others(tmp_path: Path) -> None:
    case = Case(4, 2, 2, GATHER, steps=1, micro_batch=2)
    samples = [*SAMPLES[:2], replace(SAMPLES[5], load_frames=_fail), SAMPLES[2]]
    got = curve(case, samples, tmp_path / "broken")
    want = curve(Case(2, 2, 2, GATHER, steps=1, micro_batch=3), SAMPLES[:3], tmp_path / "without")
    assert got[0] == pytest.approx(want[0], rel=1e-4)


def test_bad_samples_alone_end_a_run() -> None:
    learning = Learning(0.5)
    for _ in range(2):
        learning.note_samples(StepCounts(0, 4, 4))
    with pytest.raises(SampleError, match="nothing to learn from in 3 steps: 12 of their 12 samples were bad"):
        learning.note_samples(StepCounts(0, 4, 4))
    with pytest.raises(SampleError, match="nothing to learn from in 1 steps"):
        Learning(0.5, steps=1).note_samples(StepCounts(0, 4, 4))


def test_a_large_share_of_bad_samples_ends_a_run() -> None:
    learning = Learning(0.25)
    learning.note_samples(StepCounts(10, 49, 40))  # too few to judge
    with pytest.raises(SampleError, match=r"41 of 50 samples were bad, more than 'finetuning.max_bad_share' \(0.25\)"):
        learning.note_samples(StepCounts(10, 1, 1))


def test_no_gradient_in_the_first_steps_ends_a_run() -> None:
    learning = Learning(1.0)
    for step in (1, 2):
        learning.note_samples(StepCounts(5, 1, 0))
        learning.note_gradient(step, 0.0)
    learning.note_samples(StepCounts(5, 1, 0))
    with pytest.raises(ConfigError, match="no parameter got a gradient in the steps up to 3"):
        learning.note_gradient(3, 0.0)
    moved = Learning(1.0)
    for step, norm in ((1, 0.0), (2, 0.3), (3, 0.0)):
        moved.note_samples(StepCounts(5, 1, 0))
        moved.note_gradient(step, norm)
