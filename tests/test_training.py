"""Training with the real DeepSpeed engine against one rank, the unmodified model and plain torch AdamW."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForImageTextToText

from tests.support.distributed import run
from tests.support.processes import launch
from tests.support.tiny_model import (
    MODES,
    ds_config,
    loss_of,
    start_deepspeed,
)
from tests.support.training import (
    FINETUNE,
    Case,
    finetune,
    metrics_in,
    mixed_samples,
    one_rank,
    train,
    write_config,
    write_model,
)


def check(case: Case, folder: Path) -> None:
    run(case.ranks, train, case, folder, timeout=300)
    losses, norms = zip(*one_rank(case.steps, case.batch, case.micro_batch), strict=True)
    assert metrics_in(folder) == pytest.approx(losses, rel=1e-5)
    assert metrics_in(folder, "grad_norm") == pytest.approx(norms, rel=1e-3)


# Stages 1 and 2 differ in when gradients are reduced, not in what attention does: two modes say as much as all.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "mode"), [*((3, mode) for mode in MODES), *((stage, MODES[i]) for stage, i in ((1, 0), (2, 2)))],
    ids=str,
)  # fmt: skip
def test_losses_on_two_ranks(stage: int, mode: tuple[str, str, str], tmp_path: Path) -> None:
    check(Case(2, 2, stage, mode, steps=20 if mode is MODES[0] else 8), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("size", [4, 2])
def test_losses_on_four_ranks(size: int, stage: int, tmp_path: Path) -> None:
    """One group of four, and two groups of two with two micro-batches a step; another strategy in each."""
    mode = MODES[stage - 1] if size == 4 else MODES[6 - stage]
    check(Case(4, size, stage, mode, steps=8, accumulation=1 if size == 4 else 2), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [3])
def test_fifty_steps_of_one_sample_of_every_kind(stage: int, tmp_path: Path) -> None:
    """Steps without any frame, and with fewer frames than ranks, among others."""
    check(Case(2, 2, stage, MODES[0], steps=50, micro_batch=1), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("recompute", "stage"), [("kv", 3), ("layer", 2)])
def test_recomputation_leaves_the_losses_as_they_are(recompute: str, stage: int, tmp_path: Path) -> None:
    check(Case(2, 2, stage, ("auto", "auto", "striped"), steps=8, recompute=recompute), tmp_path)


def groups_left(case: Case, folder: Path) -> int:
    start_deepspeed()
    before = len(dist.distributed_c10d._world.pg_map)
    train(case, folder)
    return len(dist.distributed_c10d._world.pg_map) - before


def test_a_run_leaves_no_process_group_behind(tmp_path: Path) -> None:
    assert run(2, groups_left, Case(2, 2, 3, MODES[0], steps=1), tmp_path) == [0, 0]


# The command


STEPS = 6


@pytest.mark.slow
def test_the_command_and_its_resumption(tmp_path: Path) -> None:
    model, whole, stopped = write_model(tmp_path / "model"), tmp_path / "whole", tmp_path / "stopped"
    # Not auto: a plan that another history leads to gives losses that differ in their last digits.
    config = ds_config(2, 4, 4, strategy="lv_xattn")
    config["scheduler"] = {
        "type": "WarmupCosineLR",
        "params": {"total_num_steps": "auto", "warmup_num_steps": "auto", "cos_min_ratio": 0.02},
    }
    file = write_config(tmp_path / "ds.json", config, trainable="all", eval_examples=8, save_every=STEPS // 2)
    options = ("--ds_config", file, "--model", model, "--steps", STEPS, "--seed", 3)
    first = launch(FINETUNE, *options, "--output_dir", whole)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "metrics" not in first.stderr  # nothing is said of an earlier run where there was none
    assert "is deprecated" not in first.stderr + first.stdout
    check_console(first.stdout)
    check_files(whole)

    # What a run leaves that is killed after step 4: its last checkpoint is that of step 3.
    checkpoints = stopped / "checkpoints"
    shutil.copytree(whole / "checkpoints", checkpoints, ignore=shutil.ignore_patterns(f"step-{STEPS}"))
    (checkpoints / "latest").write_text(f"step-{STEPS // 2}")
    lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    (stopped / "metrics.jsonl").write_text("".join(lines[: STEPS // 2 + 1]))
    words = [str(word) for word in (*options, "--output_dir", stopped, "--resume")]
    assert run(2, finetune, words, timeout=300) == ["", ""]
    assert metrics_in(stopped) == pytest.approx(metrics_in(whole), rel=1e-6)
    assert (stopped / "eval.json").read_text() == (whole / "eval.json").read_text()

    trained, resumed = (AutoModelForImageTextToText.from_pretrained(f / "model") for f in (whole, stopped))
    original = AutoModelForImageTextToText.from_pretrained(model)
    samples = mixed_samples(4).samples
    assert loss_of(trained, samples).item() == pytest.approx(loss_of(resumed, samples).item(), rel=1e-5)
    assert loss_of(trained, samples).item() != pytest.approx(loss_of(original, samples).item(), rel=1e-2)


def check_console(text: str) -> None:
    """What takes long is said as it begins, in order, and the first and the last step have a line."""
    said = re.findall(r"^(?:\d\d:\d\d:\d\d  )?(\w[\w ]+?)(?:  loss .*)?$", text, re.MULTILINE)
    expected = [
        "loading the model", "reading the data", "starting DeepSpeed", "loading the first batch", "planning",
        "step 1", f"saving the checkpoint of step {STEPS // 2}", f"step {STEPS}",
        f"saving the checkpoint of step {STEPS}", f"evaluating after step {STEPS}", "exporting the model",
    ]  # fmt: skip
    assert [line for line in said if line in expected] == expected


def check_files(folder: Path) -> None:
    """The files that a run writes, as docs/config.md has them."""
    assert len(metrics_in(folder)) == STEPS
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        assert set(json.loads(line)) >= {
            "step", "loss", "grad_norm", "lr", "step_time_s", "data_wait_s", "text_tokens_per_s",
            "frames_per_s", "comm_bytes", "comm_bytes_between_nodes", "peak_memory_bytes",
        }  # fmt: skip
    plan = json.loads((folder / "plan.json").read_text())
    assert [layer["role"] for layer in plan if layer["role"] != "local"] == ["self", "cross", "self", "cross"]
    for layer in plan:
        assert set(layer) >= {
            "layer", "role", "strategy", "schedule", "predicted_ms", "predicted_bytes", "reason", "balance",
            "kept_bytes", "measured_ms", "bytes_between_nodes", "inner_size",
        }  # fmt: skip
    evaluation = json.loads((folder / "eval.json").read_text())
    assert 0 <= evaluation["accuracy"] <= 1 and evaluation["examples"] > 0
    assert list((folder / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.slow
@pytest.mark.parametrize("keeps", [True, False])
def test_a_pretrained_model_trains_cross_attention_and_projector_under_zero3(keeps: bool, tmp_path: Path) -> None:
    """Also resumed and evaluated on the way; what is frozen stays gathered between those."""
    model, out, again = write_model(tmp_path / "model"), tmp_path / "out", tmp_path / "again"
    config = ds_config(3, 2, 2, strategy="lv_xattn", keep_frozen="auto" if keeps else False)
    file = write_config(tmp_path / "ds.json", config, eval_examples=4, eval_every=2, save_every=2)
    words = f"--ds_config {file} --model {model} --steps 3".split()
    assert run(2, finetune, [*words, "--output_dir", str(out)], timeout=300) == ["", ""]
    zero = json.loads((out / "plan.json").read_text())[0]["zero"]
    assert zero["keeps_frozen"] is zero["gathers_trained_once"] is keeps and zero["why"]
    assert zero["buckets"]["reduce_bucket_size"] < 1e6, "of gradients, all that train"

    shutil.copytree(out / "checkpoints", again / "checkpoints", ignore=shutil.ignore_patterns("step-3"))
    (again / "metrics.jsonl").write_text("".join((out / "metrics.jsonl").read_text().splitlines(keepends=True)[:2]))
    assert run(2, finetune, [*words, "--output_dir", str(again), "--resume"], timeout=300) == ["", ""]
    assert metrics_in(again) == pytest.approx(metrics_in(out), rel=1e-6)
    # A checkpoint holds partitions, each of them once.
    size = sum(file.stat().st_size for file in (out / "checkpoints" / "step-2").glob("*model_states.pt"))
    assert size < 1.5 * (model / "model.safetensors").stat().st_size
    folders = (model, out / "model")
    before, after = (dict(AutoModelForImageTextToText.from_pretrained(f).named_parameters()) for f in folders)
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    expected = ("multi_modal_projector.", "language_model.layers.1.", "language_model.layers.3.")
    assert changed == {name for name in before if any(part in name for part in expected)}
