"""Pictures that the model's processor cuts into several images: on several ranks against the model fed by it."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AriaProcessor, Idefics2Processor, Idefics3Processor
from transformers.models.smolvlm import processing_smolvlm
from transformers.video_utils import VideoMetadata

from ds_lvxattn.batches.generation import generate
from ds_lvxattn.batches.prepare import Batches
from ds_lvxattn.batches.sequence_parallel import SequenceParallel
from ds_lvxattn.config import SequenceParallelConfig
from ds_lvxattn.data.conversations import ConversationSource
from ds_lvxattn.data.media_of_row import open_media
from ds_lvxattn.data.sample import IGNORE, FrameSize, Sample
from ds_lvxattn.data.turns import MediaRef
from ds_lvxattn.families import family_of
from ds_lvxattn.families.family import ANY_SIZE
from ds_lvxattn.families.idefics3 import in_words
from ds_lvxattn.families.owl.processing import mPLUGOwl3Processor
from ds_lvxattn.families.processors import ChannelsLast
from ds_lvxattn.training.dataset import text_of_model
from ds_lvxattn.training.loading import LoadedModel
from tests.support.conversations import write_video
from tests.support.distributed import run
from tests.support.marks import slow, slow_but
from tests.support.parity import Gradients, gradients_of, largest_differences, losses_of_steps, sum_over_ranks
from tests.support.tiny_families import CUTTING, TOKENS, cutting, cutting_processor, tagged_tokenizer
from tests.support.tiny_model import CPU, MODES, groups_of

# Rows of text, and heights and widths in pixels of their pictures, which the processors cut into 1 to 12 images.
ROWS = (
    ("which <image> digit ? <image> 3 which <image> ? 5", ((40, 90), (30, 25), (50, 50))),
    ("<image><image> digit 7", ((20, 90), (70, 30))),
    ("which digit ? 1", ()),
)
# Aria's processor writes as many squares of each image as the image with most of them has.
ALIKE = (("<image> digit 7", ((500, 990),)), *ROWS)
ANSWERS = set("0123456789")
WHOLE: dict[str, Any] = {
    "idefics2": Idefics2Processor, "idefics3": Idefics3Processor, "smolvlm": Idefics3Processor,
    "mplug-owl3": mPLUGOwl3Processor, "aria": AriaProcessor,
}  # fmt: skip
NEW = 3  # tokens that are generated


def rows_of(name: str) -> Sequence[tuple[str, tuple[tuple[int, int], ...]]]:
    return ALIKE if name == "aria" else ROWS


def whole_processor(name: str, cut: bool) -> Any:
    """The model's own one, for images and text."""
    family, parts = family_of(cutting(name)), (cutting_processor(name, cut), tagged_tokenizer(**TOKENS.get(name, {})))
    processor = WHOLE[name](*parts)
    family.complete_processor(processor, family.image_token)
    if name == "aria":  # of itself it leaves images whole, scaled to 980 pixels
        return functools.partial(processor, split_image=cut, max_image_size=490)
    return processor


