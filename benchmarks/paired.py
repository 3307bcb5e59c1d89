"""Is one faster than the other? Medians, spreads and bootstrap intervals of what was measured in turns."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

RESAMPLES = 2000
INSIDE = 0.95  # share of the resamples in an interval
LEAST = 5  # rounds: of fewer the interval says little


@dataclass(frozen=True)
class Comparison:
    """``ratio`` is the median of ``other`` over that of ``one``; ``low`` to ``high`` the interval of the median
    difference ``other - one`` of a round, in seconds. ``verdict`` says ``faster`` or ``slower`` of ``one`` only where
    the interval leaves out zero, and never of fewer than ``LEAST`` rounds."""

    one: str
    other: str
    ratio: float
    low: float
    high: float
    rounds: int

    @property
    def verdict(self) -> str:
        if self.rounds < LEAST:
            return f"{self.rounds} rounds, too few to say"
        if self.low > 0:
            return "faster"
        return "slower" if self.high < 0 else "no difference shown"


def compare(one: str, other: str, times: dict[str, Sequence[float]]) -> Comparison:
    """``times`` of both, round by round."""
    differences = [b - a for a, b in zip(times[one], times[other], strict=True)]
    chance = random.Random(0)
    medians = sorted(median(chance.choices(differences, k=len(differences))) for _ in range(RESAMPLES))
    edge = round(RESAMPLES * (1 - INSIDE) / 2)
    ratio = median(times[other]) / median(times[one])
    return Comparison(one, other, ratio, medians[edge], medians[-1 - edge], len(differences))


def spread(times: Sequence[float]) -> float:
    """Half the distance of the quartiles."""
    ordered = sorted(times)
    return (ordered[round(0.75 * (len(ordered) - 1))] - ordered[round(0.25 * (len(ordered) - 1))]) / 2
