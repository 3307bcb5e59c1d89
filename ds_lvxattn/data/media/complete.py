"""Whether a file holds all that it says it holds."""

from __future__ import annotations

import os
from typing import BinaryIO

from ds_lvxattn.data.media.last_unit import ends_inside_a_unit

EBML, SEGMENT = bytes.fromhex("1a45dfa3"), bytes.fromhex("18538067")
MP4 = (b"ftyp", b"moov", b"mdat", b"wide")  # what an MP4 or QuickTime file begins with
ASF, ASF_FILE = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c"), bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
RIFF_SLACK = 8  # some count the eight bytes of the head with what follows it


def is_cut_off(path: str) -> bool:
    """Whether a Matroska, WebM, MP4, AVI, WebP or ASF file ends ahead of what it tells, or one of other kinds inside a
    unit (``last_unit``); False where it cannot be told.

    FFmpeg reads such a file up to its end and says nothing; of MP4, that is one of fragments, each of which is whole.
    An MP4 file whose list of frames was never written, or is lost, is cut off too.
    """
    end = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(1 << 12)
        if head[4:8] in MP4:
            return _boxes_are_cut_off(file, end)
        if ends_inside_a_unit(file, end):
            return True
    if head[:4] == b"RIFF":
        told = int.from_bytes(head[4:8], "little")
        return 0 < told < 0xFFFFFFFF and end + RIFF_SLACK < 8 + told  # what was streamed tells no size
    if head.startswith(ASF):
        at = head.find(ASF_FILE)
        streamed = at < 0 or len(head) < at + 92 or head[at + 88] & 1
        return not streamed and end < int.from_bytes(head[at + 40 : at + 48], "little")
    if head[:4] != EBML:
        return False
    length, at = _size(head, 4)
    if length is None or head[at + length : at + length + 4] != SEGMENT:
        return False
    size, at = _size(head, at + length + 4)
    return size is not None and at + size > end


def _boxes_are_cut_off(file: BinaryIO, end: int) -> bool:
    """Whether an MP4 file has no list of its pictures, or a box of media in it is longer than what is left of it."""
    at, kind, kinds = 0, b"", set()
    while at + 8 <= end:
        file.seek(at)
        head = file.read(16)
        size, kind = int.from_bytes(head[:4], "big"), head[4:8]
        kinds.add(kind)
        size = int.from_bytes(head[8:16], "big") if size == 1 else size
        if size < 8:  # to the end of the file
            return not kinds & {b"moov", b"meta"}
        at += size
    if not kinds & {b"moov", b"meta"}:
        return True
    return at > end and kind in (b"mdat", b"moof", b"moov")  # what else stands behind them is no part of the film


def _size(data: bytes, at: int) -> tuple[int | None, int]:
    """A size of variable width and where it ends; None: not known, as in what was streamed."""
    width = 9 - data[at].bit_length()
    value = int.from_bytes(data[at : at + width], "big") & ((1 << 7 * width) - 1)
    return (None if value == (1 << 7 * width) - 1 else value), at + width
