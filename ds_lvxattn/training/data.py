"""The datasets of a run: the needle task or the user's own conversations."""

from __future__ import annotations

from typing import Any

from ds_lvxattn.config import ConfigError
from ds_lvxattn.data.needle import NeedleTask
from ds_lvxattn.data.needle_source import NeedleSource
from ds_lvxattn.data.sample import SampleSource
from ds_lvxattn.training.config import FinetuningConfig
from ds_lvxattn.training.model import LoadedModel

NEEDLE = "needle"


def load_sources(
    data: str,
    loaded: LoadedModel,
    finetuning: FinetuningConfig,
    steps: int,
    ds_config: dict[str, Any],
    seed: int,
) -> tuple[SampleSource, SampleSource | None]:
    """Training and evaluation samples of ``--data``.

    Raises:
        ConfigError: the dataset cannot be read or is empty.
    """
    if data == NEEDLE:
        task = NeedleTask()
        rows = steps * ds_config["train_batch_size"]
        train = NeedleSource("train", rows, seed, loaded.tokenizer, task)
        return train, NeedleSource("eval", finetuning.eval_examples, seed, loaded.tokenizer, task)
    raise ConfigError(f"--data {data}: unknown")
