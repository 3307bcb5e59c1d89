"""The comparison of runs: tables and pictures from run folders, derived configs, and runs that fail."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ds_lvxattn.errors import ConfigError
from ds_lvxattn.training.compare import runs
from ds_lvxattn.training.compare.command import main, write_report
from ds_lvxattn.training.compare.report import (
    compare,
    loss_differences,
    markdown,
    plan_counts,
    read_run,
    readable_bytes,
)
from ds_lvxattn.training.compare.variants import Variant, derive_config, parse_variants

LOSSES = [2.0, 1.0, 0.5, 0.25, 0.125, 0.0625]


def write_run(folder: Path, losses: list[float], **metrics: Any) -> Path:
    """A run folder as ``train/finetune.py`` leaves it."""
    folder.mkdir(parents=True)
    steps = [
        {"step": step, "loss": loss, "step_time_s": 9.0 if step <= 3 else 0.5, "comm_bytes": 1024 * step}
        | {"peak_memory_bytes": 2**30 + step, **metrics}
        for step, loss in enumerate(losses, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    plan = [{"layer": str(n), "role": "self", "strategy": "ulysses", "schedule": "auto"} for n in range(3)]
    plan.append({"layer": "3", "role": "cross", "strategy": "lv_xattn", "schedule": "gather"})
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "eval.json").write_text(json.dumps({"accuracy": 0.925, "examples": 80}))
    return folder


def off_by(relative: float, step: int = 3) -> list[float]:
    return [loss * (1 + relative) if at == step else loss for at, loss in enumerate(LOSSES, 1)]


def test_table_of_complete_runs(tmp_path):
    write_run(tmp_path / "lv_xattn", off_by(1e-4))
    write_run(tmp_path / "single", LOSSES)
    ours, single = compare([read_run(tmp_path / name, name) for name in ("lv_xattn", "single")])
    assert (ours.steps, ours.final_loss, ours.accuracy) == (6, 0.0625, 0.925)
    assert ours.absolute == pytest.approx(0.5e-4) and ours.relative == pytest.approx(1e-4)
    assert ours.step_time_s == 0.5  # the slow first steps do not count
    assert ours.received_bytes == 1024 * 3.5 and ours.peak_memory_bytes == 2**30 + 6
    assert (single.absolute, single.relative) == (None, None)


def test_differences_are_taken_over_shared_steps(tmp_path):
    short = read_run(write_run(tmp_path / "ring", off_by(1e-3)[:4]), "ring")
    single = read_run(write_run(tmp_path / "single", LOSSES), "single")
    steps, absolute, relative = loss_differences(short, single)
    assert steps == [1, 2, 3, 4]
    np.testing.assert_allclose(absolute, [0, 0, 0.5e-3, 0], atol=1e-12)
    np.testing.assert_allclose(relative, [0, 0, 1e-3, 0], atol=1e-12)


def test_a_diverged_run_does_not_look_equal(tmp_path):
    runs = [
        read_run(write_run(tmp_path / "ring", [*LOSSES[:5], math.nan]), "ring"),
        read_run(write_run(tmp_path / "single", LOSSES), "single"),
    ]
    assert math.isnan(compare(runs)[0].absolute)
    write_report(runs, tmp_path, "")
    assert "| ring | 6 | nan | 92.5% | nan | nan |" in (tmp_path / "report.md").read_text()


def test_plan_counts(tmp_path):
    run = read_run(write_run(tmp_path / "auto", LOSSES), "auto")
    assert plan_counts(run) == [("self", "ulysses", "auto", 3), ("cross", "lv_xattn", "gather", 1)]


def test_report_and_pictures(tmp_path):
    names = ["lv_xattn", "lv_xattn-ring", "ulysses", "single"]
    for name, losses in zip(names, (off_by(1e-7), off_by(-1e-6, 5), LOSSES, LOSSES), strict=True):
        write_run(tmp_path / name, losses)
    pictures = write_report([read_run(tmp_path / name, name) for name in names], tmp_path, "Six steps.")
    text = (tmp_path / "report.md").read_text()
    assert "Six steps." in text and "Failed runs" not in text
    assert "| ulysses | 6 | 0.062500 | 92.5% | 0.00e+00 | 0.00e+00 | 0.500 | 3.5 KiB | 1 GiB |" in text
    assert "| single | 6 | 0.062500 | 92.5% | - | - |" in text
    assert "| lv_xattn-ring | self | ulysses | auto | 3 |" in text
    assert [path.name for path in pictures] == re.findall(r"!\[.*\]\((.*)\)", text)
    assert len(pictures) == 4
    for path in pictures:
        with Image.open(path) as image:
            assert image.width > 500 and len(image.convert("RGB").getcolors(2**24)) > 10


def test_equal_losses_and_one_step_can_be_drawn(tmp_path):
    for name in ("ring", "single"):
        write_run(tmp_path / name, LOSSES[:1])
    runs = [read_run(tmp_path / name, name) for name in ("ring", "single")]
    assert len(write_report(runs, tmp_path, "")) == 4
    assert compare(runs)[0].step_time_s == 9.0


def test_without_single(tmp_path):
    run = read_run(write_run(tmp_path / "auto", LOSSES), "auto")
    assert "No losses of `single`" in markdown([run], "")
    assert compare([run])[0].absolute is None
    assert len(write_report([run], tmp_path, "")) == 4


def test_failed_and_missing_runs(tmp_path):
    broken = write_run(tmp_path / "ulysses", LOSSES[:3])
    with (broken / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    (broken / "eval.json").unlink()
    write_run(tmp_path / "single", LOSSES)
    runs = [
        read_run(tmp_path / "lv_xattn", "lv_xattn"),
        read_run(broken, "ulysses"),
        read_run(tmp_path / "ring", "ring", "exit code 1; boom"),
        read_run(tmp_path / "single", "single"),
    ]
    assert [run.failure for run in runs] == [
        "no metrics.jsonl", "metrics.jsonl breaks off after step 3", "exit code 1; boom", None
    ]  # fmt: skip
    assert len(write_report(runs, tmp_path, "")) == 4
    text = (tmp_path / "report.md").read_text()
    assert "| lv_xattn | 0 | - | - | - | - | - | - | - |" in text
    assert "| ulysses | 3 | 0.500000 | - | 0.00e+00 |" in text
    assert "`ring`:\n\n```\nexit code 1; boom\n```" in text


def test_nothing_ran(tmp_path):
    assert write_report([read_run(tmp_path / "auto", "auto")], tmp_path, "") == []
    assert "no metrics.jsonl" in (tmp_path / "report.md").read_text()


def test_metrics_that_were_not_measured(tmp_path):
    run = read_run(write_run(tmp_path / "auto", LOSSES, peak_memory_bytes=None, comm_bytes=None), "auto")
    [row] = compare([run])
    assert row.peak_memory_bytes is None and row.received_bytes is None
    assert len(write_report([run], tmp_path, "")) == 4


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1.02e+03 B"), (1024, "1 KiB"), (5 * 2**30, "5 GiB"), (math.nan, "nan")],
)
def test_readable_bytes(count, text):
    assert readable_bytes(count) == text


# Derived configs

BASE = {
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": 4,
    "sequence_parallel_size": 2,
    "sequence_parallel": {"strategy": "auto", "layers": {"*.3.*": "ring"}, "kernel": "math"},
    "zero_optimization": {"stage": 2},
}


def test_parse_variants():
    variants = parse_variants("lv_xattn, lv_xattn:ring,single")
    assert [variant.name for variant in variants] == ["lv_xattn", "lv_xattn-ring", "single"]
    for text, message in (
        ("", "has ''; choose from"),
        ("flash", "has 'flash'; choose from"),
        ("single:ring", "has no schedule"),
        ("ring,ring", "twice"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_variants(text)


def test_strategy_config():
    derived = derive_config(BASE, Variant("lv_xattn", "ring"), 4)
    assert derived["sequence_parallel"] == {"strategy": "lv_xattn", "schedule": "ring", "kernel": "math"}
    assert derived["gradient_accumulation_steps"] == 2  # 16 = 4 a micro-batch, two groups of two ranks
    assert derive_config(BASE, Variant("auto"), 4)["sequence_parallel"] == BASE["sequence_parallel"]
    assert "gradient_accumulation_steps" not in BASE and "layers" in BASE["sequence_parallel"]


@pytest.mark.parametrize("gpus", [2, 4, 8])
def test_single_keeps_micro_batches_and_global_batch(gpus):
    base = BASE | {"train_batch_size": 32}
    single = derive_config(base, Variant("single"), gpus)
    assert "sequence_parallel" not in single and "sequence_parallel_size" not in single
    assert (single["train_batch_size"], single["train_micro_batch_size_per_gpu"]) == (32, 4)
    assert single["gradient_accumulation_steps"] == 8
    assert single["zero_optimization"] == {"stage": 2}


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"train_batch_size": 16}, (16, 8)),
        ({"train_micro_batch_size_per_gpu": 3}, (6, 3)),
        ({"train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 5}, (30, 3)),
        ({"train_batch_size": 16, "gradient_accumulation_steps": 4}, (16, 2)),
    ],
)
def test_batch_sizes_as_deepspeed_infers_them(sizes, expected):
    base = {"sequence_parallel_size": 2, **sizes}
    derived = derive_config(base, Variant("ring"), 4)
    assert (derived["train_batch_size"], derived["train_micro_batch_size_per_gpu"]) == expected


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"train_batch_size": 15},
        {"train_batch_size": 1},
        {"train_batch_size": "auto"},
        {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 4},
    ],
)
def test_impossible_batch_sizes(sizes):
    with pytest.raises(ConfigError, match="2 data-parallel ranks"):
        derive_config({"sequence_parallel_size": 2, **sizes}, Variant("ring"), 4)


def test_impossible_settings(tmp_path, capsys):
    with pytest.raises(ConfigError, match="there is no strategy to compare"):
        derive_config({"train_batch_size": 4}, Variant("ring"), 2)
    with pytest.raises(ConfigError, match="does not divide"):
        derive_config(BASE, Variant("ring"), 3)
    with pytest.raises(ConfigError, match="schedule"):
        derive_config(BASE, Variant("ring", "backwards"), 2)

    config, out = tmp_path / "ds.json", tmp_path / "out"
    config.write_text(json.dumps(BASE))
    arguments = ["--ds_config", str(config), "--output_dir", str(out), "--num_gpus", "2"]
    assert main([*arguments, "--steps", "0"]) == 2
    (out / "ring").mkdir(parents=True)
    assert main([*arguments, "--steps", "1"]) == 2
    assert "--steps is 0" in (message := capsys.readouterr().err) and "holds a run ring" in message


# Writes what finetune.py writes, and fails where it is told to.
STUB = """
import argparse, json, os, pathlib, sys
parser = argparse.ArgumentParser()
for name in ("ds_config", "model", "data", "output_dir", "local_rank"):
    parser.add_argument(f"--{name}")
