"""What a script for TRL's ``SFTTrainer`` asks of the Trainer here: its ``SFTConfig``, as far as it means the same."""

from __future__ import annotations

import dataclasses
from typing import Any

import datasets
from transformers import TrainingArguments

from ds_lvxattn.errors import ConfigError

# Settings of SFTConfig that are checked or followed here; of the others none may be set.
KNOWN = (
    "max_length", "assistant_only_loss", "completion_only_loss",
    "dataset_num_proc", "pad_to_multiple_of", "truncation_mode",  # change nothing here
)  # fmt: skip
REMEDIES = {"packing": "set 'finetuning.packing' of the DeepSpeed config to the tokens of a row, and leave it out"}


def of_trl(kind: type) -> bool:
    """Whether a class is TRL's own."""
    return kind.__module__.partition(".")[0] == "trl"


def row_settings(args: TrainingArguments, *given: Any) -> dict[str, Any]:
    """Arguments of ``Rows`` by ``args``, for the rows of the datasets that are given; none where they are not TRL's.

    Raises:
        ConfigError: a setting that ``SFTTrainer`` follows and the Trainer here does not.
    """
    if not any(map(of_trl, type(args).__mro__)):
        return {}
    others = {field.name for field in dataclasses.fields(TrainingArguments)}
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if field.name not in others and field.name not in KNOWN and value != field.default:
            remedy = REMEDIES.get(field.name, "leave it out")
            raise ConfigError(f"{_named(args, field.name)}, which SequenceParallelTrainer does not do; {remedy}")
    for dataset in given:
        for each in dataset.values() if isinstance(dataset, dict) else (dataset,):
            if isinstance(each, datasets.Dataset):
                _check_loss(args, each.column_names)
    limit = getattr(args, "max_length", None)
    return {} if limit is None else {"max_text_tokens": limit}


def _check_loss(args: Any, columns: list[str]) -> None:
    """Loss is taken on the answers, as one of the settings has to say."""
    pairs = {"prompt", "completion"} <= set(columns)
    if pairs and args.completion_only_loss is False:
        raise ConfigError(f"{_named(args, 'completion_only_loss')}, and loss is taken on completions; leave it out")
    if not pairs and not args.assistant_only_loss:
        raise ConfigError(f"{_named(args, 'assistant_only_loss')}, and loss is taken on answers alone; set it")


def _named(args: Any, name: str) -> str:
    return f"{type(args).__name__}.{name} is {getattr(args, name)!r}"
