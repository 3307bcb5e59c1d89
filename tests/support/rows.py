"""Rows of images and conversations on disk, in words that the small tokenizer knows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from tests.support.tiny_model import SIZE

# Frames and answers of each row: one frame, fewer frames than ranks and none, several turns.
ROWS: tuple[tuple[int, str], ...] = ((3, "7"), (1, "4 2"), (0, "5"), (5, "1 0 3"))


def write_rows(folder: Path, count: int) -> Path:
    """``folder/rows.jsonl`` with ``count`` rows after ``ROWS``, each with images of its own."""
    rng, lines = np.random.default_rng(0), []
    for number in range(count):
        frames, answers = ROWS[number % len(ROWS)]
        names = [f"{number}-{frame}.png" for frame in range(frames)]
        for name in names:
            Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(folder / name)
        turns = []
        for answer in answers.split():
            turns += [{"from": "human", "value": "which digit"}, {"from": "gpt", "value": answer}]
        lines.append(json.dumps({"images": names, "conversations": turns} if names else {"conversations": turns}))
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path
