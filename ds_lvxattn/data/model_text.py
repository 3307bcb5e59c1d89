"""A conversation as the model reads it: how its text has images and videos, and how many rows it makes of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ds_lvxattn.data.chat import NO_VIDEOS, Message, VideoText, WrittenVideos, check_tokens, encode
from ds_lvxattn.data.media import Media
from ds_lvxattn.data.sample import FrameSize, SampleError, as_it_is, in_one_row, one_row
from ds_lvxattn.data.turns import Turn


@dataclass(frozen=True)
class ModelText:
    """How a model's text has frames and videos.

    Attributes:
        image_token: the token that stands for a frame; None for a model that takes none.
        frame_text: how a frame is written, with that token in it; empty: by the token alone.
        frame_tokens: rows that the model makes of each image token of a frame, by the size of its picture.
        videos: how it has videos in its text; None: frame by frame.
        otherwise: what the model makes of videos itself, where that is not frame by frame; empty: nothing else.
        refuses_videos: why no video may go in; empty: it may.
        write: what its processor makes of a rendered conversation, by the sizes of its frames.
        embeddings: tokens that it has an embedding of; None: all of the tokenizer's.
    """

    image_token: str | None
    frame_text: str = ""
    frame_tokens: Callable[[FrameSize], Sequence[int]] = one_row
    videos: VideoText | None = None
    otherwise: str = ""
    refuses_videos: str = ""
    write: Callable[[str, Sequence[FrameSize]], str] = as_it_is
    embeddings: int | None = None

    @property
    def of_frame(self) -> str:
        """How a frame is written."""
        return self.frame_text or self.image_token or ""

    @property
    def merged(self) -> int:
        """Frames of a video that the model merges to one; 0: it takes frames by themselves."""
        return self.videos.merged if self.videos else 0

    def check_takes(self, media: int) -> None:
        """Raise ``SampleError`` where there are ``media`` and the model takes none."""
        if media and self.image_token is None:
            raise SampleError(f"{media} images and videos, and the model takes text alone")

    def rows_of(self, sizes: Iterable[FrameSize]) -> list[int]:
        """Rows that the model makes of each image token of frames."""
        return [rows for size in sizes for rows in self.frame_tokens(size)]

    def videos_of(self, media: Sequence[Media]) -> WrittenVideos:
        """The text of the videos among ``media``; none where they go in frame by frame.

        Raises:
            SampleError: there are some, and none may go in.
        """
        if self.videos is None:
            if any(medium.is_video for medium in media):
                if self.refuses_videos:
                    raise SampleError(f"a video: {self.refuses_videos}")
                if self.otherwise:  # once, as Python has it
                    warnings.warn(f"videos go in as images, frame by frame; {self.otherwise}", stacklevel=2)
            return NO_VIDEOS
        order = [medium.is_video for medium in media for _ in range(1 if medium.is_video else len(medium.frames))]
        return self.videos.of([(medium.part_times, medium.seconds) for medium in media if medium.is_video], order)

    def messages_of(self, turns: Sequence[Turn], media: Sequence[Media], videos: WrittenVideos) -> list[Message]:
        """The turns as chat templates take them, each medium as it is written.

        Args:
            media: those of ``turns``, in the same order.
            videos: ``videos_of(media)``.
        """

        def written(medium: Media) -> str:
            return videos.text if medium.is_video else self.of_frame * len(medium.frames)

        waiting = iter(media)
        messages: list[Message] = []
        for turn in turns:
            content = "".join(part if isinstance(part, str) else written(next(waiting)) for part in turn.parts)
            message: Message = {"role": turn.role, "content": content}
            if turn.tool_calls:
                message["tool_calls"] = list(turn.tool_calls)
            messages.append(message)
        return messages


@dataclass(frozen=True)
class Tokenised:
    """A conversation in tokens.

    Attributes:
        input_ids, labels: as of ``Sample``.
        sizes: of its frames.
        of_frames: rows that the model makes of its image tokens.
        rows: rows of the language model: its other tokens, and those.
    """

    input_ids: list[int]
    labels: list[int]
    sizes: list[FrameSize]
    of_frames: int
    rows: int


def tokenised(
    turns: Sequence[Turn], media: Sequence[Media], tokenizer: PreTrainedTokenizerBase, text: ModelText
) -> Tokenised:
    """Turns with their media as the model reads them.

    Raises:
        SampleError: a chat template that rewrites turns or leaves words out, a token without an embedding, image tokens
            that are not those of the frames.
    """
    videos = text.videos_of(media)
    sizes = in_one_row(size for medium in media for size in medium.frame_sizes)
    messages = text.messages_of(turns, media, videos)
    input_ids, labels = encode(messages, tokenizer, text.of_frame, videos, lambda shown: text.write(shown, sizes))
    check_tokens(input_ids, tokenizer, text.embeddings, text.image_token)
    rows_of = text.rows_of(sizes)
    image_id = None if text.image_token is None else tokenizer.convert_tokens_to_ids(text.image_token)
    image_tokens = input_ids.count(image_id) if isinstance(image_id, int) else 0
    if image_tokens != len(rows_of):
        raise SampleError(
            f"{image_tokens} image tokens for {len(rows_of)} frames; the text holds "
            f"{text.image_token!r} outside the user's turns, or the chat template drops turns"
        )
    of_frames = sum(rows_of)
    return Tokenised(input_ids, labels, sizes, of_frames, len(input_ids) - image_tokens + of_frames)
