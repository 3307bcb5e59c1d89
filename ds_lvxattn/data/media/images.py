"""Still and animated images: from a file or embedded, decoded alike."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, BinaryIO

import av
import av.error
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ds_lvxattn.data.media.files import MAX_PIXELS, STRICT, MediaError, check_file
from ds_lvxattn.data.media.picture import Size, fitted
from ds_lvxattn.data.media.timeline import VideoInfo, still
from ds_lvxattn.data.media.unreadable import what_it_is

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA", "QOI", "ICO", "PCX", "SGI")
ANIMATED = {"GIF", "WEBP", "PNG", "AVIF"}  # a TIFF's pages and an icon's sizes are no film
PNG = b"\x89PNG\r\n\x1a\n"
PNG_TEXT = (b"tEXt", b"zTXt", b"iTXt")
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
MOTION_JPEG = (".mjpeg", ".mjpg")  # frames in a row, without a container: begins like an image
DEFAULT_MS = 100  # what browsers give a frame of an animation that says nothing, or next to nothing
SHORTEST_MS = 11
ORIENTATION = 0x0112  # of EXIF
ON_ITS_SIDE = (5, 6, 7, 8)
TURNED_BY_PILLOW = "TIFF"  # of which Pillow gives the upright size, and turns it as it is decoded
TURNED_BACK = {6: 8, 8: 6}  # the other orientations undo themselves


def is_image(path: str) -> bool:
    """Whether a file is an image by its content, and not a film."""
    check_file(path)
    if path.lower().endswith(MOTION_JPEG):
        return False
    try:
        with Image.open(path, formats=FORMATS):
            return True
    except UnidentifiedImageError:
        return False
    except Exception:
        return True  # a broken one: decoding says what is wrong


def image_info(source: str | bytes, upright: bool = True) -> VideoInfo:
    """Size and frames of an image, with the times of an animation.

    Raises:
        MediaError: missing, broken or not an image.
    """
    with _opened(source) as (image, _):
        width, height = image.size
        if _orientation(image) in ON_ITS_SIDE and upright is not (image.format == TURNED_BY_PILLOW):
            width, height = height, width
        count = getattr(image, "n_frames", 1) if image.format in ANIMATED else 1
        if count == 1:
            return still(width, height)
        starts, now = [], 0
        for number in range(count):
            image.seek(number)
            image.load()
            shown = round(image.info.get("duration") or 0)
            starts.append(now)
            now += shown if shown >= SHORTEST_MS else DEFAULT_MS
        return VideoInfo(width, height, np.array(starts, dtype=np.int64), now, Fraction(1, 1000))


def decode_image(
    source: str | bytes, numbers: Sequence[int], size: Size = None, upright: bool = True
) -> dict[int, np.ndarray]:
    """Frames of an image by number: uint8 RGB ``[height, width, 3]``. Transparent parts are white.

    Args:
        source: a path, or an encoded image.
        numbers: 0 for a still image.
        size: of the frames; a JPEG that gets smaller does so while it is decoded.
        upright: turned by its EXIF orientation; or as it is stored.

    Raises:
        MediaError: missing, broken or not an image; pixels without an agreed range (floating point).
    """
    frames = {}
    with _opened(source) as (image, file):
        if image.format in ("JPEG", "MPO"):
            _check_jpeg(file)
        target = fitted(*image.size, size)
        if target != image.size:
            image.draft("RGB", target)  # a JPEG is decoded smaller, but no smaller than that
        for number in sorted(set(numbers)):
            if number or image.format in ANIMATED:
                image.seek(number)
            orientation = _orientation(image)
            shown = _rgb(image)
            if target != shown.size:
                shown = shown.resize(target, Image.Resampling.BOX)
            if image.format == TURNED_BY_PILLOW:
                turn = 1 if upright else TURNED_BACK.get(orientation, orientation)
            else:
                turn = orientation if upright else 1
            if turn != 1:
                shown.getexif()[ORIENTATION] = turn
                shown = ImageOps.exif_transpose(shown)
            frames[number] = np.asarray(shown)
    return frames


@contextmanager
def _opened(source: str | bytes) -> Iterator[tuple[Image.Image, BinaryIO]]:
    """An image, of which only the header has been read, and its file. What Pillow raises becomes a ``MediaError``."""
    name = source if isinstance(source, str) else "an embedded image"
    try:
        if isinstance(source, str):
            check_file(source)
        with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
            is_png = file.read(len(PNG)) == PNG
            file.seek(0)
            whole = io.BytesIO(_without_text(file.read())) if is_png else file
            with Image.open(whole, formats=FORMATS) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise MediaError(f"{name}: {width} x {height} pixels; at most {MAX_PIXELS:,} are decoded")
                yield image, whole
    except MediaError as error:
        raise error if name in str(error) else MediaError(f"{name}: {error}") from error
    except UnidentifiedImageError as error:
        known = what_it_is(source, image=True) or f" of the formats {', '.join(FORMATS)}"
        raise MediaError(f"{name} cannot be decoded: not an image{known}") from error
    except Exception as error:  # decoders raise what they like
        raise MediaError(f"{name} cannot be decoded: {type(error).__name__}: {error}{what_it_is(source)}") from error


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation that an image is stored with; known ahead of its pixels, and of a TIFF only then."""
    return int(image.getexif().get(ORIENTATION, 1))


def _check_jpeg(file: BinaryIO) -> None:
    """Raise ``MediaError`` for a JPEG with missing or damaged data, which Pillow fills with grey in silence."""
    place = file.tell()  # Pillow reads on from here
    file.seek(0)
    data = file.read()
    file.seek(place)
    decoder: Any = av.CodecContext.create("mjpeg", "r")
    decoder.thread_count = 1
    decoder.options = STRICT
    try:
        frames = [*decoder.decode(av.Packet(data)), *decoder.decode(None)]
    except av.error.InvalidDataError as error:
        raise MediaError(f"an image is damaged: {error.strerror}") from error
    except av.error.FFmpegError:
        return  # a JPEG that FFmpeg does not know
    if any(frame.is_corrupt for frame in frames):
        raise MediaError("an image is damaged: what is missing was made up")


def _without_text(data: bytes) -> bytes:
    """A PNG without its comments, which may be larger than Pillow reads."""
    kept, at = [PNG], len(PNG)
    while at + 8 <= len(data):
        stop = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] not in PNG_TEXT:
            kept.append(data[at:stop])
        at = stop
    return b"".join(kept)


def _rgb(image: Image.Image) -> Image.Image:
    """The present frame in 8-bit RGB: 16 bits are scaled, and what is transparent is white."""
    image.load()
    if image.mode in SIXTEEN_BITS:
        return Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise MediaError(f"an image of the mode {image.mode!r} has no agreed range; store 8 or 16 bits a channel")
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours).convert("RGB")
    return image.convert("RGB")
