"""The user's own data: conversations about videos and images, from a JSON file or a hub dataset.

A row has LLaVA-Video's layout, or ``messages`` with ``role`` and ``content`` as in Hugging Face's chats::

    {"video": "clips/a.mp4", "conversations": [{"from": "human", "value": "<image>\\nWhat happens?"},
                                               {"from": "gpt", "value": "A man rides a bicycle."}]}

``video`` and ``image`` (or ``videos``, ``images``) are a path or a list of paths, or are left out: text only.
``<image>``, ``<video>`` and ``<|image|>`` in the user's turns say where they go; without any, they go first.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import jinja2
import numpy as np
import pyarrow as pa
from PIL import Image
from transformers import PreTrainedTokenizerBase

from ds_lvxattn.data.sample import IGNORE, Sample, SampleError
from ds_lvxattn.data.video import decode_frames, probe_video, sample_indices

MediaKind = Literal["image", "video"]
Message = dict[str, str]  # role and content

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
MEDIA_KEYS: dict[str, MediaKind] = {"image": "image", "images": "image", "video": "video", "videos": "video"}
PLACEHOLDER = re.compile(r"<image>|<video>|<\|image\|>")

# For a tokenizer without a chat template.
PLAIN_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ message.role | capitalize }}: {{ message.content | trim }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


@dataclass(frozen=True)
class Media:
    """An image or a video, and the frames sampled from it.

    Attributes:
        kind: ``image`` or ``video``.
        source: its path, or an encoded image.
        frames: frame numbers in the file; ``(0,)`` for an image.
    """

    kind: MediaKind
    source: str | bytes
    frames: tuple[int, ...]

    def decode(self, frames: Sequence[int]) -> list[np.ndarray]:
        """uint8 ``[H, W, 3]`` for the frame numbers asked for. Raises ``SampleError`` for broken media."""
        if isinstance(self.source, str):
            return decode_frames(self.source, frames)
        try:
            image = np.asarray(Image.open(io.BytesIO(self.source)).convert("RGB"))
        except OSError as error:
            raise SampleError(f"an embedded image cannot be decoded: {error}") from error
        return [image] * len(frames)


class ConversationSource:
    """Samples of a conversation dataset; rows and media stay on disk until asked for. See ``SampleSource``.

    The held-out share is drawn by video, so no video is in both splits, and from the paths alone, so it does
    not depend on the seed or on the order of the rows.

    Args:
        data: a file of one JSON object a line, or of a JSON list; or a dataset that ``datasets.load_dataset``
            finds, as ``NAME``, ``NAME:SPLIT`` or ``NAME:CONFIG:SPLIT``.
        tokenizer: a fast tokenizer; its chat template renders the text, ``PLAIN_TEMPLATE`` if it has none.
        image_token: the token that stands for a frame; None for a model that takes none.
        frame_text: how a frame is written, with that token in it; by default the token alone.
        frame_tokens: rows that the model makes of a frame's token.
        max_frames: frames of a row; its videos share what its images leave.
        max_text_tokens: longest sample in tokens, image tokens included with the rows that the model makes of them;
            None for no limit.
        split: ``train`` or ``eval``.
        eval_share: share of the videos that ``eval`` holds out, in ``[0, 1)``; unused with ``eval_data``.
        eval_data: a dataset of its own for ``eval``, as ``data``.
        media_root: folder of relative paths; by default that of the data file.
        seed: of the order of an epoch.
        limit: at most so many rows, spread evenly over the dataset.

    Raises:
        ValueError: the dataset cannot be read, holds a line that is not a JSON object, or has no row in this
            split; the tokenizer has no offsets or no image token.
    """

    def __init__(
        self,
        data: str | os.PathLike[str],
        tokenizer: PreTrainedTokenizerBase,
        *,
        image_token: str | None,
        frame_text: str = "",
        frame_tokens: int = 1,
        max_frames: int,
        max_text_tokens: int | None = None,
        split: Literal["train", "eval"] = "train",
        eval_share: float = 0.05,
        eval_data: str | os.PathLike[str] | None = None,
        media_root: str | os.PathLike[str] | None = None,
        seed: int = 0,
        limit: int | None = None,
    ) -> None:
        if not 0 <= eval_share < 1:
            raise ValueError(f"eval_share is {eval_share}; give a share in [0, 1)")
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} gives no character offsets; load the fast tokenizer")
        image_id = -1 if image_token is None else tokenizer.convert_tokens_to_ids(image_token)
        if not isinstance(image_id, int) or image_id == tokenizer.unk_token_id:
            raise ValueError(f"the tokenizer has no token {image_token!r}; give the image token of the model")
        self.image_id = image_id
        self.tokenizer, self.image_token = tokenizer, image_token
        self.frame_text, self.frame_tokens = frame_text or image_token or "", frame_tokens
        self.max_frames, self.max_text_tokens, self.seed = max_frames, max_text_tokens, seed

        separate = eval_data is not None
        self.table = _open_table(os.fspath(eval_data if eval_data is not None and split == "eval" else data))
        self.media_root = self.table.folder if media_root is None else os.fspath(media_root)
        keys = dict(self.table.media_keys())
        if not keys:
            raise ValueError(f"{self.table.name}: the dataset is empty")
        media = set(keys.values())
        held_out = set() if separate else _held_out(media, eval_share)
        rows = [number for number, key in keys.items() if separate or (key in held_out) == (split == "eval")]
        if not rows:
            raise ValueError(
                f"{self.table.name}: the {split} split is empty: eval_share {eval_share} holds out "
                f"{len(held_out)} of {len(media)} videos; change eval_share or give eval_data"
            )
        self.rows = rows if limit is None else [rows[at] for at in sample_indices(len(rows), limit)]
        self._permutation = functools.lru_cache(maxsize=2)(self._shuffle)

    def __len__(self) -> int:
        return len(self.rows)

    def order(self, epoch: int) -> Sequence[int]:
        """A permutation of the rows, from the seed and ``epoch`` alone."""
        return self._permutation(epoch)

    def _shuffle(self, epoch: int) -> list[int]:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self)).tolist()

    def sample(self, index: int) -> Sample:
        """Row ``index``, tokenised; of its videos only the packet headers are read.

        Raises:
            SampleError: naming the row: no conversation or answer, a placeholder too many or too few, missing
                or broken media, text that is too long, a chat template that rewrites earlier turns.
        """
        number = self.rows[index]
        try:
            return self._sample(self.table.row(number), self.table.row_name(number))
        except SampleError as error:
            raise SampleError(f"{self.table.row_name(number)}: {error}") from error

    def _sample(self, row: dict[str, Any], name: str) -> Sample:
        messages = read_messages(row)
        media = self._media(row)
        if self.image_token is None and media:
            raise SampleError(f"{len(media)} images and videos, and the model takes text alone")
        messages, media = place_media(messages, media, self.frame_text)
        input_ids, labels = encode(messages, self.tokenizer)
        frames = sum(len(m.frames) for m in media)
        image_tokens = input_ids.count(self.image_id)
        if image_tokens != frames:
            raise SampleError(
                f"{image_tokens} image tokens for {frames} frames; the text holds "
                f"{self.image_token!r} outside the user's turns, or the chat template drops turns"
            )
        rows = len(input_ids) + frames * (self.frame_tokens - 1)
        if self.max_text_tokens is not None and rows > self.max_text_tokens:
            raise SampleError(
                f"{rows} tokens, {frames * self.frame_tokens} of them for frames, but max_text_tokens is "
                f"{self.max_text_tokens}; shorten the conversation or raise the limit, if the model has room"
            )
        return Sample(input_ids, labels, frames, functools.partial(load_frames, media), name)

    def _media(self, row: dict[str, Any]) -> list[Media]:
        """The media of a row, images first, with the frame budget divided over its videos."""
        found = sorted(_media_values(row), key=lambda item: item[0])
        videos = sum(kind == "video" for kind, _ in found)
        room = self.max_frames - (len(found) - videos)
        if room < videos:
            raise SampleError(f"{len(found)} images and videos, but max_frames is {self.max_frames}; raise it")
        share, longer = divmod(room, max(videos, 1))  # the first videos take a frame more
        shares = iter([share + (number < longer) for number in range(videos)])
        media = []
        for kind, value in found:
            source = self._source(value)
            if isinstance(source, bytes) and kind == "video":
                raise SampleError("an embedded video cannot be read; store videos as files and give their paths")
            # Every rank looks at every file of a sample: what is missing is missing on all of them.
            length = 1 if isinstance(source, bytes) else probe_video(source).num_frames
            frames = (0,) if kind == "image" else tuple(sample_indices(length, next(shares)))
            media.append(Media(kind, source, frames))
        return media

    def _source(self, value: Any) -> str | bytes:
        # Hub datasets hold {"bytes": ..., "path": ...} where they embed media.
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return value
        if isinstance(value, str):
            return os.path.join(self.media_root, value)
        raise SampleError(f"media is a {type(value).__name__}; give a path or a list of paths")


def load_frames(media: Sequence[Media], frames: Sequence[int]) -> list[np.ndarray]:
    """Decode ``frames``, numbered over all ``media`` in order, to uint8 ``[H, W, 3]``, in the order given."""
    places = [(m, frame) for m, medium in enumerate(media) for frame in medium.frames]
    images: dict[int, np.ndarray] = {}
    for m, medium in enumerate(media):
        own = [number for number in frames if places[number][0] == m]
        if own:  # another file is not touched
            decoded = medium.decode([places[number][1] for number in own])
            images.update(zip(own, decoded, strict=True))
    return [images[number] for number in frames]


def read_messages(row: dict[str, Any]) -> list[Message]:
    """The turns of a row, as chat templates take them.

    Raises:
        SampleError: no turns, or a turn without a known role or text.
    """
    turns = row.get("conversations") or row.get("messages")
    if not isinstance(turns, list) or not turns:
        raise SampleError(f"no 'conversations' (or 'messages'); the row has the keys {sorted(row)}")
    messages = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for turn in turns:
        if not isinstance(turn, dict):
            raise SampleError(f"a turn is {turn!r}, not an object with 'from' and 'value'")
        role = turn.get("from") or turn.get("role")
        if role not in ROLES:
            raise SampleError(f"a turn is from {role!r}; choose one of {list(ROLES)}")
        value = turn["value"] if turn.get("value") is not None else turn.get("content")
        messages.append({"role": ROLES[role], "content": _plain_text(value)})
    if not any(message["role"] == "assistant" for message in messages):
        raise SampleError("no answer (a turn from 'gpt' or 'assistant'), so nothing to learn from")
    return messages


def _plain_text(value: Any) -> str:
    """A turn's text; the parts of the chat layout become text and placeholders."""
    if isinstance(value, str):
        return value
    text = ""
    for part in value if isinstance(value, list) else [value]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("image", "video"):
            text += f"<{kind}>"
        elif kind == "text" and isinstance(part.get("text"), str):
            text += part["text"]
        else:
            raise SampleError(f"a turn holds {part!r}; give text, or parts of the type text, image or video")
    return text


