"""A training loop of one's own: the example, its losses, PEFT before and after attaching, and use in a wrong order."""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import peft
import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoTokenizer, BitsAndBytesConfig

import ds_lvxattn
from ds_lvxattn import ConfigError, attach
from ds_lvxattn.batches.generation import generate
from ds_lvxattn.families import family_of
from tests.support.distributed import run
from tests.support.marks import slow
from tests.support.rows import write_rows
from tests.support.tiny_model import (
    ADAMW,
    ListSource,
    ds_config,
    start_deepspeed,
    tiny_batches,
    tiny_model,
    tiny_processor,
    tiny_sample,
)
from tests.support.training import finetune, metrics_in, write_config, write_model

EXAMPLE = Path(__file__).parent.parent / "examples" / "own_loop.py"
STEPS = 6


def run_example(folder: Path, *arguments: str) -> str:
    """What the example prints on this rank."""
    start_deepspeed()
    printed = io.StringIO()
    before = Path.cwd()
    os.chdir(folder)
    try:
        with (
            mock.patch.object(sys, "argv", [str(EXAMPLE), "--local_rank=0", *arguments]),
            mock.patch.object(dist, "destroy_process_group"),  # the ranks go on to other checks
            contextlib.redirect_stdout(printed),
        ):
            runpy.run_path(str(EXAMPLE), run_name="__main__")
    finally:
        os.chdir(before)
    return printed.getvalue()


@pytest.mark.parametrize("stage", [2, slow(3)])
def test_the_example_trains_as_the_command_does(stage: int, tmp_path: Path) -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 30
    model, rows = write_model(tmp_path / "model"), write_rows(tmp_path, 8)
    words = AutoTokenizer.from_pretrained(model)
    words.add_tokens(["another"])  # a tokenizer of the needle task's words alone is refused for rows
    words.save_pretrained(model)
    config = ds_config(stage, 2, 2, strategy="lv_xattn")
    config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    file = write_config(tmp_path / "ds.json", config, trainable="all", eval_examples=0, eval_data=str(rows))
    out = tmp_path / "command"
    words = f"--ds_config {file} --model {model} --data {rows} --steps {STEPS} --output_dir {out}".split()
    assert run(2, finetune, words, timeout=300) == ["", ""]
    printed = run(2, run_example, tmp_path, str(model), str(rows), str(file), str(STEPS), timeout=300)[0]
    losses = [float(found) for found in re.findall(r"^step \d+: loss ([\d.]+), \d+ tokens, \d+ frames$", printed, re.M)]
    assert losses == pytest.approx(metrics_in(out), rel=1e-5)


def losses_of_a_data_loader(packing: int | None) -> list[float]:
    start_deepspeed()
    parallel = attach(
        tiny_model(), ds_config(2, 4, 4), tokenizer=tokenizer(), processor=tiny_processor(), packing=packing
    )
    engine, *_ = deepspeed.initialize(**parallel.engine_arguments())
    losses = []
    for batch in DataLoader(SAMPLES[:2] * 4, batch_size=4, collate_fn=parallel.prepare):
        rows = batch.inputs["input_ids"].shape[0]
        assert rows == (2 if packing else 4)
        losses.append(parallel.loss(engine(**batch.inputs).loss))
        engine.backward(losses[-1])
        engine.step()
    return [loss.item() for loss in losses]


@pytest.mark.slow
def test_a_data_loader_packs_with_the_collator() -> None:
    packed, apart = (run(2, losses_of_a_data_loader, packing)[0] for packing in (2 * len(SAMPLES[0].input_ids), None))
    assert len(packed) == 2 and packed == pytest.approx(apart, rel=1e-5)


LORA: dict[str, Any] = {
    "r": 4, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "init_lora_weights": "gaussian",
}  # fmt: skip


def with_adapters(model: nn.Module) -> nn.Module:
    """``model`` in a ``PeftModel`` whose adapters are the same at every call, and change what it computes."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(2)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**LORA))
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return wrapped


SAMPLES = [tiny_sample("IItaIItItaaI", seed) for seed in range(4)]


def prepared(when: str, folder: Path) -> nn.Module:
    """The model as a loop of one's own has it: adapters ahead of attaching, weights in 4 bits, or frozen layers."""
    if when == "4 bits":
        small = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        model: Any = AutoModelForImageTextToText.from_pretrained(folder, quantization_config=small, device_map="cpu")
        model = with_adapters(peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False))
        return model.train()  # what bitsandbytes runs on CPUs otherwise needs wider layers
    model = tiny_model()
    if when == "frozen layers":
        for layer in model.model.language_model.layers[:2]:
            layer.requires_grad_(False)
    return with_adapters(model) if when == "before" else model


def train_with_adapters(stage: int, when: str, folder: Path) -> tuple[list[float], torch.Tensor | None]:
    """Losses of a few steps on the ranks of the pool, and what the model gives then; its adapters are saved."""
    start_deepspeed()
    config = {**ds_config(stage, 1, 1), "gradient_clipping": 0.0}
    model: Any = prepared(when, folder)
    parallel = attach(model, config, tokenizer=tokenizer(), processor=tiny_processor())
    if when == "after":
        model = with_adapters(model)
    assert family_of(model).name == "Llama 3.2 Vision"
    engine, *_ = deepspeed.initialize(**parallel.engine_arguments(model))
    if when in ("before", "after"):
        assert sum(p.requires_grad for p in engine.parameters()) == 2 * 4 * (4 + 2)  # two a projection, text and vision
    losses = []
    for sample in SAMPLES:
        loss = parallel.loss(engine(**parallel.prepare([sample]).inputs).loss)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    if stage == 3:
        return losses, None
    if when != "4 bits":
        tokens = generate(model, parallel.batches, SAMPLES[:1], max_new_tokens=2, do_sample=False)
        assert tokens.shape == (1, 2)
    if when != "frozen layers" and dist.get_rank() == 0:
        model.save_pretrained(folder / "adapter")
    with torch.no_grad():
        own = engine(**parallel.prepare(SAMPLES[:1]).inputs).logits
    rows: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(rows, own)
    return losses, torch.cat(rows, 1)


