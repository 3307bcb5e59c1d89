"""Trainers of transformers in the ranks of ``distributed.run``, and on one process without this package."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ds_lvxattn.data.sample import Sample
from ds_lvxattn.hf import SequenceParallelTrainer
from ds_lvxattn.needle.task import build_tokenizer
from ds_lvxattn.training.loading import parameter_groups
from tests.support.tiny_model import (
    ADAMW,
    CLIPPING,
    ds_config,
    start_deepspeed,
    tiny_batches,
    tiny_model,
    tiny_processor,
)

ARGUMENTS: dict[str, Any] = {
    "learning_rate": ADAMW["lr"], "lr_scheduler_type": "constant", "max_grad_norm": CLIPPING, "logging_steps": 1,
    "report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no",
    "train_sampling_strategy": "sequential",
}  # fmt: skip


@contextlib.contextmanager
def launched() -> Iterator[None]:
    """The environment that a launcher gives a rank, for Accelerate; its state is as it was behind this."""
    start_deepspeed()
    rank, ranks = str(dist.get_rank()), str(dist.get_world_size())
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1"}
    with mock.patch.dict(os.environ, environment), clean_state():
        yield


@contextlib.contextmanager
def clean_state() -> Iterator[None]:
    """What Accelerate and transformers keep for the whole process is forgotten ahead of this and behind it."""
    with mock.patch.dict(os.environ):
        forget()
        try:
            yield
        finally:
            forget()


def forget() -> None:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()


def deepspeed_block(stage: int, **block: Any) -> dict[str, Any]:
    """A config as users of the Trainer write it: sizes of batches are the arguments' own."""
    config = ds_config(stage, 1, 1, **{"strategy": "lv_xattn", **block})
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "optimizer"):
        del config[key]
    sizes = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    config |= dict.fromkeys(sizes, "auto")
    config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    return config


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """That of the loop."""
    return torch.optim.AdamW(parameter_groups(model), **ADAMW)


class Divided(SequenceParallelTrainer):
    """With the loop's optimizer: under DeepSpeed the Trainer passes by the one that it is given."""

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        self.optimizer = self.optimizer or optimizer_of(self.model)
        return self.optimizer


def divided_trainer(
    folder: Path, config: dict[str, Any], samples: Sequence[Sample], model: Any = None, **how: Any
) -> SequenceParallelTrainer:
    """Between ``launched``. ``how`` holds arguments of the training, and of the Trainer where it knows the name."""
    ours = {key: how.pop(key) for key in list(how) if key in ("eval_dataset", "compute_metrics", "on_bad_sample")}
    ours |= {"preprocess_logits_for_metrics": how.pop("preprocess_logits_for_metrics", None)}
    # Ahead of the arguments: models that are made while those of ZeRO-3 are there are partitioned as they are made.
    model, processing = tiny_model() if model is None else model, Processing()
    args = TrainingArguments(str(folder), deepspeed=config, **{**ARGUMENTS, **how})
    return Divided(model, args, train_dataset=samples, processing_class=processing, **ours)


class Processing:
    """A processor as ``AutoProcessor`` gives it: tokenizer and image processor."""

    def __init__(self) -> None:
        self.tokenizer = build_tokenizer()
        self.image_processor = tiny_processor()

    def save_pretrained(self, folder: str) -> None:
        self.tokenizer.save_pretrained(folder)


def plain_trainer(folder: Path, samples: Sequence[Sample], model: Any = None, **how: Any) -> Trainer:
    """``transformers.Trainer`` on one process, over the unmodified model and its own masks."""
    ours = {key: how.pop(key) for key in list(how) if key in ("eval_dataset", "compute_metrics")}
    model = tiny_model() if model is None else model
    batches = tiny_batches(tiny_model())

    def collate(rows: list[Sample]) -> dict[str, Any]:
        inputs = batches.prepare(rows).inputs
        del inputs["num_items_in_batch"]
        return inputs

    args = TrainingArguments(str(folder), remove_unused_columns=False, **{**ARGUMENTS, **how})
    optimizers = optimizer_of(model), None
    return Trainer(model, args, data_collator=collate, train_dataset=list(samples), optimizers=optimizers, **ours)


def logged(trainer: Trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]
