"""Every row of a dataset read, and its media probed and decoded, as training would: what is bad, and why.

Bad rows are found before GPUs are rented. Nothing here ends at a bad row.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from ds_lvxattn.data.media import Media, VideoInfo, probe_image, probe_video
from ds_lvxattn.data.media_of_row import media_in, open_media
from ds_lvxattn.data.rows import read_row, unknown_keys
from ds_lvxattn.data.table import Table
from ds_lvxattn.data.turns import Turn

Encode = Callable[[Sequence[Turn], Sequence[Media]], tuple[int, int]]


@dataclass(frozen=True)
class CheckedMedium:
    """A medium that was decoded.

    Attributes:
        row: number of its row, from 0.
        path: of its file; of all of them where a video is given as its frames; ``embedded`` where it has none.
        frames: frames that a player shows.
        width, height: in pixels, as shown.
        sampled_s: when each sampled frame was looked for, in seconds; empty for images.
    """

    row: int
    path: str
    frames: int
    width: int
    height: int
    sampled_s: list[float]


@dataclass
class Findings:
    """What the rows are like.

    Attributes:
        rows, good: rows read, and those that can be trained on.
        bad: number of each other row, and what is wrong with it.
        media: of the good rows.
        unknown: keys that nothing reads, with the number of the first row that has each.
        tokens, supervised: tokens of each good row, and those that loss is taken on; empty without a model.
    """

    rows: int = 0
    good: int = 0
    bad: dict[int, str] = field(default_factory=dict)
    media: list[CheckedMedium] = field(default_factory=list)
    unknown: dict[str, int] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)
    supervised: list[int] = field(default_factory=list)


def check_rows(
    table: Table,
    *,
    max_frames: int,
    root: str,
    encode: Encode | None = None,
    merged: int = 0,
    limit: int | None = None,
    save: Path | None = None,
) -> Findings:
    """Read and decode rows.

    Args:
        table: the dataset.
        max_frames: frames sampled of a row.
        root: folder of relative paths.
        encode: tokens of a conversation and of its answers; raises where a model cannot take it. None: text is not
            tokenised.
        merged: frames of a video that the model merges; see ``open_media``.
        limit: the first rows only; None: all.
        save: folder for the sampled frames, as ``ROW-MEDIUM-NUMBER.png`` (all from 0).
    """
    findings = Findings()
    for number, _ in table.media_keys(strict=False):
        if findings.rows == limit:
            break
        at, findings.rows = findings.rows, findings.rows + 1
        try:
            row = table.row(number)
            for key in unknown_keys(row):
                findings.unknown.setdefault(key, at)
            turns = read_row(row)
            found = media_in(turns)
            media = open_media(found, max_frames, root, merged=merged)
            if encode is not None:
                tokens, supervised = encode(turns, media)
            checked = [_decode(medium, at, m, save) for m, medium in enumerate(media)]
        except Exception as error:  # whatever is raised while a row is made is that row's fault
            findings.bad[at] = (
                f"{type(error).__name__}: {error}" if type(error).__module__ == "builtins" else str(error)
            )
            continue
        findings.good += 1
        findings.media += checked
        if encode is not None:
            findings.tokens.append(tokens)
            findings.supervised.append(supervised)
    return findings


def _decode(medium: Media, row: int, number: int, save: Path | None) -> CheckedMedium:
    frames = medium.decode(medium.frames)
    if save is not None:
        for at, frame in enumerate(frames):
            Image.fromarray(frame).save(save / f"{row}-{number}-{at}.png")
    info = _info(medium)
    shown = info.num_frames if len(medium.sources) == 1 else len(medium.sources)
    path = ", ".join(_names(medium))
    return CheckedMedium(row, path, shown, info.width, info.height, [round(time, 6) for time in medium.times])


def _info(medium: Media) -> VideoInfo:
    first = medium.sources[0]
    if medium.kind == "image" or isinstance(first, bytes) or len(medium.sources) > 1:
        return probe_image(first, medium.upright)
    return probe_video(first)


def _names(medium: Media) -> Iterator[str]:
    for source in medium.sources:
        yield os.fspath(source) if isinstance(source, str) else "embedded"
