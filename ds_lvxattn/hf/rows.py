"""Datasets of the Trainer: rows of conversations, or samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
from torch.utils.data import Dataset

from ds_lvxattn.batches.loader import MakeSample, attempt, made_already
from ds_lvxattn.data.sample import Sample, SampleError, SampleSource
from ds_lvxattn.data.table import Data, check_has_rows, name_of
from ds_lvxattn.errors import ConfigError
from ds_lvxattn.training.attach import Attached

Found = Sample | SampleError  # a row, or why it cannot be used


class Rows(Dataset[Found]):
    """Conversations about videos and images as a dataset of the Trainer.

    The Trainer that gets it makes samples of the rows, by its model's tokenizer.

    Args:
        data: a file, a dataset of the hub, or one that ``datasets`` has loaded; ``docs/your-data-and-model.md`` has
            the layouts of its rows.
        max_frames: frames of a row.
        how: other arguments of ``ConversationSource``: ``max_text_tokens``, ``media_root``, ``limit``, ...
    """

    def __init__(self, data: Data, *, max_frames: int = 64, **how: Any) -> None:
        self.data, self.how = data, {"max_frames": max_frames, **how}
        self.source: SampleSource | None = None

    def bind(self, attached: Attached) -> None:
        """Make samples for this model from now on.

        Raises:
            ConfigError: the data cannot be read.
        """
        self.source = attached.rows(self.data, **self.how)

    def __len__(self) -> int:
        return len(self._bound)

    def __getitem__(self, index: int) -> Found:
        return attempt(self._bound.sample, index, f"sample {index}")

    @property
    def _bound(self) -> SampleSource:
        if self.source is None:
            raise ConfigError(f"Rows({name_of(self.data)!r}) has no model yet; give it to SequenceParallelTrainer")
        return self.source


class Samples(Dataset[Found]):
    """A dataset of ``Sample`` objects, whose errors are found when a micro-batch of them loads.

    Args:
        dataset: with ``__len__`` and ``__getitem__``, or a ``SampleSource``.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Found:
        found = attempt(getattr(self.dataset, "sample", None) or self.dataset.__getitem__, index, f"sample {index}")
        if not isinstance(found, (Sample, SampleError)):
            raise ConfigError(
                f"row {index} of the {type(self.dataset).__name__} is a {type(found).__name__}; give Rows(FILE), or a "
                "dataset of ds_lvxattn.Sample"
            )
        return found


def as_dataset(dataset: Any, **how: Any) -> Any:
    """What the Trainer is given, as a dataset of samples; a dict of evaluation datasets name by name.

    Args:
        how: arguments of ``Rows`` for what ``datasets`` has loaded.

    Raises:
        ConfigError: it has no length, as an iterable dataset, or is all splits of one where one is wanted.
    """
    if dataset is None or isinstance(dataset, (str, Rows, Samples)):
        return dataset
    try:
        check_has_rows(dataset)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if isinstance(dataset, dict):
        return {name: as_dataset(each, **how) for name, each in dataset.items()}
    if isinstance(dataset, datasets.Dataset):
        return Rows(dataset, **how)
    if not hasattr(dataset, "__len__"):
        raise ConfigError(f"the dataset is a {type(dataset).__name__} without a length; give Rows(FILE), or a list")
    return Samples(dataset)


def bind(dataset: Any, attached: Attached) -> None:
    """Bind the ``Rows`` in what ``as_dataset`` returned."""
    for each in dataset.values() if isinstance(dataset, dict) else (dataset,):
        if isinstance(each, Rows):
            each.bind(attached)


def as_they_are(samples: Sequence[Found]) -> Any:
    """The Trainer's data collator: micro-batches are made where the ranks of a group agree on them."""
    return list(samples)


def as_made(samples: Sequence[Found | None]) -> list[MakeSample | None]:
    """What a loader takes, for samples that are made already.

    Raises:
        ConfigError: they are something else, of a ``get_train_dataloader`` or ``get_eval_dataloader`` of one's own.
    """
    for sample in samples:
        if not isinstance(sample, (Sample, SampleError, type(None))):
            raise ConfigError(
                f"the Trainer's data loader gave a {type(sample).__name__} in a {type(samples).__name__}; let it give "
                "lists of ds_lvxattn.Sample (collate_fn=list), of which micro-batches are made for the ranks of a group"
            )
    return [None if sample is None else made_already(sample) for sample in samples]
