"""Decode chosen frames of a film, from the key frames before them, and keep no others."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import av
import av.error
import numpy as np

from ds_lvxattn.data.media.files import STRICT, MediaError, open_film
from ds_lvxattn.data.media.index import FilmIndex, film_index, is_frame_by_packet
from ds_lvxattn.data.media.picture import Size, as_shown, fitted

# Codecs whose frames say that no other refers to them; those that are not asked for are then not decoded.
SKIPS_UNREFERENCED = frozenset(["h264", "mpeg1video", "mpeg2video", "mpeg4"])


class _DamageError(MediaError):
    """The decoder gives out an error, or a picture that it made up."""


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
    # One size for all, as a player's window has, also where the stored one changes along the film.
    size = fitted(index.info.width, index.info.height, size)
    frames: dict[int, np.ndarray] = {}
    for run in groups(index, numbers):
        frames |= _decode_group(path, index, run, size)
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


def _decode_group(path: str, index: FilmIndex, run: list[int], size: Size) -> dict[int, np.ndarray]:
    """Frames of one group, as far as they are found."""
    key = int(index.key_of[run[0]])
    try:
        return _decode_from(path, index, run, size, key)
    except _DamageError:
        # Behind an open group of pictures, what the decoder misses may be ahead of the key frame, and sound.
        if key == 0 or index.stamps is None:
            raise
        return _decode_from(path, index, run, size, key - 1)


def _decode_from(path: str, index: FilmIndex, run: list[int], size: Size, key: int) -> dict[int, np.ndarray]:
    """Frames of one group, decoded from the key frame ``key``: its own or the one before."""
    frames: dict[int, np.ndarray] = {}
    for target in _targets(index, key):
        with open_film(path) as (container, stream):
            if not _seek(container, stream, target):
                continue
            aspect = stream.sample_aspect_ratio
            for number, frame in _walk(path, container, stream, index, run, int(index.keys[key][0])):
                frames[number] = as_shown(frame, aspect, size)
        if len(frames) == len(run):
            break
    return frames


def _targets(index: FilmIndex, key: int) -> list[int | None]:
    """Where to seek to for a key frame, one after the other until it is found; None: read from the start.

    Formats differ in what they seek by, and some arrive behind what was asked for.
    """
    if index.stamps is None:
        return [None]
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
    path: str,
    container: av.container.InputContainer,
    stream: av.VideoStream,
    index: FilmIndex,
    run: list[int],
    first: int,
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Yield ``(number, frame)`` of ``run``, frames of one group, if the key frame at ``first`` comes from here on."""
    context = stream.codec_context
    context.thread_count = 1
    context.options = STRICT
    if index.stamps is None:
        yield from _count(path, container, stream, run)
        return
    wanted = {int(index.stamps[number]): number for number in run}
    last, start = max(wanted), int(index.keys[index.key_of[run[0]]][0])
    by_packet = is_frame_by_packet(stream)
    skips = context.name in SKIPS_UNREFERENCED and by_packet
    counts = False  # whether the group itself has begun
    for packet in _until_all(_packets_from(container, stream, first), set(wanted) if by_packet else None):
        if packet is not None:
            counts = counts or packet.pts == start
            if skips:
                context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
        try:
            frames = context.decode(packet)
        except av.error.InvalidDataError as error:
            if not counts or (packet is not None and packet.pts is not None and packet.pts < start):
                continue  # of another group, or a leading frame, which no other refers to
            raise _DamageError(f"{path}: damaged {_place(packet, index)}: {error.strerror}") from error
        for frame in frames:
            if frame.pts is None or frame.pts < start:
                continue
            if frame.is_corrupt:
                raise _DamageError(f"{path}: damaged {_place(frame, index)}: what is missing was made up")
            if frame.pts in wanted:
                yield wanted[frame.pts], frame
            # With a frame by packet, what still comes was decoded ahead of the last one, which may refer to it.
            if frame.pts >= last and not by_packet:
                return


def _until_all(packets: Iterator[av.Packet], wanted: set[int] | None) -> Iterator[av.Packet | None]:
    """Packets up to the last one of the frames ``wanted``, or all, and then None, for what the decoder holds back.

    What is behind is not read: a frame needs nothing that is decoded after it.
    """
    missing = None if wanted is None else set(wanted)
    for packet in packets:
        if packet.size:
            yield packet
        if missing is not None and packet.pts is not None:
            missing.discard(packet.pts)
            if not missing:
                break
    yield None


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


def _place(at: av.Packet | av.VideoFrame | None, index: FilmIndex) -> str:
    if at is None or at.pts is None or index.stamps is None:
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
