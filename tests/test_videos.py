"""Videos whose frames a model merges: Qwen's models on several ranks against those fed by their own processors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy

from ds_lvxattn.batches.generation import generate
from ds_lvxattn.data.media import decode_frames, frame_groups, load_frames
from ds_lvxattn.data.media_of_row import open_media
from ds_lvxattn.data.sample import IGNORE, FrameSize, Part, Sample, SampleError
from ds_lvxattn.data.turns import MediaRef
from ds_lvxattn.families import family_of
from ds_lvxattn.families.family import ANY_SIZE, FrameLimits
from ds_lvxattn.families.qwen_vl import QwenVL
from tests.support.conversations import write_video
from tests.support.distributed import run
from tests.support.marks import slow_but
from tests.support.parity import (
    Gradients,
    gradients_of,
    largest_differences,
    limits_of,
    losses_of_steps,
    sum_over_ranks,
)
from tests.support.qwen_videos import (
    FAMILIES,
    VIDEO_TOKENS,
    arguments_of,
    loaded,
    model_of,
    sizes_made,
    source_of,
    write_rows,
)
from tests.support.tiny_model import MODES, attach, loss_of, tiny_batches

NEW = 4
ONE_ROW = 1000
Mode = tuple[tuple[str, str, str], int | None]  # strategy, schedule and placement; tokens of a packed row


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows"))


def samples_of(name: str, rows: Path) -> list[Sample]:
    source = source_of(loaded(name), rows)
    return [source.sample(row) for row in range(len(source))]


def in_transformers(name: str, samples: list[Sample]) -> tuple[float, Gradients]:
    """Loss and gradients of the unmodified model, with all that its own processor gives it, a row at a time."""
    model = model_of(name, torch.float64)
    layout = tiny_batches(model).collator.layout(samples)
    total, items = torch.zeros((), dtype=torch.float64), 0
    for row, length in enumerate(layout.lengths):
        inputs = arguments_of(name, row, torch.float64)
        # Here the token of an image stands for a part of a video too.
        ids = inputs["input_ids"][0]
        ids = ids.where(ids != model.config.video_token_id, model.config.image_token_id)
        assert ids.tolist() == layout.input_ids[row, :length].tolist()
        labels = torch.from_numpy(layout.shift_labels[row, :length])
        total = total + cross_entropy(model(**inputs).logits[0], labels, ignore_index=IGNORE, reduction="sum")
        items += int((labels != IGNORE).sum())
    loss = total / items
    loss.backward()
    return loss.item(), gradients_of(model)


def in_modes(name: str, rows: Path, modes: list[Mode]) -> list[tuple[float, Gradients]]:
    samples, results = samples_of(name, rows), []
    for mode, packing in modes:
        model = model_of(name, torch.float64).train()
        batches = attach(model, dist.get_world_size(), mode, samples, packing, recompute="layer")
        loss = loss_of(model, samples, batches, batches.collator.layout(samples, packing))
        loss.backward()
        results.append(sum_over_ranks(loss, gradients_of(model)))
    return results


@pytest.mark.parametrize("name", slow_but(FAMILIES, "qwen2.5-vl"))
def test_loss_and_gradients_are_those_of_the_model_with_its_own_processor(name: str, rows: Path) -> None:
    want = in_transformers(name, samples_of(name, rows))
    modes: list[Mode] = [(MODES[0], None), (MODES[2], None), (MODES[4], ONE_ROW)]
    limits = limits_of(name)
    for mode, got in zip(modes, run(2, in_modes, name, rows, modes)[0], strict=True):
        loss, gradient = largest_differences(got, want)
        assert loss < limits[0] and gradient < limits[1], (mode, loss, gradient)


@pytest.mark.slow
def test_loss_and_gradients_on_four_ranks(rows: Path) -> None:
    want = in_transformers("qwen2.5-vl", samples_of("qwen2.5-vl", rows))
    loss, gradient = largest_differences(run(4, in_modes, "qwen2.5-vl", rows, [(MODES[4], None)])[0][0], want)
    assert loss < 1e-12 and gradient < 1e-11, (loss, gradient)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_vision_encoder_asks_the_device_for_nothing(name: str, rows: Path) -> None:
    model, samples = model_of(name), samples_of(name, rows)
    collator, family = tiny_batches(model).collator, family_of(model)
    assert isinstance(family, QwenVL)
    layout = collator.layout(samples)
    pixels = collator.pixels(layout, collator.load(samples, layout))
    # A tensor without values has none to tell.
    vision = model.model.visual.to("meta")
    given = (pixels[key].to("meta") for key in family.pixel_arguments)
    visual = family.encode_portion(vision, *given, [shape for shapes in layout.shapes for shape in shapes])
    assert visual.shape == (layout.visual_tokens, family.visual_widths()[0])


@pytest.mark.parametrize("name", FAMILIES)
def test_pixels_are_those_of_the_video_processor(name: str, rows: Path) -> None:
    collator, samples = tiny_batches(model_of(name)).collator, samples_of(name, rows)[:2]
    layout = collator.layout(samples)
    pixels = collator.pixels(layout, collator.load(samples, layout))
    theirs = [arguments_of(name, row, torch.float32) for row in range(2)]
    # A video, an image, a video; and a video.
    videos, last = theirs[0]["pixel_values_videos"], theirs[1]["pixel_values_videos"]
    ahead = int(theirs[0]["video_grid_thw"][0].prod())
    want = torch.cat((videos[:ahead], theirs[0]["pixel_values"], videos[ahead:], last))
    assert torch.equal(pixels["pixel_values"], want)
    parts = [shape.pictures for shape in layout.shapes[0]]
    assert parts == [2, 2, 2, 1, 2, 1]  # three frames are two parts, the last frame twice in the second


@pytest.mark.parametrize("name", FAMILIES)
def test_frames_are_scaled_as_the_video_processor_scales_them(name: str) -> None:
    made = loaded(name)
    family: Any = family_of(made.model)
    patch = made.model.config.vision_config.patch_size
    for case in sizes_made(name).tolist():
        frames, height, width, least, most, cap, *sides = case
        video = made.processor.video.with_settings(
            size={"shortest_edge": least, "longest_edge": most},
            cap_pixels_per_frame=bool(cap),
            max_video_tokens=VIDEO_TOKENS,
        )
        size = FrameSize(height, width, True, Part(0, 2, frames, 1.0))
        grid = family.shape_of(size, made.processor.with_video(video), ANY_SIZE).grid
        assert [side * patch for side in grid] == sides, case


@pytest.mark.parametrize("name", FAMILIES)
def test_a_limit_of_pixels_holds_and_is_exported(name: str, tmp_path: Path) -> None:
    made = loaded(name)
    family: Any = family_of(made.model)
    size, limits = FrameSize(720, 1280, True, Part(0, 2, 8, 1.0)), FrameLimits(frame_pixels=3000)
    shape = family.shape_of(size, made.processor, limits)
    assert 1000 < shape.encoder_tokens * 7**2 <= 3000
    family.limited(made.processor, limits).save_pretrained(tmp_path)
    again = family.load_processor(str(tmp_path))
    assert family.shape_of(size, again, ANY_SIZE) == shape


def test_parts_of_a_film(tmp_path: Path) -> None:
    path = str(tmp_path / "film.mp4")
    write_video(Path(path), 7)  # five a second
    (medium,) = open_media([MediaRef("video", path)], 7, "", merged=2)
    assert len(medium.frames) == 6 and len(medium.parts) == 3
    assert medium.part_times == pytest.approx([(a + b) / 2 / 5 for a, b in medium.parts])
    sizes = medium.frame_sizes
    assert [size.part for size in sizes] == [Part(n, 2, 6, pytest.approx(2 * 7 / 5 / 6)) for n in range(3)]
    taken = [2, 0, 1, 0]
    pictures = load_frames([medium], taken)
    for part, got in zip(taken, pictures, strict=True):
        assert (got == np.stack(decode_frames(path, medium.parts[part]))).all()
    assert sorted(part for group in frame_groups([medium], taken) for part in group) == [0, 1, 2]
    (short,) = open_media([MediaRef("video", path)], 1, "", merged=2)
    assert short.parts == [(short.frames[0],) * 2]


def test_rows_that_cannot_be_read_as_videos(tmp_path: Path) -> None:
    paths = []
    for number, side in enumerate((20, 30)):
        paths.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(np.zeros((side, side, 3), dtype=np.uint8)).save(paths[-1])
    answer = {"role": "assistant", "content": "Yes."}
    rows = [
        {"video": paths, "messages": [{"role": "user", "content": "?"}, answer]},
        {"messages": [{"role": "user", "content": "What is <|video_pad|>?"}, answer]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    source = source_of(loaded("qwen2.5-vl"), path)
    for row, reason in enumerate(("several sizes", "outside its 0 videos")):
        with pytest.raises(SampleError, match=reason):
            source.sample(row)


def answers(name: str, rows: Path) -> Tensor:
    model, samples = model_of(name, torch.float64), samples_of(name, rows)
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    batches = attach(model, ranks, MODES[0], samples) if ranks > 1 else tiny_batches(model)
    how: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": 10_000}
    first = generate(model, batches, samples[:2], **how)
    found = generate(model, batches, samples, **how)
    assert torch.equal(first, found[:2])
    return found


@pytest.mark.parametrize("name", slow_but(FAMILIES, "qwen3-vl"))
def test_answers_are_those_of_the_model_with_its_own_processor(name: str, rows: Path) -> None:
    model = model_of(name, torch.float64)
    how: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": 10_000, "pad_token_id": 0}
    want = [model.generate(**arguments_of(name, row, torch.float64), **how)[0, -NEW:].tolist() for row in range(3)]
    assert answers(name, rows).tolist() == want
    assert run(2, answers, name, rows)[0].tolist() == want


def train(name: str, rows: Path, ranks: int) -> list[float]:
    return losses_of_steps(model_of(name), samples_of(name, rows), ranks, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "qwen2-vl"])
def test_losses_under_zero3(name: str, rows: Path) -> None:
    want, got = train(name, rows, 1), run(2, train, name, rows, 2)[0]
    assert want[-1] < want[0]
    assert got == pytest.approx(want, rel=1e-4)
