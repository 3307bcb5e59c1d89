"""Open the file that is named, and nothing else; find the film in it."""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import av
import av.error

from ds_lvxattn.data.media.complete import is_cut_off
from ds_lvxattn.data.media.unreadable import what_it_is
from ds_lvxattn.data.sample import SampleError

# Pixels of a picture, at most, checked before it is decoded: 300 MB as RGB.
MAX_PIXELS = 100_000_000

# Containers that hold a film in one file. Those that name other files (playlists, image sequences, concat scripts)
# or devices are not among them, so whatever a file says, no second one is opened.
CONTAINERS = (
    "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,vob,m4v,flv,asf,ogg,ivf,gif,apng,nut,mxf,dv,wtv,rm,h261,h263,"
    "h264,hevc,vvc,av1,obu,vc1,mjpeg,yuv4mpegpipe,swf,nsv,nuv,amv,bink,smk,roq,film_cpk,flic,ty,pva,gxf,jpegxl_anim"
)
OPTIONS = {"protocol_whitelist": "file", "format_whitelist": CONTAINERS, "max_pixels": str(MAX_PIXELS)}
# Of a decoder. Errors are told, not concealed: a picture made up from its neighbours is not what the file holds.
STRICT = {"err_detect": "crccheck+bitstream+buffer+explode", "max_pixels": str(MAX_PIXELS)}
# The pictures of a HEIF file are tracks of tiles: FFmpeg's streams are single tiles, not the picture.
HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1", b"mif2", b"avif", b"avis"}


class MediaError(SampleError):
    """A missing, empty, damaged or unreadable video or image; the message names the path and the cause."""


def check_file(path: str) -> os.stat_result:
    """``os.stat`` of a file with content.

    Raises:
        MediaError: ``path`` is no name of a file, or names a folder, a pipe, a device or an empty file.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise MediaError(f"{path}: {error.strerror}{_why_not_there(path, error)}") from error
    except ValueError as error:  # a NUL, or characters that no file name has
        raise MediaError(f"{path!r}: not a path ({error})") from error
    if not stat.S_ISREG(status.st_mode):
        raise MediaError(f"{path}: not a regular file; give a video or an image")
    if status.st_size == 0:
        raise MediaError(f"{path}: the file is empty")
    return status


def _why_not_there(path: str, error: OSError) -> str:
    """What a path that names no file was perhaps meant to be."""
    if error.errno == errno.ENAMETOOLONG:
        return "; an embedded medium begins with data:...;base64,"
    if error.errno != errno.ENOENT:
        return ""
    if "\\" in path:
        return "; folders are separated by / here"
    if any(part.startswith(("~", "$")) for part in path.split("/")):
        return "; ~ and variables are not replaced"
    return "; a name in it begins or ends with white space" if any(n != n.strip() for n in path.split("/")) else ""


def check_sha256(source: str | bytes, expected: str) -> None:
    """Read a file, or an embedded medium, and compare it with its SHA-256: damage that breaks no syntax is found too.

    A file is read once for as long as it is not written.

    Raises:
        MediaError: it is another, or cannot be read.
    """
    if isinstance(source, bytes):
        name, found = "an embedded medium", hashlib.sha256(source).hexdigest()
    else:
        status = check_file(source)
        name, found = source, _sha256(source, status.st_mtime_ns, status.st_size)
    if found != expected:
        raise MediaError(f"{name}: damaged, or another file: its SHA-256 is {found}, and the row has {expected}")


@functools.lru_cache(maxsize=1 << 16)
def _sha256(path: str, mtime_ns: int, size: int) -> str:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise MediaError(f"{path}: {error.strerror}") from error
    return digest.hexdigest()


@contextmanager
def open_film(path: str) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """A container and its film. Every failure of FFmpeg inside the block becomes a ``MediaError``."""
    check_file(path)
    _refuse_heif(path)
    try:
        # As a URL with a protocol, an absolute path is a path, whatever characters are in it.
        with av.open(f"file:{os.path.abspath(path)}", options=OPTIONS, metadata_errors="replace") as container:
            film = _film(container, path)
            discard = getattr(av.stream, "Discard", None)  # which older versions of PyAV do not set
            for stream in container.streams:
                if discard is not None and stream.index != film.index:
                    stream.discard = discard.all  # sound is not read from disk
            yield container, film
    except (MediaError, av.error.FFmpegError, OSError) as error:
        if is_cut_off(path):
            raise MediaError(f"{path}: damaged: the file is cut off") from error
        if isinstance(error, MediaError):
            raise
        raise MediaError(f"{path}: cannot decode: {error.strerror or error}{what_it_is(path)}") from error


def _film(container: av.container.InputContainer, path: str) -> av.VideoStream:
    """The stream that a player shows: not cover art or thumbnails; the default one, or else the first."""
    streams = container.streams.video
    pictures = av.stream.Disposition.attached_pic | av.stream.Disposition.timed_thumbnails
    films = [stream for stream in streams if not stream.disposition & pictures]
    if not films:
        raise MediaError(f"{path}: no video stream" + (", only cover art" if streams else ""))
    film = next((stream for stream in films if stream.disposition & av.stream.Disposition.default), films[0])
    if film.codec_context is None:
        raise MediaError(f"{path}: cannot decode: FFmpeg has no decoder for its video codec")
    return film


def _refuse_heif(path: str) -> None:
    with open(path, "rb") as file:
        size, kind = int.from_bytes(file.read(4), "big"), file.read(4)
        if kind != b"ftyp":
            return
        brands = file.read(max(min(size, 1 << 12) - 8, 0))
        named = {brands[at : at + 4] for at in range(0, len(brands), 4) if at != 4}  # what comes second is a version
        # A film may be made to hold a picture too; it has an index of packets, and a picture has none.
        if brands[:4] in HEIF_BRANDS or (named & HEIF_BRANDS and b"moov" not in _boxes(file, size)):
            raise MediaError(f"{path}: HEIF images are not read; convert it to JPEG, PNG or AVIF")


def _boxes(file: BinaryIO, at: int) -> set[bytes]:
    """Kinds of the boxes of an MP4 file from a place on."""
    found: set[bytes] = set()
    for _ in range(64):
        file.seek(at)
        head = file.read(16)
        if len(head) < 8:
            break
        size = int.from_bytes(head[:4], "big")
        size = int.from_bytes(head[8:16], "big") if size == 1 else size
        found.add(head[4:8])
        if size < 8:  # to the end of the file
            break
        at += size
    return found
