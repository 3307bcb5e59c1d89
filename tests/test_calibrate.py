"""Measuring a machine, and the times of layers inside training steps."""

from __future__ import annotations

import itertools
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from ds_lvxattn.calibrate import cache_path, calibrated
from ds_lvxattn.calibration.clock import alike
from ds_lvxattn.calibration.compile_ahead import Item, compile_ahead, items_of
from ds_lvxattn.calibration.extent import Extent, HeadLayout
from ds_lvxattn.calibration.kernels import Shape, to_measure
from ds_lvxattn.exchange.comm import communicator
from ds_lvxattn.kernels.fa4.kept import ENABLED, FOLDER, keeping_compiled
from ds_lvxattn.kernels.triton.kernel import TritonKernel
from ds_lvxattn.plan.cost import Layer
from ds_lvxattn.plan.dense import ENCODER_LAYER, TEXT_LAYER
from ds_lvxattn.plan.modes import eligible_modes
from ds_lvxattn.plan.planner import BatchSizes, Plan
from ds_lvxattn.plan.profile import profile_to_json
from ds_lvxattn.plan.traffic import CallShape, LayerShape
from ds_lvxattn.runtime.layer_times import LayerTimes
from tests.support.distributed import device, run
from tests.support.tiny_model import attach, tiny_model, tiny_sample

LAYOUTS = (HeadLayout(4, 2, 16),)
SMALL = Extent((8, 16), (16, 64), 1e9, (1 << 8, 1 << 12), 1, ((8, 16, 32),))


def measured_twice(cache: str) -> tuple[dict, dict, bool]:
    """The profile as first measured and as then read, and whether the group's counts stayed as they were."""
    group = dist.group.WORLD
    comm = communicator(group)
    comm.reset()
    with mock.patch.dict(os.environ, XDG_CACHE_HOME=cache):
        first = calibrated(group, LAYOUTS, device(), torch.float32, SMALL)
        untouched = comm.bytes_received == 0
        second = calibrated(group, LAYOUTS, device(), torch.float32, SMALL)
        path = cache_path(group, LAYOUTS, device(), torch.float32)
    assert path.is_file() and path.is_relative_to(cache)
    if comm.rank == 0:
        path.write_text("{}")  # as another version may have left it
    with mock.patch.dict(os.environ, XDG_CACHE_HOME=cache):
        assert calibrated(group, LAYOUTS, device(), torch.float32, SMALL).curves
    layer = Layer(LayerShape(1, 4, 2, 16, (12, 12), (30, 30), 4))
    for mode in eligible_modes():
        assert 0 < mode.cost(layer, first).total < 10
    return profile_to_json(first), profile_to_json(second), untouched


@pytest.mark.slow
def test_ranks_measure_once_and_agree(tmp_path: Path) -> None:
    results = run(2, measured_twice, str(tmp_path))
    for first, second, untouched in results:
        assert first == second == results[0][0] and untouched
    profile = results[0][0]
    assert {c["op"] for c in profile["collectives"]} == {"all_gather", "all_to_all", "send", "all_reduce"}
    assert {(k["masked"], k["head_dim"]) for k in profile["kernels"]} == {(False, 16), (True, 16)}
    assert {"lv_xattn/gather", "lv_xattn/routed masked", "ulysses/auto", "ring/ring masked"} <= set(profile["host_ms"])
    assert all(profile["host_ms"][name][0] > 0 for name in (TEXT_LAYER, ENCODER_LAYER))
    assert [product[:3] for product in profile["products"]] == [[8, 16, 32]] and profile["products"][0][3] > 0
    assert "measured by ds_lvxattn.calibrate on 2 ranks" in profile["source"]
    assert profile["versions"]["torch"] == torch.__version__
    assert 0 <= profile["overlap"] <= 1


def test_what_is_measured_is_compiled_once_and_measured_once() -> None:
    layouts = [HeadLayout(4, 2, 16), HeadLayout(8, 4, 16), HeadLayout(4, 4, 8)]
    measured = to_measure(layouts, SMALL, device(), torch.float32)
    assert {(each.masked, each.shapes[0].layout.head_dim) for each in measured} == {
        (masked, head_dim) for masked in (False, True) for head_dim in (8, 16)
    }
    for each in measured:
        assert len(set(each.shapes)) == len(each.shapes)
        assert {shape.layout for shape in each.shapes if shape.layout.kv_heads > 1} <= set(layouts)
    shared = [shape for each in measured for shape in each.shapes if shape.layout == HeadLayout(2, 1, 16)]
    assert len(shared) == (1 + 4) * len(SMALL.rows), "two layouts with two heads a key head"
    triton = [each._replace(kernel=TritonKernel()) for each in measured]
    items = items_of([*measured, *triton])
    calls = [(item.backward, shape) for item in items for shape in item.shapes]
    assert len(set(calls)) == len(calls) == 2 * sum(len(each.shapes) for each in measured)
    assert {item.kernel for item in items} == {"triton"}


