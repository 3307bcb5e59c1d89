"""The needle task as a source of samples."""

from __future__ import annotations

import functools

from transformers import PreTrainedTokenizerFast

from ds_lvxattn.data.sample import Sample
from ds_lvxattn.needle.task import ClipCache, NeedleTask, Split, encode_row, needle_dataset, render_frames


class NeedleSource:
    """Samples of ``needle_dataset``; see there for what they show.

    Args:
        split: ``train`` or ``eval``; they share neither clips nor digit images.
        size: rows.
        seed: equal seeds give equal rows.
        tokenizer: has the words of the task.
        task: shape of a sample.
        frame: how the model's text has a frame.
    """

    def __init__(
        self, split: Split, size: int, seed: int, tokenizer: PreTrainedTokenizerFast, task: NeedleTask, frame: str
    ) -> None:
        self.rows = needle_dataset(split, size, seed, task)
        self.tokenizer, self.task, self.frame = tokenizer, task, frame
        self.cache = ClipCache(task.image_size)
        self.name = f"needle/{split}"

    @property
    def digest(self) -> str:
        """The task alone: the rows follow from seed and length of the run."""
        return f"{self.name} {self.task}"

    def __len__(self) -> int:
        return len(self.rows)

    def order(self, epoch: int) -> range:
        # Rows are random already, and in the order of the curriculum.
        return range(len(self))

    def sample(self, index: int) -> Sample:
        row = self.rows[index]
        input_ids, labels = encode_row(row, self.tokenizer, self.frame)
        return Sample(
            input_ids,
            labels,
            num_frames=len(row["frame"]),
            load_frames=functools.partial(render_frames, row, cache=self.cache),
            name=f"{self.name}[{index}]",
        )
