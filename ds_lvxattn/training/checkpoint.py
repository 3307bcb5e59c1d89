"""DeepSpeed checkpoints of a run, what they can be resumed with, and the export at the end."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine, zero

from ds_lvxattn.errors import ConfigError

FOLDER = "checkpoints"
FACTS_FILE = "run.json"


@dataclass(frozen=True)
class RunFacts:
    """What a checkpoint was made with, and can be resumed with.

    ``sequence_parallel_size`` may differ at resumption: ZeRO partitions over all ranks, whatever their groups.
    """

    world_size: int
    zero_stage: int
    train_batch_size: int
    seed: int
    sequence_parallel_size: int


def check_fresh(output_dir: Path) -> None:
    """Refuse to mix a new run with the checkpoints of an older one.

    Raises:
        ConfigError: the folder holds checkpoints.
    """
    if (output_dir / FOLDER / "latest").exists():
        raise ConfigError(
            f"--output_dir {output_dir} holds checkpoints of an earlier run; give --resume to go on with it, "
            "or another folder"
        )


def save(engine: DeepSpeedEngine, output_dir: Path, step: int, facts: RunFacts) -> None:
    """Save a checkpoint after ``step``; all ranks call it. An older one stays until this one is whole."""
    folder = output_dir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    if dist.get_rank() == 0:
        (folder / FACTS_FILE).write_text(json.dumps(asdict(facts), indent=2) + "\n")
    engine.save_checkpoint(str(folder), tag=f"step-{step}", client_state={"step": step})


def resume(engine: DeepSpeedEngine, output_dir: Path, facts: RunFacts) -> int:
    """Load the latest checkpoint; all ranks call it.

    Returns:
        The step after which it was saved.

    Raises:
        ConfigError: there is none, or it was made with other ranks, ZeRO stage, batch or seed.
    """
    folder = output_dir / FOLDER
    try:
        saved = RunFacts(**json.loads((folder / FACTS_FILE).read_text()))
    except OSError as error:
        raise ConfigError(f"--resume: {folder} holds no checkpoint") from error
    for key in ("world_size", "zero_stage", "train_batch_size", "seed"):
        was, now = getattr(saved, key), getattr(facts, key)
        if was != now:
            raise ConfigError(
                f"--resume: the checkpoint in {folder} was made with {key} {was}, this run has {now}; "
                f"use {was}, or start a new run in another folder"
            )
    path, state = engine.load_checkpoint(str(folder))
    if path is None:
        raise ConfigError(f"--resume: DeepSpeed finds no checkpoint in {folder}")
    return state["step"]


def full_state_dict(engine: DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """All parameters on the CPU of rank 0, gathered one at a time under ZeRO-3; empty on other ranks."""
    state: dict[str, torch.Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        with zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if dist.get_rank() == 0:
                state[name] = parameter.detach().cpu().clone()
    return state
