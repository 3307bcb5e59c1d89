"""Decode chosen frames of a film, from the key frames before them, and keep no others."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import av
import av.error
import numpy as np

from ds_lvxattn.data.media.files import MAX_PIXELS, MediaError, open_film
from ds_lvxattn.data.media.index import PROGRESSIVE, FilmIndex, film_index
from ds_lvxattn.data.media.picture import Size, as_shown

# Errors are told instead of concealed: a picture made up from its neighbours is not what the file holds.
STRICT = {"err_detect": "crccheck+bitstream+buffer+explode", "max_pixels": str(MAX_PIXELS)}
# Codecs whose frames say that no other refers to them; those that are not asked for are then not decoded.
SKIPS_UNREFERENCED = frozenset(["h264", "mpeg1video", "mpeg2video", "mpeg4"])


def decode_film(path: str, numbers: Sequence[int], size: Size = None) -> dict[int, np.ndarray]:
    """Frames of a film by number: uint8 RGB ``[height, width, 3]``, as a player shows them.

    Decoding starts at the key frame before each run of wanted frames, so a few frames of a long film cost a few groups
    of pictures. One thread decodes: ``groups`` divides the work of several.

    Args:
        size: of the frames; they are scaled one by one as they are decoded.

    Raises:
        MediaError: the file is missing or broken, or what these frames are decoded from is damaged.
    """
    index = film_index(path)
    frames: dict[int, np.ndarray] = {}
    for run in groups(index, numbers):
        for target in _targets(index, run):
            with open_film(path) as (container, stream):
                if not _seek(container, stream, target):
                    continue
                aspect = stream.sample_aspect_ratio
                for number, frame in _walk(path, container, stream, index, run):
                    frames[number] = as_shown(frame, aspect, size)
            if frames.keys() >= set(run):
                break
    missing = sorted(set(numbers) - frames.keys())
    if missing:
        raise MediaError(f"{path}: frames {missing[:8]} cannot be decoded, the file is damaged")
    return frames


def groups(index: FilmIndex, numbers: Collection[int]) -> list[list[int]]:
    """``numbers`` in ascending order, without repeats, by the key frame that they are decoded from."""
    runs: dict[int, list[int]] = {}
    for number in sorted(set(numbers)):
        runs.setdefault(int(index.key_of[number]), []).append(number)
    return list(runs.values())


def _targets(index: FilmIndex, run: list[int]) -> list[int | None]:
    """Where to seek to for the key frame of ``run``, one after the other until it is found; None: read from the start.

    Formats differ in what they seek by, and some arrive behind what was asked for.
    """
    if index.stamps is None:
        return [None]
    key = int(index.key_of[run[0]])
    return [*index.keys[key].tolist(), int(index.keys[max(key - 2, 0)].min()), None]


def _seek(container: av.container.InputContainer, stream: av.VideoStream, target: int | None) -> bool:
    if target is None:
        return True
    try:
        container.seek(target, stream=stream)
    except av.error.FFmpegError:
        return False  # a format without seeking
    return True


def _walk(
    path: str, container: av.container.InputContainer, stream: av.VideoStream, index: FilmIndex, run: list[int]
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Yield ``(number, frame)`` of ``run``, frames of one group, if the key frame comes from here on."""
    context = stream.codec_context
    context.thread_count = 1
    context.options = STRICT
    if index.stamps is None:
        yield from _count(path, container, stream, run)
        return
    wanted = {int(index.stamps[number]): number for number in run}
    last, start = max(wanted), int(index.keys[index.key_of[run[0]]][0])
    skips = context.name in SKIPS_UNREFERENCED and context.field_order in PROGRESSIVE
    for packet in _packets_from(container, stream, start):
        if skips and packet.size:
            context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
        try:
            frames = packet.decode()
        except av.error.InvalidDataError as error:
            if packet.pts is not None and packet.pts < start:
                continue  # a leading frame: it refers to what is ahead of the key frame, and nothing to it
            raise MediaError(f"{path}: damaged {_place(packet, index)}: {error.strerror}") from error
        for frame in frames:
            if frame.pts is None or frame.pts < start:
                continue
            if frame.is_corrupt:
                raise MediaError(f"{path}: damaged {_place(frame, index)}: what is missing was made up")
            if frame.pts in wanted:
                yield wanted[frame.pts], frame
            if frame.pts >= last:
                return


def _packets_from(container: av.container.InputContainer, stream: av.VideoStream, start: int) -> Iterator[av.Packet]:
    """Packets from the key frame at ``start`` on; none when the container is behind it already."""
    found = False
    for packet in container.demux(stream):
        if not found and packet.is_keyframe and packet.pts is not None:
            if packet.pts > start:
                return
            found = packet.pts == start
        if found:
            yield packet


def _place(at: av.Packet | av.VideoFrame, index: FilmIndex) -> str:
    if at.pts is None or index.stamps is None:
        return "near the end"
    return f"near {float((at.pts - int(index.stamps[0])) * index.info.unit):.2f} s"


def _count(
    path: str, container: av.container.InputContainer, stream: av.VideoStream, run: list[int]
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Yield ``(number, frame)`` of the ascending ``run``, decoding from the first frame and counting."""
    targets, number, started = set(run), 0, False
    for packet in container.demux(stream):
        started = started or packet.is_keyframe
        if not started:
            continue
        try:
            frames = packet.decode()
        except av.error.InvalidDataError as error:
            raise MediaError(f"{path}: damaged near frame {number}: {error.strerror}") from error
        for frame in frames:
            if frame.is_corrupt:
                raise MediaError(f"{path}: damaged near frame {number}: what is missing was made up")
            if number in targets:
                yield number, frame
            number += 1
            if number > run[-1]:
                return
