"""What a file that no decoder takes was perhaps meant to be, by how it begins."""

from __future__ import annotations

import errno

from ds_lvxattn.data.media.complete import ASF, EBML, MP4, is_cut_off

BEGINNINGS = (
    (b"version https://git-lfs.github.com/spec/", "it is a pointer of Git LFS; git lfs pull fetches the file itself"),
    (b"PK\x03\x04", "it is a ZIP archive; unpack it"),
    (b"\x1f\x8b", "it is compressed with gzip; unpack it"),
    (b"\x28\xb5\x2f\xfd", "it is compressed with Zstandard; unpack it"),
    (b"\xfd7zXZ\x00", "it is compressed with xz; unpack it"),
    (b"%PDF", "it is a PDF"),
    (b"\x93NUMPY", "it is an array of NumPy; write its frames as images, or as a video"),
    (b"ID3", "it is sound alone"),
    (b"#EXTM3U", "it is a playlist, which names other files"),
)
MARKUP = (b"<!doctype html", b"<html", b"{")  # what servers answer instead of a file
XML = (b"<?xml", b"<svg")
FILMS = (EBML, ASF, b"FLV")
READ = 1 << 12


def what_it_is(source: str | bytes, image: bool = False) -> str:
    """What to add to the message about a file, or an embedded medium, that cannot be decoded; empty: nothing is known.

    Args:
        image: it was read as an image.
    """
    try:
        head = source[:READ] if isinstance(source, bytes) else _head(source)
        cut_off = isinstance(source, str) and is_cut_off(source)
    except OSError as error:  # it cannot be opened once more
        return "; raise the limit of open files (ulimit -n)" if error.errno in (errno.EMFILE, errno.ENFILE) else ""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    found = next((said for start, said in BEGINNINGS if head.startswith(start)), "")
    if not found and text.startswith(MARKUP):
        found = "it is a web page or a message, such as a download that failed leaves"
    elif not found and text.startswith(XML):
        found = "it is XML, such as an SVG drawing; drawings of lines are not read"
    elif not found and not head.strip(b"\0"):
        found = "it begins with zeros alone, as an unfinished download or copy does"
    elif not found and cut_off:
        found = "the file is cut off"
    elif not found and image and (head[4:8] in MP4 or head.startswith(FILMS) or head[8:12] == b"AVI "):
        found = "it is a video; give it under 'video'"
    return f"; {found}" if found else ""


def _head(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(READ)
