"""Generation over divided visual keys against transformers' own generation by the unmodified model on one rank."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor

from ds_lvxattn.batches.generation import generate
from ds_lvxattn.data.chat import encode
from ds_lvxattn.data.media import MediaError
from ds_lvxattn.data.model_text import ModelText
from ds_lvxattn.data.question import question_sample
from ds_lvxattn.data.sample import Sample, SampleError
from ds_lvxattn.runtime.decoding import DecodingStep
from ds_lvxattn.training import generate as command
from ds_lvxattn.training.loading import partition_over_all_ranks
from tests.support.conversations import IMAGE, TOKENIZER, write_video
from tests.support.distributed import run
from tests.support.marks import slow
from tests.support.parity import samples_of
from tests.support.tiny_families import FAMILIES, tiny
from tests.support.tiny_model import (
    IMAGE_TOKEN,
    MODES,
    PATTERNS,
    attach,
    ds_config,
    groups_of,
    tiny_batches,
    tiny_loaded,
    tiny_model,
    tiny_sample,
)

NEW = 5
NEVER = 10_000  # a token that no model has, so that no answer ends
GREEDY: dict[str, Any] = {"do_sample": False}
SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 1.3, "seed": 5}

Mode = tuple[str, str, str]
Answer = tuple[Tensor, Tensor]  # new tokens [B, new], and the scores that each rank computed for them [new, B, V]


class Recording(LogitsProcessor):
    def __init__(self) -> None:
        self.scores: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.scores.append(scores.clone())
        return scores


def model_of(family: str) -> Any:
    return tiny_model(dtype=torch.float64) if family == "mllama" else tiny(family, torch.float64)


def answer(family: str, samples: Sequence[Sample], mode: Mode | None, how: dict[str, Any]) -> Answer:
    """On the ranks of the harness in a mode, or without one by the unmodified model on this rank alone."""
    model = model_of(family)
    batches = attach(model, dist.get_world_size(), mode, samples) if mode else tiny_batches(model)
    recording = Recording()
    how = {"max_new_tokens": NEW, "eos_token_id": NEVER, "logits_processor": [recording], **how}
    tokens = generate(model, batches, samples, **how)
    return tokens, torch.stack(recording.scores)


def in_modes(family: str, cases: Sequence[tuple[tuple[str, ...], Mode, dict[str, Any]]]) -> list[Answer]:
    return [answer(family, samples_of(patterns), mode, how) for patterns, mode, how in cases]


@functools.cache
def on_one_rank(family: str, patterns: tuple[str, ...], sampled: bool = False) -> Answer:
    return answer(family, samples_of(patterns), None, SAMPLED if sampled else GREEDY)


def check(family: str, ranks: int, cases: Sequence[tuple[tuple[str, ...], Mode, dict[str, Any]]]) -> None:
    for answers in run(ranks, in_modes, family, cases):
        for (patterns, mode, how), got in zip(cases, answers, strict=True):
            want = on_one_rank(family, patterns, how is SAMPLED or how["do_sample"])
            assert torch.equal(got[0], want[0]), (patterns, mode)
            torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=1e-5)


# Several images at uneven places; text alone; a batch of uneven prompts that start with an image, see ``tiny_model``.
LONG = (PATTERNS["several images"],)
BATCH = ("IIttt", "ItItIItta", "ItItt")
TEXT = (("ttatttattaataatta",), ("ttatta",), ("tttatta", "tta", "ttttta"))


@pytest.mark.parametrize("ranks", [2, slow(4)])
def test_the_quickstart_family_gives_the_tokens_of_one_rank(ranks: int) -> None:
    cases = [(LONG, mode, GREEDY) for mode in (MODES if ranks == 2 else MODES[:3])]
    cases += [(batch, MODES[0], GREEDY) for batch in ((PATTERNS["short clip"],), (PATTERNS["text only"],))]
    check("mllama", ranks, [*cases, (LONG, MODES[1], SAMPLED), (BATCH, MODES[4], SAMPLED)])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_families_give_the_tokens_of_one_rank(family: str) -> None:
    long, few, batch = TEXT if family == "text only" else (LONG, (PATTERNS["short clip"],), BATCH)
    if family == "open_flamingo, all previous":  # text ahead of all images sees the padding of the batch there
        long, batch = ("ItIIttIta",), ("IIttt", "ItItt")
    if family == "qwen2.5-vl":  # takes adjacent images for one, where it makes positions of its own
        long, batch = ("tItItttaaItatIta",), ("Itt", "ItItIta", "ttIta")
    check(family, 2, [(long, MODES[0], GREEDY), (batch, MODES[1], SAMPLED)])
    check(family, 4, [(few, MODES[2] if family == "text only" else MODES[3], GREEDY)])


def test_samples_of_a_batch_get_what_they_get_alone() -> None:
    """Text ahead of the images, and a sample without any, beside a longer video."""
    patterns = ("tItIIta", "ttIa", "tta")
    got = run(2, in_modes, "mllama", [(patterns, mode, GREEDY) for mode in (MODES[0], MODES[4])])[1]
    alone = [answer("mllama", [sample], None, GREEDY) for sample in samples_of(patterns)]
    for tokens, scores in got:
        assert torch.equal(tokens, torch.cat([want for want, _ in alone]))
        torch.testing.assert_close(scores, torch.cat([want for _, want in alone], dim=1), rtol=1e-5, atol=1e-5)


# What stays where


def steps_of(pattern: str, mode: Mode) -> tuple[list[tuple[int, int]], int, dict[str, int]]:
    """Per cross-attention layer the bytes of the visual cache and of the memory behind it, this rank's visual tokens,
    and the bytes received in the decoding steps."""
    model, samples = tiny_model(), [tiny_sample(pattern)]
    batches = attach(model, dist.get_world_size(), mode, samples)
    seen: list[DecodingStep] = []
    received: dict[str, int] = {}

    def look(model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if isinstance(kwargs["sequence_parallel"], DecodingStep):
            if not seen:
                batches.parallel.comm.reset()
            seen.append(kwargs["sequence_parallel"])
            for module in seen[-1].divided:  # the model's own cache holds no second copy
                kept = kwargs["past_key_values"].layers[module.layer_idx].keys.untyped_storage()
                assert kept.data_ptr() == seen[-1].divided[module][0].untyped_storage().data_ptr()

    model.register_forward_pre_hook(look, with_kwargs=True)
    generate(model, batches, samples, max_new_tokens=NEW, do_sample=False, eos_token_id=NEVER)
    received.update(batches.parallel.comm.received)
    assert len(seen) == NEW
    layout = batches.collator.layout(samples)
    layers = [
        (k.nbytes + v.nbytes, k.untyped_storage().nbytes() + v.untyped_storage().nbytes())
        for k, v in seen[-1].divided.values()
    ]
    return layers, layout.keys.lengths[batches.parallel.comm.rank], received


@pytest.mark.parametrize("mode", [MODES[0], MODES[2]], ids="/".join)
def test_the_visual_cache_is_divided_and_only_partial_results_travel(mode: Mode) -> None:
    """float32, two key heads of 8; seven frames of five tokens on two ranks."""
    results = run(2, steps_of, PATTERNS["video"], mode)
    assert {tokens for _, tokens, _ in results} == {20, 15}
    heads, size, vocabulary = 4, 8, IMAGE_TOKEN
    partial = 4 * heads * (size + 1)  # an output and its log-sum-exp a head
    for rank, (layers, tokens, received) in enumerate(results):
        assert layers == [(2 * tokens * 2 * 8 * 4,) * 2] * 2
        assert received["outputs"] == NEW * 2 * partial
        assert received["scores"] == (NEW * vocabulary * 4 if rank else 0)
        assert set(received) <= {"outputs", "scores"}


def divided_bytes(family: str, pattern: str, mode: Mode) -> list[int]:
    """Bytes of keys and values that this rank keeps of the prompt, by layer."""
    model, samples = model_of(family), [tiny_sample(pattern)]
    batches = attach(model, dist.get_world_size(), mode, samples)
    steps: list[DecodingStep] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: steps.append(kwargs["sequence_parallel"]), with_kwargs=True)
    generate(model, batches, samples, max_new_tokens=2, do_sample=False)
    return [k.nbytes + v.nbytes for k, v in steps[-1].divided.values()]


def test_the_cache_of_a_text_that_holds_the_visual_tokens_is_divided() -> None:
    """float64, two key heads of 8; seven frames of four rows and six tokens on two ranks."""
    whole = 2 * 34 * 2 * 8 * 8
    assert run(2, divided_bytes, "llava", PATTERNS["video"], MODES[0]) == [[whole // 2] * 3] * 2


def test_a_prompt_without_frames_exchanges_the_scores_alone() -> None:
    assert all(set(received) <= {"scores"} for _, _, received in run(2, steps_of, PATTERNS["text only"], MODES[0]))


# Under ZeRO-3


def of_two_groups(patterns: Sequence[str], ends: Sequence[int]) -> Tensor:
    """Each group its own sample, and token that ends answers, under ZeRO-3, which partitions over both."""
    group = dist.get_rank() // 2
    model, sample = tiny_model(), samples_of(patterns)[group]
    batches = attach(model, 2, MODES[0], [sample])
    config = {**ds_config(3, 2, 1), "steps_per_print": 1_000_000}
    del config["optimizer"]
    partition_over_all_ranks(model, config, groups_of(2))
    engine, *_ = deepspeed.initialize(model=model, config=config, mpu=groups_of(2))
    how = {"max_new_tokens": NEW, "eos_token_id": ends[group], "do_sample": False}
    tokens = generate(engine.module, batches, [sample], **how)
    engine.destroy()
    return tokens


@pytest.mark.slow
def test_groups_under_zero3_wait_for_one_another() -> None:
    patterns = (PATTERNS["several images"], PATTERNS["video"])
    model = tiny_model()
    want = [
        generate(model, tiny_batches(model), [sample], max_new_tokens=NEW, do_sample=False, eos_token_id=NEVER)
        for sample in samples_of(patterns)
    ]
    # The first group ends ahead of the second.
    first, second = (tokens[0].tolist() for tokens in want)
    got = run(4, of_two_groups, patterns, (first[1], NEVER))
    assert [tokens[0].tolist() for tokens in got] == [first[: first.index(first[1]) + 1]] * 2 + [second] * 2


# Bad input


def refused(case: str) -> str:
    """The message of the error, which every rank raises."""
    model, samples = tiny_model(), [tiny_sample(PATTERNS["video"])]
    batches = attach(model, dist.get_world_size(), MODES[0], samples)
    settings: dict[str, dict[str, Any]] = {
        "beams": {"num_beams": 2}, "beams of a config": {"generation_config": GenerationConfig(num_beams=2)},
        "cache": {"cache_implementation": "static"}, "guidance": {"guidance_scale": 2.0}, "clock": {"max_time": 5.0},
    }  # fmt: skip
    how = settings.get(case, {})
    if case == "broken":
        load = samples[0].load_frames

        def broken(frames: Sequence[int]) -> Any:
            if 6 in frames:
                raise MediaError("clip.mp4: frames [6] cannot be decoded")
            return load(frames)

        samples[0] = Sample(samples[0].input_ids, samples[0].labels, 7, broken, "clip")
    elif case == "other text":
        samples = [tiny_sample(PATTERNS["video"], name=f"rank {dist.get_rank()}")]
    elif case == "nothing":
        samples = [Sample([], [])]
    with pytest.raises(ValueError) as error:
        generate(model.train(), batches, samples, max_new_tokens=1, **how)
    assert model.training
    return str(error.value)


def test_a_model_without_transformers_generation_is_refused_by_name() -> None:
    """As the code that a checkpoint of mPLUG-Owl3 comes with."""
    model: Any = tiny("mplug_owl3, fused")
    bare = type("mPLUGOwl3Model", (torch.nn.Module,), {"dtype": torch.float32, "config": model.config})
    batches = tiny_batches(model)
    with pytest.raises(ValueError, match="mPLUG-Owl3 cannot generate: mPLUGOwl3Model is not"):
        generate(bare(), batches, samples_of(LONG), max_new_tokens=1)


def test_a_prompt_that_ends_in_an_image_which_only_later_tokens_see_is_refused_by_name() -> None:
    samples = samples_of(("tIItI",))
    for kind, refuses in (("gate", True), ("fused", False)):
        model: Any = tiny(f"mplug_owl3, {kind}").eval()
        if refuses:
            with pytest.raises(ValueError, match="ends in an image, which mPLUG-Owl3 shows to the tokens behind it"):
                generate(model, tiny_batches(model), samples, max_new_tokens=1)
        else:
            assert generate(model, tiny_batches(model), samples, max_new_tokens=1).shape == (1, 1)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("broken", "clip.mp4: frames [6] cannot be decoded"),
        ("other text", "the ranks of the group read different data"),
        ("beams", "num_beams is 2; generation over divided keys takes 1 alone"),
        ("beams of a config", "num_beams is 2; generation over divided keys takes 1 alone"),
        ("cache", "cache_implementation was given; the cache of divided keys is made here"),
        ("guidance", "guidance_scale is 2.0; generation over divided keys takes 1 alone"),
        ("clock", "max_time is 5.0; generation over divided keys takes None alone"),
        ("nothing", "give at least one prompt, each with at least one token"),
    ],
)
def test_errors_come_on_every_rank(case: str, message: str) -> None:
    assert all(message in text for text in run(2, refused, case))


# The prompt of a question, and the command


def question(asked: str, video: Path | None, **changes: Any) -> Sample:
    changes = {"text": ModelText(IMAGE), "max_frames": 4, "max_text_tokens": 100, **changes}
    return question_sample(asked, video, TOKENIZER, **changes)


def test_a_question_is_rendered_as_a_row_of_training(tmp_path: Path) -> None:
    video = tmp_path / "a.mp4"
    write_video(video, 10)
    sample = question("Which colour?", video)
    row = [{"role": "user", "content": IMAGE * 4 + "Which colour?"}, {"role": "assistant", "content": " red"}]
    ids, labels = encode(row, TOKENIZER)
    first = next(n for n, label in enumerate(labels) if label >= 0)
    assert list(sample.input_ids) == ids[:first]
    grey = [frame.mean() / 8 for frame in sample.load_frames([0, 1, 2, 3])]
    assert grey == pytest.approx([1, 3, 6, 8], abs=0.5)
    assert TOKENIZER.decode(question("Is <video> red?", video).input_ids).count(f"Is {IMAGE * 4} red?") == 1
    assert question("Why?", None).num_frames == 0


def test_questions_that_cannot_be_asked(tmp_path: Path) -> None:
    video = tmp_path / "a.mp4"
    write_video(video, 3)
    for message, text, path, changes in (
        ("no such file|No such file", "Why?", tmp_path / "b.mp4", {}),
        ("takes text alone", "Why?", video, {"text": ModelText(None)}),
        ("2 placeholders", "<video> or <video>?", video, {}),
        ("room for 5", "Which colour has it?", video, {"max_text_tokens": 5}),
    ):
        with pytest.raises(SampleError, match=message):
            question(text, path, **changes)


def run_command(arguments: list[str]) -> str:
    return command.answer(command.parse(arguments))


@pytest.mark.slow
def test_the_command_gives_one_answer_on_any_number_of_ranks(tmp_path: Path) -> None:
    loaded = tiny_loaded()
    loaded.save(tmp_path / "model", loaded.model.state_dict())
    write_video(tmp_path / "clip.mp4", 5)
    arguments = ["--model", str(tmp_path / "model"), "--video", str(tmp_path / "clip.mp4"), "--max_new_tokens", "6"]
    arguments += ["--question", "which digit ?", "--temperature", "1.5", "--seed", "2"]
    answers = []
    for ranks, stage in ((1, 2), (2, 3)):
        config = tmp_path / f"{stage}.json"
        config.write_text(json.dumps(ds_config(stage, 1, 1, size=4)))
        given = ["--ds_config", str(config), *arguments]
        answers += [run_command(given)] if ranks == 1 else run(ranks, run_command, given)
    assert answers[0] and answers == answers[:1] * 3
