"""Whether a file holds all that it says it holds."""

from __future__ import annotations

import os

EBML, SEGMENT = bytes.fromhex("1a45dfa3"), bytes.fromhex("18538067")


def is_cut_off(path: str) -> bool:
    """Whether a Matroska or WebM file ends ahead of the size that it begins with; False for other files.

    FFmpeg reads such a file up to its end and says nothing. In MP4 it marks the last packet.
    """
    with open(path, "rb") as file:
        head = file.read(128)
    if head[:4] != EBML:
        return False
    length, at = _size(head, 4)
    if length is None or head[at + length : at + length + 4] != SEGMENT:
        return False
    size, at = _size(head, at + length + 4)
    return size is not None and at + size > os.path.getsize(path)


def _size(data: bytes, at: int) -> tuple[int | None, int]:
    """A size of variable width and where it ends; None: not known, as in what was streamed."""
    width = 9 - data[at].bit_length()
    value = int.from_bytes(data[at : at + width], "big") & ((1 << 7 * width) - 1)
    return (None if value == (1 << 7 * width) - 1 else value), at + width
