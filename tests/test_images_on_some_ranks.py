"""Images in the micro-batches of some ranks alone, without sequence parallelism: the same in every kind of loop.

The unmodified model leaves its vision encoder and cross-attention out where there is text alone. ZeRO-3, which gathers
a module on all ranks together, would wait for ever; ZeRO 1 and 2 would sum gradients of different parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ds_lvxattn import ConfigError, attach
from ds_lvxattn.batches.generation import generate
from ds_lvxattn.batches.loader import ControlGroups, Loader
from ds_lvxattn.data.sample import Sample
from ds_lvxattn.needle.task import build_tokenizer
from ds_lvxattn.training.evaluation import evaluate
from ds_lvxattn.training.loading import parameter_groups, partition_over_all_ranks
from ds_lvxattn.training.reach import check_reached_alike
from tests.support.distributed import run
from tests.support.hf import deepspeed_block, divided_trainer, launched, logged
from tests.support.marks import slow
from tests.support.tiny_families import tiny
from tests.support.tiny_model import (
    ADAMW,
    CLIPPING,
    MODES,
    ListSource,
    ds_config,
    groups_of,
    loss_of_each_alone,
    start_deepspeed,
    tiny_batches,
    tiny_loaded,
    tiny_model,
    tiny_processor,
    tiny_sample,
)
from tests.support.tiny_model import attach as attach_to
from tests.support.training import Case, metrics_in, train

VIDEO, TEXT = "IItaIta", "tttatta"  # as many tokens with loss
PACKING = "'finetuning.packing'"


def model_of(trained: str) -> nn.Module:
    """The tiny model, of which the named layers train: ``all``, those of the ``text``, or those that see ``images``."""
    model = tiny_model()
    if trained != "all":
        for name, parameter in model.named_parameters():
            of_images = any(part in name for part in ("cross_attn", "vision_model", "projector"))
            parameter.requires_grad_(of_images == (trained == "images") and "embed" not in name)
        if trained == "images":
            for layer in model.get_decoder().cross_attention_layers:
                model.get_decoder().layers[layer].requires_grad_(True)
        else:
            for layer in model.get_decoder().cross_attention_layers:
                model.get_decoder().layers[layer].requires_grad_(False)
    return model


def rows(patterns: Sequence[str]) -> list[Sample]:
    return [tiny_sample(pattern, seed) for seed, pattern in enumerate(patterns)]


Steps = tuple[list[float], str]  # losses, and the error that ended them


def by_the_command(stage: int, trained: str, patterns: Sequence[str], folder: Path) -> Steps:
    steps, said = len(patterns) // 2, ""
    case = Case(2, 1, stage, ("auto", "auto", "contiguous"), steps, micro_batch=1)
    loaded = tiny_loaded(model=model_of(trained))
    try:
        train(case, folder, ListSource(rows(patterns)), loaded=loaded)
    except ConfigError as error:
        said = str(error)
    return metrics_in(folder), said


def in_an_own_loop(samples: Callable[[Any], Any], stage: int, trained: str, patterns: Sequence[str]) -> Steps:
    start_deepspeed()
    parallel = attach(
        model_of(trained), ds_config(stage, 2, 1, size=1), tokenizer=build_tokenizer(), processor=tiny_processor()
    )
    engine, *_ = deepspeed.initialize(**parallel.engine_arguments())
    losses: list[float] = []
    try:
        for batch in samples(parallel):
            loss = parallel.loss(engine(**batch.inputs).loss)
            engine.backward(loss)
            engine.step()
            whole = loss.detach().clone()
            dist.all_reduce(whole)
            losses.append(whole.item() / 2)
    except ConfigError as error:
        return losses, str(error)
    finally:
        parallel.close()
        engine.destroy()
    return losses, ""


def by_micro_batches(stage: int, trained: str, patterns: Sequence[str], folder: Path) -> Steps:
    source = ListSource(rows(patterns))
    return in_an_own_loop(lambda p: p.micro_batches(source, 0, len(patterns) // 2), stage, trained, patterns)


def by_a_data_loader(stage: int, trained: str, patterns: Sequence[str], folder: Path) -> Steps:
    """Where ZeRO takes them, all micro-batches are prepared ahead."""
    own: Any = rows(patterns)[dist.get_rank() :: 2]
    kind = iter if stage == 3 else list
    return in_an_own_loop(lambda p: kind(DataLoader(own, batch_size=1, collate_fn=p.prepare)), stage, trained, patterns)


def by_the_trainer(stage: int, trained: str, patterns: Sequence[str], folder: Path) -> Steps:
    config = {**deepspeed_block(stage), "sequence_parallel_size": 1}
    how = {"per_device_train_batch_size": 1, "max_steps": len(patterns) // 2}
    with launched():
        trainer = divided_trainer(folder, config, rows(patterns), model_of(trained), **how)
        said = ""
        try:
            trainer.train()
        except ConfigError as error:
            said = str(error)
        finally:
            trainer.close()
        return logged(trainer, "loss"), said


LOOPS = (by_the_command, by_micro_batches, by_a_data_loader, by_the_trainer)


def in_every_loop(stage: int, trained: str, patterns: Sequence[str], folder: Path) -> list[Steps]:
    return [loop(stage, trained, patterns, folder / loop.__name__) for loop in LOOPS]


def on_one_rank(trained: str, patterns: Sequence[str]) -> list[float]:
    model, samples, losses = model_of(trained).train(), rows(patterns), []
    optimizer = torch.optim.AdamW(parameter_groups(model), **ADAMW)
    for first in range(0, len(samples), 2):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        loss = loss_of_each_alone(model, samples[first : first + 2])
        if loss.requires_grad:
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIPPING)
        optimizer.step()
        losses.append(loss.item())
    return losses


STAGES = (slow(1), 2, 3)


@pytest.mark.parametrize("stage", STAGES)
def test_parameters_that_only_some_ranks_reach_end_every_loop_by_name(stage: int, tmp_path: Path) -> None:
    want = on_one_rank("all", (VIDEO, VIDEO, TEXT, TEXT))
    for each in run(2, in_every_loop, stage, "all", (VIDEO, VIDEO, TEXT, TEXT, VIDEO, TEXT), tmp_path, timeout=300):
        for losses, said in each:
            assert losses == pytest.approx(want, rel=1e-4)
            assert "only some of the 2 ranks have images in a micro-batch" in said and PACKING in said
            assert ("would wait for ever" if stage == 3 else f"ZeRO-{stage} would sum gradients") in said


@pytest.mark.parametrize("stage", STAGES)
def test_where_all_ranks_reach_the_same_every_loop_trains_as_one_rank(stage: int, tmp_path: Path) -> None:
    """Layers of the text alone train; ZeRO-3 waits for the vision encoder all the same."""
    patterns = (VIDEO, TEXT, TEXT, VIDEO, VIDEO, VIDEO)
    want = [] if stage == 3 else on_one_rank("text", patterns)
    for each in run(2, in_every_loop, stage, "text", patterns, tmp_path, timeout=300):
        for losses, said in each:
            assert losses == pytest.approx(want, rel=1e-4)
            assert bool(said) == (stage == 3) and said == each[0][1]


@pytest.mark.parametrize("stage", STAGES)
def test_text_that_reaches_nothing_that_trains(stage: int, tmp_path: Path) -> None:
    """A step of no gradient, or under ZeRO-3 an error on all ranks."""
    patterns = (VIDEO, VIDEO, TEXT, TEXT, VIDEO, VIDEO)
    want = on_one_rank("images", patterns)[: 1 if stage == 3 else 3]
    for each in run(2, in_every_loop, stage, "images", patterns, tmp_path, timeout=300):
        for losses, said in each:
            assert losses == pytest.approx(want, rel=1e-4)
            assert ("reaches no parameter that trains" in said) == (stage == 3)


# Evaluation and generation under ZeRO-3


def partitioned() -> Any:
    """An engine without an optimizer over the ranks of the run."""
    model, config = tiny_model(), ds_config(3, 2, 1, size=1)
    del config["optimizer"]
    partition_over_all_ranks(model, config, groups_of(1))
    return deepspeed.initialize(model=model, config=config, mpu=groups_of(1))[0]


def judged(patterns: Sequence[str], folder: Path) -> list[float | str]:
    """What the command's evaluation and the Trainer's say of the rows under ZeRO-3, one a micro-batch."""
    source, found = ListSource(rows(patterns)), []

    def note(evaluation: Callable[[], float]) -> None:
        try:
            found.append(evaluation())
        except ConfigError as error:
            found.append(str(error))

    start_deepspeed()
    engine = partitioned()
    loader = Loader(source, tiny_batches(engine.module), ControlGroups.beside(groups_of(1)), skip_bad=False)
    note(lambda: evaluate(engine, loader, groups_of(1), micro_batch=1)["loss"])
    engine.destroy()
    config = {**deepspeed_block(3), "sequence_parallel_size": 1}
    with launched():
        trainer = divided_trainer(folder, config, source.samples, per_device_eval_batch_size=1)
        note(lambda: trainer.evaluate(source.samples)["eval_loss"])
        trainer.close()
    return found


def test_evaluation_fills_up_what_ranks_lack_with_images(tmp_path: Path) -> None:
    patterns = (VIDEO, "IIItIta", VIDEO)
    samples = rows(patterns)
    tokens = [sum(label >= 0 for label in sample.labels[1:]) for sample in samples]
    losses = [loss_of_each_alone(tiny_model(), [sample]).item() for sample in samples]
    a_token = sum(loss * n for loss, n in zip(losses, tokens, strict=True)) / sum(tokens)
    for found in run(2, judged, patterns, tmp_path):
        assert found == [pytest.approx(a_token, rel=1e-5), pytest.approx(sum(losses) / 3, rel=1e-5)]
    for found in run(2, judged, (VIDEO, TEXT), tmp_path):
        assert all("would wait for ever" in said and PACKING in said for said in found)


def answered(patterns: Sequence[str], ends: Sequence[int]) -> Tensor | str:
    """What this rank's prompt is answered, by the token that ends its answer, under ZeRO-3."""
    start_deepspeed()
    engine, rank = partitioned(), dist.get_rank()
    how = {"max_new_tokens": 4, "eos_token_id": ends[rank], "do_sample": False}
    try:
        return generate(engine.module, tiny_batches(engine.module), [rows(patterns)[rank]], **how)
    except ConfigError as error:
        return str(error)
    finally:
        engine.destroy()


