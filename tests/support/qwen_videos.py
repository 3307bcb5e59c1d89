"""Rows with images and videos for Qwen's models, and what the models' own processors make of them.

transformers' video processors need torchvision, which this package does not, so what they made lies in a file beside
this one. Where torchvision is installed, ``python -m tests.support.qwen_videos`` makes it anew.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import nn
from transformers.image_utils import SizeDict

from ds_lvxattn.data.conversations import ConversationSource
from ds_lvxattn.families import family_of
from ds_lvxattn.needle.small_models import SMALL_MODELS, random
from ds_lvxattn.training.dataset import text_of_model
from ds_lvxattn.training.loading import LoadedModel
from tests.support.conversations import make_tokenizer
from tests.support.tiny_families import REFUSED, tiny

FILE = Path(__file__).with_suffix(".npz")
FAMILIES = {
    "qwen2-vl": "Qwen2VLProcessor",
    "qwen2.5-vl": "Qwen2_5_VLProcessor",
    "qwen3-vl": "Qwen3VLProcessor",
    "cosmos3": "Qwen3VLProcessor",
    "cohere-compass": "CohereCompassProcessor",
    "qwen2.5-omni": "Qwen2_5OmniProcessor",
    "qwen3-omni": "Qwen3OmniMoeProcessor",
    "qwen3.5": "Qwen3VLProcessor",
}
for refused in REFUSED:
    del FAMILIES[refused]
# As the published ones: a turn is parts, an image and a video each one token between two others.
TEMPLATE = (
    "{% for m in messages %}<|start_header_id|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|eot_id|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant\n{% endif %}"
)
TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
OTHER_TOKENS = {
    "qwen2.5-omni": ("<|vision_bos|>", "<|vision_eos|>", "<|IMAGE|>", "<|VIDEO|>"),
    "cohere-compass": ("<|VISION_START|>", "<|VISION_END|>", "<|IMAGE_PAD|>", "<|VIDEO_PAD|>"),
}
# What processors with audio ask of their tokenizer.
AUDIO = {"audio_token": "<|audio|>", "audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>"}
ARGUMENTS = (
    "input_ids", "mm_token_type_ids", "pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw",
    "second_per_grid_ts", "video_second_per_grid",
)  # fmt: skip
# The processors of both are one, and so is what they make.
MADE_FOR = {"qwen3.5": "qwen3-vl", "cosmos3": "qwen3-vl"}
VIDEO_TOKENS = 20  # of a video, at most, where frames are capped
MAX_FRAMES = 13  # of the first row: an image, and six of each video

# Heights, widths and, of videos, how many frames there are, which of them are taken, and their rate.
ROWS: tuple[tuple[str | tuple[int, ...], ...], ...] = (
    ("See ", (40, 61, 7, 2), " and ", (45, 30), " and ", (33, 52, 3, 4), "?"),
    ("Or ", (28, 42, 2, 2), " this?"),
    ("Nothing?",),
)
TAKEN = {7: [0, 1, 2, 4, 5, 6], 3: [0, 1, 2], 2: [0, 1]}


def frames_of(height: int, width: int, frames: int = 1, rate: int = 0) -> list[np.ndarray]:
    """Coarse random pictures."""
    rng = np.random.default_rng([height, width, frames])
    small = rng.integers(0, 256, (frames, 3, 3, 3), dtype=np.uint8)
    return [np.asarray(Image.fromarray(picture).resize((width, height), 0)) for picture in small]


def tokens_of(name: str) -> tuple[str, ...]:
    return OTHER_TOKENS.get(name, TOKENS)


def template_of(name: str) -> str:
    made = TEMPLATE
    for usual, own in zip(TOKENS, tokens_of(name), strict=True):
        made = made.replace(usual, own)
    return made


def tokenizer(name: str) -> Any:
    made = make_tokenizer(template_of(name))
    made.add_tokens(list(tokens_of(name)), special_tokens=True)
    made.pad_token = made.eos_token
    return made


def model_of(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The tiny model of a family for the words of ``tokenizer``, the same at every call."""
    known = tokenizer(name)
    like: Any = tiny(name)
    config = copy.deepcopy(like.config)
    config.text_config.vocab_size = len(known)
    config.text_config.max_position_embeddings = 512
    for kind, token in zip(("vision_start", "vision_end", "image", "video"), tokens_of(name), strict=True):
        setattr(config, f"{kind}_token_id", known.convert_tokens_to_ids(token))

    def build() -> nn.Module:
        model = type(like)(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    return nn.Module.to(random(build, seed=1), dtype)


def loaded(name: str, dtype: torch.dtype = torch.float32) -> LoadedModel:
    model = model_of(name, dtype)
    return LoadedModel(model, tokenizer(name), SMALL_MODELS[f"small-{name}"][1](), family_of(model).image_token)


def write_rows(folder: Path) -> Path:
    """The rows as a file; their videos are given as pictures, which lose nothing."""
    lines = []
    for number, row in enumerate(ROWS):
        content: list[dict[str, Any]] = []
        for place, part in enumerate(row):
            if isinstance(part, str):
                content.append({"type": "text", "text": part})
                continue
            paths = []
            for at, picture in enumerate(frames_of(*part)):
                paths.append(f"{number}-{place}-{at}.png")
                Image.fromarray(picture).save(folder / paths[-1])
            if len(part) == 2:
                content.append({"type": "image", "image": paths[0]})
            else:
                content.append({"type": "video", "video": paths, "fps": part[3]})
        answer = {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]}
        lines.append(json.dumps({"messages": [{"role": "user", "content": content}, answer]}))
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines))
    return path


