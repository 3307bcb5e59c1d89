"""Sequence parallelism under Hugging Face's Trainer: ``SequenceParallelTrainer`` over ``Rows`` of conversations."""

from __future__ import annotations

from ds_lvxattn.groups import leave_out_shared_memory
from ds_lvxattn.hf.rows import Rows
from ds_lvxattn.hf.trainer import SequenceParallelTrainer

# TrainingArguments start torch.distributed through DeepSpeed, and are usually made after this import.
leave_out_shared_memory()

__all__ = ["Rows", "SequenceParallelTrainer"]
