"""A row of the user's data as a conversation: turns of text and media in their order, whatever layout the row has.

Layouts, all of which may have media beside them (``video``, ``videos``, ``image``, ``images``: a path or a list):

- ``conversations`` of ``from`` and ``value`` (LLaVA), or ``messages`` of ``role`` and ``content`` (Hugging Face), where
  a content is text, or parts that hold media themselves: ``{"type": "video", "video": "a.mp4"}``;
- ``prompt`` and ``completion``, each text or messages;
- ``query`` and ``response`` with ``history``; ``instruction``, ``input`` and ``output``; ``question`` and ``answer``,
  with ``options`` to choose from (Video-MME).

``<image>``, ``<video>`` and ``<|image|>`` in the user's text stand for the media beside it, where their number is that
of the media. Where there are more, those that have a line to themselves do; the others are text.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePath
from typing import Any
from urllib.parse import unquote

from ds_lvxattn.data.sample import SampleError
from ds_lvxattn.data.turns import MediaKind, MediaRef, RawTurn, Slot, Source, Turn, joined, place

ROLES = {
    "human": "user", "user": "user",
    "gpt": "assistant", "assistant": "assistant", "model": "assistant", "bot": "assistant",
    "system": "system", "developer": "system",
    "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip
MEDIA_KEYS: dict[str, MediaKind] = {"image": "image", "images": "image", "video": "video", "videos": "video"}
TURN_KEYS = ("conversations", "messages", "prompt", "completion", "query", "response", "history")
PAIRS = (("instruction", "output"), ("query", "response"), ("question", "answer"))
# What is read beside a question and its answer, by the key of the question.
BESIDE = {
    "prompt": (), "instruction": ("history", "input"), "query": ("history",), "question": ("history", "options"),
}  # fmt: skip
LETTERS = "ABCDEFGH"  # of the options of a question
CHOOSE = "Answer with the letter of the best option alone."
# How a row or a part asks for the frames of its videos, by the names that other tools use, and the names here.
SAMPLING_KEYS = {
    "fps": "fps", "start": "start", "video_start": "start", "end": "end", "video_end": "end",
    "max_frames": "frames", "nframes": "frames",
}  # fmt: skip
CHECKSUM = "sha256"  # of a medium, beside it or in a column of its own
ROW_KEYS = {*MEDIA_KEYS, *SAMPLING_KEYS, CHECKSUM, "system", "id"}  # beside those of the layout
TURN_PARTS = {"from", "role", "value", "content", "tool_calls"}
MEDIUM_KEYS = {"type", "url", "path", "bytes", "base64", CHECKSUM}
# What other tools call the media of a row: video_path, Video, img, image_urls, ...
OTHER_NAME = re.compile(
    r"(image|img|pic|picture|photo|video|vid|clip|movie|frame|media|medium)s?(path|file|filename|url|uri|src)?s?"
)
# How other tools ask for sound, beside the turns or with a video.
AUDIO_KEYS = ("audio", "audios", "use_audio_in_video", "load_audio_from_video")
INLINE_IMAGE = re.compile(r"<img>\s*[^<>\n]+?\s*</img>")  # of the first Qwen-VL: a path in the text
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".heic", ".heif", ".avif", ".ppm"}

NUMBER = re.compile(r"\d+(\.\d*)?")
SHA256 = re.compile(r"[0-9a-fA-F]{64}")


def read_row(row: Mapping[str, Any], answered: bool = True) -> list[Turn]:
    """The turns of a row, its media in their places.

    Args:
        answered: whether a row without a turn of the assistant is refused.

    Raises:
        SampleError: no turns, a turn without a known role or text, placeholders that do not match the media, media
            without a turn of the user, audio.
    """
    _check_no_audio(row)
    turns = _turns(row)
    if answered and not any(role == "assistant" for role, _, _ in turns):
        raise SampleError("no answer (a turn from 'gpt' or 'assistant'), so nothing to learn from")
    for role, parts, calls in turns:
        if role == "assistant" and not calls and not any(part.strip() for part in parts if isinstance(part, str)):
            raise SampleError("an answer is empty, so nothing to learn from")
        for part in parts:
            if isinstance(part, str):
                _check_text(part)
    media = deque(sorted(media_of(row), key=lambda medium: medium.kind))
    placed = place(turns, media)
    if placed[0][0] == "assistant":
        raise SampleError("the first turn is an answer; give the question ahead of it")
    if not any(isinstance(part, MediaRef) for _, parts, _ in placed for part in parts):
        _check_no_medium_is_missed(row, turns)
    return [Turn(role, tuple(joined(parts)), calls) for role, parts, calls in placed]


def media_of(row: Mapping[str, Any]) -> list[MediaRef]:
    """The media beside the turns of a row, in the order of ``MEDIA_KEYS``; null and empty ones are none.

    Raises:
        SampleError: a medium that is neither a path nor embedded, or a number that is none.
    """
    sampling = _sampling(row)
    found: list[MediaRef] = []
    for key, kind in MEDIA_KEYS.items():
        value = row.get(key)
        if value is None or value == "" or value == []:
            continue
        if key == "video" and _is_frames(value):
            value = [value]
        for one in value if isinstance(value, list | tuple) else [value]:
            if one is not None and one != "":
                found.append(_medium(kind, one, sampling))
    checksums = row.get(CHECKSUM)
    if checksums is None:
        return found
    one_each = isinstance(checksums, list | tuple) and len(checksums) == len(found)
    listed = checksums if one_each else [checksums]
    if len(listed) != len(found):
        raise SampleError(
            f"'{CHECKSUM}' is {checksums!r} for {len(found)} images and videos beside the turns; give one for each"
        )
    return [replace(medium, sha256=_checksums(one, medium.source)) for one, medium in zip(listed, found, strict=True)]


def media_keys_of(row: Mapping[str, Any]) -> str:
    """A text that is equal for rows about the same media; empty for rows of text, and for rows that cannot be read."""
    try:
        media = [*media_of(row), *(part for _, parts, _ in _turns(row) for part in parts if isinstance(part, MediaRef))]
    except (SampleError, RecursionError):
        return ""
    return "\n".join(sorted(str(medium.source) for medium in media))


def unknown_keys(row: Mapping[str, Any]) -> set[str]:
    """Keys that nothing here reads and that hold something: those of the row, of another layout than the one that is
    read too, and those inside of it, such as ``messages[].weight`` and ``messages[].content[].max_pixels``."""
    layout = _layout(row)
    found = _unread("", row, {*ROW_KEYS, *layout})
    for key in MEDIA_KEYS:
        for medium in _listed(row.get(key)):
            found |= _unread(f"{key}.", medium, MEDIUM_KEYS)
    for key in layout:
        for turn in _listed(row[key] if _is_messages(row[key]) else None):
            found |= _unread(f"{key}[].", turn, TURN_PARTS)
            for part in _listed(turn.get("content")) if isinstance(turn, Mapping) else ():
                read = {*MEDIUM_KEYS, *SAMPLING_KEYS} | {"image", "video", "image_url", "video_url"}
                is_text = isinstance(part, Mapping) and part.get("type") == "text"
                found |= _unread(f"{key}[].content[].", part, {"type", "text"} if is_text else read)
    return found


def _check_no_audio(held: Mapping[str, Any]) -> None:
    """Check that a row, or a part of a turn, asks for no sound. Raises ``SampleError``."""
    for key in AUDIO_KEYS:
        value = held.get(key)
        empty = isinstance(value, str | bytes | list | tuple | dict) and not value
        if value is not None and value is not False and not empty:
            raise SampleError(f"{key!r} asks for audio, which no model is given here; leave it out to train without")


def _check_no_medium_is_missed(row: Mapping[str, Any], turns: Sequence[RawTurn]) -> None:
    """Check that a row of text alone is not one whose media stand where nothing reads them.

    Raises:
        SampleError: naming the key, and what to call it.
    """
    layout = _layout(row)
    for key, value in row.items():
        name = OTHER_NAME.fullmatch(re.sub(r"[\W_]", "", key).lower()) if isinstance(key, str) else None
        if name and key not in (*MEDIA_KEYS, *layout) and _may_be_media(value):
            film = name[1] in ("video", "vid", "clip", "movie", "frame")
            right = "'video'" if film else "'image' or 'video'" if name[1] in ("media", "medium") else "'image'"
            raise SampleError(
                f"the key {key!r} is not read, and the row has no other image or video; rename it to {right}, or leave "
                "it out of a row that is text alone"
            )
    for role, parts, _ in turns:
        found = next(filter(None, (INLINE_IMAGE.search(text) for text in parts if isinstance(text, str))), None)
        if role == "user" and found:
            raise SampleError(
                f"the text holds {found[0]!r}, which is not read as an image; write <image> in its place, and give the "
                "path under 'image'"
            )


def _may_be_media(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_may_be_media, value))
    if isinstance(value, Mapping):
        return any(_may_be_media(value.get(key)) for key in MEDIUM_KEYS - {"type", CHECKSUM})
    return isinstance(value, str | bytes) and bool(value)


def _unread(where: str, value: Any, read: set[str]) -> set[str]:
    if not isinstance(value, Mapping):
        return set()
    return {f"{where}{key}" for key, held in value.items() if key not in read and held not in (None, "", [], {})}


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else () if value is None else (value,)


def _turns(row: Mapping[str, Any]) -> list[RawTurn]:
    turns = [_turn(role, content, calls) for role, content, calls in _speech(row)]
    if not turns:
        raise SampleError(
            f"no 'conversations' (or 'messages'); the row has the keys {sorted(map(str, row))}; "
            "docs/your-data-and-model.md has the layouts of rows"
        )
    if row.get("system"):
        turns.insert(0, _turn("system", row["system"], ()))
    return turns


def _layout(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The keys of a row that hold its turns, those of the first layout that it has; empty where it has none."""
    for key in ("conversations", "messages"):
        if row.get(key):
            return (key,)
    for asked, answered in (("prompt", "completion"), *PAIRS):
        if row.get(asked) is not None and row.get(answered) is not None:
            return tuple(key for key in (asked, answered, *BESIDE[asked]) if key in row)
    return ()


