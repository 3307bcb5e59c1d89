"""The benchmark of the whole step: that it runs, and what it makes of a profile and of times."""

from __future__ import annotations

import importlib
import itertools
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ds_lvxattn.runtime import compiled
from tests.support.distributed import run
from tests.support.tiny_model import start_deepspeed

BENCHMARKS = str(Path(__file__).parents[1] / "benchmarks")
sys.path.insert(0, BENCHMARKS)  # as where its script is started
import paired  # noqa: E402
import step  # noqa: E402
import step_parts  # noqa: E402


@pytest.mark.parametrize("name", sorted(file.stem for file in Path(BENCHMARKS).glob("*.py")))
def test_each_benchmark_imports_what_there_is(name: str) -> None:
    importlib.import_module(name)


def tiny_runs(stage: int) -> dict[str, Any]:
    start_deepspeed()
    usual, compiled.BACKEND = compiled.BACKEND, "eager"
    runner = step.Runner(stage, step.tiny_config(), ("lv_xattn", "ulysses", "ring", "lv_xattn+", "lv_xattn+@"))
    saved: list[dict[str, Any]] = []
    found = step.measure(runner, (5, 1, 24), 0.0, 2, True, saved.append)
    runner.engine.destroy()
    compiled.BACKEND = usual
    assert len(saved) == 7  # after each round, and after each profile
    return found


@pytest.mark.slow
def test_every_strategy_and_stage_makes_the_same_step(tmp_path: Path) -> None:
    losses, runs = [], []
    for stage in (2, 3):
        found = run(2, tiny_runs, stage)[0]
        strategies = found["strategies"]
        losses += [loss for figures in strategies.values() for loss in figures["losses"]]
        for figures in strategies.values():
            # Every part of the model is marked, and attention is marked as exchange.
            assert all(figures["parts"][part] > 0 for part in (*step.PARTS, "exchange"))
        runs.append({**found, "stage": stage, "link": "nvlink", "ranks": 2, "device": "CPU"})
        assert all(name in step.report(runs[-1]) for name in strategies)
    assert losses == pytest.approx([losses[0]] * 20, rel=1e-5)
    step.draw(runs, tmp_path / "step.png")
    assert (tmp_path / "step.png").stat().st_size


def test_work_grows_until_it_does_not_fit() -> None:
    assert list(step.works("24:1:384,96:4:4096", largest=False)) == [(24, 1, 384), (96, 4, 4096)]
    assert list(itertools.islice(step.works("96:4:384", largest=True), 3)) == [(96 * 2**n, 4, 384) for n in range(3)]


def test_weak_scaling_is_of_as_many_frames_a_gpu() -> None:
    common = {"tiles": 1, "text": 384, "device": "H100", "stage": 2, "link": "nvlink"}
    times = {"lv_xattn": {"steps": [1.0, 1.2, 1.1]}}
    runs = [
        {**common, "ranks": 1, "frames": 24, "strategies": times},
        *({**common, "ranks": 4, "frames": frames, "strategies": times | {"ring": {}}} for frames in (96, 48)),
    ]
    assert step.weak_scaling(runs) == ["lv_xattn, nvlink: 24 frames on one H100 1.100 s, 96 on 4 1.100 s: 1.000"]


def event(name: str, begin: float, end: float) -> Any:
    return SimpleNamespace(name=name, time_range=SimpleNamespace(start=begin, end=end), device_type="DeviceType.CUDA")


def test_parts_of_a_profile() -> None:
    labels = ["text", "encoder", "text", "cross-attention", "cross-attention exchange", "cross-attention", "optimizer"]
    marks = [event("spin_kernel(long)", at, at + 0.5) for at in (0, 10, 30, 40, 50, 80, 90)]
    kernels = [
        event("gemm", -9, -1),  # of the step before
        event("gemm", 11, 29),
        event("layer_norm", 20, 30),  # beside it, on another stream: one more microsecond
        event("ncclDevKernel_AllGather", 31, 38),  # of parameters, of which six are waited for
        event("gemm", 32, 33),
        event("gemm", 41, 49),
        event("ncclDevKernel_SendRecv", 52, 72),  # an exchange, half of it behind a kernel
        event("interval_forward", 62, 79),
        event("Memcpy HtoD (Pinned -> Device)", 1, 9),
        event("adam", 91, 95),
    ]
    found = step_parts.parts_of_profile([*kernels, *marks], labels)
    micro = {name: round(seconds * 1e6) for name, seconds in found.items() if name != "kernels"}
    assert micro == {
        "encoder": 19, "projection": 0, "cross-attention": 25, "text": 1, "optimizer": 4, "exchange": 10,
        "parameters and gradients": 6, "idle": 95 - 65, "floor": 49,
    }  # fmt: skip
    with pytest.raises(ValueError, match="7 marks of 8"):
        step_parts.parts_of_profile([*kernels, *marks], [*labels, "text"])


def test_faster_is_said_only_where_the_interval_leaves_out_zero() -> None:
    times = {"a": [1.0, 1.1, 0.9, 1.0, 1.05, 1.0], "b": [1.3, 1.4, 1.2, 1.3, 1.35, 1.3], "c": [0.8, 1.4] * 3}
    ahead = paired.compare("a", "b", times)
    assert ahead.verdict == "faster" and ahead.ratio == pytest.approx(1.3)
    assert paired.compare("b", "a", times).verdict == "slower"
    assert paired.compare("a", "c", times).verdict == "no difference shown"
    few = {name: steps[:4] for name, steps in times.items()}
    assert paired.compare("a", "b", few).verdict == "4 rounds, too few to say"
    assert paired.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == 1.0