def test_answers_of_ranks_may_end_apart_and_prompts_have_images_on_all() -> None:
    patterns, model = (VIDEO, "IIItIta"), tiny_model()
    first, second = (
        generate(model, tiny_batches(model), [sample], max_new_tokens=4, do_sample=False, eos_token_id=99)[0].tolist()
        for sample in rows(patterns)
    )
    got = [tokens[0].tolist() for tokens in run(2, answered, patterns, (first[0], 99))]
    assert got == [first[:1], second]
    for said in run(2, answered, (VIDEO, TEXT), (99, 99)):
        assert "would wait for ever" in said and PACKING in said


# Parts of it


def loaded_on_ranks() -> list[bool]:
    """Which micro-batches a loader calls mixed: images on both ranks, on one, on none."""
    source = ListSource(rows((VIDEO, VIDEO, VIDEO, TEXT, TEXT, TEXT)))
    loader = Loader(source, tiny_batches(tiny_model()), ControlGroups.beside(groups_of(1)), skip_bad=False)
    return [each.mixed for each in loader.stream(lambda number: [2 * number + dist.get_rank()], 0, 3)]


def test_a_loader_knows_where_only_some_ranks_have_images() -> None:
    assert run(2, loaded_on_ranks) == [[False, True, False]] * 2


