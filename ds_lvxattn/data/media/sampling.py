"""Frames of a video by time: at equal parts of its length, or so many a second."""

from __future__ import annotations

from fractions import Fraction

from ds_lvxattn.data.media.files import MediaError
from ds_lvxattn.data.media.timeline import VideoInfo


def sample_times(
    info: VideoInfo,
    max_frames: int,
    *,
    fps: float | None = None,
    start: float | None = None,
    end: float | None = None,
    multiple: int = 1,
) -> list[Fraction]:
    """When to look at a video, in seconds after its first frame appears, in ascending order.

    The midpoints of equal parts of the video, or of its range from ``start`` to ``end``: of ``max_frames`` parts, or
    with ``fps`` of as many as the range has at that rate, at most ``max_frames``. A range with no more frames than
    that gives each of its frames once.

    Args:
        info: the video; a still image is looked at once.
        max_frames: frames to take, at most.
        fps: frames of each second to take; None: ``max_frames``, however long the video.
        start, end: the range in seconds; None: from the first frame, to the end.
        multiple: the number of frames is one of it, rounded down, where the range has more.

    Raises:
        MediaError: the range is empty, or the video ends before it begins.
        ValueError: ``max_frames`` is less than 1, or ``fps`` not above 0.
    """
    if max_frames < 1 or (fps is not None and not 0 < fps < float("inf")):
        raise ValueError(f"max_frames must be at least 1 and fps above 0, got {max_frames} and {fps}")
    if not info.length:
        return [Fraction(0)]
    length = info.length * info.unit
    first, last = _seconds("start", start, Fraction(0)), min(_seconds("end", end, length), length)
    if first >= length:
        raise MediaError(f"the range starts at {start} s, but the video is {info.seconds:.3f} s long")
    if last <= first:
        raise MediaError(f"the range from {start or 0} s to {end} s is empty")
    shown = range(info.frame_at(first), info.frame_at(last) + 1)
    if len(shown) > 1 and info.starts[shown[-1]] * info.unit >= last:
        shown = shown[:-1]  # it appears when the range ends
    count = max_frames if fps is None else max(1, min(max_frames, round((last - first) * Fraction(fps))))
    count -= count % multiple if count > multiple else 0
    if len(shown) <= count:
        return [max(first, int(info.starts[number]) * info.unit) for number in shown]
    return [first + (last - first) * (2 * part + 1) / (2 * count) for part in range(count)]


def _seconds(name: str, value: float | None, default: Fraction) -> Fraction:
    if value is None:
        return default
    if not 0 <= value < float("inf"):
        raise MediaError(f"'{name}' is {value}; give seconds of at least 0")
    return Fraction(value)


def sample_indices(num_items: int, budget: int) -> list[int]:
    """Spread a budget evenly over a list: the midpoints of ``min(budget, num_items)`` equal segments.

    Raises:
        ValueError: ``num_items`` or ``budget`` is less than 1.
    """
    if num_items < 1 or budget < 1:
        raise ValueError(f"num_items and budget must be at least 1, got {num_items} and {budget}")
    count = min(budget, num_items)
    return [(2 * segment + 1) * num_items // (2 * count) for segment in range(count)]