def test_processes_compile_and_tell_what_they_cannot() -> None:
    shape = Shape(HeadLayout(4, 2, 16), 8, 16, "growing")
    items = [Item(kernel, backward, (shape,)) for kernel in ("math", "fa4", "math") for backward in (False, True)]
    troubles = compile_ahead(items, torch.device("cpu"), torch.float32, processes=1)
    assert len(troubles) == 2 and all(trouble.startswith("fa4: ValueError: ") for trouble in troubles)


def test_measurements_that_are_alike_are_enough() -> None:
    assert not alike([1.0, 1.0]) and alike([1.0, 1.01, 1.0]) and not alike([1.0, 1.01, 1.5])


@pytest.mark.parametrize("unsafe", [False, True])
def test_compiled_kernels_are_kept_in_a_folder_of_the_user(tmp_path, monkeypatch, unsafe) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv(ENABLED, raising=False)
    monkeypatch.delenv(FOLDER, raising=False)
    if unsafe:
        folder = tmp_path / f"ds_lvxattn-{os.getuid()}"
        folder.mkdir()
        folder.chmod(0o777)
    with keeping_compiled():
        assert os.environ.get(ENABLED) == (None if unsafe else "1")
        assert unsafe or Path(os.environ[FOLDER]).is_relative_to(tmp_path)
    assert ENABLED not in os.environ and FOLDER not in os.environ


def modes(plan: Plan) -> list[tuple[str, str]]:
    return [(layer.strategy, layer.schedule) for layer in plan]


def times_and_plans() -> tuple[list[dict[str, float]], list[tuple], list[bool]]:
    """Measured milliseconds of the exchanged layers, and the plan as batches change their sizes."""
    samples = [tiny_sample("IItaIItItaaI", seed) for seed in range(2)]
    model = tiny_model()
    batches = attach(model, dist.get_world_size(), ("auto", "auto", "contiguous"), samples, recompute="kv")
    planner, times = batches.planner, LayerTimes(device())
    for _ in range(2):
        times.start_step()
        model(**batches.prepare(samples, times).inputs).loss.backward()
    batches.note_times(planner.plan, times)
    measured = [layer.measured_ms for layer in planner.plan if layer.role != "local"]

    made = []

    def shapes():
        made.append(True)
        return {role: CallShape(1, (64, 64), (5000, 5000), 4) for role in ("cross", "self")}

    before, sizes = modes(planner.plan), BatchSizes((1, 7, 14), 2, False, 64, 0.0, shapes)
    plans = [before, *(modes(planner.follow(sizes)) for _ in range(2))]
    changed = [now != then for then, now in itertools.pairwise(plans)]
    later = plans[-1]
    assert len(made) == 1, "a class that is known needs no new plan"
    work, larger = (planner.work(replace(sizes, rows=rows)) for rows in (64, 1 << 20))
    assert 0 < work.device < larger.device and work.host >= 0
    return measured, later, changed


def test_layers_are_timed_and_plans_follow_the_sizes() -> None:
    results = run(2, times_and_plans)
    for measured, later, changed in results:
        assert all(set(times) == {"forward", "backward"} and min(times.values()) > 0 for times in measured)
        assert later == results[0][1] and not changed[1]


def test_a_layer_is_timed_once_a_step() -> None:
    times = LayerTimes(torch.device("cpu"))
    module = torch.nn.Identity()
    x = torch.ones(3, requires_grad=True)
    calls = 0

    def call():
        nonlocal calls
        calls += 1
        return x * 2, x

    times.start_step()
    for _ in range(2):
        out, _ = times.measure(module, (x,), call)
        out.sum().backward()
    assert calls == 2 and set(times.milliseconds()[module]) == {"forward", "backward"}
    with torch.no_grad():
        times.start_step()
        times.measure(module, (x,), call)
    assert len(times._spans[module]["forward"]) == 1
