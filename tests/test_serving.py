"""An export in plain transformers, one process, gives what the training path gives on the same media."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, Idefics3Processor
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import is_torchvision_available

from ds_lvxattn.batches.prepare import Batches
from ds_lvxattn.batches.sequence_parallel import SequenceParallel
from ds_lvxattn.config import SequenceParallelConfig
from ds_lvxattn.data.conversations import ConversationSource
from ds_lvxattn.needle.small_models import SMALL_MODELS
from ds_lvxattn.needle.small_models.own_processors import Videos
from ds_lvxattn.needle.task import build_tokenizer
from ds_lvxattn.training.dataset import text_of_model
from ds_lvxattn.training.loading import LoadedModel, image_token_of, load_model
from tests.support import qwen_videos
from tests.support.distributed import run
from tests.support.image_models import IMAGE_MODELS, SERVED, WITH_VIDEOS, image_model
from tests.support.marks import slow, slow_but
from tests.support.tiny_families import CUTTING, TOKENS, cutting, cutting_processor, tagged_tokenizer, tiny
from tests.support.tiny_model import CPU, ds_config, groups_of, tiny_config, tiny_model
from tests.support.training import finetune, metrics_in, write_config

# As in published templates, text stands ahead of the image.
TEMPLATE = (
    "{{ bos_token }} {% for m in messages %}{% for part in m.content %}"
    "{% if part.type == 'image' %}<|image|>{% else %}{{ part.text }} {% endif %}{% endfor %}"
    "{% if m.role == 'assistant' %}{{ eos_token }} {% endif %}{% endfor %}"
)
AHEAD = (
    "{% for m in messages %}{% for part in m.content %}{% if part.type == 'image' %}<|image|>{% endif %}"
    "{% endfor %}{% endfor %}" + TEMPLATE.replace("<|image|>", "")
)
FILMED = ("llava_onevision", "internvl")  # take a video as such
ONE_IMAGE = ("blip2", "instructblip")  # their processors write an image ahead of everything
TEMPLATES = {
    **dict.fromkeys(ONE_IMAGE, AHEAD),
    **dict.fromkeys(FILMED, TEMPLATE.replace("{% else %}", "{% elif part.type == 'video' %}<video>{% else %}")),
}
TILES = 4


def pretrained(name: str, folder: Path) -> None:
    """A saved model with its processor, as a user would have it."""
    if name == "mllama":
        tokenizer, processor = build_tokenizer(), SMALL_MODELS["quickstart"][1]()
        processor.max_image_tiles = TILES
        model: Any = tiny_model(tiny_config(TILES))
    elif name in IMAGE_MODELS:
        model = image_model(name)
        processor = model.own_processor
        tokenizer = processor.tokenizer
    elif name == "llava":
        tokenizer, processor, model = build_tokenizer(), SMALL_MODELS["small-llava"][1](), tiny(name)
    else:
        tokenizer = tagged_tokenizer(**TOKENS.get(name, {}))
        processor = cutting_processor(name) if name in CUTTING else SMALL_MODELS[f"small-{name}"][1]()
        model = cutting(name)
    image_token = image_token_of(model, tokenizer)
    tokenizer.chat_template = TEMPLATES.get(name, TEMPLATE).replace("<|image|>", image_token)
    LoadedModel(model, tokenizer, processor, image_token).save(folder, dict(model.named_parameters()))


def trained(folder: str, export: str, rows: str, max_frames: int = 4) -> Tensor:
    """Train two steps, save, and give the logits ``[S, V]`` of the first row on the ranks of the group."""
    ranks, loaded = dist.get_world_size(), load_model(folder, {}, seed=0)
    model: Any = loaded.model
    parallel = SequenceParallel(model, SequenceParallelConfig(size=ranks, strategy="lv_xattn"), groups_of(ranks))
    batches = Batches(model, loaded.processor, loaded.pad_token, loaded.image_id, CPU, torch.float32, parallel)
    source = ConversationSource(rows, loaded.tokenizer, text_of_model(loaded), max_frames=max_frames, eval_share=0.0)
    samples = [source.sample(row) for row in range(len(source))]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        model(**batches.prepare(samples).inputs).loss.backward()
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(parameter.grad)
        optimizer.step()
        optimizer.zero_grad()
    inputs = batches.prepare(samples[:1]).inputs
    for key in ("labels", "shift_labels", "num_items_in_batch"):
        del inputs[key]
    with torch.no_grad():
        logits = model.eval()(**inputs).logits[0]
    rows_of: list[Any] = [None] * ranks
    dist.all_gather_object(rows_of, logits)
    if dist.get_rank() == 0:
        loaded.save(Path(export), {name: p.detach().clone() for name, p in model.named_parameters()})
    return torch.cat(rows_of)


def served(name: str, export: Path, pictures: list[np.ndarray]) -> dict[str, Any]:
    """What the processor of an export makes of the row, for the model of the export.

    Args:
        pictures: two images and the frames of a video.
    """
    *pictures, film = [*pictures[:2], np.stack(pictures[2:])]
    if name == "smolvlm" and not is_torchvision_available():  # which its whole processor needs
        parts = AutoImageProcessor.from_pretrained(export, backend="pil"), AutoTokenizer.from_pretrained(export)
        processor = Idefics3Processor(*parts, image_seq_len=4)
    elif name in WITH_VIDEOS and not is_torchvision_available():
        settings = json.loads((export / "processor_config.json").read_text())
        images, videos = AutoImageProcessor.from_pretrained(export), Videos(settings["video_processor"])
        parts = images, AutoTokenizer.from_pretrained(export), videos
        processor = WITH_VIDEOS[name].from_args_and_dict(parts, settings)
    else:
        processor = AutoProcessor.from_pretrained(export)
    if name in ONE_IMAGE:  # takes one image, ahead of the text and its first token
        text = "<|begin_of_text|> which digit ? 3 <|end_of_text|>"
        made = processor(images=pictures[0], text=[text], return_tensors="pt")
        if name == "instructblip":  # which is asked with the prompt alone
            told = processor(images=pictures[0], text=["which digit ?"], return_tensors="pt")
            made.update({key: told[key] for key in ("qformer_input_ids", "qformer_attention_mask")})
        return made
    images = [Image.fromarray(picture) for picture in pictures]
    if name == "idefics":  # has no template: text and images in a list
        return processor(text=[["which", images[0], "digit ?", images[1], "3 <|end_of_text|>"]], return_tensors="pt")
    image = {"type": "image"}
    user = [{"type": "text", "text": "which"}, image, {"type": "text", "text": "digit ?"}, image]
    # Of itself Aria's processor leaves images whole, scaled to 980 pixels, whatever its image processor says.
    more: dict[str, Any] = {"max_image_size": 490, "split_image": True} if name == "aria" else {}
    if name in FILMED:
        user.append({"type": "video"})
        more = {"videos": [film]}
    chat = [
        {"role": "user", "content": user},
        {"role": "assistant", "content": [{"type": "text", "text": "3"}]},
    ]
    text = AutoTokenizer.from_pretrained(export).apply_chat_template(chat, tokenize=False)
    return processor(text=[text], images=[images], return_tensors="pt", **more)


# transformers has no mPLUG-Owl3: the export brings its code.
SERVE = """
import sys, torch
from pathlib import Path
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, export = map(Path, sys.argv[1:])
processor = AutoProcessor.from_pretrained(export, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(export, trust_remote_code=True).eval()
image, words = {"type": "image"}, lambda text: {"type": "text", "text": text}
chat = [{"role": "user", "content": [words("which"), image, words("digit ?"), image]}]
chat.append({"role": "assistant", "content": [words("3")]})
text = processor.apply_chat_template(chat, tokenize=False)
images = [Image.open(folder / f"{number}.png") for number in range(2)]
inputs = processor(text=[text], images=[images], return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits[0]
    answers = [
        model.generate(**inputs, max_new_tokens=4, eos_token_id=10_000, do_sample=False, **how)
        for how in ({}, {"use_cache": False}, {"num_beams": 2})
    ]
assert torch.equal(answers[0], answers[1]) and answers[2].shape == answers[0].shape
assert not any(name.startswith("ds_lvxattn") for name in sys.modules)
torch.save(logits, folder / "logits.pt")
"""


def alone(export: Path, got: Tensor) -> None:
    """Compare with what an export gives in a process that knows nothing of this package."""
    folder = export.parent
    environment = {"PATH": os.environ["PATH"], "HF_HOME": str(folder), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-I", "-c", SERVE, folder, export], env=environment, cwd=folder, check=True)
    want = torch.load(folder / "logits.pt")
    torch.testing.assert_close(got[: len(want)], want, rtol=1e-4, atol=1e-4)
    assert len(got) - len(want) <= 1


@pytest.mark.parametrize(
    "name", ["mllama", "llava", *map(slow, ("idefics", *ONE_IMAGE, *CUTTING)), *slow_but(SERVED, "llava_onevision")]
)
def test_an_export_serves_what_was_trained(name: str, tmp_path: Path) -> None:
    folder, export, rows = tmp_path / "model", tmp_path / "export", tmp_path / "rows.jsonl"
    pretrained(name, folder)
    widths = (30, 80, 31, 31)
    pictures = [np.random.default_rng(w).integers(0, 256, (40, w, 3), dtype=np.uint8) for w in widths]
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
    question = "<image> which digit ?" if name in ONE_IMAGE else "which <image> digit ? <image>"
    media: dict[str, Any] = {"image": ["0.png", "1.png"][: question.count("<image>")]}
    if name in FILMED:
        question += " <video>"
        media["video"] = ["2.png", "3.png"]
    rows.write_text(json.dumps({**media, "conversations": _asked(question)}))
    got = run(2, trained, str(folder), str(export), str(rows))[0]
    if name == "mplug-owl3":
        return alone(export, got)

    model = AutoModelForImageTextToText.from_pretrained(export).eval()
    with torch.no_grad():
        want = model(**served(name, export, pictures)).logits[0]
    torch.testing.assert_close(got[: len(want)], want, rtol=1e-4, atol=1e-4)
    assert len(got) - len(want) <= 1


@pytest.mark.parametrize("name", ["llava_onevision", slow("internvl"), slow("aria")])
def test_the_command_trains_on_rows_of_images_and_videos_as_on_one_rank(name: str, tmp_path: Path) -> None:
    pretrained(name, tmp_path / "model")
    for number in range(5):
        side = 40 if number < 3 else 30 + 40 * number  # the first three are the frames of a film
        picture = np.random.default_rng(number).integers(0, 256, (40, side, 3), dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
    film, images = ["0.png", "1.png", "2.png"], ["3.png", "4.png"]
    rows = [
        {"image": images, "conversations": _asked("which <image> digit ? <image>")},
        {"video": [film], "conversations": _asked("<video> which digit ?")},
        {"image": images[:1], "video": [film], "conversations": _asked("which <image> digit ? <video>")},
        {"conversations": _asked("which digit ?")},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    losses = []
    for size in (2, 1):
        config = ds_config(2, 2, 2, size=size)
        file = write_config(
            tmp_path / f"{size}.json", config, eval_examples=0, frames=4, on_bad_sample="fail",
            trainable="all", eval_data=str(tmp_path / "rows.jsonl"),
        )  # fmt: skip
        out = tmp_path / f"out{size}"
        words = f"--ds_config {file} --model {tmp_path / 'model'} --data {tmp_path / 'rows.jsonl'} --steps 2".split()
        assert run(size, finetune, [*words, "--seed", "1", "--output_dir", str(out)], timeout=300) == [""] * size
        losses.append(metrics_in(out))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def _asked(question: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": "3"}]


VIDEOS = [slow("qwen2-vl", 2), slow("qwen2.5-vl", 4), ("qwen3-vl", 2)]
VIDEOS += [slow(name, 2) for name in qwen_videos.FAMILIES if name.endswith("omni")]


@pytest.mark.parametrize(("name", "ranks"), VIDEOS)
def test_an_export_serves_videos(name: str, ranks: int, tmp_path: Path) -> None:
    folder, export = tmp_path / "model", tmp_path / "export"
    made = qwen_videos.loaded(name)
    made.save(folder, dict(made.model.named_parameters()))
    rows = qwen_videos.write_rows(tmp_path)
    got = run(ranks, trained, str(folder), str(export), str(rows), qwen_videos.MAX_FRAMES)[0]

    # What the model's own processor makes of the row, and that the export has all that it is made of.
    inputs = qwen_videos.arguments_of(name, 0, torch.float32)
    settings = json.loads((export / "video_preprocessor_config.json").read_text())
    assert {**settings, **made.processor.video.settings} == settings
    picture = qwen_videos.frames_of(45, 30)
    images = AutoImageProcessor.from_pretrained(export, backend="pil")
    assert torch.equal(images(picture, return_tensors="pt")["pixel_values"], inputs["pixel_values"])
    assert AutoTokenizer.from_pretrained(export).chat_template == qwen_videos.template_of(name)
    if is_torchvision_available() and not name.endswith("omni"):  # which wants a feature extractor too
        whole = qwen_videos.processed(AutoProcessor.from_pretrained(export), 0)
        # With torchvision, images are scaled by it.
        assert all(torch.equal(whole[key], x) for key, x in inputs.items() if key != "pixel_values")

    model = AutoModelForImageTextToText.from_pretrained(export).eval()
    with torch.no_grad():
        want = model(**inputs).logits[0]
    torch.testing.assert_close(got[: len(want)], want, rtol=1e-4, atol=1e-4)
