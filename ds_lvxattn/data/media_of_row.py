"""The images and videos of a row, and which of their frames are taken."""

from __future__ import annotations

import os
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from ds_lvxattn.data.media import (
    FRAMES_A_SECOND,
    NO_LIMITS,
    Media,
    PixelLimits,
    check_sha256,
    probe_image,
    probe_video,
    sample_indices,
    sample_times,
)
from ds_lvxattn.data.sample import SampleError
from ds_lvxattn.data.turns import MediaRef, Source, Turn


def media_in(turns: Sequence[Turn]) -> list[MediaRef]:
    """Those of a conversation, in the order of its text."""
    return [part for turn in turns for part in turn.parts if isinstance(part, MediaRef)]


def open_media(
    found: Sequence[MediaRef],
    max_frames: int,
    root: str,
    pixels: PixelLimits = NO_LIMITS,
    upright: bool = True,
    fps: float | None = None,
    merged: int = 0,
) -> list[Media]:
    """Media with the frames that are taken of them: one of an image, the rest of the budget divided over the videos.

    Args:
        found: media in the order of the text.
        max_frames: frames of all of them.
        root: folder of relative paths.
        pixels: to which larger pictures are scaled down while they are decoded.
        upright: whether images are turned by their EXIF orientation.
        fps: frames of each second of a video that are taken, where its row does not say; None: all of its share.
        merged: frames of a video that the model merges: as many are taken, or a multiple, where there are more; 0: it
            takes them by themselves.

    Raises:
        SampleError: missing or broken media, or more of them than frames.
    """
    shares = iter(_shares(found, max_frames))
    media = []
    for medium in found:
        sources, is_video = _sources(medium, root), medium.kind == "video"
        # Every rank looks at every file of a sample: what is missing is missing on all of them.
        if is_video and len(sources) == 1:
            taken = _of_film(medium, sources[0], next(shares), fps, merged)
        else:
            for source in sources:
                probe_image(source, upright)
            frames = sample_indices(len(sources), _multiple(next(shares), merged)) if is_video else [0]
            taken = _of_pictures(medium, len(sources), frames)
        media.append(
            Media(
                medium.kind, sources, taken.frames, taken.times, pixels.of(medium.kind), upright,
                merged if is_video else 0, taken.step, taken.rate,
            )
        )  # fmt: skip
    return media


class _Taken(NamedTuple):
    """Frames of a medium, their times, the step between them and the rate of pictures; see ``Media``."""

    frames: tuple[int, ...]
    times: tuple[float, ...]
    step: float
    rate: float


def _shares(found: Sequence[MediaRef], max_frames: int) -> list[int]:
    """Frames of each video, at most: what the images leave, the first videos a frame more."""
    videos = sum(medium.kind == "video" for medium in found)
    room = max_frames - (len(found) - videos)
    if room < videos:
        raise SampleError(
            f"{len(found)} images and videos, but max_frames is {max_frames}; raise it ('frames' of a config)"
        )
    share, longer = divmod(room, max(videos, 1))
    return [share + (number < longer) for number in range(videos)]


def _sources(medium: MediaRef, root: str) -> tuple[Source, ...]:
    """Where its files are, or their bytes, with the checksums that the row says."""
    listed = medium.source if isinstance(medium.source, tuple) else (medium.source,)
    sources = tuple(os.path.join(root, source) if isinstance(source, str) else source for source in listed)
    for source, checksum in zip(sources, medium.sha256, strict=False):  # none where the row does not say
        check_sha256(source, checksum)
    if medium.kind == "video" and isinstance(sources[0], bytes) and len(sources) == 1:
        raise SampleError("an embedded video cannot be read; store videos as files and give their paths")
    return sources


def _of_pictures(medium: MediaRef, pictures: int, frames: Sequence[int]) -> _Taken:
    """Of an image, or of a video that is given as its frames."""
    rate = Fraction(medium.sampling.get("fps") or FRAMES_A_SECOND)
    return _Taken(tuple(frames), (), float(pictures / rate / len(frames)), float(rate))


def _of_film(medium: MediaRef, path: Source, share: int, fps: float | None, merged: int) -> _Taken:
    asked = medium.sampling
    most = min(share, max(int(asked.get("frames", share)), 1))
    span = {"fps": asked.get("fps", fps), "start": asked.get("start"), "end": asked.get("end")}
    assert isinstance(path, str)  # ``_sources`` refuses another
    info = probe_video(path)
    times = sample_times(info, _multiple(most, merged), **span, multiple=max(merged, 1))
    step = (times[-1] - times[0]) / max(len(times) - 1, 1)
    return _Taken(tuple(info.frame_at(time) for time in times), tuple(map(float, times)), float(step), 0.0)


def _multiple(frames: int, merged: int) -> int:
    return frames - frames % merged if frames > merged > 1 else frames
