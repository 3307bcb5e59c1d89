"""Key frames of H.264 that are none: recovery points, from which pictures become whole over the next frames."""

from __future__ import annotations

from collections.abc import Iterator

import av

IDR, SEI, RECOVERY_POINT = 5, 6, 6
SLICES = range(1, 6)


class RecoveryPoints:
    """Until when decoding that starts at a key frame refreshes the picture.

    With periodic intra refresh a film has one key frame proper. Where else decoding can start, a message says how many
    reference pictures later the picture no longer holds anything from before; a decoder withholds what is shown until
    then.

    Args:
        stream: the film.
        by_packet: whether a packet is a frame; it may be a field otherwise.

    Attributes:
        ends: of each key frame so far, the presentation time from which all pictures are whole: -inf without refresh,
            inf while it goes on.
    """

    def __init__(self, stream: av.VideoStream, by_packet: bool) -> None:
        self.ends: list[float] = []
        self._is_h264 = stream.codec_context.name == "h264"
        self._packets_of_frame = 1 if by_packet else 2
        head = stream.codec_context.extradata or b""
        # MP4 and Matroska have the length of each unit ahead of it, streams a start code.
        self._length_bytes = (head[4] & 3) + 1 if len(head) > 4 and head[0] == 1 else 0
        self._open: dict[int, int] = {}  # key frame to the reference pictures that are still to come

    def add(self, packet: av.Packet) -> None:
        """The next packet, in decoding order."""
        if not self._is_h264:
            self.ends += [-float("inf")] * packet.is_keyframe
            return
        if not (packet.is_keyframe or self._open):
            return
        units = list(self._units(bytes(packet)))
        if packet.is_keyframe:
            count = _recovery_count(units) * self._packets_of_frame
            if count:
                self._open[len(self.ends)] = count
            self.ends.append(float("inf") if count else -float("inf"))
        if not any(unit[0] & 0x60 for unit in units if unit[0] & 31 in SLICES):
            return  # no other picture refers to this one
        for key, left in list(self._open.items()):
            if left:
                self._open[key] = left - 1
            elif packet.pts is not None:
                self.ends[key] = packet.pts
                del self._open[key]

    def _units(self, data: bytes) -> Iterator[bytes]:
        """The units of a packet up to the first slice of its picture."""
        at = 0
        while at < len(data):
            if self._length_bytes:
                start = at + self._length_bytes
                at = start + int.from_bytes(data[at:start], "big")
            else:
                start = data.find(b"\0\0\1", at) + 3
                if start < 3:
                    return
                at = data.find(b"\0\0\1", start)
                at = len(data) if at < 0 else at
            unit = data[start:at]
            if unit:
                yield unit
                if unit[0] & 31 in SLICES:
                    return


def _recovery_count(units: list[bytes]) -> int:
    """Reference pictures until pictures are whole, decoding from this one; 0: they are."""
    if any(unit[0] & 31 == IDR for unit in units):
        return 0
    for unit in units:
        if unit[0] & 31 == SEI:
            for kind, payload in _messages(unit[1:].replace(b"\0\0\3", b"\0\0")):
                if kind == RECOVERY_POINT and payload:
                    bits = "".join(f"{byte:08b}" for byte in payload)
                    zeros = len(bits) - len(bits.lstrip("0"))  # Exp-Golomb
                    return int(bits[zeros : 2 * zeros + 1] or "0", 2) - 1
    return 0


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Kind and payload of supplemental messages; what is cut off ends them."""
    at = 0
    while at + 2 < len(data):
        numbers = []
        for _ in range(2):
            number = 0
            while at < len(data) and data[at] == 0xFF:
                number, at = number + 255, at + 1
            numbers.append(number + (data[at] if at < len(data) else 0))
            at += 1
        kind, size = numbers
        yield kind, data[at : at + size]
        at += size
