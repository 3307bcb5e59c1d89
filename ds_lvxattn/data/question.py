"""A question about a video as the prompt of a generation."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from ds_lvxattn.data.chat import VideoText, check_tokens, check_words, render
from ds_lvxattn.data.conversations import messages_of, open_media, videos_of
from ds_lvxattn.data.media import DEFAULT_LIMITS, load_frames
from ds_lvxattn.data.rows import MediaRef, read_row
from ds_lvxattn.data.sample import IGNORE, FrameSize, Sample, SampleError, as_it_is, in_one_row, one_row


def question_sample(
    question: str,
    video: str | os.PathLike[str] | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    image_token: str | None,
    frame_text: str = "",
    frame_tokens: Callable[[FrameSize], Sequence[int]] = one_row,
    videos: VideoText | None = None,
    write: Callable[[str, Sequence[FrameSize]], str] = as_it_is,
    embeddings: int | None = None,
    max_frames: int,
    max_text_tokens: int,
) -> Sample:
    """The prompt of ``question``, as rows of the user's own data are rendered up to their first answer.

    Args:
        question: the user's turn; a placeholder (``<video>``, ``<image>``) says where the frames go, or they are first.
        video: a video or an image; None: text alone.
        tokenizer: its chat template renders the text, ``PLAIN_TEMPLATE`` if it has none.
        image_token: the token that stands for a frame; None for a model that takes none.
        frame_text: how a frame is written, with that token in it; by default the token alone.
        frame_tokens: rows that the model makes of each image token of a frame, by the size of its picture.
        videos: how the model has videos in its text; None: frame by frame.
        write: what the model's processor makes of a rendered conversation, by the sizes of its frames.
        embeddings: tokens that the model has an embedding of; None: all of the tokenizer's.
        max_frames: frames taken, spread evenly over the video.
        max_text_tokens: longest prompt, with the rows of its frames.

    Raises:
        SampleError: a missing or broken video, a placeholder without one, a model that takes no frames, a template
            that refuses the question, a prompt that is too long.
    """
    name = "the question" if video is None else os.fspath(video)
    if video is not None and image_token is None:
        raise SampleError(f"{name}: the model takes text alone; leave the video out")
    asked = {"messages": [{"role": "user", "content": question}], "video": None if video is None else os.fspath(video)}
    turns = read_row(asked, answered=False)
    found = [part for turn in turns for part in turn.parts if isinstance(part, MediaRef)]
    media = open_media(found, max_frames, "", DEFAULT_LIMITS, merged=videos.merged if videos else 0)
    frame_text = frame_text or image_token or ""
    videos_here = videos_of(media, videos)
    messages = messages_of(turns, media, frame_text, videos_here)
    text = render(messages, tokenizer, True, frame_text, videos_here)
    check_words(messages, text, frame_text, videos_here.text)
    sizes = in_one_row(size for medium in media for size in medium.frame_sizes)
    input_ids = tokenizer(write(text, sizes), add_special_tokens=False, verbose=False)["input_ids"]
    check_tokens(input_ids, tokenizer, embeddings, image_token)
    rows_of = [rows for size in sizes for rows in frame_tokens(size)]
    of_frames = sum(rows_of)
    rows = len(input_ids) - len(rows_of) + of_frames
    if rows > max_text_tokens:
        raise SampleError(
            f"{name}: the prompt has {rows} tokens, {of_frames} of them for frames, and there is room for "
            f"{max_text_tokens}; ask a shorter question, or take fewer frames"
        )
    return Sample(input_ids, [IGNORE] * len(input_ids), len(sizes), functools.partial(load_frames, media), name, sizes)
