"""Runs of the training loop on small models: in the ranks of ``distributed.run``, and by the command."""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_lvxattn.config import sequence_parallel_config
from ds_lvxattn.data.sample import SampleError, SampleSource
from ds_lvxattn.errors import ConfigError
from ds_lvxattn.training import finetune as command
from ds_lvxattn.training.loading import LoadedModel
from ds_lvxattn.training.loop import Job, Trainer
from ds_lvxattn.training.settings import FinetuningConfig
from tests.support.processes import REPOSITORY
from tests.support.tiny_model import (
    PATTERNS,
    ListSource,
    ds_config,
    start_deepspeed,
    steps_on_one_rank,
    tiny_config,
    tiny_loaded,
    tiny_sample,
)

FINETUNE = REPOSITORY / "train" / "finetune.py"


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
    inner_size: int | None = None
    text: str = "auto"

    @property
    def batch(self) -> int:
        return self.ranks // self.size * self.micro_batch * self.accumulation

    @property
    def config(self) -> dict[str, Any]:
        strategy, schedule, placement = self.mode
        return ds_config(
            self.stage, self.batch, self.micro_batch, self.size,
            strategy=strategy, schedule=schedule, placement=placement, recompute=self.recompute,
            inner_size=self.inner_size, text=self.text,
        )  # fmt: skip


def mixed_samples(count: int) -> ListSource:
    """Every kind of sample, in pairs that change: a video, a clip shorter than the ranks, text, several images."""
    patterns = list(PATTERNS.values())
    return ListSource([tiny_sample(patterns[(n + n // 4) % 4], seed=n + 1) for n in range(count)])


def train(
    case: Case,
    folder: Path,
    source: SampleSource | None = None,
    resume: bool = False,
    seed: int = 0,
    new_data: bool = False,
    loaded: LoadedModel | None = None,
    **finetuning: Any,
) -> dict[str, Any]:
    """Run the whole loop on this rank; its evaluation, on the training samples, when it is asked for."""
    os.environ["WANDB_MODE"] = "disabled"
    start_deepspeed()
    source = source or mixed_samples(case.steps * case.batch)
    settings = FinetuningConfig(**finetuning)
    evaluation = source if settings.eval_every else None
    parallel = sequence_parallel_config(case.config, case.ranks)
    job = Job(
        case.config, parallel, settings, loaded or tiny_loaded(), source, evaluation, case.steps, seed, folder, resume,
        new_data=new_data,
    )  # fmt: skip
    return Trainer(job).run()


@functools.cache
def one_rank(steps: int, batch: int, micro_batch: int) -> list[tuple[float, float]]:
    return steps_on_one_rank(mixed_samples(steps * batch).samples, steps, batch, micro_batch)


def metrics_in(folder: Path, what: str = "loss") -> list[float]:
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == list(range(1, len(steps) + 1))
    return [step[what] for step in steps]


def write_model(folder: Path, **config: Any) -> Path:
    """A model folder as ``from_pretrained`` wants it, with room for a sample of the needle task."""
    loaded = tiny_loaded(tiny_config(**{"max_position_embeddings": 256, **config}))
    loaded.save(folder, loaded.model.state_dict())
    return folder


def write_config(path: Path, config: dict[str, Any], **finetuning: Any) -> Path:
    path.write_text(json.dumps({**config, "finetuning": finetuning}))
    return path


def finetune(arguments: list[str]) -> str:
    """The command's body on this rank; the error that it would print, or nothing."""
    os.environ["WANDB_MODE"] = "disabled"
    start_deepspeed()
    try:
        command.finetune(command.parse(arguments))
    except (ConfigError, SampleError) as error:
        return str(error)
    return ""
