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
from ds_lvxattn.data.rows import MediaKind, Source
from ds_lvxattn.data.sample import FrameSize


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
    """

    kind: MediaKind
    sources: tuple[Source, ...]
    frames: tuple[int, ...]
    times: tuple[float, ...] = ()
    size: Size = None
    upright: bool = True

    @property
    def frame_sizes(self) -> list[FrameSize]:
        """Size of each of ``frames`` as it is decoded, from the headers of the files."""
        info = [self._info(source) for source in self.sources]
        own = [info[frame if len(info) > 1 else 0] for frame in self.frames]
        shown = (fitted(picture.width, picture.height, self.size) for picture in own)
        return [FrameSize(height, width, self.kind == "video") for width, height in shown]

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
    """Decode ``frames``, numbered over all ``media`` in order, to uint8 ``[H, W, 3]``, in the order given.

    Raises:
        MediaError: naming the file: it is broken, or whatever else its decoder raises.
    """
    found: dict[int, np.ndarray] = {}
    for medium, own in _by_medium(media, frames):  # another file is not touched
        try:
            decoded = medium.decode([number for _, number in own])
        except MediaError:
            raise
        except Exception as error:
            raise MediaError(f"{medium.name}: {type(error).__name__}: {error}") from error
        found.update(zip((frame for frame, _ in own), decoded, strict=True))
    return [found[frame] for frame in frames]


def frame_groups(media: Sequence[Media], frames: Sequence[int]) -> list[list[int]]:
    """``frames``, numbered over all ``media`` in order, without repeats, by what is decoded together."""
    groups = []
    for medium, own in _by_medium(media, frames):
        places: dict[int, list[int]] = {}
        for frame, number in own:
            places.setdefault(number, []).append(frame)
        groups += [[frame for number in group for frame in places[number]] for group in medium.groups(list(places))]
    return groups


def _by_medium(media: Sequence[Media], frames: Sequence[int]) -> list[tuple[Media, list[tuple[int, int]]]]:
    """Each medium of which there are ``frames``, with those and their numbers in it."""
    places = [(m, number) for m, medium in enumerate(media) for number in medium.frames]
    own: dict[int, list[tuple[int, int]]] = {}
    for frame in dict.fromkeys(frames):
        m, number = places[frame]
        own.setdefault(m, []).append((frame, number))
    return [(media[m], pairs) for m, pairs in own.items()]
