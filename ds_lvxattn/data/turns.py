"""Turns of a conversation, and how the media of a row come to their places in them."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ds_lvxattn.data.sample import SampleError

MediaKind = Literal["image", "video"]
Source = str | bytes

PLACEHOLDER = re.compile(r"<image>|<video>|<\|image\|>")
# Lines of placeholders and blanks alone.
_TAG = PLACEHOLDER.pattern
STANDING = re.compile(rf"(?m)^(?:[ \t]*(?:{_TAG}))+[ \t]*$")


@dataclass(frozen=True)
class MediaRef:
    """An image or a video as a row names it; nothing of it has been read.

    Attributes:
        kind: ``image`` or ``video``.
        source: a path, relative ones as the row has them; an encoded image; or, of a video that is given as its frames,
            those of its images.
        sampling: how its frames are chosen: ``fps``, ``start`` and ``end`` in seconds, ``frames`` at most.
        sha256: of its content, or of each of its images; empty where the row does not say.
    """

    kind: MediaKind
    source: Source | tuple[Source, ...]
    sampling: Mapping[str, float] = field(default_factory=dict)
    sha256: tuple[str, ...] = ()


@dataclass(frozen=True)
class Turn:
    """What one side says.

    Attributes:
        role: ``user``, ``assistant``, ``system`` or ``tool``.
        parts: text and media, in their order.
        tool_calls: of the assistant, as chat templates take them.
    """

    role: str
    parts: tuple[str | MediaRef, ...]
    tool_calls: tuple[Any, ...] = ()

    @property
    def text(self) -> str:
        """Its text without the media."""
        return "".join(part for part in self.parts if isinstance(part, str))


@dataclass(frozen=True)
class Slot:
    """A place for the next medium of the row: a part without a source, or a placeholder in text."""

    kind: MediaKind


RawTurn = tuple[str, list["str | MediaRef | Slot"], tuple[Any, ...]]
PlacedTurn = tuple[str, list["str | MediaRef"], tuple[Any, ...]]


def place(turns: Sequence[RawTurn], media: deque[MediaRef]) -> list[PlacedTurn]:
    """Put ``media`` into the slots of the turns, and where their number asks for it, into placeholders in the text."""
    user = [parts for role, parts, _ in turns if role == "user"]
    slots = sum(isinstance(part, Slot) for _, parts, _ in turns for part in parts)
    inside = any(isinstance(part, MediaRef) for _, parts, _ in turns for part in parts)
    texts = [part for parts in user for part in parts if isinstance(part, str)]
    tags = sum(len(PLACEHOLDER.findall(text)) for text in texts)
    standing = sum(len(PLACEHOLDER.findall(run)) for text in texts for run in STANDING.findall(text))
    missing = len(media) - slots
    pattern = None
    if missing == 0:
        if not media and not inside and standing:
            _mismatch(standing, media)
    elif missing > 0 and tags == missing:
        pattern = PLACEHOLDER
    elif missing > 0 and standing == missing:
        pattern = STANDING
    elif not slots and not tags:
        if not user:
            raise SampleError("media, but no turn of the user to put them in")
        user[0][:0] = media
        media = deque()
    else:
        _mismatch(slots + tags, media)
    waiting = {kind: deque(medium for medium in media if medium.kind == kind) for kind in ("image", "video")}

    def fill(part: str | MediaRef | Slot) -> str | MediaRef:
        if not isinstance(part, Slot):
            return part
        other = "image" if part.kind == "video" else "video"
        return (waiting[part.kind] or waiting[other]).popleft()

    filled: list[PlacedTurn] = []
    for role, parts, calls in turns:
        if pattern is not None and role == "user":
            parts = [piece for part in parts for piece in _cut(part, pattern)]
        filled.append((role, [fill(part) for part in parts], calls))
    return filled


def _mismatch(placeholders: int, media: Sequence[MediaRef]) -> None:
    raise SampleError(
        f"{placeholders} placeholders (<image>, <video>, <|image|>) for {len(media)} images and videos; "
        "give one for each, or none to put them first"
    )


def _cut(part: str | MediaRef | Slot, pattern: re.Pattern[str]) -> Iterator[str | MediaRef | Slot]:
    """Text cut at the placeholders in what ``pattern`` matches."""
    if not isinstance(part, str):
        yield part
        return
    at = 0
    for run in pattern.finditer(part):
        for tag in PLACEHOLDER.finditer(part, run.start(), run.end()):
            yield part[at : tag.start()]
            yield Slot("video" if tag.group() == "<video>" else "image")
            at = tag.end()
    yield part[at:]


def joined(parts: Sequence[str | MediaRef]) -> Iterator[str | MediaRef]:
    """Adjacent texts as one; empty ones are left out."""
    text = ""
    for part in parts:
        if isinstance(part, str):
            text += part
        else:
            if text:
                yield text
            yield part
            text = ""
    if text:
        yield text
