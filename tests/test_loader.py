"""The order of micro-batches, loading ahead, who loads which frame, and evaluation on any number of ranks."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ds_lvxattn.batches import processors
from ds_lvxattn.batches.loader import ControlGroups, Loader
from ds_lvxattn.data.sample import IGNORE, Sample, SampleError
from ds_lvxattn.groups import HOST_SIZES
from ds_lvxattn.training.evaluation import evaluate
from ds_lvxattn.training.order import Order
from tests.support.distributed import run
from tests.support.marks import slow
from tests.support.tiny_model import (
    MODES,
    PATTERNS,
    ListSource,
    attach,
    groups_of,
    tiny_batches,
    tiny_model,
    tiny_sample,
)
from tests.support.training import Case, metrics_in, train


@dataclass
class ShuffledSource(ListSource):
    """Reads an epoch in an order of its own."""

    def order(self, epoch: int) -> Sequence[int]:
        return np.random.default_rng(epoch).permutation(len(self)).tolist()


@pytest.mark.parametrize(("micro_batch", "data_ranks"), [(1, 1), (2, 3), (4, 2)])
def test_every_epoch_reads_every_row_once_in_the_order_of_the_source(micro_batch: int, data_ranks: int) -> None:
    source = ShuffledSource([tiny_sample("ta")] * 10)
    orders = [Order(source, micro_batch, rank, data_ranks) for rank in range(data_ranks)]
    rows = [row for number in range(30) for order in orders for row in order.rows(number)]
    assert len(rows) >= 30
    assert rows[:30] == [row for epoch in range(3) for row in source.order(epoch)]


@dataclass
class WatchedSource(ListSource):
    """Notes what is asked for; frames of one rank may load slowly."""

    asked: list[int] = field(default_factory=list)
    frames: list[list[int]] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def sample(self, index: int) -> Sample:
        with self.changed:
            self.asked.append(index)
            self.changed.notify_all()
        sample = self.samples[index]

        def load(wanted: Sequence[int]) -> list[np.ndarray]:
            self.frames.append(list(wanted))
            return sample.load_frames(wanted)

        return replace(sample, load_frames=load)


def load_ahead(placement: str) -> tuple[list[int], list[int], list[list[int]]]:
    """What was asked for while the first micro-batch was in use, and in all; which frames this rank loaded."""
    source = WatchedSource([tiny_sample("IIIIIta", seed) for seed in range(4)])
    batches = attach(tiny_model(), dist.get_world_size(), ("ring", "ring", placement), source.samples)
    control = ControlGroups.beside(groups_of(dist.get_world_size()))
    loader = Loader(source, batches, control, skip_bad=False)
    stream = loader.stream(lambda number: [number], 1, 4)
    next(stream)
    with source.changed:
        assert source.changed.wait_for(lambda: len(source.asked) >= 2, timeout=60)
        ahead = list(source.asked)
    assert [loaded.layout.frames for loaded in stream] == [(5,), (5,)]
    return ahead, source.asked, source.frames


@pytest.mark.parametrize(
    ("placement", "frames"), [("contiguous", [[0, 1, 2], [3, 4]]), ("striped", [[0, 3, 4], [1, 2]])]
)
def test_one_micro_batch_loads_ahead_and_a_rank_loads_only_its_frames(placement: str, frames: list[list[int]]) -> None:
    for rank, (ahead, asked, loaded) in enumerate(run(2, load_ahead, placement)):
        assert ahead == [1, 2] and asked == [1, 2, 3]
        assert loaded == [frames[rank]] * 3


def look_ahead(micro_batches: int) -> list[int]:
    """What was asked for while the first micro-batch was in use."""
    source = WatchedSource([tiny_sample("IIIta", seed) for seed in range(8)])
    control = ControlGroups.beside(groups_of(1))
    loader = Loader(source, tiny_batches(tiny_model()), control, skip_bad=False, look_ahead=micro_batches)
    stream = loader.stream(lambda number: [number], 0, 8)
    next(stream)
    with source.changed:
        assert source.changed.wait_for(lambda: len(source.asked) >= micro_batches + 1, timeout=60)
        ahead = list(source.asked)
    assert len(list(stream)) == 7 and source.asked == [*range(8)]
    return ahead


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_as_many_micro_batches_load_ahead_as_asked_for(micro_batches: int) -> None:
    assert run(1, look_ahead, micro_batches) == [[*range(micro_batches + 1)]]


class RaisingSource(ListSource):
    """Row ``n`` raises an error of a kind of its own: while it is made, while its frames load, or in the processor."""

    def sample(self, index: int) -> Sample:
        sample = self.samples[index]
        if index == 1:
            raise RuntimeError("a codec's own error")
        if index == 2:
            return replace(sample, load_frames=lambda wanted: {}["a key"])
        if index == 3:
            return replace(sample, load_frames=lambda wanted: [np.zeros((0, 5), dtype=np.uint8)] * len(wanted))
        if index == 4:
            return replace(sample, frame_groups=lambda wanted: [[frame] for frame in reversed(wanted)])
        return sample


def load_raising(skip: bool) -> tuple[int, list[str], list[bool], str]:
    """Skipped samples, the warnings, whether a row has pixels, and the error that ended it."""
    source = RaisingSource([replace(tiny_sample("IIta", n), name=f"clip {n}") for n in range(5)])
    batches = attach(tiny_model(), dist.get_world_size(), MODES[0], source.samples)
    loader = Loader(source, batches, ControlGroups.beside(groups_of(dist.get_world_size())), skip_bad=skip)
    warnings: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ds_lvxattn.batches.loader").addHandler(handler)
    try:
        loaded = loader.load([0, 1, 2, 3, 4])
    except SampleError as error:
        return 0, warnings, [], str(error)
    return loaded.skipped, warnings, [frames > 0 for frames in loaded.layout.frames], ""


def test_whatever_is_raised_while_a_sample_is_made_is_its_fault() -> None:
    results = run(2, load_raising, True)
    for skipped, _, frames, _ in results:
        assert skipped == 3 and frames == [True, False, False, False, True]
    told = "\n".join(results[0][1])
    for part in ("sample 1: RuntimeError: a codec's own error", "clip 2: KeyError: 'a key'", "clip 3: "):
        assert part in told
    for _, _, _, error in run(2, load_raising, False):
        assert "sample 1: RuntimeError: a codec's own error (set 'finetuning.on_bad_sample'" in error


# Threads


@pytest.mark.parametrize(
    ("environment", "bound", "limit", "expected"),
    [
        ({}, False, None, 16),
        ({"LOCAL_WORLD_SIZE": "2"}, False, None, 8),
        ({"LOCAL_SIZE": "8"}, False, None, 2),  # DeepSpeed's launcher says no more than this
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "32"}, False, None, 1),
        ({"LOCAL_SIZE": "2"}, True, None, 16),  # --bind_cores_to_rank
        ({"LOCAL_SIZE": "2"}, False, "600000 100000", 3),
        ({"LOCAL_SIZE": "2"}, True, "600000 100000", 3),
        ({"LOCAL_SIZE": "2"}, False, "max 100000", 8),
    ],
)
def test_a_rank_takes_its_share_of_the_processors(
    environment: dict[str, str], bound: bool, limit: str | None, expected: int,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for name in HOST_SIZES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16 if pid == 0 or not bound else 32)))
    monkeypatch.setattr(processors, "CGROUPS", tmp_path)
    monkeypatch.setattr(processors, "own_cgroup", lambda: "pod/container")
    (tmp_path / "pod" / "container").mkdir(parents=True)
    (tmp_path / "pod" / "container" / "cpu.max").write_text("max 100000\n")
    if limit is not None:
        (tmp_path / "pod" / "cpu.max").write_text(limit + "\n")
    assert processors.processors_of_rank() == expected


def test_the_quota_of_cgroups_of_version_1(tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    for name, value in (("cpu.cfs_quota_us", "250000"), ("cpu.cfs_period_us", "100000")):
        (tmp_path / "cpu" / name).write_text(value)
    assert processors.quota(tmp_path, "") == 2.5
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1")
    assert processors.quota(tmp_path, "") is None


# Evaluation

ANSWERS = (*PATTERNS.values(), "IItaaIItattIaaaa", "tIaIaIaIatIaa", "ttaatataaa")


def half_right_samples() -> ListSource:
    """Samples in which some answers are what the model says, and others only in part."""
    model, rng, samples = tiny_model().eval(), np.random.default_rng(0), []
    batches = tiny_batches(model)
    for seed, pattern in enumerate(ANSWERS):
        sample = tiny_sample(pattern, seed)
        batch = batches.prepare([sample])
        with torch.no_grad():
            said = model(**batch.inputs).logits[0].argmax(-1).tolist()
        labels = [IGNORE, *said[:-1]]
        kept = [
            IGNORE if label == IGNORE else (right if rng.random() < 0.7 else (right + 1) % 17)
            for label, right in zip(sample.labels, labels, strict=True)
        ]
        samples.append(replace(sample, labels=kept))
    return ListSource(samples)


def expected_evaluation(source: ListSource) -> tuple[float, float, int]:
    """Accuracy, loss and answers, counted one token at a time on the unmodified model."""
    model, batches = tiny_model().eval(), tiny_batches(tiny_model())
    right, loss, tokens = [], 0.0, 0
    for sample in source.samples:
        inputs = batches.prepare([sample]).inputs
        with torch.no_grad():
            logits = model(**inputs).logits[0].double()
        previous = IGNORE
        for row, label in zip(logits[:-1], sample.labels[1:], strict=True):
            if label != IGNORE:
                hit = row.argmax().item() == label
                right.append(hit) if previous == IGNORE else right.append(right.pop() and hit)
                loss -= row.log_softmax(-1)[label].item()
                tokens += 1
            previous = label
    return sum(right) / len(right), loss / tokens, len(right)


def evaluate_on_ranks(source: ListSource, size: int, mode: tuple[str, str, str]) -> dict[str, float | int]:
    model = tiny_model()
    batches = attach(model, size, mode, source.samples) if size > 1 else tiny_batches(model)
    groups = groups_of(size)
    loader = Loader(source, batches, ControlGroups.beside(groups), skip_bad=False)
    # Without exchange, transformers lets samples of a batch see each other's padding: see ``loss_of_each_alone``.
    return evaluate(model, loader, groups, micro_batch=2 if size > 1 else 1)


@pytest.mark.parametrize(("ranks", "size"), [slow(2, 1), slow(2, 2), slow(4, 4), (4, 2)])
def test_accuracy_is_the_same_on_any_number_of_ranks(ranks: int, size: int) -> None:
    source = half_right_samples()
    accuracy, loss, answers = expected_evaluation(source)
    assert 0.2 < accuracy < 0.8
    for result in run(ranks, evaluate_on_ranks, source, size, MODES[1]):
        assert result == {"accuracy": accuracy, "loss": pytest.approx(loss, rel=1e-5), "examples": answers}


def load_slowly(frames: Sequence[np.ndarray], wanted: Sequence[int]) -> list[np.ndarray]:
    """Rank 1 is still loading the next training batch when rank 0 has long begun to evaluate."""
    time.sleep(0.4 * dist.get_rank())
    return [frames[index] for index in wanted]


def train_with_evaluation(folder: Path) -> dict[str, float | int]:
    samples = [tiny_sample("IItaIa", seed) for seed in range(4)]
    slow = []
    for sample in samples:
        frames = sample.load_frames(range(sample.num_frames))
        slow.append(replace(sample, load_frames=lambda wanted, frames=frames: load_slowly(frames, wanted)))
    case = Case(2, 2, 1, MODES[0], steps=3, micro_batch=1)
    return train(case, folder, ListSource(slow), eval_every=1, on_bad_sample="fail")


@pytest.mark.slow
def test_evaluation_does_not_meet_the_batch_that_loads_ahead(tmp_path: Path) -> None:
    results = run(2, train_with_evaluation, tmp_path)
    assert results[0] == results[1] and results[0]["examples"] == 8
    assert len(metrics_in(tmp_path)) == 3
