"""An AVIF whose picture is a row of tiles, as cameras write large ones: no encoder at hand makes it."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence

from PIL import Image


def tiled_avif(tiles: Sequence[Image.Image]) -> bytes:
    """The tiles, squares of one size, side by side as one picture."""
    files, side, count = [_encoded(tile) for tile in tiles], tiles[0].width, len(tiles)
    properties = [
        p for p in _boxes(_inside(files[0], b"meta", b"iprp", b"ipco")) if p[4:8] in (b"av1C", b"pixi", b"colr")
    ]
    sizes = [_box(b"ispe", struct.pack(">II", width, side), version=0) for width in (side, side * count)]
    kinds = {p[4:8]: number for number, p in enumerate(properties, 3)}
    of_whole = bytes([2, *(number for kind, number in kinds.items() if kind != b"av1C")])
    of_tile = bytes([1, *(number | 0x80 * (kind == b"av1C") for kind, number in kinds.items())])  # essential
    uses = [(1, of_whole), *((number, of_tile) for number in range(2, count + 2))]
    ipma = [struct.pack(">HB", number, len(use)) + use for number, use in uses]
    iprp = _box(
        b"iprp", _box(b"ipco", *sizes, *properties), _box(b"ipma", struct.pack(">I", count + 1), *ipma, version=0)
    )
    entries = [_entry(1, b"grid"), *(_entry(number, b"av01", hidden=1) for number in range(2, count + 2))]
    iinf = _box(b"iinf", struct.pack(">H", count + 1), *entries, version=0)
    tile_numbers = struct.pack(f">{count}H", *range(2, count + 2))
    iref = _box(b"iref", _box(b"dimg", struct.pack(">HH", 1, count), tile_numbers), version=0)
    hdlr = _box(b"hdlr", bytes(4), b"pict", bytes(13), version=0)
    pitm = _box(b"pitm", struct.pack(">H", 1), version=0)
    ftyp = _box(b"ftyp", b"avif", bytes(4), b"avifmif1miaf")
    layout = struct.pack(">BBBBHH", 0, 0, 0, count - 1, side * count, side)
    items = [layout, *(_inside(file, b"mdat") for file in files)]

    def meta(offset: int) -> bytes:
        places = b""
        for number, data in enumerate(items, 1):
            places += struct.pack(">HHHII", number, 0, 1, offset, len(data))
            offset += len(data)
        iloc = _box(b"iloc", b"\x44\0", struct.pack(">H", len(items)), places, version=0)
        return _box(b"meta", hdlr, pitm, iloc, iinf, iref, iprp, version=0)

    return ftyp + meta(len(ftyp) + len(meta(0)) + 8) + _box(b"mdat", *items)


def _encoded(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "AVIF", quality=95, subsampling="4:4:4")
    return buffer.getvalue()


def _box(kind: bytes, *content: bytes, version: int | None = None, flags: int = 0) -> bytes:
    head = b"" if version is None else struct.pack(">I", version << 24 | flags)
    body = head + b"".join(content)
    return struct.pack(">I", len(body) + 8) + kind + body


def _entry(number: int, kind: bytes, hidden: int = 0) -> bytes:
    return _box(b"infe", struct.pack(">HH", number, 0) + kind + b"\0", version=2, flags=hidden)


def _boxes(data: bytes) -> list[bytes]:
    found, at = [], 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        found.append(data[at : at + size])
        at += size
    return found


def _inside(data: bytes, *kinds: bytes) -> bytes:
    """Content of the box at a path of kinds."""
    for kind in kinds:
        [box] = [box for box in _boxes(data) if box[4:8] == kind]
        data = box[12:] if kind == b"meta" else box[8:]
    return data
