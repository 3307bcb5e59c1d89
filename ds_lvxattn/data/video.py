"""Decode chosen frames of a video (or one image) with PyAV, in bounded memory."""

import functools
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import av
import numpy as np

from ds_lvxattn.data.sample import SampleError


class VideoError(SampleError):
    """A missing, empty or broken video; the message names the path and the cause."""


@dataclass(frozen=True)
class VideoInfo:
    """What `sample_indices` and `decode_frames` need to know about a video."""

    num_frames: int
    fps: float  # 0.0 when the container does not say (a still image may not)
    width: int
    height: int


@dataclass(frozen=True)
class _Index:
    """Presentation times of a stream, in time-base units and ascending order.

    `times` is None when the container stores no usable ones; frames are then counted from the start.
    """

    info: VideoInfo
    times: tuple[int, ...] | None
    keys: tuple[int, ...]


@contextmanager
def _open(path: str) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """Open the first video stream; every FFmpeg failure inside the block becomes a `VideoError`."""
    if not os.path.isfile(path):
        raise VideoError(f"{path}: no such file")
    try:
        # An absolute path cannot be mistaken for a URL such as "concat:...".
        with av.open(os.path.abspath(path)) as container:
            if not container.streams.video:
                raise VideoError(f"{path}: no video stream")
            yield container, container.streams.video[0]
    except (av.error.FFmpegError, OSError) as error:
        raise VideoError(f"{path}: cannot decode: {error.strerror or error}") from error


@functools.lru_cache(maxsize=64)
def _index(path: str, mtime_ns: int, size: int) -> _Index:
    """Read every packet header once, decoding nothing; `mtime_ns` and `size` only refresh the cache.

    The frame count in the header is not used: many containers have none, and it is wrong for truncated files
    and for edit lists, so indices drawn from it could not be decoded.
    """
    with _open(path) as (container, stream):
        packets = [
            (packet.pts, packet.is_keyframe)
            for packet in container.demux(stream)
            if packet.size and not packet.is_discard
        ]
        # Frames ahead of the first key frame refer to data that the file does not hold.
        first = next((n for n, (_, is_key) in enumerate(packets) if is_key), len(packets))
        packets = packets[first:]
        if not packets:
            raise VideoError(f"{path}: no decodable frame")

        times: tuple[int, ...] | None = None
        keys: tuple[int, ...] = ()
        count = len(packets)
        # AVI stores no presentation times; what FFmpeg makes up for it is off by one around B-frames.
        stamped = [(pts, is_key) for pts, is_key in packets if pts is not None]
        if container.format.name != "avi" and len({pts for pts, _ in stamped}) == count:
            times = tuple(sorted(pts for pts, _ in stamped if pts >= stamped[0][0]))
            keys = tuple(sorted(pts for pts, is_key in stamped if is_key))
            count = len(times)
        fps = float(stream.average_rate or stream.guessed_rate or 0.0)
        return _Index(VideoInfo(count, fps, stream.width, stream.height), times, keys)


def _load_index(path: str) -> _Index:
    try:
        stat = os.stat(path)
    except OSError as error:
        raise VideoError(f"{path}: {error.strerror}") from error
    if stat.st_size == 0:
        raise VideoError(f"{path}: the file is empty")
    return _index(path, stat.st_mtime_ns, stat.st_size)


def probe_video(path: str | os.PathLike[str]) -> VideoInfo:
    """Frame count, rate and stored size of a video or image, without decoding it.

    Raises:
        VideoError: the file is missing, broken or holds no frame.
    """
    return _load_index(os.fspath(path)).info


def decode_frames(
    path: str | os.PathLike[str], indices: Sequence[int], size: tuple[int, int] | None = None
) -> list[np.ndarray]:
    """Decode frames by presentation index.

    Decoding starts at the key frame before each run of wanted frames, so a few frames of a long video cost a
    few groups of pictures, and only the frames asked for are kept.

    Args:
        path: a video, or an image (one frame).
        indices: frame numbers in `[0, num_frames)`, in any order, repeats allowed.
        size: `(width, height)` to scale to; the stored size when None.

    Returns:
        uint8 RGB arrays `[height, width, 3]` in the order of `indices`. Repeated indices share one array.

    Raises:
        VideoError: the file is missing or broken, or an index is out of range.
    """
    path = os.fspath(path)
    index = _load_index(path)
    count = index.info.num_frames
    for number in indices:
        if not 0 <= number < count:
            raise VideoError(f"{path}: frame {number} is out of range, the video has {count} frames")

    wanted = set(indices)
    frames: dict[int, np.ndarray] = {}
    # Some containers (MPEG-TS, AVI, a JPEG file) cannot seek exactly; what the walk from key frames does not
    # deliver is found by counting from the start.
    for walk in (_walk_from_keys, _walk_from_start):
        todo = sorted(wanted - frames.keys())
        if not todo:
            break
        with _open(path) as (container, stream):
            for number, frame in walk(container, stream, index, todo):
                if frame.is_corrupt:
                    raise VideoError(f"{path}: frame {number} is corrupt")
                width, height = size or (frame.width, frame.height)
                # Area averaging: the other filters alias when a frame shrinks to a small model input.
                scaled = frame.reformat(width=width, height=height, format="rgb24", interpolation="AREA")
                frames[number] = scaled.to_ndarray()
    missing = sorted(wanted - frames.keys())
    if missing:
        raise VideoError(f"{path}: frames {missing[:8]} cannot be decoded, the file is damaged")
    return [frames[number] for number in indices]


def _walk_from_keys(
    container: av.container.InputContainer, stream: av.VideoStream, index: _Index, todo: list[int]
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Yield `(number, frame)` for those of the ascending `todo` that seeking to their key frame delivers."""
    if index.times is None:
        return
    # One run per key frame: the frames that are decoded from it, by presentation time.
    runs: dict[int, dict[int, int]] = {}
    for number in todo:
        time = index.times[number]
        runs.setdefault(index.keys[bisect_right(index.keys, time) - 1], {})[time] = number
    for key, run in runs.items():
        try:
            container.seek(key, stream=stream)
        except av.error.FFmpegError:
            return  # a format without seeking: the other walk delivers
        last = max(run)
        for frame in container.decode(stream):
            if frame.pts in run:
                yield run[frame.pts], frame
            if frame.pts is not None and frame.pts >= last:
                break


def _walk_from_start(
    container: av.container.InputContainer, stream: av.VideoStream, index: _Index, todo: list[int]
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Yield `(number, frame)` for the ascending `todo`, decoding from the first frame and counting."""
    targets = set(todo)
    for number, frame in enumerate(container.decode(stream)):
        if number in targets:
            yield number, frame
        if number >= todo[-1]:
            return


def sample_indices(num_frames: int, budget: int) -> list[int]:
    """Spread a frame budget evenly over a video: the midpoints of `min(budget, num_frames)` equal segments.

    Raises:
        ValueError: `num_frames` or `budget` is less than 1.
    """
    if num_frames < 1 or budget < 1:
        raise ValueError(f"num_frames and budget must be at least 1, got {num_frames} and {budget}")
    count = min(budget, num_frames)
    return [(2 * segment + 1) * num_frames // (2 * count) for segment in range(count)]
