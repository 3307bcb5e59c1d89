"""One training or evaluation sample, and where samples come from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

IGNORE = -100  # label of a token that no loss is taken on, as in transformers


# Characters of the two ends of a message that is longer: what stands in the place of a path may be megabytes.
MESSAGE_ENDS = 600, 200


class SampleError(ValueError):
    """A sample that cannot be used: broken media, text that is too long. Skipped or fatal, by the config."""

    def __init__(self, message: str) -> None:
        head, tail = MESSAGE_ENDS
        if len(message) > 2 * (head + tail):
            message = f"{message[:head]} [... {len(message) - head - tail} characters ...] {message[-tail:]}"
        super().__init__(message)


def together(frames: Sequence[int]) -> list[Sequence[int]]:
    """``frame_groups`` of a sample whose frames are loaded in one go."""
    return [frames] if frames else []


def no_frames(frames: Sequence[int]) -> list[np.ndarray]:
    """``load_frames`` of a sample without frames."""
    return []


@dataclass(frozen=True)
class Part:
    """Frames of a video that a model merges, which are decoded and encoded as one: they count as one frame.

    Attributes:
        number: of this part among those of its video, from 0.
        merged: frames in it; the last frame of a video stands in for those that its last part lacks.
        frames: of the whole video, as they were taken.
        seconds: from one part to the next.
    """

    number: int
    merged: int
    frames: int
    seconds: float

    @property
    def is_last(self) -> bool:
        """Whether its video ends with it."""
        return (self.number + 1) * self.merged >= self.frames


@dataclass(frozen=True)
class FrameSize:
    """The picture of a frame, as it is decoded.

    Attributes:
        height, width: pixels.
        video: whether it is a frame of a video, for which limits differ from those of an image.
        part: for models that take a video as such: the frames that this one stands for; None: one picture by itself.
        images: pictures by themselves in its row (``in_one_row``), which some processors cut only where there is one.
    """

    height: int
    width: int
    video: bool = False
    part: Part | None = None
    images: int = 1


def in_one_row(sizes: Iterable[FrameSize]) -> list[FrameSize]:
    """The pictures of a row, which know how many images there are."""
    listed = list(sizes)
    images = sum(size.part is None for size in listed)
    return [size if size.part is not None else replace(size, images=images) for size in listed]


def one_row(size: FrameSize) -> Sequence[int]:
    """Rows of a frame for a model that sees visual tokens as keys of their own: its one image token."""
    return (1,)


def as_it_is(text: str, sizes: Sequence[FrameSize]) -> str:
    """A rendered conversation for a model whose processor adds nothing around its image tokens."""
    return text


@dataclass(frozen=True)
class FrameShape:
    """What a model makes of a frame.

    Attributes:
        tokens: visual tokens, as the language model sees it.
        encoder_tokens: tokens inside the vision encoder, padding included: what encoding it costs.
        grid: how the image processor divides the picture, in its own units (rows and columns of tiles or patches).
        padding: further tokens, of what pads the picture, that only text sees which sees no frame.
        time: of a part of a video behind its first, how far behind that one its positions in time are; it shares the
            others. None: its positions are its own.
        pictures: that the frame stands for.
        crop: of a picture that the image processor cuts into several images, which have an image token each, the number
            of this one; 0 for the first, and for a picture that stays whole.
        runs: visual tokens of each of its image tokens in the text, where the model's processor writes text between
            them; empty: it has one image token.
        told: tokens that the encoder reads beside the frame, of a tokenizer of its own.
    """

    tokens: int
    encoder_tokens: int
    grid: tuple[int, ...] = ()
    padding: int = 0
    time: float | None = None
    pictures: int = 1
    crop: int = 0
    runs: tuple[int, ...] = ()
    told: tuple[int, ...] = ()

    @property
    def rows(self) -> tuple[int, ...]:
        """Visual tokens of each of its image tokens."""
        return self.runs or (self.tokens,)


@dataclass(frozen=True)
class Sample:
    """A tokenised conversation and its frames, which are decoded only when asked for.

    Attributes:
        input_ids: token ids; one image token for each frame, in frame order, or one for each image that the model's
            processor cuts a frame into.
        labels: as long as ``input_ids``; the token itself where it is an answer, ``IGNORE`` elsewhere.
        num_frames: frames of all its media.
        sizes: their pictures' sizes, where the visual tokens of a frame follow from its size; None: every frame counts
            as one of the model's smallest (one tile).
        load_frames: uint8 ``[H, W, 3]`` images of the frames asked for, ``[merged, H, W, 3]`` of a ``Part`` of a video;
            raises ``SampleError`` (or ``MediaError``) for broken media.
        name: how messages call the sample.
        frame_groups: frames by what is decoded together; groups may be loaded side by side.
    """

    input_ids: Sequence[int]
    labels: Sequence[int]
    num_frames: int = 0
    load_frames: Callable[[Sequence[int]], list[np.ndarray]] = field(default=no_frames, repr=False)
    name: str = ""
    sizes: Sequence[FrameSize] | None = None
    frame_groups: Callable[[Sequence[int]], Sequence[Sequence[int]]] = field(default=together, repr=False)

    def __post_init__(self) -> None:
        if self.sizes is not None and len(self.sizes) != self.num_frames:
            raise SampleError(f"{self.name}: {self.num_frames} frames but {len(self.sizes)} sizes")
        if len(self.input_ids) != len(self.labels):
            raise SampleError(f"{self.name}: {len(self.input_ids)} tokens but {len(self.labels)} labels")

    def pictures(self, frames: Sequence[int]) -> list[np.ndarray]:
        """The pictures of ``frames``, of the sizes that they are said to have.

        Raises:
            SampleError: broken media, or a picture of another size.
        """
        pictures = self.load_frames(frames)
        for frame, picture in zip(frames, pictures, strict=True):
            size = self.sizes[frame] if self.sizes is not None else None
            if size is not None and picture.shape[-3:-1] != (size.height, size.width):
                raise SampleError(
                    f"frame {frame} has {picture.shape[-2]} x {picture.shape[-3]} pixels, and its file says "
                    f"{size.width} x {size.height}; write the file anew"
                )
        return pictures


def without_labels(sample: Sample) -> Sample:
    """``sample``, no token of which is an answer."""
    return replace(sample, labels=[IGNORE] * len(sample.input_ids))


class SampleSource(Protocol):
    """A dataset whose rows become samples on request.

    Attributes:
        digest: how many rows it has and what they are like: another text for other rows, so that a run which goes on
            can tell whether it has the data that it began with.
    """

    @property
    def digest(self) -> str: ...

    def __len__(self) -> int: ...

    def sample(self, index: int) -> Sample:
        """Row ``index`` as a sample. Raises ``SampleError`` when it cannot be used."""

    def order(self, epoch: int) -> Sequence[int]:
        """The rows in the order in which ``epoch`` takes them; the same on every rank."""
