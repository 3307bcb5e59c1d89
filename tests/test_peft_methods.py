"""PEFT's other methods on divided text: parts that are trained whole, adapters put in ahead and behind, refusals."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import nn

import ds_lvxattn
from ds_lvxattn import ConfigError
from ds_lvxattn.families import unwrapped
from ds_lvxattn.needle.task import build_tokenizer
from tests.support.distributed import run
from tests.support.parity import Gradients, gradients_of, largest_differences, samples_of, sum_over_ranks
from tests.support.tiny_families import tiny
from tests.support.tiny_model import (
    attach,
    ds_config,
    loss_of,
    start_deepspeed,
    tiny_model,
    tiny_processor,
)

MODE = ("lv_xattn", "gather", "contiguous")
BATCHES: tuple[tuple[str, ...], ...] = (("ItItIIttaaItaIIta",), ("IItaIta", "ItIa"))
# Parts that PEFT copies and trains whole, attention and layers among them; and adapters that the projection of visual
# keys, by which mPLUG-Owl3's attention is planned, gets behind attaching, with a norm that is copied.
COPIED = {"r": 2, "target_modules": r".*layers.0.*q_proj", "modules_to_save": ["cross_attn", "layers.2", "lm_head"]}
AROUND = {"r": 2, "target_modules": ["v_kv_proj", "q_proj"], "modules_to_save": ["input_layernorm"]}
CASES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "copied layers, ahead": ("mllama", COPIED, False),
    "keys and norm, behind": ("mplug_owl3, fused", AROUND, True),
}


def model_of(family: str) -> nn.Module:
    return tiny_model(dtype=torch.float64) if family == "mllama" else tiny(family, torch.float64)


def adapted(model: nn.Module, how: dict[str, Any]) -> nn.Module:
    """In a ``PeftModel`` whose adapters and copies are moved, the same at every call."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(2)
        wrapped: nn.Module = peft.get_peft_model(model, peft.LoraConfig(**how)).double()
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return wrapped.train()


def divided(name: str) -> list[tuple[float, Gradients]]:
    (family, how, behind), found = CASES[name], []
    for patterns in BATCHES:
        samples, model = samples_of(patterns), model_of(family)
        wrapped = model if behind else adapted(model, how)
        batches = attach(unwrapped(wrapped), 2, MODE, samples)
        wrapped = adapted(wrapped, how) if behind else wrapped
        loss = loss_of(wrapped, samples, batches)
        loss.backward()
        found.append(sum_over_ranks(loss, gradients_of(wrapped)))
    return found


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_one_rank(name: str) -> None:
    family, how, _ = CASES[name]
    for patterns, got in zip(BATCHES, run(2, divided, name)[0], strict=True):
        wrapped = adapted(model_of(family), how)
        loss = loss_of(wrapped, samples_of(patterns))
        loss.backward()
        difference, of_gradients = largest_differences(got, (loss.item(), gradients_of(wrapped)))
        assert difference < 1e-6 and of_gradients < 1e-5  # norms compute in float32


REFUSED: dict[str, tuple[peft.PeftConfig, str]] = {
    "prompt": (peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "PROMPT_TUNING, which puts"),
    "prefix": (peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "PREFIX_TUNING, which puts"),
    "AdaLoRA": (peft.AdaLoraConfig(total_step=9, target_modules=["q_proj"]), "ADALORA, which adds a term"),
    "mean over rows": (peft.LilyConfig(r=2, target_modules=["q_proj"]), "LILY, which mixes"),
    "invocation": (
        peft.LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[3], task_type="CAUSAL_LM"),
        "alora_invocation_tokens, which looks",
    ),
}


def refusals() -> dict[str, str]:
    """What is said of methods, ahead of attaching and behind it, and of copies of what is attached."""
    start_deepspeed()
    how, said = {"tokenizer": build_tokenizer(), "processor": tiny_processor()}, {}
    config = ds_config(2, 1, 1, tiled_mlp=2)
    for name, (method, _) in REFUSED.items():
        with pytest.raises(ConfigError) as error:
            ds_lvxattn.attach(peft.get_peft_model(tiny_model(), method), config, **how)
        said[name] = str(error.value)
    model: Any = tiny_model()
    parallel = ds_lvxattn.attach(model, config, **how)
    for part in (model, model.model.language_model.layers[1], model.model.language_model.layers[0].mlp):
        with pytest.raises(ConfigError, match=r"or call peft.get_peft_model, ahead of attach"):
            copy.deepcopy(part)
    copy.deepcopy(model.lm_head)
    with pytest.raises(ConfigError, match="ADALORA"):
        parallel.engine_arguments(peft.get_peft_model(model, REFUSED["AdaLoRA"][0]))
    parallel.close()
    return said


def layouts(rate: float) -> list[int | str]:
    """Over how many ranks text is divided that would be copied, where adapters drop out: as planned, as asked for."""
    samples, found = samples_of(BATCHES[0]), []
    for text in ("auto", "replicated"):
        how = {"r": 2, "target_modules": ["q_proj"], "lora_dropout": rate}
        batches = attach(
            adapted(tiny_model(), how).get_base_model(), 2, ("auto", "auto", "contiguous"), samples, text=text
        )
        planner: Any = batches.planner
        planner.undivided, planner.copies_text = (lambda sizes: False), (lambda sizes: True)
        try:
            found.append(batches.layout(samples).text.ranks)
        except ConfigError as error:
            found.append(str(error))
    return found


def test_copies_of_a_row_do_not_drop_out_differently() -> None:
    assert run(2, layouts, 0.0) == [[1, 1]] * 2
    for planned, asked in run(2, layouts, 0.1):
        assert planned == 2 and "the text has dropout of 0.1 in " in asked


def test_what_reads_or_changes_a_whole_text_is_refused() -> None:
    for said in run(2, refusals):
        for name, (_, part) in REFUSED.items():
            assert part in said[name] and "'sequence_parallel_size' to 1" in said[name], name
