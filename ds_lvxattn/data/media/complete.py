"""Whether a file holds all that it says it holds."""

from __future__ import annotations

import os
from typing import BinaryIO

EBML, SEGMENT = bytes.fromhex("1a45dfa3"), bytes.fromhex("18538067")


def is_cut_off(path: str) -> bool:
    """Whether a Matroska, WebM or MP4 file ends ahead of the sizes that it tells; False for other files.

    FFmpeg reads such a file up to its end and says nothing; of MP4, that is one of fragments, each of which is whole.
    """
    with open(path, "rb") as file:
        head = file.read(128)
        if head[4:8] == b"ftyp":
            return _last_box_is_cut_off(file, os.path.getsize(path))
    if head[:4] != EBML:
        return False
    length, at = _size(head, 4)
    if length is None or head[at + length : at + length + 4] != SEGMENT:
        return False
    size, at = _size(head, at + length + 4)
    return size is not None and at + size > os.path.getsize(path)


def _last_box_is_cut_off(file: BinaryIO, end: int) -> bool:
    """Whether a box of media in an MP4 file says that it is longer than what is left of the file."""
    at, kind = 0, b""
    while at + 8 <= end:
        file.seek(at)
        head = file.read(16)
        size, kind = int.from_bytes(head[:4], "big"), head[4:8]
        size = int.from_bytes(head[8:16], "big") if size == 1 else size
        if size < 8:  # to the end of the file
            return False
        at += size
    return at > end and kind in (b"mdat", b"moof", b"moov")  # what else stands behind them is no part of the film


def _size(data: bytes, at: int) -> tuple[int | None, int]:
    """A size of variable width and where it ends; None: not known, as in what was streamed."""
    width = 9 - data[at].bit_length()
    value = int.from_bytes(data[at : at + width], "big") & ((1 << 7 * width) - 1)
    return (None if value == (1 << 7 * width) - 1 else value), at + width
