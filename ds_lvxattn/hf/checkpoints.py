"""What a checkpoint of the Trainer can be resumed by: DeepSpeed divides optimizer states by ZeRO stage and ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from ds_lvxattn.errors import ConfigError

INSTEAD = "start from its weights (model and trainer of a new run)"


def check_resumable(resume: Any, args: TrainingArguments, ds_config: dict[str, Any]) -> None:
    """Raise ``ConfigError`` where DeepSpeed would fail on the checkpoint, or on some of the ranks alone.

    Args:
        resume: the argument ``resume_from_checkpoint`` of ``Trainer.train``.
        args: those of the Trainer.
        ds_config: of this run.
    """
    found = get_last_checkpoint(args.output_dir) if resume is True and args.output_dir else resume
    if not isinstance(found, str) or not Path(found).is_dir():
        return  # transformers says so
    zero = ds_config.get("zero_optimization", {})
    if ds_config.get("checkpoint", {}).get("load_universal") or zero.get("elastic_checkpoint"):
        return
    latest = Path(found) / "latest"
    if not latest.is_file():
        raise ConfigError(
            f"resume_from_checkpoint is {found!r}, which has no optimizer states (save_only_model); {INSTEAD}"
        )
    folder = Path(found) / latest.read_text().strip()
    states = len(list(folder.glob("*zero_pp_rank_*_optim_states.pt")))
    divided = any(folder.glob("zero_pp_rank_*_model_states.pt"))
    stage, ranks = zero.get("stage", 0), args.world_size
    here = states if args.save_on_each_node else ranks  # then a host has those of its own ranks
    if divided != (stage == 3) or (states and states != here):
        was = "3" if divided else "1 or 2"
        raise ConfigError(
            f"resume_from_checkpoint is {found!r}, whose states are those of ZeRO stage {was} on {states} ranks, and "
            f"this run has stage {stage} on {ranks}; resume as it was ('sequence_parallel_size' may be another), or "
            f"{INSTEAD}"
        )
