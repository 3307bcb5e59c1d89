"""A row's image or video, whichever decoder reads it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ds_lvxattn.data.media import decode, images
from ds_lvxattn.data.media.files import MediaError
from ds_lvxattn.data.media.index import film_index
from ds_lvxattn.data.media.picture import Size, fitted
from ds_lvxattn.data.media.timeline import VideoInfo
from ds_lvxattn.data.sample import FrameSize, Part
from ds_lvxattn.data.turns import MediaKind, Source

# Of a video that is given as its frames, whose row does not say: what Qwen's processors take of a video.
FRAMES_A_SECOND = 2.0


def probe_video(path: str | os.PathLike[str]) -> VideoInfo:
    """What a player shows of a video, an animated image or a still one, without decoding more than that takes.

    Raises:
        MediaError: the file is missing, broken or shows no frame.
    """
    path = os.fspath(path)
    return images.image_info(path) if images.is_image(path) else film_index(path).info


def probe_image(source: str | bytes, upright: bool = True) -> VideoInfo:
    """Size of an image.

    Args:
        source: a path, or an encoded image.
        upright: turned by its EXIF orientation.

    Raises:
        MediaError: missing, broken, a film, or an animation.
    """
    info = images.image_info(source, upright)
    if info.num_frames > 1:
        name = source if isinstance(source, str) else "an embedded image"
        raise MediaError(f"{name}: an animation of {info.num_frames} frames; give it as a video")
    return info


def decode_frames(path: str | os.PathLike[str], indices: Sequence[int], size: Size = None) -> list[np.ndarray]:
    """Decode frames by presentation index.

    Args:
        path: a video, or an image (one frame).
        indices: frame numbers in ``[0, num_frames)``, in any order, repeats allowed.
        size: of the frames; they are scaled one by one as they are decoded.

    Returns:
        uint8 RGB arrays ``[height, width, 3]`` in the order of ``indices``. Repeated indices share one array.

    Raises:
        MediaError: the file is missing or broken, or an index is out of range.
    """
    path = os.fspath(path)
    is_image = images.is_image(path)
    count = (images.image_info(path) if is_image else film_index(path).info).num_frames
    for number in indices:
        if not 0 <= number < count:
            raise MediaError(f"{path}: frame {number} is out of range, the video has {count} frames")
    frames = (images.decode_image if is_image else decode.decode_film)(path, indices, size)
    return [frames[number] for number in indices]


@dataclass(frozen=True)
class PixelLimits:
    """Pixels of a decoded picture, at most; None: all that it has.

    Attributes:
        image: of an image.
        video: of a frame of a video.
    """

    image: int | None = None
    video: int | None = None

    def of(self, kind: MediaKind) -> int | None:
        return self.image if kind == "image" else self.video


NO_LIMITS = PixelLimits()
DEFAULT_LIMITS = PixelLimits(image=1 << 22, video=1 << 20)  # more than most models take in


@dataclass(frozen=True)
class Media:
    """An image or a video, and the frames sampled from it.

    Attributes:
        kind: ``image`` or ``video``.
        sources: its path or encoded image; of a video that is given as its frames, one for each.
        frames: frame numbers in the file, or in ``sources``; ``(0,)`` for an image.
        times: when each of them was looked for, in seconds after the video's first frame; none where it has no times.
        size: of the decoded frames.
        upright: whether images are turned by their EXIF orientation; videos always are.
        merged: frames of a video that count as one part of it (``Part``); 0: they are taken by themselves, as images.
        step: seconds from one of ``frames`` to the next, on average.
        rate: of a video that is given as its frames, how many there are in a second.
    """

    kind: MediaKind
    sources: tuple[Source, ...]
    frames: tuple[int, ...]
    times: tuple[float, ...] = ()
    size: Size = None
    upright: bool = True
    merged: int = 0
    step: float = 0.0
    rate: float = FRAMES_A_SECOND

    @property
    def is_video(self) -> bool:
        """Whether it is taken as a video, and not as frames by themselves."""
        return self.kind == "video" and self.merged > 0

    @property
    def parts(self) -> list[tuple[int, ...]]:
        """``frames`` as they count: by themselves, or of a video ``merged`` each."""
        if not self.is_video:
            return [(frame,) for frame in self.frames]
        filled = (*self.frames, *self.frames[-1:] * (-len(self.frames) % self.merged))
        return [filled[at : at + self.merged] for at in range(0, len(filled), self.merged)]

    @property
    def part_times(self) -> list[float]:
        """Of each of ``parts``, the mean of when its first and its last frame appear, in seconds."""
        if len(self.sources) > 1:
            starts = {frame: frame / self.rate for frame in self.frames}
        else:
            info = self._info(self.sources[0])
            starts = {frame: float(int(info.starts[frame]) * info.unit) for frame in self.frames}
        return [(starts[part[0]] + starts[part[-1]]) / 2 for part in self.parts]

    @property
    def seconds(self) -> float:
        """That a video lasts, all of it."""
        return len(self.sources) / self.rate if len(self.sources) > 1 else self._info(self.sources[0]).seconds

    @property
    def frame_sizes(self) -> list[FrameSize]:
        """Size of each of ``parts`` as it is decoded, from the headers of the files.

        Raises:
            MediaError: a video is given as images of several sizes, and its frames are merged.
        """
        info = [self._info(source) for source in self.sources]
        own = [info[frame if len(info) > 1 else 0] for frame in self.frames]
        shown = [fitted(picture.width, picture.height, self.size) for picture in own]
        if not self.is_video:
            return [FrameSize(height, width, self.kind == "video") for width, height in shown]
        if len(set(shown)) > 1:
            raise MediaError(f"{self.name}: the frames of a video have several sizes: {sorted(set(shown))}")
        (width, height), parts, seconds = shown[0], len(self.parts), self.merged * self.step
        of_video = (Part(number, self.merged, len(self.frames), seconds) for number in range(parts))
        return [FrameSize(height, width, True, part) for part in of_video]

    def _info(self, source: Source) -> VideoInfo:
        if self.kind == "image" or isinstance(source, bytes) or len(self.sources) > 1:
            return probe_image(source, self.upright)
        return probe_video(source)

    def decode(self, frames: Sequence[int]) -> list[np.ndarray]:
        """uint8 ``[H, W, 3]`` for the frame numbers asked for. Raises ``MediaError`` for broken media."""
        if len(self.sources) > 1:
            return [self._image(self.sources[frame]) for frame in frames]
        source = self.sources[0]
        if self.kind == "image" or isinstance(source, bytes):
            return [self._image(source)] * len(frames)
        return decode_frames(source, frames, self.size)

    @property
    def name(self) -> str:
        """What messages call it."""
        return next((source for source in self.sources if isinstance(source, str)), "an embedded image")

    def _image(self, source: Source) -> np.ndarray:
        return images.decode_image(source, [0], self.size, self.upright)[0]

    def groups(self, frames: Sequence[int]) -> list[list[int]]:
        """``frames`` without repeats, by what is decoded together: groups may be decoded side by side."""
        single = sorted(set(frames))
        if len(self.sources) > 1:
            return [[frame] for frame in single]
        source = self.sources[0]
        if self.kind == "image" or isinstance(source, bytes) or images.is_image(source):
            return [single]
        return decode.groups(film_index(source), single)


def load_frames(media: Sequence[Media], frames: Sequence[int]) -> list[np.ndarray]:
    """Decode ``frames``, numbered over the ``parts`` of all ``media`` in order, in the order given.

    Returns:
        uint8 ``[H, W, 3]`` each, ``[merged, H, W, 3]`` of a part of a video.

    Raises:
        MediaError: naming the file: it is broken, or whatever else its decoder raises.
    """
    found: dict[int, np.ndarray] = {}
    for medium, own in _by_medium(media, frames):  # another file is not touched
        numbers = [number for _, part in own for number in part]
        try:
            decoded = iter(medium.decode(numbers))
        except MediaError:
            raise
        except Exception as error:
            raise MediaError(f"{medium.name}: {type(error).__name__}: {error}") from error
        for frame, part in own:
            pictures = [next(decoded) for _ in part]
            found[frame] = np.stack(pictures) if medium.is_video else pictures[0]
    return [found[frame] for frame in frames]


def frame_groups(media: Sequence[Media], frames: Sequence[int]) -> list[list[int]]:
    """``frames``, numbered as in ``load_frames``, without repeats, by what is decoded together.

    A part of a video is decoded with its first frame.
    """
    groups = []
    for medium, own in _by_medium(media, frames):
        places: dict[int, list[int]] = {}
        for frame, part in own:
            places.setdefault(part[0], []).append(frame)
        groups += [[frame for number in group for frame in places[number]] for group in medium.groups(list(places))]
    return groups


def _by_medium(media: Sequence[Media], frames: Sequence[int]) -> list[tuple[Media, list[tuple[int, tuple[int, ...]]]]]:
    """Each medium of which there are ``frames``, with those and their numbers in it."""
    places = [(m, part) for m, medium in enumerate(media) for part in medium.parts]
    own: dict[int, list[tuple[int, tuple[int, ...]]]] = {}
    for frame in dict.fromkeys(frames):
        m, part = places[frame]
        own.setdefault(m, []).append((frame, part))
    return [(media[m], pairs) for m, pairs in own.items()]
