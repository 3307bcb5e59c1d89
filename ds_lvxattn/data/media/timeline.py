"""Which frames a medium shows, and when."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np


@dataclass(frozen=True, eq=False)
class VideoInfo:
    """What a player shows of a video or an image; times count from its first shown frame.

    Attributes:
        width, height: in pixels, as shown: upright, with square pixels.
        starts: int64 ``[num_frames]``, ascending from 0: when each frame appears, in ``unit``.
        length: when the last one disappears, in ``unit``; 0 for a still image.
        unit: seconds.
    """

    width: int
    height: int
    starts: np.ndarray
    length: int
    unit: Fraction

    @property
    def num_frames(self) -> int:
        return len(self.starts)

    @property
    def seconds(self) -> float:
        """The length."""
        return float(self.length * self.unit)

    @property
    def fps(self) -> float:
        """Mean rate; 0 for a still image."""
        return self.num_frames / self.seconds if self.length else 0.0

    def frame_at(self, time: Fraction) -> int:
        """The frame that is shown ``time`` seconds after the first one appears."""
        at = int(np.searchsorted(self.starts, time / self.unit // 1, side="right")) - 1
        return min(max(at, 0), self.num_frames - 1)


def still(width: int, height: int) -> VideoInfo:
    """The one frame of a still image."""
    return VideoInfo(width, height, np.zeros(1, dtype=np.int64), 0, Fraction(1))