def pictures_of(seed: int, sizes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def labels_of(ids: Sequence[int]) -> list[int]:
    words = tagged_tokenizer().convert_ids_to_tokens(ids)
    return [token if word in ANSWERS else IGNORE for token, word in zip(ids, words, strict=True)]


def samples_of(name: str, video: bool) -> list[Sample]:
    family, tokenizer = family_of(cutting(name)), tagged_tokenizer()
    made = []
    for seed, (text, sizes) in enumerate(rows_of(name)):
        shown = [FrameSize(*size, video) for size in sizes]
        text = text.replace("<image>", family.image_token)
        ids = tokenizer(family.write(text, shown, cutting_processor(name), ANY_SIZE))["input_ids"]
        take = functools.partial(_take, pictures_of(seed, sizes))
        made.append(Sample(ids, labels_of(ids), len(sizes), take, text, shown))
    return made


def _take(frames: Sequence[np.ndarray], wanted: Sequence[int]) -> list[np.ndarray]:
    return [frames[index] for index in wanted]


def arguments_of(name: str, processor: Any, seed: int, row: tuple[str, Any]) -> dict[str, Tensor]:
    """What the model's own processor makes of a row."""
    text, sizes = row
    pictures = [Image.fromarray(picture) for picture in pictures_of(seed, sizes)]
    text = text.replace("<image>", family_of(cutting(name)).image_token)
    made = processor(text=[text], images=[pictures] if sizes else None, return_tensors="pt")
    return {key: x.double() if key == "pixel_values" else x for key, x in made.items()}


@functools.cache
def in_transformers(name: str, video: bool) -> tuple[float, Gradients]:
    """Loss and gradients of the unmodified model, with all that its own processor gives it, a sample at a time."""
    model, processor = cutting(name, torch.float64), whole_processor(name, not video)
    losses, items = [], 0
    for seed, row in enumerate(rows_of(name)):
        arguments = arguments_of(name, processor, seed, row)
        labels = torch.tensor([*labels_of(arguments["input_ids"][0].tolist())[1:], IGNORE])
        losses.append(cross_entropy(model(**arguments).logits[0], labels, ignore_index=IGNORE, reduction="sum"))
        items += int((labels != IGNORE).sum())
    loss = torch.stack(losses).sum() / items
    loss.backward()
    return loss.item(), gradients_of(model)


def attached(name: str, model: Any, mode: tuple[str, str, str] | None, **block: Any) -> Batches:
    parallel = None
    if mode is not None:
        strategy, schedule, placement = mode
        ranks = dist.get_world_size()
        config = SequenceParallelConfig(strategy=strategy, schedule=schedule, placement=placement, size=ranks, **block)  # type: ignore[arg-type]
        parallel = SequenceParallel(model, config, groups_of(ranks))
    tokenizer, dtype = tagged_tokenizer(), next(model.parameters()).dtype
    return Batches(
        model, cutting_processor(name), tokenizer.pad_token_id, model.config.image_token_id, CPU, dtype, parallel
    )


def loss_of(model: Any, samples: Sequence[Sample], batches: Batches) -> Tensor:
    inputs = batches.prepare(samples).inputs
    labels, items = inputs.pop("shift_labels"), inputs.pop("num_items_in_batch")
    del inputs["labels"]
    logits = model(**inputs).logits
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum") / items


def in_modes(name: str) -> list[tuple[float, Gradients]]:
    results = []
    for mode, video in ((MODES[0], False), (MODES[1], False), (MODES[2], True)):
        model, samples = cutting(name, torch.float64).train(), samples_of(name, video)
        loss = loss_of(model, samples, attached(name, model, mode, recompute="layer"))
        loss.backward()
        results.append(sum_over_ranks(loss, gradients_of(model)))
    return results


@pytest.mark.parametrize("ranks", [2, slow(4)])
@pytest.mark.parametrize("name", slow_but(CUTTING, "idefics3"))
def test_loss_and_gradients_are_those_of_the_model_with_its_own_processor(name: str, ranks: int) -> None:
    for number, got in enumerate(run(ranks, in_modes, name)[0]):
        loss, gradient = largest_differences(got, in_transformers(name, number == 2))
        assert loss < 1e-12 and gradient < 1e-11, (number, loss, gradient)


@pytest.mark.slow
def test_the_path_without_exchange_is_exact_too() -> None:
    for name in CUTTING:
        model, samples = cutting(name, torch.float64), samples_of(name, False)
        loss = loss_of(model, samples, attached(name, model, None))
        loss.backward()
        assert max(largest_differences((loss.item(), gradients_of(model)), in_transformers(name, False))) < 1e-11, name


def answers(name: str) -> Tensor:
    model, prompts = cutting(name, torch.float64), samples_of(name, False)
    batches = attached(name, model, MODES[0] if dist.is_initialized() else None)
    return generate(model, batches, prompts, max_new_tokens=NEW, do_sample=False, eos_token_id=10_000)


@pytest.mark.parametrize("name", slow_but(CUTTING, "idefics3"))
def test_answers_are_those_of_the_model_with_its_own_processor(name: str) -> None:
    model, processor, want = cutting(name, torch.float64), whole_processor(name, True), []
    for seed, row in enumerate(rows_of(name)):
        made = arguments_of(name, processor, seed, row)
        tokens = model.generate(**made, max_new_tokens=NEW, do_sample=False, eos_token_id=10_000, pad_token_id=0)
        want.append(tokens[0, -NEW:].tolist())
    assert answers(name).tolist() == want
    assert run(2, answers, name)[0].tolist() == want


def train(name: str, ranks: int) -> list[float]:
    model = cutting(name)
    return losses_of_steps(
        model, samples_of(name, False), ranks, 3, attached(name, model, MODES[0] if ranks > 1 else None)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", CUTTING)
def test_losses_under_zero3(name: str) -> None:
    want, got = train(name, 1), run(2, train, name, 2)[0]
    assert want[-1] < want[0]
    assert got == pytest.approx(want, rel=1e-4)


@settings(max_examples=30)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(28, 150))
def test_a_picture_has_the_squares_that_its_size_tells(height: int, width: int, longest: int) -> None:
    family, pictures = family_of(cutting("idefics3")), cutting_processor("idefics3")
    pictures.size = {"longest_edge": longest}
    processor = ChannelsLast(pictures)  # a picture may be one pixel high
    frame = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    shapes = family.crops_of(FrameSize(height, width), processor, ANY_SIZE)
    theirs = processor([[frame]], return_row_col_info=True, return_tensors="pt")
    assert [theirs["rows"], theirs["cols"]] == [[[side]] for side in shapes[0].grid or (0, 0)]
    squares = family.cut(frame, processor) if len(shapes) > 1 else [frame]
    assert torch.equal(family.pixels(squares, shapes, processor)["pixel_values"], theirs["pixel_values"])


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"), (7, "seven"), (19, "nineteen"), (40, "forty"), (64, "sixty-four"), (100, "one hundred"),
        (101, "one hundred and one"), (768, "seven hundred and sixty-eight"), (1000, "one thousand"),
        (1024, "one thousand and twenty-four"), (2100, "two thousand, one hundred"),
        (12345, "twelve thousand, three hundred and forty-five"),
    ],
)  # fmt: skip
def test_numbers_in_words(number: int, words: str) -> None:
    assert in_words(number) == words


