"""``metrics.jsonl``: its lines by step, and what becomes of those that another run left."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from pathlib import Path

from ds_lvxattn.training.files import writing

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"


def lines_of(path: Path, done: int) -> str:
    """Lines of the first ``done`` steps of a metrics file; lines that are torn or repeated are not among them."""
    lines: dict[int, str] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            step = int(json.loads(line)["step"])
        except (ValueError, TypeError, KeyError, RecursionError):
            logger.warning("%s has a line that breaks off; it is dropped", path)
            continue
        if step <= done:
            lines[step] = line
    return "".join(f"{lines[step]}\n" for step in sorted(lines))


def text_digest(text: str) -> str:
    """SHA-256 of lines, by which a later run finds them changed."""
    return hashlib.sha256(text.encode()).hexdigest()


def keep_metrics(path: Path, problem: str) -> None:
    """Move a metrics file that holds something aside, so that a run does not erase it, and say why."""
    if not path.exists():
        logger.warning("%s", problem)
    elif path.stat().st_size:
        kept = _unused(path.with_name(f"metrics-{_written(path)}.jsonl"))
        with writing(kept):
            path.rename(kept)
        logger.warning("%s; they are now in %s", problem, kept)


def _written(path: Path) -> str:
    return time.strftime("%Y%m%d-%H%M%S", time.localtime(path.stat().st_mtime))


def _unused(path: Path) -> Path:
    """``path``, or one beside it that is not there yet."""
    others = (path.with_stem(f"{path.stem}-{number}") for number in range(2, 1000))
    return next((other for other in (path, *others) if not other.exists()), path)