parser.add_argument("--steps", type=int)
parser.add_argument("--seed", type=int)
args = parser.parse_args()
out = pathlib.Path(args.output_dir)
config = json.loads(pathlib.Path(args.ds_config).read_text())
if os.environ["RANK"] == "0":
    names = [os.environ[key] for key in ("WORLD_SIZE", "WANDB_NAME", "WANDB_RUN_GROUP")]
    (out / "seen.json").write_text(json.dumps([*names, args.seed, args.model, args.data]))
if config.get("sequence_parallel", {}).get("strategy") == "ring":
    sys.exit("no ring today")
if os.environ["RANK"] == "0":
    with (out / "metrics.jsonl").open("w") as file:
        for step in range(1, args.steps + 1):
            file.write(json.dumps({"step": step, "loss": 1 / step, "step_time_s": 1.0}) + "\\n")
"""


@pytest.mark.slow
def test_runs_through_the_launcher_and_goes_on_after_a_failure(tmp_path, monkeypatch, capfd):
    stub, config, out = tmp_path / "stub.py", tmp_path / "ds.json", tmp_path / "out"
    stub.write_text(STUB)
    config.write_text(json.dumps(BASE))
    monkeypatch.setattr(runs, "FINETUNE", [str(stub)])
    monkeypatch.setattr(runs, "POLL_SECONDS", 0.2)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    arguments = ["--ds_config", str(config), "--steps", "4", "--output_dir", str(out), "--num_gpus", "2"]
    assert main([*arguments, "--strategies", "ring:ring,single", "--seed", "3"]) == 1

    ring, single = (json.loads((out / name / "seen.json").read_text()) for name in ("ring-ring", "single"))
    assert (ring[:2], single[:2]) == (["2", "ring-ring"], ["1", "single"])
    assert ring[2] == single[2]  # one wandb group
    assert ring[3:] == single[3:] == [3, "quickstart", "needle"]
    report = (out / "report.md").read_text()
    assert "| ring-ring | 0 | - |" in report and "| single | 4 | 0.250000 |" in report
    for text in (report, capfd.readouterr().out, (out / "ring-ring" / "log.txt").read_text()):
        assert "no ring today" in text
