"""The frames of a film that a player shows, when, and where decoding can start: read once, kept on disk."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from fractions import Fraction

import av
import av.error
import numpy as np

from ds_lvxattn.data.media.complete import is_cut_off
from ds_lvxattn.data.media.files import MAX_PIXELS, MediaError, check_file, open_film
from ds_lvxattn.data.media.hidden import shows_frame
from ds_lvxattn.data.media.picture import size_as_shown
from ds_lvxattn.data.media.recovery import RecoveryPoints
from ds_lvxattn.data.media.store import fetch
from ds_lvxattn.data.media.timeline import VideoInfo

# Codecs of which every packet is one shown frame, but for those that `shows_frame` tells apart. In others a packet may
# be a field, two frames (MPEG-4 in AVI) or a frame that is not coded; their frames are counted by decoding.
PACKET_IS_FRAME = {
    "h264", "hevc", "vvc", "av1", "libdav1d", "libaom-av1", "vp8", "libvpx", "vp9", "libvpx-vp9", "mpeg1video",
    "mpeg2video", "mjpeg", "prores", "dnxhd", "ffv1", "huffyuv", "ffvhuff", "utvideo", "rawvideo", "png", "qtrle",
}  # fmt: skip
# Formats that store no presentation times; what FFmpeg makes up is off around B-frames.
WITHOUT_TIMES = {"avi", "h264", "hevc", "vvc", "m4v", "mpegvideo", "h261", "h263", "mjpeg", "vc1", "av1", "obu"}
PROGRESSIVE = (0, 1)  # field orders: not said, progressive


@dataclass(frozen=True, eq=False)
class FilmIndex:
    """What decoding needs to know about a film.

    Attributes:
        info: what a player shows.
        stamps: int64 ``[num_frames]``, presentation time of each shown frame in the stream's time base, ascending; None
            when the file has no usable ones: frames are then counted from the start.
        key_of: int32 ``[num_frames]``, the key frame that decoding of a frame starts from: the last one by which all of
            its picture is there.
        keys: int64 ``[keys, 2]``, presentation and decoding time of the key frames, in decoding order.
    """

    info: VideoInfo
    stamps: np.ndarray | None
    key_of: np.ndarray
    keys: np.ndarray


@dataclass(frozen=True)
class _Packet:
    pts: int | None
    dts: int | None
    is_key: bool
    shown: bool
    duration: int
    is_corrupt: bool


def film_index(path: str) -> FilmIndex:
    """The index of a film, from memory, from disk, or by reading the file once.

    Raises:
        MediaError: the file is missing or broken, or shows no frame.
    """
    status = check_file(path)
    return remembered_index(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=256)
def remembered_index(path: str, mtime_ns: int, size: int) -> FilmIndex:
    return fetch((path, mtime_ns, size), size, lambda: _build(path), _to_arrays, _from_arrays)


def _build(path: str) -> FilmIndex:
    """Read every packet, and decode as little as tells which of them are shown."""
    with open_film(path) as (container, stream):
        if stream.width * stream.height > MAX_PIXELS:
            raise MediaError(f"{path}: {stream.width} x {stream.height} pixels; at most {MAX_PIXELS:,} are decoded")
        codec = stream.codec_context.name
        by_packet = is_frame_by_packet(stream)
        points = RecoveryPoints(stream, by_packet)
        packets: list[_Packet] = []
        for packet in container.demux(stream):
            if packet.size:
                points.add(packet)
                packets.append(_packet(codec, packet))
        # The list of its frames comes first in such a file: it is shorter than it says. Streams end anywhere.
        if is_cut_off(path) or (packets and packets[-1].is_corrupt and "mp4" in container.format.name):
            raise MediaError(f"{path}: damaged: the file is cut off")
        # Frames ahead of the first key frame refer to data that the file does not hold.
        first = next((at for at, packet in enumerate(packets) if packet.is_key), len(packets))
        packets = packets[first:]
        if not any(packet.shown for packet in packets):
            raise MediaError(f"{path}: no decodable frame")
        unit = Fraction(stream.time_base or 1)
        rate = Fraction(stream.average_rate or stream.guessed_rate or 25)
        reorders = any(packet.pts != packet.dts for packet in packets)
        timeless = container.format.name in WITHOUT_TIMES and reorders
    times = None
    if not timeless and by_packet:
        times = _packet_times(packets, points.ends)
    if times is None:
        decoded = _decoded(path)
        if not decoded:
            raise MediaError(f"{path}: no decodable frame")
        times = None if timeless else _frame_times(packets, decoded, points.ends)
    keys = np.array([(p.pts or 0, p.dts or 0) for p in packets if p.is_key], dtype=np.int64).reshape(-1, 2)
    width, height = _shown_size(path)
    if times is None:
        count = len(decoded)
        info = VideoInfo(width, height, np.arange(count), count, 1 / rate)
        return FilmIndex(info, None, np.zeros(count, dtype=np.int32), keys)
    stamps, key_of = times
    if not len(stamps):
        raise MediaError(f"{path}: no decodable frame")
    # Durations are stored in decoding order: that of the last packet is what is said of the end.
    last = packets[-1].duration
    last = last or (int(np.median(np.diff(stamps))) if len(stamps) > 1 else round(1 / rate / unit)) or 1
    info = VideoInfo(width, height, stamps - stamps[0], int(stamps[-1] - stamps[0]) + last, unit)
    return FilmIndex(info, stamps, key_of, keys)


def _packet(codec: str, packet: av.Packet) -> _Packet:
    return _Packet(
        packet.pts,
        packet.dts,
        packet.is_keyframe,
        not packet.is_discard and shows_frame(codec, packet),
        packet.duration or 0,
        packet.is_corrupt,
    )


def is_frame_by_packet(stream: av.VideoStream) -> bool:
    """Whether every packet is one frame (shown or not): no fields, no packets of several frames."""
    return stream.codec_context.name in PACKET_IS_FRAME and stream.codec_context.field_order in PROGRESSIVE


def _packet_times(packets: list[_Packet], whole_from: list[float]) -> tuple[np.ndarray, np.ndarray] | None:
    """``stamps`` and ``key_of`` from packets in decoding order; None when they have no distinct times.

    Args:
        whole_from: ``RecoveryPoints.ends``.
    """
    found: dict[int, int] = {}
    keys: list[int] = []
    for packet in packets:
        if packet.pts is None:
            return None
        if packet.is_key:
            keys.append(packet.pts)
        # Leading frames of a key frame, shown before it, may refer to frames ahead of it.
        key = len(keys) - 1 - (packet.pts < keys[-1])
        key = _whole(packet.pts, key, whole_from)
        if packet.shown and key >= 0:
            if packet.pts in found:
                return None
            found[packet.pts] = key
    stamps = sorted(found)
    return np.array(stamps, dtype=np.int64), np.array([found[stamp] for stamp in stamps], dtype=np.int32)


def _whole(stamp: int, key: int, whole_from: list[float]) -> int:
    """The last key frame, ``key`` or one before, by which the picture at ``stamp`` is whole; -1: there is none."""
    while key >= 0 and stamp < whole_from[key]:
        key -= 1
    return key


def _frame_times(
    packets: list[_Packet], decoded: list[int | None], whole_from: list[float]
) -> tuple[np.ndarray, np.ndarray] | None:
    """``stamps`` and ``key_of`` from the times of decoded frames; None when those do not ascend."""
    stamps = [stamp for stamp in decoded if stamp is not None]
    keys = [packet.pts for packet in packets if packet.is_key]
    if len(stamps) < len(decoded) or any(b <= a for a, b in itertools.pairwise(stamps)):
        return None
    starts = [key for key in keys if key is not None]
    if len(starts) < len(keys) or starts != sorted(starts):
        return None
    last = np.searchsorted(starts, stamps, side="right") - 1
    key_of = [max(_whole(stamp, key, whole_from), 0) for stamp, key in zip(stamps, last.tolist(), strict=True)]
    return np.array(stamps, dtype=np.int64), np.array(key_of, dtype=np.int32)


def _decoded(path: str) -> list[int | None]:
    """Presentation times of all frames that the decoder gives out. What is damaged is judged when it is used."""
    stamps: list[int | None] = []
    with open_film(path) as (container, stream):
        stream.codec_context.thread_type = "AUTO"
        started = False
        for packet in container.demux(stream):
            started = started or packet.is_keyframe
            if started:
                try:
                    stamps += [frame.pts for frame in packet.decode()]
                except av.error.InvalidDataError:
                    continue
    return stamps


def _shown_size(path: str) -> tuple[int, int]:
    """Width and height of the first frame, as a player shows it; as the file says where that cannot be decoded."""
    with open_film(path) as (container, stream):
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        started = False
        try:
            for packet in container.demux(stream):
                started = started or packet.is_keyframe
                for frame in packet.decode() if started else ():
                    return size_as_shown(frame, stream.sample_aspect_ratio)
        except av.error.InvalidDataError:
            pass
        return stream.width, stream.height


def _to_arrays(index: FilmIndex) -> dict[str, np.ndarray]:
    info = index.info
    numbers = [info.width, info.height, info.length, info.unit.numerator, info.unit.denominator]
    timed = {} if index.stamps is None else {"stamps": index.stamps}
    return {
        "numbers": np.array(numbers, dtype=np.int64), "starts": info.starts, "key_of": index.key_of,
        "keys": index.keys, **timed,
    }  # fmt: skip


def _from_arrays(arrays: dict[str, np.ndarray]) -> FilmIndex:
    width, height, length, over, under = arrays["numbers"].tolist()
    info = VideoInfo(width, height, arrays["starts"], length, Fraction(over, under))
    return FilmIndex(info, arrays.get("stamps"), arrays["key_of"], arrays["keys"])
