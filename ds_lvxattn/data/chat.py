"""A conversation as token ids and labels, by the tokenizer's chat template."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ds_lvxattn.data.sample import IGNORE, SampleError

Message = dict[str, Any]  # role and content, as chat templates take them

# For a tokenizer without a chat template.
PLAIN_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ message.role | capitalize }}: {{ message.content | trim }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


# What a template that takes strings shows of a turn, and one that walks content parts does not.
PROBE = "7f3a"


@dataclass(frozen=True)
class VideoText:
    """How a model that takes a video as such, and not frame by frame, has it in its text.

    Attributes:
        merged: frames that it merges to one (``Part``).
        text: how a conversation writes a video, ``token`` in it.
        token: what a chat template leaves of a video; its parts stand in the place of it.
        write: the text of these parts, a frame's token in it for each, by the seconds at which they are shown and
            those that the video lasts.
        image: the token of an image.
        template: chat template of conversations with videos; empty: the tokenizer's.
    """

    merged: int
    text: str
    token: str
    write: Callable[[Sequence[float], float], str]
    image: str
    template: str = ""

    def of(self, videos: Sequence[tuple[Sequence[float], float]], order: Sequence[bool]) -> WrittenVideos:
        """Those of a conversation.

        Args:
            videos: the times of the parts of each, and how long it lasts.
            order: of its images and videos, which are videos.
        """
        parts = tuple(self.write(*video) for video in videos)
        return WrittenVideos(self.text, self.token, parts, self.image, tuple(order), self.template if parts else "")


@dataclass(frozen=True)
class WrittenVideos:
    """The videos of a conversation.

    Attributes:
        text, token, image: see ``VideoText``.
        parts: the text of the parts of each.
        order: of the images and videos of the conversation, which are videos.
        template: see ``VideoText``; empty where there is none.
    """

    text: str = ""
    token: str = ""
    parts: tuple[str, ...] = ()
    image: str = ""
    order: tuple[bool, ...] = ()
    template: str = ""

    def put_into(self, text: str) -> str:
        """``text`` of a conversation, or of its beginning, with the parts of its videos in their places.

        Raises:
            SampleError: more of their tokens than videos; images and videos in another order than the conversation's.
        """
        if not self.token:
            return text
        media = re.findall(f"{re.escape(self.token)}|{re.escape(self.image)}", text)
        order = tuple(token == self.token for token in media)
        if order != self.order and sorted(order) == sorted(self.order):
            raise SampleError(
                "the chat template writes the images and videos of a turn in another order than the row, images first "
                "for instance; give them in the order of the template"
            )
        first, *others = text.split(self.token)
        if len(others) > len(self.parts):
            raise SampleError(f"the text holds {self.token!r} outside its {len(self.parts)} videos; take it out")
        return first + "".join(parts + other for parts, other in zip(self.parts, others, strict=False))


NO_VIDEOS = WrittenVideos()


def render(
    messages: list[Message],
    tokenizer: PreTrainedTokenizerBase,
    prompt: bool = False,
    frame_text: str = "",
    videos: WrittenVideos = NO_VIDEOS,
) -> str:
    """The text of a conversation; with ``prompt``, up to where the assistant's answer begins.

    Args:
        messages: with strings as content. A template that walks content parts gets parts: one for each
            ``frame_text``, which it writes as it writes an image, one for each video, and the text between them.
        frame_text: how a frame is written.
        videos: of a model that takes them as such.

    Raises:
        SampleError: the template refuses the conversation.
    """
    template = videos.template or tokenizer.chat_template or PLAIN_TEMPLATE
    shown = messages
    if videos.template or _walks_parts(tokenizer, str(template)):
        shown = [{**message, "content": _parts(message["content"], frame_text, videos.text)} for message in messages]
    try:
        text = _apply(tokenizer, template, shown, prompt)
    except Exception as error:  # a template is a program of its own, which may fail in any way
        raise SampleError(f"the chat template refuses the conversation: {error or type(error).__name__}") from error
    return videos.put_into(text)


def _apply(tokenizer: PreTrainedTokenizerBase, template: Any, messages: list[Message], prompt: bool) -> str:
    return str(
        tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=prompt)
    )


@functools.lru_cache(maxsize=16)
def _walks_parts(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Whether the tokenizer's template shows the text of content parts, and not that of a string.

    Args:
        template: the template as text, by which an answer is remembered.
    """

    def shows(content: Any) -> bool:
        try:
            message = [{"role": "user", "content": content}]
            return PROBE in _apply(tokenizer, tokenizer.chat_template or PLAIN_TEMPLATE, message, False)
        except Exception:  # it refuses such a conversation
            return False

    return not shows(PROBE) and shows([{"type": "text", "text": PROBE}])