def _speech(row: Mapping[str, Any]) -> Iterator[tuple[Any, Any, Any]]:
    """Role, content and tool calls of every turn, whatever the layout."""
    layout = _layout(row)
    if len(layout) == 1:
        yield from _messages(row[layout[0]])
    elif layout[:1] == ("prompt",):
        for key, role in zip(layout, ("user", "assistant"), strict=True):
            yield from _messages(row[key]) if _is_messages(row[key]) else [(role, row[key], None)]
    elif layout:
        yield from _pair(row, *layout[:2])


def _pair(row: Mapping[str, Any], asked: str, answered: str) -> Iterator[tuple[Any, Any, Any]]:
    """The turns of a question and its answer, with those before it and what belongs to it."""
    for pair in row.get("history") or ():
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise SampleError(f"'history' holds {pair!r}; give pairs of a question and its answer")
        yield from zip(("user", "assistant"), pair, (None, None), strict=True)
    for key in (asked, answered):
        if isinstance(row[key], list | tuple) and len(row[key]) > 1 and all(isinstance(one, str) for one in row[key]):
            raise SampleError(f"'{key}' holds {len(row[key])} texts, {row[key]!r}; give one")
    question = row[asked]
    if asked == "instruction" and row.get("input"):
        question = f"{question}\n{row['input']}"
    if asked == "question" and row.get("options"):
        question = _with_options(question, row["options"], row[answered])
    yield "user", question, None
    yield "assistant", row[answered], None


