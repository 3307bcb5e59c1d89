"""Films and pictures that tests make."""

from __future__ import annotations

import io
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from ds_lvxattn.data.media import (
    decode_frames,
)


def write_film(
    path: Path,
    levels: list[int],
    *,
    codec: str = "libx264",
    rate: int = 10,
    times: list[int] | None = None,
    **options: str,
) -> Path:
    """Grey frames of 64 x 48; ``times`` in thousandths of a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, level in enumerate(levels):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), level, dtype=np.uint8), format="rgb24")
            frame.pts, frame.time_base = (times[number], Fraction(1, 1000)) if times else (number, Fraction(1, rate))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def levels_of(path: Path, numbers: list[int]) -> list[int]:
    return [round(float(frame.mean())) for frame in decode_frames(path, numbers)]


def remux(source: Path, target: Path, change: Callable[[av.Packet, int], bool | None] = lambda packet, n: None) -> Path:
    """Copy a film packet by packet; ``change`` may alter one, or return False to leave it out."""
    with av.open(str(source)) as film, av.open(str(target), "w") as copy:
        stream = copy.add_stream_from_template(film.streams.video[0])
        for number, packet in enumerate(p for p in film.demux(video=0) if p.size):
            if change(packet, number) is not False:
                packet.stream = stream
                copy.mux(packet)
    return target


def corners(height: int = 48, width: int = 64) -> np.ndarray:
    """A red, a green, a blue and a white quarter, from the top left on."""
    image = np.zeros((height, width, 3), dtype=np.uint8)
    colours = np.array([[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (255, 255, 255)]], dtype=np.uint8)
    image[:] = colours.repeat(height // 2, axis=0).repeat(width // 2, axis=1)
    return image


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()