def _parts(content: str, frame_text: str, video_text: str) -> list[dict[str, str]]:
    """``content`` as content parts."""
    kinds = {frame_text: "image", video_text: "video"}
    pattern = "|".join(re.escape(text) for text in kinds if text)
    parts: list[dict[str, str]] = []
    for text in re.split(f"({pattern})", content) if pattern else [content]:
        if text and text in kinds:
            parts.append({"type": kinds[text]})
        elif text.strip():
            parts.append({"type": "text", "text": text})
    return parts


def check_words(messages: list[Message], text: str, frame_text: str = "", video_text: str = "") -> None:
    """Check that every word of the conversation is found again in its rendered text, those of a turn in their order.

    Raises:
        SampleError: naming a word that is not.
    """
    for message in messages:
        content, at = message["content"] or "", 0
        for medium in filter(None, (frame_text, video_text)):
            content = content.replace(medium, " ")
        for word in content.split():
            found = text.find(word, at)
            if found < 0:
                raise SampleError(
                    f"the chat template leaves the word {word!r} of the conversation out; use a template that writes "
                    "all turns"
                )
            at = found + len(word)


def check_tokens(
    input_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, embeddings: int | None, image_token: str | None
) -> None:
    """Check that the model has an embedding of every token but the image token, whose place a picture takes.

    Args:
        embeddings: tokens that it has one of; None: all of them.

    Raises:
        SampleError: naming a token of which it has none.
    """
    if embeddings is None or max(input_ids, default=0) < embeddings:
        return
    missing = {number: tokenizer.convert_ids_to_tokens(number) for number in input_ids if number >= embeddings}
    for number, token in missing.items():
        if token == image_token:
            continue
        raise SampleError(
            f"the tokenizer makes token {number}, {token!r}, and the model has "
            f"embeddings of {embeddings} tokens; give it the tokenizer it was trained with, or call "
            f"resize_token_embeddings({len(tokenizer)}) and save it"
        )


def encode(
    messages: list[Message],
    tokenizer: PreTrainedTokenizerBase,
    frame_text: str = "",
    videos: WrittenVideos = NO_VIDEOS,
    write: Callable[[str], str] = str,
) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, and labels that mask all but the answers and their end-of-turn tokens.

    Few chat templates mark the answers, so they are found by rendering: an answer is what a turn of the
    assistant adds to the conversation before it and its generation prompt. That is done on text and carried
    to tokens by their character offsets, so a token that spans prompt and answer does no harm: it is a label.

    Args:
        messages, frame_text, videos: see ``render``.
        write: what the model's processor makes of a rendered text; of its beginning, the beginning of that.

    Raises:
        SampleError: the template refuses the conversation, leaves words of it out, or rewrites earlier turns when later
            ones follow.
    """
    answers = []
    text = render(messages, tokenizer, frame_text=frame_text, videos=videos)
    for at, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = render(messages[:at], tokenizer, True, frame_text, videos)
            answered = render(messages[: at + 1], tokenizer, False, frame_text, videos)
            if not (answered.startswith(prompt) and text.startswith(answered)):
                raise SampleError(
                    f"the chat template rewrites the conversation around turn {at + 1}, so the answer "
                    "cannot be told from the prompt; use a template that only appends"
                )
            # White space behind the end-of-turn token belongs to the template.
            answers.append((len(write(prompt)), len(write(answered.rstrip()))))
    check_words(messages, text, frame_text, videos.text)
    encoded = tokenizer(write(text), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    input_ids = encoded["input_ids"]
    begin, end = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
    is_answer = np.zeros(len(input_ids), dtype=bool)
    for start, stop in answers:
        is_answer |= (begin < stop) & (end > start)
    return input_ids, np.where(is_answer, input_ids, IGNORE).tolist()
