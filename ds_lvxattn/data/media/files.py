"""Open the file that is named, and nothing else; find the film in it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

import av
import av.error

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
        raise MediaError(f"{path}: {error.strerror}") from error
    except ValueError as error:  # a NUL, or characters that no file name has
        raise MediaError(f"{path!r}: not a path ({error})") from error
    if not stat.S_ISREG(status.st_mode):
        raise MediaError(f"{path}: not a regular file; give a video or an image")
    if status.st_size == 0:
        raise MediaError(f"{path}: the file is empty")
    return status


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
    except (av.error.FFmpegError, OSError) as error:
        raise MediaError(f"{path}: cannot decode: {error.strerror or error}") from error


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
        start = file.read(12)
    if start[4:8] == b"ftyp" and start[8:12] in HEIF_BRANDS:
        raise MediaError(f"{path}: HEIF images are not read; convert it to JPEG, PNG or AVIF")