def _with_options(question: Any, options: Any, answer: Any) -> str:
    """A multiple-choice question, its options below it; those without a letter get one."""
    if not isinstance(options, list | tuple) or not all(isinstance(option, str) for option in options):
        raise SampleError(f"'options' holds {options!r}; give a list of texts")
    if len(options) > len(LETTERS):
        raise SampleError(f"{len(options)} options, and there are letters for {len(LETTERS)}")
    letter = re.fullmatch(r"\W*([A-Za-z])\W*", answer) if isinstance(answer, str) else None
    if letter and letter[1].upper() not in LETTERS[: len(options)] and answer not in options:
        raise SampleError(f"the answer is {answer!r}, and the {len(options)} options have other letters")
    lettered = [
        option if re.match(rf"\W?{letter}\W", option) else f"{letter}. {option}"
        for letter, option in zip(LETTERS, options, strict=False)
    ]
    return "\n".join((str(question), *lettered, CHOOSE))


def _is_messages(value: Any) -> bool:
    return (
        isinstance(value, list) and bool(value) and isinstance(value[0], dict) and bool({"role", "from"} & {*value[0]})
    )


def _messages(turns: Any) -> Iterator[tuple[Any, Any, Any]]:
    if isinstance(turns, str):  # as tables in text have them
        try:
            turns = json.loads(turns)
        except ValueError as error:
            raise SampleError(f"the turns are a text that is not JSON ({error}); give a list of them") from error
    if not isinstance(turns, list | tuple):
        raise SampleError(f"the turns are a {type(turns).__name__}; give a list of them")
    for turn in turns:
        if not isinstance(turn, dict):
            raise SampleError(f"a turn is {turn!r}, not an object with 'from' and 'value'")
        role = turn.get("from") or turn.get("role")
        value = turn["value"] if turn.get("value") is not None else turn.get("content")
        yield role, value, turn.get("tool_calls")


def _turn(role: Any, content: Any, calls: Any) -> RawTurn:
    if not isinstance(role, str) or role not in ROLES:
        raise SampleError(f"a turn is from {role!r}; choose one of {list(ROLES)}")
    known = ROLES[role]
    if content is None and calls:
        content = ""
    parts = list(_parts(content))
    if known not in ("user", "tool") and any(not isinstance(part, str) for part in parts):
        raise SampleError(f"a turn from {role!r} holds an image or a video; media stand in the user's turns")
    return known, parts, tuple(calls or ())


