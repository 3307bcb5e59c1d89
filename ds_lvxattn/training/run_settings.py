"""What a run is asked to do, checked as far as that is possible before any process group exists."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_lvxattn.config import SequenceParallelConfig, load_ds_config, sequence_parallel_config
from ds_lvxattn.errors import ConfigError
from ds_lvxattn.training.config_check import check_ds_config, check_names
from ds_lvxattn.training.ds_config import BATCH, auto_steps, fill_steps, resolve_ds_config
from ds_lvxattn.training.hub import check_hub
from ds_lvxattn.training.settings import FinetuningConfig, finetuning_config
from ds_lvxattn.training.trackers import check_tracker

SEEDS = 1 << 32  # of numpy


@dataclass(frozen=True)
class RunSettings:
    """Settings of a run.

    Attributes:
        ds_config: the whole DeepSpeed config, with a value for every ``auto`` but those that depend on the model.
        parallel: its settings of sequence parallelism.
        finetuning: its block for the loop.
        steps: optimizer steps, where ``epochs`` does not say them.
        epochs: passes over the training data that say the steps; None: ``steps`` does.
        length: steps of the schedule and of generated data. A run that ``--steps`` ends earlier can be resumed, and
            is then the same as one that was never interrupted.
        auto_steps: settings of the schedule that follow from the steps.
    """

    ds_config: dict[str, Any]
    parallel: SequenceParallelConfig
    finetuning: FinetuningConfig
    steps: int
    length: int
    epochs: float | None
    auto_steps: tuple[str, ...]

    def steps_of(self, rows: int) -> int:
        """Optimizer steps over so many training samples; fills in the schedule's length where that was open."""
        if self.epochs is None:
            return self.steps
        steps = max(1, math.ceil(self.epochs * rows / self.ds_config[BATCH]))
        fill_steps(self.ds_config, self.auto_steps, steps)
        return steps


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Let a command take settings of its config as ``key=value``; parse with ``parse_intermixed_args``."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="over the config, such as bf16.enabled=true")


def read_settings(
    path: str | Path, steps: int | None, seed: int, ranks: int, overrides: Sequence[str] = ()
) -> RunSettings:
    """The settings of a config file and of the command line for a run of ``ranks`` ranks.

    Raises:
        ConfigError: something cannot work; the same on every rank.
    """
    ds_config = load_ds_config(path, overrides)
    check_names(ds_config)
    finetuning = finetuning_config(ds_config)
    if steps is not None and steps < 1:
        raise ConfigError(f"--steps is {steps}; give at least 1")
    if not 0 <= seed < SEEDS:
        raise ConfigError(f"--seed is {seed}; give a number from 0 to {SEEDS - 1}")
    config = sequence_parallel_config(ds_config, ranks)
    length = max(steps or 1, finetuning.steps)
    open_steps = auto_steps(ds_config)
    ds_config = resolve_ds_config(ds_config, length, ranks // config.size)
    check_ds_config(ds_config)
    check_tracker(finetuning.report_to)
    check_hub(finetuning.push_to_hub)
    epochs = finetuning.epochs if steps is None else None
    return RunSettings(ds_config, config, finetuning, steps or finetuning.steps, length, epochs, open_steps)