def place_media(
    messages: Sequence[Message], media: Sequence[Media], frame_text: str
) -> tuple[list[Message], list[Media]]:
    """Replace the placeholders of the user's turns by one ``frame_text`` a frame.

    A placeholder takes the next of its kind, or of the other kind when there is none: LLaVA-Video writes
    ``<image>`` for a video.

    Returns:
        The messages, and the media in the order in which the text has them.

    Raises:
        SampleError: placeholders that do not match the media, or media without a turn of the user.
    """
    messages = [dict(message) for message in messages]
    user = [message for message in messages if message["role"] == "user"]
    count = sum(len(PLACEHOLDER.findall(message["content"])) for message in user)
    if not count and media:
        if not user:
            raise SampleError("media, but no turn of the user to put them in")
        user[0]["content"] = "".join(f"<{medium.kind}>" for medium in media) + user[0]["content"]
    elif count != len(media):
        raise SampleError(
            f"{count} placeholders (<image>, <video>, <|image|>) for {len(media)} images and videos; "
            "give one for each, or none to put them first"
        )
    waiting = {kind: deque(m for m in media if m.kind == kind) for kind in ("image", "video")}
    placed: list[Media] = []

    def tokens(match: re.Match[str]) -> str:
        kind, other = ("video", "image") if match.group() == "<video>" else ("image", "video")
        placed.append((waiting[kind] or waiting[other]).popleft())
        return frame_text * len(placed[-1].frames)

    for message in user:
        message["content"] = PLACEHOLDER.sub(tokens, message["content"])
    return messages, placed