def tokenizer() -> Any:
    from ds_lvxattn.needle.task import build_tokenizer

    return build_tokenizer()


def train_adapters_on_one_rank(when: str, folder: Path) -> tuple[list[float], torch.Tensor]:
    model, losses = prepared("before" if when == "after" else when, folder), []
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, **ADAMW)
    batches = tiny_batches(tiny_model())
    for sample in SAMPLES:
        loss = model(**batches.prepare([sample]).inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        return losses, model(**batches.prepare(SAMPLES[:1]).inputs).logits


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "when"),
    [(2, "before"), (2, "after"), (3, "before"), (3, "after"), (2, "4 bits"), (2, "frozen layers")],
)
def test_adapters_before_and_after_attaching(stage: int, when: str, tmp_path: Path) -> None:
    """Losses and logits of one rank; the saved adapters give the same logits in plain transformers."""
    if when == "4 bits":
        pytest.importorskip("bitsandbytes")
        write_model(tmp_path)
    want, logits = train_adapters_on_one_rank(when, tmp_path)
    for losses, got in run(2, train_with_adapters, stage, when, tmp_path):
        assert losses == pytest.approx(want, rel=1e-4 if when == "frozen layers" else 1e-5)  # whole weights change
        if got is not None:
            torch.testing.assert_close(got, logits, rtol=1e-3, atol=1e-3)
    if when in ("before", "after") and stage < 3:
        plain = peft.PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter")
        with torch.no_grad():
            loaded = plain(**tiny_batches(tiny_model()).prepare(SAMPLES[:1]).inputs).logits
        torch.testing.assert_close(loaded, got, rtol=1e-4, atol=1e-5)


def mistakes() -> dict[str, str]:
    """What is said when calls come in a wrong order."""
    start_deepspeed()
    config, how = ds_config(2, 1, 1), {"tokenizer": tokenizer(), "processor": object()}
    plain, said = {**config, "sequence_parallel_size": 1, "train_batch_size": 2}, {}

    def note(name: str, call: Any) -> None:
        try:
            call()
        except (ConfigError, ValueError) as error:
            said[name] = str(error)

    engine, *_ = deepspeed.initialize(model=tiny_model(), config=plain)
    note("an engine", lambda: attach(engine, config, **how))
    model = tiny_model()
    parallel = attach(model, config, **how)
    note("twice", lambda: attach(model, config, **how))
    note("another model", lambda: parallel.engine_arguments(tiny_model()))
    around = nn.ModuleDict({"answers": model})
    assert parallel.engine_arguments(around)["model"] is around
    parallel = attach(tiny_model(), config, **how)
    note("around", lambda: attach(nn.ModuleDict({"answers": tiny_model()}), config, **how))
    note("loss first", lambda: parallel.loss(torch.ones(())))
    note("without prepare", lambda: model(input_ids=torch.ones(1, 4, dtype=torch.long)))
    note("choice", lambda: attach(tiny_model(), config, on_bad_sample="drop", **how))
    note("nothing to load", lambda: attach(tiny_model(), config))
    return said


def test_a_wrong_order_is_an_error_that_says_the_right_one() -> None:
    parts = {
        "an engine": "attach it first, then deepspeed.initialize(**attached.engine_arguments())",
        "twice": "attached already",
        "another model": "does not hold the model that was attached",
        "around": "attach the MllamaForConditionalGeneration in it ('answers')",
        "loss first": "deepspeed.initialize(**engine_arguments())",
        "without prepare": "prepare",
        "choice": "'skip' or 'fail'",
        "nothing to load": "give them",
    }
    for said in run(2, mistakes):
        assert set(said) == set(parts)
        for name, part in parts.items():
            assert part in said[name], name


def cycles(count: int, size: int, source: ListSource) -> int:
    """Groups that attaching, preparing and closing leaves behind."""
    start_deepspeed()
    known = dist.distributed_c10d._world.pg_map
    config = ds_config(1, 1, 1, size=size, strategy="lv_xattn", inner_size=2)
    how = {"tokenizer": tokenizer(), "processor": tiny_processor()}
    before = len(known)
    for number in range(count):
        with attach(tiny_model(), config, **how) as parallel:
            attached = len(known)
            assert attached > before
            if number == 0:
                assert len([*parallel.micro_batches(source, 0, 2)]) == 2
                assert len(known) == attached
                parallel.prepare([source.sample(0)])
    return len(known) - before


@pytest.mark.parametrize(("ranks", "count"), [(2, 20), (4, 2)])
def test_closing_leaves_no_process_group(ranks: int, count: int) -> None:
    """Nor do the groups of nodes and across them, which four ranks have."""
    source = ListSource([tiny_sample("IaIt", seed) for seed in range(4)])
    assert run(ranks, cycles, count, ranks, source) == [0] * ranks


def test_public_names_are_there() -> None:
    for name in ds_lvxattn.__all__:
        assert getattr(ds_lvxattn, name) is not None
