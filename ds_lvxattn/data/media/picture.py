"""A decoded frame as a player shows it: deinterlaced, upright, with square pixels, in full-range RGB."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, Union

import av
import av.filter
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

UNSPECIFIED = 2  # FFmpeg's colour space of a frame whose file names none
IDENTITY = (1, 0, 0, 1)

# Of a picture that is decoded: None, its own; a number, its own or scaled down to so many pixels, its shape kept; or
# width and height.
Size = Union[int, tuple[int, int], None]


def as_shown(frame: av.VideoFrame, aspect: Fraction | None, size: Size = None) -> np.ndarray:
    """uint8 RGB ``[height, width, 3]``.

    Args:
        frame: a decoded frame.
        aspect: width of a pixel over its height; None: square.
        size: of the result.
    """
    if frame.interlaced_frame:
        frame = _deinterlaced(frame)
    matrix = _matrix(frame)
    if _is_quarter(matrix) and isinstance(size, tuple):
        size = size[::-1]
    width, height = fitted(*_square(frame.width, frame.height, aspect), size)
    # Area averaging: the other filters alias when a frame shrinks to a small model input.
    rgb = VideoReformatter().reformat(
        frame, width, height, "rgb24", _colorspace(frame), None, "AREA", None, ColorRange.JPEG, **_ONE_THREAD
    )
    return _turned(rgb.to_ndarray(), matrix)


def size_as_shown(frame: av.VideoFrame, aspect: Fraction | None) -> tuple[int, int]:
    """Width and height of ``as_shown``."""
    width, height = _square(frame.width, frame.height, aspect)
    return (height, width) if _is_quarter(_matrix(frame)) else (width, height)


def fitted(width: int, height: int, size: Size) -> tuple[int, int]:
    """The size that a picture of ``width`` by ``height`` gets."""
    if isinstance(size, tuple):
        return size
    if size is None or width * height <= size:
        return width, height
    scale = (size / (width * height)) ** 0.5
    return max(1, int(width * scale)), max(1, int(height * scale))


def _square(width: int, height: int, aspect: Fraction | None) -> tuple[int, int]:
    """The size in square pixels: players keep the height."""
    return (max(1, round(width * aspect)), height) if aspect else (width, height)


def _colorspace(frame: av.VideoFrame) -> int | None:
    """What to read the frame's colours as where its file does not say: as players do, by its size."""
    if frame.colorspace != UNSPECIFIED:
        return None
    return Colorspace.ITU709 if frame.width >= 1280 or frame.height > 576 else Colorspace.ITU601


def _deinterlaced(frame: av.VideoFrame) -> av.VideoFrame:
    """Both fields as one picture of the first. From this frame alone: a frame looks the same however it is reached."""
    graph = av.filter.Graph()
    graph.threads = 1
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or Fraction(1, 1000)
    )
    graph.link_nodes(source, graph.add("estdif", "mode=frame"), graph.add("buffersink")).configure()
    graph.push(frame)
    graph.push(None)
    picture = graph.pull()
    assert isinstance(picture, av.VideoFrame)
    return picture


def _matrix(frame: av.VideoFrame) -> tuple[int, int, int, int]:
    """How the frame is turned and mirrored: x to ``a x + c y``, y to ``b x + d y``, in 1/65536."""
    data: Any = frame.side_data.get("DISPLAYMATRIX")
    if data is not None:
        a, b, _, c, d = np.frombuffer(bytes(data), dtype="=i4")[:5].tolist()
        return a, b, c, d
    return IDENTITY


def _is_quarter(matrix: tuple[int, int, int, int]) -> bool:
    return abs(matrix[1]) > abs(matrix[0])


def _turned(image: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """The image by its display matrix; angles between quarter turns are taken as the nearest one."""
    a, b, c, d = matrix
    if _is_quarter(matrix):
        image = image.swapaxes(0, 1)
        a, d = c, b
    if a < 0:
        image = image[:, ::-1]
    if d < 0:
        image = image[::-1]
    return np.ascontiguousarray(image)


def _one_thread() -> dict[str, Any]:
    """Threads of the scaler, where this PyAV lets them be chosen: frames are decoded side by side as it is."""
    try:
        VideoReformatter().reformat(av.VideoFrame(2, 2, "rgb24"), threads=1)
    except TypeError:
        return {}
    return {"threads": 1}


_ONE_THREAD = _one_thread()
