"""The datasets of a run: the needle task or the user's own conversations."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from ds_lvxattn.batches.collate import Vocabulary
from ds_lvxattn.data.chat import VideoText
from ds_lvxattn.data.conversations import ConversationSource
from ds_lvxattn.data.media import PixelLimits
from ds_lvxattn.data.model_text import ModelText
from ds_lvxattn.data.sample import FrameSize, SampleSource
from ds_lvxattn.data.table import check_folder, check_rows_file
from ds_lvxattn.errors import ConfigError
from ds_lvxattn.families import VisualFamily, family_of
from ds_lvxattn.families.family import ANY_SIZE, FrameLimits
from ds_lvxattn.families.processors import written
from ds_lvxattn.needle.source import NeedleSource
from ds_lvxattn.needle.task import IMAGE, VOCABULARY, NeedleTask
from ds_lvxattn.training.loading import LoadedModel
from ds_lvxattn.training.settings import FinetuningConfig

NEEDLE = "needle"


def check_files(data: str, finetuning: FinetuningConfig) -> None:
    """Refuse files and folders that are not there; ahead of the model, which may take minutes to load.

    Raises:
        ConfigError: naming the setting and the file.
    """
    with _read_from(f"--data {data}"):
        check_rows_file(data)
    with _read_from("'finetuning.eval_data'"):
        check_rows_file(finetuning.eval_data or data)
    with _read_from("'finetuning.media_root'"):
        check_folder(finetuning.media_root)


@contextlib.contextmanager
def _read_from(setting: str) -> Iterator[None]:
    """What is wrong with a dataset as a mistake in the setting that names it."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{setting}: {error}") from error


def load_sources(
    data: str,
    loaded: LoadedModel,
    finetuning: FinetuningConfig,
    rows: int,
    seed: int,
) -> tuple[SampleSource, SampleSource | None]:
    """Training and evaluation samples of ``--data``.

    Args:
        rows: training samples to generate, for data that is generated.

    Raises:
        ConfigError: the dataset cannot be read or is empty.
    """
    if data == NEEDLE:
        task = NeedleTask()
        frame = text_of_model(loaded).write(IMAGE, [FrameSize(task.image_size, task.image_size, video=True)])
        needles = functools.partial(NeedleSource, seed=seed, tokenizer=loaded.tokenizer, task=task, frame=frame)
        train_rows = needles("train", rows)
        if not finetuning.eval_examples:
            return train_rows, None
        return train_rows, needles("eval", finetuning.eval_examples)
    conversations = functools.partial(
        ConversationSource,
        data,
        loaded.tokenizer,
        text_of_model(loaded, finetuning.frame_limits),
        max_frames=finetuning.frames,
        max_text_tokens=finetuning.max_text_tokens or text_limit(loaded.model),
        eval_data=finetuning.eval_data,
        eval_share=finetuning.eval_share,
        media_root=finetuning.media_root,
        pixels=PixelLimits(finetuning.image_pixels, finetuning.video_pixels),
        upright=finetuning.image_orientation == "upright",
        fps=finetuning.fps,
        seed=seed,
    )
    with _read_from(f"--data {data}"):
        train = conversations(split="train")
        if not set(loaded.tokenizer.get_vocab()) - set(VOCABULARY):
            raise ConfigError(
                f"the model's tokenizer knows the {len(VOCABULARY)} words of the needle task alone, so "
                "it would read every word of your rows as unknown; give --model a pretrained model"
            )
    if not finetuning.eval_examples:
        return train, None
    with _read_from("'finetuning.eval_data'" if finetuning.eval_data else f"--data {data}"):
        return train, conversations(split="eval", limit=finetuning.eval_examples)


def text_of_model(loaded: LoadedModel, limits: FrameLimits = ANY_SIZE) -> ModelText:
    """How the model's text has frames and videos."""
    family = family_of(loaded.model)
    embeddings = Vocabulary.of(loaded.model).embeddings
    if not isinstance(family, VisualFamily):
        return ModelText(None, embeddings=embeddings)
    text = text_of_family(family, loaded.tokenizer, loaded.processor, limits)
    text = replace(text, image_token=loaded.image_token, embeddings=embeddings)
    # The tokenizer of a small model has the token alone.
    if loaded.image_token is not None and loaded.image_token != family.token_of(loaded.tokenizer):
        write = functools.partial(write_crops, text.frame_tokens, loaded.image_token)
        return replace(text, frame_text="", write=write)
    return text


def text_of_family(family: VisualFamily, tokenizer: Any, processor: Any, limits: FrameLimits = ANY_SIZE) -> ModelText:
    """How the text of the models of a family has frames and videos."""
    videos, otherwise = videos_in_text(family, tokenizer), family.videos_otherwise()
    if family.video_token and videos is None:
        otherwise = f"the tokenizer lacks a token of {family.tokens_of_videos(tokenizer)}, which stand for one"
    return ModelText(
        image_token=family.token_of(tokenizer),
        frame_text=family.frame_text,
        frame_tokens=rows_of_frames(family, processor, limits),
        videos=videos,
        otherwise=otherwise,
        refuses_videos=family.refuses_videos(),
        write=functools.partial(family.write, processor=processor, limits=limits),
    )


def videos_in_text(family: VisualFamily, tokenizer: Any) -> VideoText | None:
    """How the model's text has a video; None: frame by frame, also where its tokenizer has no token for one."""
    image, video = family.token_of(tokenizer), family.video_token
    if not video or any(token not in tokenizer.get_vocab() for token in family.tokens_of_videos(tokenizer)):
        return None

    def parts(times: Sequence[float], seconds: float) -> str:
        return family.video_parts(times, seconds).replace(family.image_token, image)

    return VideoText(family.merged_frames(), family.video_text, video, parts, image, family.video_template)


def rows_of_frames(family: VisualFamily, processor: Any, limits: FrameLimits) -> Callable[[FrameSize], Sequence[int]]:
    """Rows that the model makes of each image token of a frame."""
    crops = functools.partial(family.crops_of, processor=processor, limits=limits)
    return lambda size: [rows for shape in crops(size) for rows in (shape.rows if family.keys_in_text else (1,))]


def write_crops(
    rows: Callable[[FrameSize], Sequence[int]], image_token: str, text: str, sizes: Sequence[FrameSize]
) -> str:
    """A conversation with the image token of a frame for each image that it is cut into, and nothing around them."""
    return written(text, image_token, (image_token * len(rows(size)) for size in sizes))


def text_limit(model: PreTrainedModel) -> int:
    """Tokens that the model's positions reach."""
    return model.config.get_text_config().max_position_embeddings
