"""The user's own data: conversations about videos and images, from a JSON file or a hub dataset, as samples."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from ds_lvxattn.data.media import (
    NO_LIMITS,
    PixelLimits,
    frame_groups,
    load_frames,
    sample_indices,
)
from ds_lvxattn.data.media_of_row import media_in, open_media
from ds_lvxattn.data.model_text import ModelText, tokenised
from ds_lvxattn.data.rows import read_row, unknown_keys
from ds_lvxattn.data.sample import Sample, SampleError
from ds_lvxattn.data.table import Data, check_folder, open_table
from ds_lvxattn.data.turns import Turn

logger = logging.getLogger(__name__)


class ConversationSource:
    """Samples of a conversation dataset; rows and media stay on disk until asked for. See ``SampleSource``.

    The held-out share is drawn by video, so no video is in both splits, and from the paths alone, so it does
    not depend on the seed or on the order of the rows.

    Args:
        data: a file of one JSON object a line, of a JSON list or in Parquet; a dataset that ``datasets.load_dataset``
            finds, as ``NAME``, ``NAME:SPLIT`` or ``NAME:CONFIG:SPLIT``; or what it has loaded. Its rows have the
            layouts of ``ds_lvxattn.data.rows``.
        tokenizer: a fast tokenizer; its chat template renders the text, ``PLAIN_TEMPLATE`` if it has none.
        text: how the model's text has frames and videos.
        max_frames: frames of a row; its videos share what its images leave.
        max_text_tokens: longest sample in tokens, image tokens included with the rows that the model makes of them;
            None for no limit.
        split: ``train`` or ``eval``.
        eval_share: share of the videos that ``eval`` holds out, in ``[0, 1)``; unused with ``eval_data``.
        eval_data: a dataset of its own for ``eval``, as ``data``.
        media_root: folder of relative paths; by default that of the data file.
        pixels: to which larger pictures are scaled down while they are decoded.
        upright: whether images are turned by their EXIF orientation.
        fps: frames of each second of a video that are taken, within its share; None: all of its share.
        seed: of the order of an epoch.
        limit: at most so many rows, spread evenly over the dataset.

    Raises:
        ValueError: the dataset cannot be read, holds a line that is not a JSON object, or has no row in this
            split; the tokenizer has no offsets or no image token.
    """

    def __init__(
        self,
        data: Data,
        tokenizer: PreTrainedTokenizerBase,
        text: ModelText,
        *,
        max_frames: int,
        max_text_tokens: int | None = None,
        split: Literal["train", "eval"] = "train",
        eval_share: float = 0.05,
        eval_data: Data | None = None,
        media_root: str | os.PathLike[str] | None = None,
        pixels: PixelLimits = NO_LIMITS,
        upright: bool = True,
        fps: float | None = None,
        seed: int = 0,
        limit: int | None = None,
    ) -> None:
        if not 0 <= eval_share < 1:
            raise ValueError(f"eval_share is {eval_share}; give a share in [0, 1)")
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} gives no character offsets; load the fast tokenizer")
        image_id = -1 if text.image_token is None else tokenizer.convert_tokens_to_ids(text.image_token)
        if not isinstance(image_id, int) or image_id == tokenizer.unk_token_id:
            raise ValueError(f"the tokenizer has no token {text.image_token!r}; give the image token of the model")
        self.tokenizer, self.text = tokenizer, text
        self.max_frames, self.max_text_tokens, self.seed = max_frames, max_text_tokens, seed
        self.pixels, self.upright, self.fps = pixels, upright, fps

        check_folder(media_root)
        separate = eval_data is not None
        self.table = open_table(eval_data if eval_data is not None and split == "eval" else data)
        self.media_root = self.table.folder if media_root is None else os.fspath(media_root)
        keys = dict(self.table.media_keys())
        if not keys:
            raise ValueError(f"{self.table.name}: the dataset is empty")
        media = set(keys.values())
        held_out = set() if separate else _held_out(media, eval_share)
        rows = [number for number, key in keys.items() if separate or (key in held_out) == (split == "eval")]
        if not rows:
            raise ValueError(
                f"{self.table.name}: the {split} split is empty: eval_share {eval_share} holds out "
                f"{len(held_out)} of {len(media)} videos; change eval_share or give eval_data"
            )
        self.rows = rows if limit is None else [rows[at] for at in sample_indices(len(rows), limit)]
        self._unknown_keys: set[str] = set()
        self._permutation = functools.lru_cache(maxsize=2)(self._shuffle)

    @functools.cached_property
    def digest(self) -> str:
        """Rows of the split, and a digest of the dataset's texts."""
        return f"{len(self)} rows, {self.table.digest()}"

    def __len__(self) -> int:
        return len(self.rows)

    def order(self, epoch: int) -> Sequence[int]:
        """A permutation of the rows, from the seed and ``epoch`` alone."""
        return self._permutation(epoch)

    def _shuffle(self, epoch: int) -> list[int]:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self)).tolist()

    def sample(self, index: int) -> Sample:
        """Row ``index``, tokenised; of its videos only the packet headers are read.

        Raises:
            SampleError: naming the row: no conversation or answer, a placeholder too many or too few, missing
                or broken media, text that is too long, a chat template that rewrites earlier turns.
        """
        number = self.rows[index]
        try:
            row = self.table.row(number)
            self._name_unknown_keys(row, number)
            return self._sample(read_row(row), self.table.row_name(number))
        except SampleError as error:
            raise SampleError(f"{self.table.row_name(number)}: {error}") from error

    def _name_unknown_keys(self, row: Mapping[str, Any], number: int) -> None:
        """Say once of every key that nothing here reads that it is not read."""
        unknown = unknown_keys(row) - self._unknown_keys
        if unknown:
            self._unknown_keys |= unknown
            logger.warning("%s: the keys %s are not read", self.table.row_name(number), sorted(unknown))

    def _sample(self, turns: Sequence[Turn], name: str) -> Sample:
        found = media_in(turns)
        self.text.check_takes(len(found))
        media = open_media(
            found, self.max_frames, self.media_root, self.pixels, self.upright, self.fps, self.text.merged
        )
        made = tokenised(turns, media, self.tokenizer, self.text)
        if self.max_text_tokens is not None and made.rows > self.max_text_tokens:
            raise SampleError(
                f"{made.rows} tokens, {made.of_frames} of them for frames, but max_text_tokens is "
                f"{self.max_text_tokens}; shorten the conversation or raise the limit, if the model has room"
            )
        load, groups = functools.partial(load_frames, media), functools.partial(frame_groups, media)
        return Sample(made.input_ids, made.labels, len(made.sizes), load, name, made.sizes, groups)


def _held_out(keys: set[str], share: float) -> set[str]:
    """A share of ``keys``, at least one unless it is 0; which ones depends on nothing but themselves."""
    ranked = sorted(keys, key=lambda key: hashlib.blake2b(key.encode(errors="surrogatepass")).digest())
    return set(ranked[: max(round(share * len(keys)), share > 0)])
