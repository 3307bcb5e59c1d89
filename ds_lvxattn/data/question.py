"""A question about a video as the prompt of a generation."""

from __future__ import annotations

import functools
import os

from transformers import PreTrainedTokenizerBase

from ds_lvxattn.data.chat import check_tokens, check_words, render
from ds_lvxattn.data.media import DEFAULT_LIMITS, load_frames
from ds_lvxattn.data.media_of_row import media_in, open_media
from ds_lvxattn.data.model_text import ModelText
from ds_lvxattn.data.rows import read_row
from ds_lvxattn.data.sample import IGNORE, Sample, SampleError, in_one_row


def question_sample(
    question: str,
    video: str | os.PathLike[str] | None,
    tokenizer: PreTrainedTokenizerBase,
    text: ModelText,
    *,
    max_frames: int,
    max_text_tokens: int,
) -> Sample:
    """The prompt of ``question``, as rows of the user's own data are rendered up to their first answer.

    Args:
        question: the user's turn; a placeholder (``<video>``, ``<image>``) says where the frames go, or they are first.
        video: a video or an image; None: text alone.
        tokenizer: its chat template renders the text, ``PLAIN_TEMPLATE`` if it has none.
        text: how the model's text has frames and videos.
        max_frames: frames taken, spread evenly over the video.
        max_text_tokens: longest prompt, with the rows of its frames.

    Raises:
        SampleError: a missing or broken video, a placeholder without one, a model that takes no frames, a template
            that refuses the question, a prompt that is too long.
    """
    name = "the question" if video is None else os.fspath(video)
    if video is not None and text.image_token is None:
        raise SampleError(f"{name}: the model takes text alone; leave the video out")
    asked = {"messages": [{"role": "user", "content": question}], "video": None if video is None else os.fspath(video)}
    turns = read_row(asked, answered=False)
    found = media_in(turns)
    media = open_media(found, max_frames, "", DEFAULT_LIMITS, merged=text.merged)
    videos = text.videos_of(media)
    messages = text.messages_of(turns, media, videos)
    prompt = render(messages, tokenizer, True, text.of_frame, videos)
    check_words(messages, prompt, text.of_frame, videos.text)
    sizes = in_one_row(size for medium in media for size in medium.frame_sizes)
    input_ids = tokenizer(text.write(prompt, sizes), add_special_tokens=False, verbose=False)["input_ids"]
    check_tokens(input_ids, tokenizer, text.embeddings, text.image_token)
    rows_of = text.rows_of(sizes)
    of_frames = sum(rows_of)
    rows = len(input_ids) - len(rows_of) + of_frames
    if rows > max_text_tokens:
        raise SampleError(
            f"{name}: the prompt has {rows} tokens, {of_frames} of them for frames, and there is room for "
            f"{max_text_tokens}; ask a shorter question, or take fewer frames"
        )
    return Sample(input_ids, [IGNORE] * len(input_ids), len(sizes), functools.partial(load_frames, media), name, sizes)
