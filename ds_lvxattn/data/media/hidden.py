"""Packets that are decoded but never shown: VP8 and VP9 have frames that others are predicted from, and no more."""

from __future__ import annotations

import av


def shows_frame(codec: str, packet: av.Packet) -> bool:
    """Whether a decoder gives out a frame for this packet, by its first bytes."""
    if codec in ("vp8", "libvpx"):
        return bool(memoryview(packet)[0] & 0x10)
    if codec in ("vp9", "libvpx-vp9"):
        data = memoryview(packet)
        return any(_vp9_shows(data[start]) for start in _superframe_starts(data))
    return True


def _vp9_shows(first: int) -> bool:
    """``show_existing_frame`` or ``show_frame`` of a VP9 frame header."""
    profile = (first >> 5 & 1) | (first >> 3 & 2)  # the low bit comes first
    at = 2 if profile == 3 else 3  # profile 3 has a reserved bit more
    return bool(first >> at & 1) or bool(first >> (at - 2) & 1)


def _superframe_starts(data: memoryview) -> list[int]:
    """Where the frames of a VP9 packet start; an index at the end of a packet holds the sizes of several."""
    marker = data[-1]
    if marker & 0xE0 == 0xC0:
        frames, width = (marker & 7) + 1, (marker >> 3 & 3) + 1
        index = len(data) - 2 - frames * width
        if index >= 0 and data[index] == marker:
            starts, at = [], 0
            for frame in range(frames):
                starts.append(at)
                place = index + 1 + frame * width
                at += int.from_bytes(data[place : place + width], "little")
            return [start for start in starts if start < index]
    return [0]
