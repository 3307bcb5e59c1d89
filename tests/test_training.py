"""Training with the real DeepSpeed engine against one rank, the unmodified model and plain torch AdamW."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from ds_lvxattn.data.sample import SampleError, SampleSource
from ds_lvxattn.errors import ConfigError
from ds_lvxattn.training.loop import Job, Trainer
from ds_lvxattn.training.settings import FinetuningConfig
from tests.support.distributed import run
from tests.support.tiny_model import (
    MODES,
    PATTERNS,
    ListSource,
    ds_config,
    loss_of,
    start_deepspeed,
    steps_on_one_rank,
    tiny_config,
    tiny_loaded,
    tiny_sample,
)


@dataclass(frozen=True)
class Case:
    """One training run."""

    ranks: int
    size: int
    stage: int
    mode: tuple[str, str, str]
    steps: int = 20
    micro_batch: int = 2
    accumulation: int = 1
    recompute: str = "none"

    @property
    def batch(self) -> int:
        return self.ranks // self.size * self.micro_batch * self.accumulation

    @property
    def config(self) -> dict[str, Any]:
        strategy, schedule, placement = self.mode
        return ds_config(
            self.stage, self.batch, self.micro_batch, self.size,
            strategy=strategy, schedule=schedule, placement=placement, recompute=self.recompute,
        )  # fmt: skip


def mixed_samples(count: int) -> ListSource:
    """Every kind of sample, in pairs that change: a video, a clip shorter than the ranks, text, several images."""
    patterns = list(PATTERNS.values())
    return ListSource([tiny_sample(patterns[(n + n // 4) % 4], seed=n) for n in range(count)])


def train(
    case: Case, folder: Path, source: SampleSource | None = None, resume: bool = False, seed: int = 0, **finetuning: Any
) -> dict[str, Any]:
    """Run the whole loop on this rank; its evaluation, on the training samples, when it is asked for."""
    os.environ["WANDB_MODE"] = "disabled"
    start_deepspeed()
    source = source or mixed_samples(case.steps * case.batch)
    settings = FinetuningConfig(**finetuning)
    evaluation = source if settings.eval_every else None
    job = Job(case.config, settings, tiny_loaded(), source, evaluation, case.steps, seed, folder, resume)
    return Trainer(job).run()


@functools.cache
def one_rank(steps: int, batch: int, micro_batch: int) -> list[tuple[float, float]]:
    return steps_on_one_rank(mixed_samples(steps * batch).samples, steps, batch, micro_batch)


def metrics_in(folder: Path, what: str = "loss") -> list[float]:
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == list(range(1, len(steps) + 1))
    return [step[what] for step in steps]


def check(case: Case, folder: Path) -> None:
    run(case.ranks, train, case, folder, timeout=300)
    losses, norms = zip(*one_rank(case.steps, case.batch, case.micro_batch), strict=True)
    assert metrics_in(folder) == pytest.approx(losses, rel=1e-5)
    assert metrics_in(folder, "grad_norm") == pytest.approx(norms, rel=1e-3)


# Stages 1 and 2 differ in when gradients are reduced, not in what attention does: two modes say as much as all.
@pytest.mark.parametrize(
    ("stage", "mode"), [*((3, mode) for mode in MODES), *((stage, MODES[i]) for stage, i in ((1, 0), (2, 2)))],
    ids=str,
)  # fmt: skip
def test_losses_on_two_ranks(stage: int, mode: tuple[str, str, str], tmp_path: Path) -> None:
    check(Case(2, 2, stage, mode, steps=20 if mode is MODES[0] else 8), tmp_path)


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("size", [4, 2])
def test_losses_on_four_ranks(size: int, stage: int, tmp_path: Path) -> None:
    """One group of four, and two groups of two with two micro-batches a step; another strategy in each."""
    mode = MODES[stage - 1] if size == 4 else MODES[6 - stage]
    check(Case(4, size, stage, mode, steps=8, accumulation=1 if size == 4 else 2), tmp_path)


@pytest.mark.parametrize("stage", [3])
def test_fifty_steps_of_one_sample_of_every_kind(stage: int, tmp_path: Path) -> None:
    """Steps without any frame, and with fewer frames than ranks, among others."""
    check(Case(2, 2, stage, MODES[0], steps=50, micro_batch=1), tmp_path)


@pytest.mark.parametrize(("recompute", "stage"), [("kv", 3), ("layer", 2)])
def test_recomputation_leaves_the_losses_as_they_are(recompute: str, stage: int, tmp_path: Path) -> None:
    check(Case(2, 2, stage, ("auto", "auto", "striped"), steps=8, recompute=recompute), tmp_path)


# The command


FINETUNE = Path(__file__).parent.parent / "train" / "finetune.py"
STEPS = 6


def write_model(folder: Path, **config: Any) -> Path:
    """A model folder as ``from_pretrained`` wants it, with room for a sample of the needle task."""
    loaded = tiny_loaded(tiny_config(**{"max_position_embeddings": 256, **config}))
    loaded.save(folder, loaded.model.state_dict())
    return folder


def write_config(path: Path, config: dict[str, Any], **finetuning: Any) -> Path:
    path.write_text(json.dumps({**config, "finetuning": finetuning}))
    return path


def launch(*arguments: Any) -> subprocess.CompletedProcess[str]:
    """``deepspeed train/finetune.py`` on two CPU ranks, as a user without a wandb key."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "NETRC": os.devnull}
    environment["PYTHONPATH"] = str(FINETUNE.parent.parent)
    command = [Path(sys.executable).with_name("deepspeed"), "--num_gpus", 2, "--master_port", port, FINETUNE]
    return subprocess.run(
        [str(word) for word in (*command, *arguments)],
        env=environment,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


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
    first = launch(*options, "--output_dir", whole)
    assert first.returncode == 0, first.stdout + first.stderr
    check_files(whole)

    # What a run leaves that is killed after step 4: its last checkpoint is that of step 3.
    checkpoints = stopped / "checkpoints"
    shutil.copytree(whole / "checkpoints", checkpoints, ignore=shutil.ignore_patterns(f"step-{STEPS}"))
    (checkpoints / "latest").write_text(f"step-{STEPS // 2}")
    lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    (stopped / "metrics.jsonl").write_text("".join(lines[: STEPS // 2 + 1]))
    second = launch(*options, "--output_dir", stopped, "--resume")
    assert second.returncode == 0, second.stdout + second.stderr
    assert metrics_in(stopped) == pytest.approx(metrics_in(whole), rel=1e-6)
    assert (stopped / "eval.json").read_text() == (whole / "eval.json").read_text()

    trained, resumed = (AutoModelForImageTextToText.from_pretrained(f / "model") for f in (whole, stopped))
    original = AutoModelForImageTextToText.from_pretrained(model)
    samples = mixed_samples(4).samples
    assert loss_of(trained, samples).item() == pytest.approx(loss_of(resumed, samples).item(), rel=1e-5)
    assert loss_of(trained, samples).item() != pytest.approx(loss_of(original, samples).item(), rel=1e-2)


def check_files(folder: Path) -> None:
    """The files that a run writes, as docs/config.md has them."""
    assert len(metrics_in(folder)) == STEPS
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        assert set(json.loads(line)) >= {
            "step", "loss", "grad_norm", "lr", "step_time_s", "text_tokens_per_s", "frames_per_s", "comm_bytes",
            "peak_memory_bytes",
        }  # fmt: skip
    plan = json.loads((folder / "plan.json").read_text())
    assert [layer["role"] for layer in plan if layer["role"] != "local"] == ["self", "cross", "self", "cross"]
    for layer in plan:
        assert set(layer) >= {
            "layer", "role", "strategy", "schedule", "predicted_ms", "predicted_bytes", "reason", "balance",
            "kept_bytes", "measured_ms",
        }  # fmt: skip
    evaluation = json.loads((folder / "eval.json").read_text())
    assert 0 <= evaluation["accuracy"] <= 1 and evaluation["examples"] > 0
    assert list((folder / "wandb").glob("offline-run-*/*.wandb"))


def finetune(arguments: list[str]) -> str:
    """The command's body on this rank; the error that it would print, or nothing."""
    os.environ["WANDB_MODE"] = "disabled"
    start_deepspeed()
    specification = importlib.util.spec_from_file_location("finetune", FINETUNE)
    assert specification is not None and specification.loader is not None
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    try:
        script.finetune(script.parse(arguments))
    except (ConfigError, SampleError) as error:
        return str(error)
    return ""


def test_a_pretrained_model_trains_cross_attention_and_projector_under_zero3(tmp_path: Path) -> None:
    model, out = write_model(tmp_path / "model"), tmp_path / "out"
    file = write_config(tmp_path / "ds.json", ds_config(3, 2, 2, strategy="lv_xattn"), eval_examples=0)
    words = f"--ds_config {file} --model {model} --steps 3 --output_dir {out}".split()
    assert run(2, finetune, words, timeout=300) == ["", ""]
    folders = (model, out / "model")
    before, after = (dict(AutoModelForImageTextToText.from_pretrained(f).named_parameters()) for f in folders)
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    expected = ("multi_modal_projector.", "language_model.layers.1.", "language_model.layers.3.")
    assert changed == {name for name in before if any(part in name for part in expected)}