def reaching_on_one_rank(stage: int) -> str:
    """What is said of a loss that reaches a layer on rank 0 alone; the other layer does not train on any rank."""
    module = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2) for name in ("text", "images", "frozen")})
    module["frozen"].requires_grad_(False)
    hidden = module["frozen"](torch.ones(1, 2))
    hidden = module["images"](hidden) if dist.get_rank() == 0 else hidden
    try:
        check_reached_alike(module["text"](hidden).sum(), module, stage, dist.group.WORLD)
    except ConfigError as error:
        return str(error)
    return ""


def test_parameters_that_only_some_ranks_reach_are_named_where_zero_would_mix_their_gradients() -> None:
    for said in run(2, reaching_on_one_rank, 2):
        assert "reach 2 of the parameters that train ('images.bias')" in said and PACKING in said
    assert run(2, reaching_on_one_rank, 0) == ["", ""]


def skipping(family: str, attached: bool) -> bool:
    model, samples = tiny(family), rows((TEXT,))
    return (attach_to(model, 1, MODES[0], samples) if attached else tiny_batches(model)).skips_encoder


def test_only_unmodified_models_that_have_an_encoder_skip_it() -> None:
    assert run(1, skipping, "llava", False) == [True]
    for case in (("llava", True), ("idefics", False), ("text only", False)):
        assert run(1, skipping, *case) == [False], case