def test_a_video_of_smolvlm_is_written_as_by_its_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the counts and times of its frames, which go in as squares; its processor's own template has videos."""
    write_video(tmp_path / "film.mp4", 31)  # 6.2 seconds
    question = {
        "role": "user",
        "content": [{"type": "video", "video": "film.mp4"}, {"type": "text", "text": "digit ?"}],
    }
    answer = {"role": "assistant", "content": [{"type": "text", "text": "7"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": [question, answer]}))
    model, tokenizer, processor = cutting("smolvlm"), tagged_tokenizer(), cutting_processor("smolvlm")
    tokenizer.chat_template = (
        "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
    )
    loaded = LoadedModel(model, tokenizer, processor, "<image>")
    texts: list[str] = []
    whole = text_of_model(loaded)

    def write(text: str, sizes: Sequence[FrameSize]) -> str:
        texts.append(whole.write(text, sizes))
        return texts[-1]

    rows = tmp_path / "rows.jsonl"
    source = ConversationSource(
        rows, tokenizer, replace(whole, write=write), max_frames=4, eval_share=0.0, media_root=str(tmp_path)
    )
    sample = source.sample(0)

    tokens = family_of(model).frame_tokens()
    monkeypatch.setattr(processing_smolvlm, "num2words", in_words)
    own = SimpleNamespace(
        image_seq_len=tokens, image_token="<image>", fake_image_token="<fake_token_around_image>",
        global_image_token="<global-img>",
    )  # fmt: skip
    (medium,) = open_media([MediaRef("video", str(tmp_path / "film.mp4"))], 4, "", merged=1)
    metadata = VideoMetadata(total_num_frames=31, fps=5, duration=6.2, frames_indices=list(medium.frames))
    given = {"pixel_values": np.zeros((1, 4)), "video_metadata": [metadata]}
    video = processing_smolvlm.SmolVLMProcessor.replace_video_token(own, given, 0)
    assert "four frames from a 0:00:06 [H:MM:SS]" in video and "Frame from 00:" in video
    want = f"<|im_start|>User: {video}digit ?<end_of_utterance>\nAssistant: 7<end_of_utterance>\n"
    assert texts[-1].replace("<image>", "<image>" * tokens) == want
    assert sample.num_frames == 4 and {size.part is not None for size in sample.sizes or ()} == {True}

    inputs = attached("smolvlm", model, None).prepare([sample]).inputs
    frames = [frame[0] for frame in sample.load_frames(range(4))]
    pixels = processor([frames], do_image_splitting=False, return_tensors="pt", input_data_format="channels_last")
    torch.testing.assert_close(inputs["pixel_values"].flatten(0, 1), pixels["pixel_values"][0])
