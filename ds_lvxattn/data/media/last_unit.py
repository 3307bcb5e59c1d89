"""Whether a film ends inside one of its units: the tags, pages, packets or frames that its file is a row of.

Such a file tells no size of the whole, and FFmpeg reads it up to its end and says nothing. One that ends between two
units may be whole: a recording ends where it was stopped.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import BinaryIO

# Of a unit by its first bytes: its size, or ``CUT`` where they are too few to tell; None: it is no unit.
SizeOf = Callable[[bytes], int | None]
HEAD, CUT = 1 << 10, 1 << 62
TAIL = 1 << 18  # bytes in which a unit begins, wherever they are

TRANSPORT_PACKETS = ((188, 0), (192, 4), (204, 0))  # bytes of one, and those ahead of its first
SYNC = 0x47  # the first
START, PACK, END, SYSTEM = b"\x00\x00\x01", b"\x00\x00\x01\xba", 0xB9, 0xBB  # of an MPEG program stream
FLV, FLV_TAGS = b"FLV\x01", (8, 9, 18)
OGG, IVF = b"OggS\x00", b"DKIF"
MXF = bytes.fromhex("060e2b34")
Y4M, FRAME = b"YUV4MPEG2 ", b"FRAME"
# Colour spaces of Y4M: whole planes, and pixels, across and down, for a sample of each of two more.
PLANES = {
    "420": (1, 2, 2),
    "411": (1, 4, 1),
    "422": (1, 2, 1),
    "444": (3, 0, 0),
    "444alpha": (4, 0, 0),
    "mono": (1, 0, 0),
}


def ends_inside_a_unit(file: BinaryIO, end: int) -> bool:
    """Whether the last unit of ``file``, of ``end`` bytes, is not whole; False where that cannot be told.

    Known are MPEG transport and program streams, FLV, Ogg, IVF, MXF and Y4M.
    """
    file.seek(0)
    head = file.read(HEAD)
    if head.startswith(FLV):
        return _flv(file, end, int.from_bytes(head[5:9], "big"))
    if head.startswith(PACK):
        return _near_the_end(file, end, PACK, _program_unit)
    if head.startswith(OGG):
        return _near_the_end(file, end, OGG, _ogg_page)
    if head.startswith(IVF):
        return bool(_walk(file, end, int.from_bytes(head[6:8], "little"), _ivf_frame))
    if head.startswith(MXF):
        return bool(_walk(file, end, 0, _mxf_unit))
    if head.startswith(Y4M):
        return _y4m(file, end, head)
    return any(_transport(file, end, head, *packet) for packet in TRANSPORT_PACKETS)


def _walk(file: BinaryIO, end: int, at: int, size_of: SizeOf) -> bool | None:
    """Whether the last of the units from ``at`` on is not whole; None where something else stands among them."""
    while at < end:
        file.seek(at)
        size = size_of(file.read(HEAD))
        if size is None:
            return None
        at += size
    return at > end


def _near_the_end(file: BinaryIO, end: int, sign: bytes, size_of: SizeOf) -> bool:
    """The same of those from the first unit with ``sign`` in the tail of the file; False where there is none."""
    begin = max(end - TAIL, 0)
    file.seek(begin)
    tail, at = file.read(TAIL), -1
    while (at := tail.find(sign, at + 1)) >= 0:
        if (found := _walk(file, end, begin + at, size_of)) is not None:
            return found
    return False


def _transport(file: BinaryIO, end: int, head: bytes, size: int, ahead: int) -> bool:
    whole, rest = divmod(end, size)
    if whole < 3 or not rest or any(head[at] != SYNC for at in range(ahead, 3 * size, size)):
        return False
    file.seek((whole - 1) * size)
    last = file.read(2 * size)
    return last[ahead] == SYNC and (rest <= ahead or last[size + ahead] == SYNC)


def _program_unit(head: bytes) -> int | None:
    if not head.startswith(START):
        return None
    if len(head) == len(START):
        return CUT
    if head[3] == END:
        return 4
    if head[3] == PACK[3]:
        if len(head) < 14:
            return CUT
        return 14 + (head[13] & 7) if head[4] >> 6 == 1 else 12 if head[4] >> 4 == 2 else None  # of MPEG-2, MPEG-1
    if head[3] < SYSTEM:
        return None
    return 6 + int.from_bytes(head[4:6], "big") if len(head) >= 6 else CUT


def _ogg_page(head: bytes) -> int | None:
    if not head.startswith(OGG):
        return None
    if len(head) < 27 or len(head) < 27 + head[26]:
        return CUT
    return 27 + head[26] + sum(head[27 : 27 + head[26]])


def _ivf_frame(head: bytes) -> int:
    return 12 + int.from_bytes(head[:4], "little") if len(head) >= 12 else CUT


def _mxf_unit(head: bytes) -> int | None:
    if not head.startswith(MXF):
        return None
    more = head[16] & 0x7F if len(head) > 16 and head[16] & 0x80 else 0  # bytes of a size that is no small one
    if len(head) < 17 + more:
        return CUT
    return 17 + more + (int.from_bytes(head[17 : 17 + more], "big") if more else head[16])


def _flv_tag(head: bytes) -> int | None:
    if not head or head[0] & 0x1F not in FLV_TAGS:
        return None
    return 11 + int.from_bytes(head[1:4], "big") + 4 if len(head) >= 4 else CUT


def _flv(file: BinaryIO, end: int, begin: int) -> bool:
    """Behind each tag stands its size; behind the last one not in every file."""
    file.seek(end - 4)
    last = end - 4 - int.from_bytes(file.read(4), "big")
    file.seek(max(last, begin))
    if last + (_flv_tag(file.read(HEAD)) or CUT) == end:
        return False
    return bool(_walk(file, end + 4, begin + 4, _flv_tag))


def _y4m(file: BinaryIO, end: int, head: bytes) -> bool:
    line = head.partition(b"\n")[0].decode("latin-1")
    told = {word[0]: word[1:] for word in line.split()[1:]}
    space = re.fullmatch(r"(\d+alpha|\d+|mono)(?:p?(\d+)|jpeg|mpeg2|paldv)?", told.get("C", "420"))
    sides = told.get("W", ""), told.get("H", "")
    if space is None or space[1] not in PLANES or not all(map(str.isdecimal, sides)):
        return False
    width, height = map(int, sides)
    planes, across, down = PLANES[space[1]]
    samples = planes * width * height + (2 * -(-width // across) * -(-height // down) if across else 0)
    content = samples * (2 if int(space[2] or 8) > 8 else 1)

    def frame(head: bytes) -> int | None:
        if not head.startswith(FRAME):
            return CUT if FRAME.startswith(head) else None
        return head.find(b"\n") + 1 + content if b"\n" in head else CUT

    return bool(_walk(file, end, len(line) + 1, frame))
