"""The best evaluation of a run, and how long ago it was: which checkpoint stays, and when a run ends early."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ds_lvxattn.training.files import replace_text

FILE = "best.json"


@dataclass
class Best:
    """The evaluation with the lowest loss; alike on every rank.

    Attributes:
        step: after which it was made; 0: none yet.
        loss: its loss.
        since: evaluations after it.
    """

    step: int = 0
    loss: float = float("inf")
    since: int = 0

    def note(self, step: int, loss: float) -> bool:
        """Take an evaluation in; whether it is the best so far. A loss that is no number is not."""
        if loss < self.loss:
            self.step, self.loss, self.since = step, loss, 0
            return True
        self.since += 1
        return False

    def write(self, folder: Path) -> None:
        """Rank 0: in the run's folder, for a run that is resumed."""
        replace_text(folder / FILE, json.dumps(asdict(self)) + "\n")

    @classmethod
    def read(cls, folder: Path, done: int) -> Best:
        """That of a run that goes on after step ``done``; of a later step it is not known."""
        try:
            found = json.loads((folder / FILE).read_text())
            best = cls(int(found["step"]), float(found["loss"]), int(found["since"]))
        except (OSError, ValueError, TypeError, KeyError, OverflowError):
            return cls()
        return best if best.step <= done else cls()