def render(messages: list[Message], tokenizer: PreTrainedTokenizerBase, prompt: bool = False) -> str:
    """The text of a conversation; with ``prompt``, up to where the assistant's answer begins."""
    template = tokenizer.chat_template or PLAIN_TEMPLATE
    return str(
        tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=prompt)
    )


def encode(messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, and labels that mask all but the answers and their end-of-turn tokens.

    Few chat templates mark the answers, so they are found by rendering: an answer is what a turn of the
    assistant adds to the conversation before it and its generation prompt. That is done on text and carried
    to tokens by their character offsets, so a token that spans prompt and answer does no harm: it is a label.

    Raises:
        SampleError: the template refuses the conversation, or rewrites earlier turns when later ones follow.
    """
    answers = []
    try:
        text = render(messages, tokenizer)
        for at, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = render(messages[:at], tokenizer, prompt=True)
                answered = render(messages[: at + 1], tokenizer)
                if not (answered.startswith(prompt) and text.startswith(answered)):
                    raise SampleError(
                        f"the chat template rewrites the conversation around turn {at + 1}, so the answer "
                        "cannot be told from the prompt; use a template that only appends"
                    )
                # White space behind the end-of-turn token belongs to the template.
                answers.append((len(prompt), len(answered.rstrip())))
    except jinja2.TemplateError as error:
        raise SampleError(f"the chat template refuses the conversation: {error}") from error
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    input_ids = encoded["input_ids"]
    begin, end = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
    is_answer = np.zeros(len(input_ids), dtype=bool)
    for start, stop in answers:
        is_answer |= (begin < stop) & (end > start)
    return input_ids, np.where(is_answer, input_ids, IGNORE).tolist()


@dataclass(frozen=True)
class _Table:
    """Rows in Arrow, read from disk when asked for.

    Attributes:
        name: of the dataset, for messages.
        rows: in Arrow format, so that media stay undecoded.
        is_json: rows are JSON texts in one column ``text``: those of a file need not share a schema.
        unit: ``line`` or ``row``, for messages.
        folder: where relative paths start.
    """

    name: str
    rows: datasets.Dataset
    is_json: bool
    unit: Literal["line", "row"]
    folder: str

    def row_name(self, number: int) -> str:
        return f"{self.name}, {self.unit} {number + 1}"

    def row(self, number: int) -> dict[str, Any]:
        [row] = self.rows[number : number + 1].to_pylist()
        return json.loads(row["text"]) if self.is_json else row

    def media_keys(self) -> Iterator[tuple[int, str]]:
        """The number of every row, and a text that is equal for rows about the same media. Skips blank lines.

        Raises:
            ValueError: a line that is not a JSON object.
        """
        # Embedded media are not read for this, so each of their rows counts as its own.
        names = ["text"] if self.is_json else MEDIA_KEYS
        schema = self.rows.features.arrow_schema
        columns = [field.name for field in schema if field.name in names and _holds_text(field.type)]
        if not columns:
            yield from ((number, f"row {number}") for number in range(len(self.rows)))
            return
        number = 0
        for batch in self.rows.select_columns(columns).iter(batch_size=1000):
            for row in batch.to_pylist():
                if not self.is_json or row["text"].strip():
                    media = sorted(str(value) for _, value in _media_values(self._parse(row, number)))
                    yield number, "\n".join(media) or f"row {number}"
                number += 1

    def _parse(self, row: dict[str, Any], number: int) -> dict[str, Any]:
        if not self.is_json:
            return row
        try:
            parsed = json.loads(row["text"])
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.row_name(number)}: not JSON ({error}); give one object a line") from error
        if not isinstance(parsed, dict):
            raise ValueError(f"{self.row_name(number)}: holds a {type(parsed).__name__}, not an object")
        return parsed


def _holds_text(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _media_values(row: dict[str, Any]) -> list[tuple[MediaKind, Any]]:
    """``(kind, path or embedded media)`` of a row; null and empty ones are none."""
    found: list[tuple[MediaKind, Any]] = []
    for key, kind in MEDIA_KEYS.items():
        value = row.get(key)
        found += [(kind, one) for one in (value if isinstance(value, list) else [value]) if one]
    return found


def _held_out(keys: set[str], share: float) -> set[str]:
    """A share of ``keys``, at least one unless it is 0; which ones depends on nothing but themselves."""
    ranked = sorted(keys, key=lambda key: hashlib.blake2b(key.encode()).digest())
    return set(ranked[: max(round(share * len(keys)), share > 0)])


def _open_table(data: str) -> _Table:
    if os.path.isfile(data):
        rows, unit = _read_file(data)
        return _Table(data, rows.with_format("arrow"), True, unit, str(Path(data).parent))
    if Path(data).suffix in (".json", ".jsonl"):
        raise ValueError(f"{data}: no such file")
    name, *selection = data.split(":")
    *config, split = selection or ["train"]
    try:
        rows = datasets.load_dataset(name, *config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{data}: neither a file nor a dataset that can be loaded: {error}") from error
    return _Table(data, rows.with_format("arrow"), False, "row", name if os.path.isdir(name) else "")


def _read_file(path: str) -> tuple[datasets.Dataset, Literal["line", "row"]]:
    try:
        with open(path, encoding="utf-8") as file:
            start = next((line.lstrip() for line in file if not line.isspace()), "")
            if start.startswith("["):
                file.seek(0)
                return datasets.Dataset.from_dict({"text": [json.dumps(row) for row in json.load(file)]}), "row"
            if not start:
                raise ValueError("the file is empty")
        return datasets.load_dataset("text", data_files=path, split="train"), "line"
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