def source_of(made: LoadedModel, rows: Path, **how: Any) -> ConversationSource:
    return ConversationSource(rows, made.tokenizer, text_of_model(made), max_frames=MAX_FRAMES, eval_share=0.0, **how)


@functools.cache
def made_by_transformers() -> dict[str, np.ndarray]:
    with np.load(FILE) as file:
        return dict(file)


def arguments_of(name: str, row: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What the model's own processor makes of a row: arguments of the model."""
    prefix = f"{MADE_FOR.get(name, name)}/{row}/"
    arrays = made_by_transformers()
    found = {key[len(prefix) :]: torch.from_numpy(x) for key, x in arrays.items() if key.startswith(prefix)}
    if name.endswith("omni"):
        found["attention_mask"] = torch.ones_like(found["input_ids"])  # without which it takes all for text
    return {key: x.to(dtype) if key.startswith("pixel") else x for key, x in found.items()}


def whole_processor(made: LoadedModel, name: str) -> Any:
    """The model's own processor of images, videos and text."""
    kind = made.processor.video.settings["video_processor_type"]
    settings = {**made.processor.video.settings, "cap_pixels_per_frame": False, "max_video_tokens": VIDEO_TOKENS}
    videos = getattr(transformers, kind)(**settings)
    images, kind = SMALL_MODELS[f"small-{name}"][1]()._processor, getattr(transformers, FAMILIES[name])
    if not name.endswith("omni"):
        return kind(images, made.tokenizer, videos, chat_template=template_of(name))
    start, end, image, video = tokens_of(name)
    named = {"image_token": image, "video_token": video, "vision_bos_token": start, "vision_eos_token": end, **AUDIO}
    for key, token in named.items():
        setattr(made.tokenizer, key, token)
        setattr(made.tokenizer, f"{key}_id", made.tokenizer.convert_tokens_to_ids(token))
    audio = transformers.WhisperFeatureExtractor()
    whole = kind(images, videos, audio, made.tokenizer, chat_template=template_of(name))
    whole.videos_kwargs = {**whole.videos_kwargs, "size": settings["size"]}  # ahead of that of the video processor
    return whole


def processed(processor: Any, row: int) -> Any:
    """What a whole processor of transformers makes of a row."""
    given: dict[str, Any] = {"images": [], "videos": [], "video_metadata": []}
    content: list[dict[str, str]] = []
    for part in ROWS[row]:
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
        elif len(part) == 2:
            content.append({"type": "image"})
            given["images"].append(frames_of(*part)[0])
        else:
            content.append({"type": "video"})
            pictures, taken = frames_of(*part), TAKEN[part[2]]
            given["videos"].append(np.stack([pictures[at] for at in taken]))
            given["video_metadata"].append({"total_num_frames": part[2], "fps": part[3], "frames_indices": list(taken)})
    answer = {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]}
    text = processor.apply_chat_template([{"role": "user", "content": content}, answer], tokenize=False)
    more = {key: value for key, value in given.items() if value}
    if "videos" in more:
        more["do_sample_frames"] = False
    made = processor(text=[text], **more, return_tensors="pt")
    if "video_second_per_grid" in made:  # of one rate, whatever the videos' own
        rates = [len(x["frames_indices"]) / x["total_num_frames"] * x["fps"] for x in given["video_metadata"]]
        made["video_second_per_grid"] = torch.tensor([processor.video_processor.temporal_patch_size / x for x in rates])
    return made


def make() -> None:
    """Write the file."""
    arrays = {}
    for name in FAMILIES.keys() - MADE_FOR.keys():
        processor = whole_processor(loaded(name), name)
        for row in range(len(ROWS)):
            of_row = processed(processor, row)
            arrays |= {f"{name}/{row}/{key}": of_row[key].numpy() for key in ARGUMENTS if key in of_row}
        arrays[f"{name}/sizes"] = np.array(list(_sizes(processor.video_processor)))
    np.savez_compressed(FILE, **arrays)


def sizes_made(name: str) -> np.ndarray:
    """See ``_sizes``, of the video processor of a model."""
    return made_by_transformers()[f"{MADE_FOR.get(name, name)}/sizes"]


def _sizes(processor: Any) -> Iterator[tuple[int, ...]]:
    """Frames, height, width, least and most pixels, whether they are capped, and the height and width that follow."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        frames, height, width = (int(rng.integers(*bounds)) for bounds in ((2, 9), (14, 200), (14, 200)))
        least, most, cap = int(rng.integers(200, 3000)), int(rng.integers(3000, 40000)), int(rng.integers(2))
        scaled = processor.resize(
            torch.zeros(1, frames, 3, height, width, dtype=torch.uint8),
            size=SizeDict(shortest_edge=least, longest_edge=most),
            resample=3,
            factor=2 * processor.patch_size,
            temporal_factor=2,
            cap_pixels_per_frame=bool(cap),
        )
        yield frames, height, width, least, most, cap, *scaled.shape[-2:]


if __name__ == "__main__":
    make()