def _parts(content: Any) -> Iterator[str | MediaRef | Slot]:
    if isinstance(content, str):
        yield content
        return
    for part in content if isinstance(content, list | tuple) else [content]:
        if isinstance(part, str):
            yield part
            continue
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            yield part["text"]
        elif kind in ("image", "image_url", "video", "video_url"):
            yield _media_part(part, "image" if kind.startswith("image") else "video")
        else:
            sound = ", not audio" if isinstance(kind, str) and "audio" in kind else ""
            raise SampleError(f"a turn holds {part!r}; give text, or parts of the type text, image or video{sound}")


def _media_part(part: Mapping[str, Any], kind: MediaKind) -> MediaRef | Slot:
    """A part with its medium, or without one: a place for the next medium beside the turns."""
    _check_no_audio(part)
    for key in (kind, f"{kind}_url", "url", "path", "base64"):
        value = part.get(key)
        if value is not None:
            if isinstance(value, dict) and "url" in value:
                value = value["url"]
            if key == "base64":
                value = f"data:;base64,{value}"
            medium = _medium(kind, value, _sampling(part))
            return replace(medium, sha256=_checksums(part[CHECKSUM], medium.source)) if CHECKSUM in part else medium
    return Slot(kind)


def _is_frames(value: Any) -> bool:
    """Whether a list is one video, given as its frames."""
    return (
        isinstance(value, list | tuple)
        and len(value) > 1
        and all(isinstance(one, str) and PurePath(one).suffix.lower() in IMAGE_SUFFIXES for one in value)
    )


def _medium(kind: MediaKind, value: Any, sampling: Mapping[str, float]) -> MediaRef:
    if isinstance(value, list | tuple):
        if kind == "image":
            raise SampleError(f"an image is a list, {value!r}; give one path for each image")
        return MediaRef(kind, tuple(_source(one) for one in value), sampling)
    source = _source(value)
    checksum = value.get(CHECKSUM) if isinstance(value, dict) else None
    return MediaRef(kind, source, sampling if kind == "video" else {}, _checksums(checksum, source))


def _checksums(value: Any, source: Source | tuple[Source, ...]) -> tuple[str, ...]:
    """SHA-256 of each of the sources, in small letters; empty for null."""
    if value is None:
        return ()
    listed = value if isinstance(value, list | tuple) else [value]
    count = len(source) if isinstance(source, tuple) else 1
    if len(listed) != count or not all(isinstance(one, str) and SHA256.fullmatch(one) for one in listed):
        raise SampleError(f"'{CHECKSUM}' is {value!r}; give 64 hexadecimal digits for each file")
    return tuple(one.lower() for one in listed)


def _source(value: Any) -> Source:
    # Hub datasets hold {"bytes": ..., "path": ...} where they embed media.
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path") or value.get("url")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise SampleError(f"media is a {type(value).__name__}; give a path or a list of paths")
    if value.startswith("data:"):
        head, _, body = value.partition(",")
        if not head.endswith(";base64"):
            raise SampleError(f"an embedded medium begins {value[:40]!r}; give data:...;base64,...")
        try:
            return base64.b64decode(body, validate=True)
        except binascii.Error as error:
            raise SampleError(f"an embedded medium is not base64: {error}") from error
    scheme, colon, rest = value.partition("://")
    if not colon or "/" in scheme:
        return value
    if scheme == "file":
        return unquote(rest.removeprefix("localhost") if rest.startswith("localhost/") else rest)
    raise SampleError(f"{value!r} is a URL, which is not read; download it and give its path")


def _sampling(asked: Mapping[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for key, name in SAMPLING_KEYS.items():
        value = asked.get(key)
        if value is None or value == "":
            continue
        if isinstance(value, str) and NUMBER.fullmatch(value):  # of a table in text
            value = float(value)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise SampleError(f"'{key}' is {value!r}; give a number of at least 0")
        if (name == "fps" and value == 0) or (name == "frames" and value < 1):
            raise SampleError(f"'{key}' is {value!r}, which takes no frame; give more, or leave it out")
        found[name] = value
    if "end" in found and found["end"] <= found.get("start", 0):
        raise SampleError(f"'end' is {found['end']}, which is not behind 'start' {found.get('start', 0)}")
    return found


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SampleError(
            f"a turn holds {text[error.start]!r}, half of a pair of surrogates: text that was cut inside a character"
        ) from error
