"""Language models that have no family of their own, divided over ranks, against themselves on one rank."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache

from ds_lvxattn.batches.generation import generate
from ds_lvxattn.errors import ConfigError
from ds_lvxattn.families import family_of
from ds_lvxattn.families.text_only import TextOnly
from ds_lvxattn.runtime.registration import exchanged_attention
from tests.support.distributed import run
from tests.support.marks import slow_but
from tests.support.parity import (
    TEXT,
    Gradients,
    gradients_of,
    largest_differences,
    losses_of_steps,
    samples_of,
    sum_over_ranks,
)
from tests.support.text_models import LATENT, LIGHTNING, ROUTED, SIZES, TEXT_MODELS, text_model
from tests.support.tiny_model import attach, loss_of

# Their norms, or their routers of experts, compute in float32, whatever the model.
SINGLE = (
    "gemma2", "gemma3_text", "gpt_oss", "cohere2", "deepseek_v3", "deepseek_v2", "longcat_flash", "glm4_moe_lite",
    "mimo_v2_flash", "gemma3n_text", "gemma4_text", "llama4_text", "moshi", "qwen3_5_text", "qwen3_next", "olmo_hybrid",
    "lfm2", "lfm2_moe", "lfm3", "kimi_linear", "bamba", "granitemoehybrid", "nemotron_h",
)  # fmt: skip
KINDS = tuple(kind for kind in TEXT_MODELS if kind in CONFIG_MAPPING)  # of this release of transformers
OTHERWISE = (
    "qwen3_5_text",
    "qwen3_next",
    "olmo_hybrid",
    "kimi_linear",
    "bamba",
    "granitemoehybrid",
    "nemotron_h",
    "lfm2",
)
MIXERS = tuple(kind for kind in OTHERWISE if kind in KINDS)  # that mix tokens otherwise than by attention
MODES = (("lv_xattn", "gather", "contiguous"), ("ulysses", "auto", "striped"), ("ring", "ring", "contiguous"))


def on_one_rank(kind: str, patterns: tuple[str, ...]) -> tuple[float, Gradients]:
    model = text_model(kind, torch.float64)
    loss = loss_of(model, samples_of(patterns))
    loss.backward()
    return loss.item(), gradients_of(model)


def on_all_ranks(kind: str) -> list[tuple[float, Gradients]]:
    results = []
    for patterns, mode in zip((TEXT[0], TEXT[4], TEXT[1]), MODES, strict=True):
        samples, model = samples_of(patterns), text_model(kind, torch.float64).train()
        loss = loss_of(model, samples, attach(model, dist.get_world_size(), mode, samples))
        loss.backward()
        results.append(sum_over_ranks(loss, gradients_of(model)))
    return results


@pytest.mark.parametrize(
    "kind", slow_but(KINDS, "llama", "qwen3", "gemma3_text", "gpt_oss", "gpt2", "deepseek_v3", "nemotron", "qwen3_next")
)
def test_loss_and_gradients(kind: str) -> None:
    for patterns, got in zip((TEXT[0], TEXT[4], TEXT[1]), run(2, on_all_ranks, kind)[0], strict=True):
        loss, gradient = largest_differences(got, on_one_rank(kind, patterns))
        limits = (1e-7, 1e-5) if kind in SINGLE else (1e-12, 1e-10)
        assert loss < limits[0] and gradient < limits[1], (patterns, loss, gradient)


def answers(kind: str) -> list[list[int]]:
    """Tokens that a divided model generates; on one rank, those of the largest logits, without a cache."""
    model, prompts = text_model(kind, torch.float64), samples_of(TEXT[4])
    if dist.is_initialized():
        batches = attach(model, dist.get_world_size(), MODES[0], prompts)
        return generate(model, batches, prompts, max_new_tokens=3, do_sample=False, eos_token_id=10_000).tolist()
    made = []
    for prompt in prompts:
        ids = torch.tensor(prompt.input_ids)[None]
        for _ in range(3):
            ids = torch.cat((ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
        made.append(ids[0, -3:].tolist())
    return made


# Their caches hold latents, each key once that two heads repeat, nothing of layers that attend to others' keys, and
# states of linear attention and convolutions.
@pytest.mark.parametrize(
    "kind",
    slow_but(
        ("deepseek_v3", "jetmoe", "gemma3n_text", "gemma4_text", "llama4_text", "nemotron", *MIXERS),
        "deepseek_v3",
        "qwen3_next",
    ),
)
def test_answers_where_the_cache_is_not_what_is_attended_to(kind: str) -> None:
    assert run(2, answers, kind)[0] == answers(kind)


def test_generation_where_a_module_attends_twice_is_refused() -> None:
    with pytest.raises(AssertionError, match="DiffLlamaAttention attends twice in a forward"):
        run(2, answers, "diffllama")


def train(kind: str, ranks: int) -> list[float]:
    return losses_of_steps(text_model(kind), samples_of(TEXT[4]), ranks, 2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt_oss", "gemma3_text", *MIXERS])
def test_losses_under_zero3(kind: str) -> None:
    assert run(2, train, kind, 2)[0] == pytest.approx(train(kind, 1), rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "others", "reason"),
    [
        ("qwen3_moe", {"output_router_logits": True}, "'output_router_logits' is true"),
        ("mamba", {"state_size": 4}, "does not look up transformers' registry"),
        ("minimax", LIGHTNING, r"layers of the types \['linear_attention'\]"),
        ("glm_moe_dsa", {**LATENT, **ROUTED, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 4},
         r"\(GlmMoeDsaIndexer\) chooses the keys that a row attends to"),
        ("bloom", {}, "does not look up transformers' registry|ALiBi"),
        ("doge", {}, r"DogeAttention makes a dense mask itself \('attn_mask'\)"),
    ],
)  # fmt: skip
def test_models_that_would_be_wrong_are_refused_by_reason(kind: str, others: dict[str, Any], reason: str) -> None:
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this release of transformers has no {kind}")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**SIZES, **others}))
    family = family_of(model)
    assert isinstance(family, TextOnly)
    with pytest.raises(ConfigError, match=reason):
        family.attention_layers(model)


def test_sizes_of_latent_attention() -> None:
    layers = TextOnly(text_model("deepseek_v3")).attention_layers(text_model("deepseek_v3")).values()
    assert {(layer.heads, layer.kv_heads, layer.head_dim, layer.value_dim) for layer in layers} == {(4, 4, 12, 6)}


def test_a_sink_takes_its_share_of_the_weights() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 4, dtype=torch.float64) for _ in range(3))
    sink = torch.randn(3, dtype=torch.float64, requires_grad=True)
    module: nn.Module = nn.Identity()

    def attend(*tensors: Any) -> tuple[torch.Tensor, torch.Tensor]:
        scores = q @ k.mT / 2
        return scores.softmax(-1) @ v, scores.logsumexp(-1)

    batch: Any = SimpleNamespace(plans={module: SimpleNamespace(window=None)}, attend=attend, position_ids=None)
    out, _ = exchanged_attention(module, q, k, v, None, s_aux=sink, sequence_parallel=batch)
    scores = torch.cat([q @ k.mT / 2, sink[None, :, None, None].expand(2, 3, 5, 1)], dim=-1)
    want = (scores.softmax(-1)[..., :-1] @ v).transpose(1, 2)
    torch.testing.assert_close(out, want)
    got, expected = (torch.autograd.grad(x.square().sum(), sink)[0] for x in (out, want))
    torch.testing.assert_close(got, expected)


def with_other_arguments() -> dict[str, str]:
    """What is said of arguments beside those of a batch, and of a model that was changed after it was attached."""
    samples, model = samples_of(TEXT[0]), text_model("llama")
    inputs = attach(model, dist.get_world_size(), MODES[0], samples).prepare(samples).inputs
    ids, lengths = inputs["input_ids"], torch.tensor([0, 2])
    said = {}

    def note(name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except (ConfigError, ValueError) as error:
            said[name] = str(error)

    others: dict[str, Any] = {
        "attention_mask": torch.ones_like(ids), "position_ids": inputs["position_ids"] % 4, "cu_seq_lens_q": lengths,
        "is_causal": False, "output_attentions": True, "output_router_logits": True, "use_cache": True,
        "past_key_values": DynamicCache(), "logits_to_keep": torch.tensor([0]), "shift_labels": None,
        "num_items_in_batch": None, "input_ids": ids[:, 1:], "labels": ids,
    }  # fmt: skip
    for name, value in others.items():
        note(name, model, **{**inputs, name: value})
    note("no positions", model, **{**inputs, "position_ids": None})
    note("by position", model, ids, others["attention_mask"], **{k: x for k, x in inputs.items() if k != "input_ids"})
    handed = {name: inputs[name] for name in ("input_ids", "position_ids", "sequence_parallel")}
    note("inside", model.get_submodule("model"), **handed, attention_mask=others["attention_mask"])
    note("inside, no positions", model.get_submodule("model"), **{**handed, "position_ids": None})
    note("inside, with a cache", model.get_submodule("model"), **handed)
    batch = replace(inputs["sequence_parallel"], block_arguments={"token_type_ids": ids})
    note("token_type_ids", model, **{**inputs, "sequence_parallel": batch}, token_type_ids=ids + 1)
    note("another model's", attach_another(), **inputs)
    note("copied", copy.deepcopy, model)
    note("pickled", pickle.dumps, model)
    model.set_attn_implementation("sdpa")  # type: ignore[operator]
    note("implementation", model, **inputs)
    return said


def attach_another() -> nn.Module:
    other = text_model("llama")
    attach(other, dist.get_world_size(), MODES[0], samples_of(TEXT[0]))
    return other


def test_other_arguments_beside_the_batch_are_refused_by_name() -> None:
    said = run(2, with_other_arguments)[0]
    named = {
        "no positions": "position_ids are missing", "inside, no positions": "position_ids are missing",
        "inside, with a cache": "use_cache is set", "labels": "that are not shift_labels",
        "by position": "attention_mask was given beside sequence_parallel",
        "inside": "attention_mask was given beside sequence_parallel", "past_key_values": "use_cache is set",
        "another model's": "not of the model that sequence_parallel was prepared for", "copied": "state_dict()",
        "pickled": "state_dict()", "implementation": "was set to 'sdpa' after the model was attached",
        "shift_labels": "labels were given without shift_labels", "input_ids": r"input_ids of shape [1, 8]",
        "num_items_in_batch": "labels were given without num_items_in_batch",
        "position_ids": "position_ids were given that are not those of the batch",
    }  # fmt: skip
    assert len(said) == 23, ", ".join(said)
    for name, message in said.items():
        assert named.get(name, name) in message, (name, message)


def without_arguments(self: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return hidden_states


def test_layers_that_hand_nothing_on_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = text_model("llama")
    layer = model.get_submodule("model.layers.0")
    monkeypatch.setattr(type(layer), "forward", without_arguments)
    with pytest.raises(ConfigError, match=r"model\.layers\.0 \(LlamaDecoderLayer\) hands no further arguments on"):
        TextOnly(model.config).attention_layers(model)
    monkeypatch.undo()
    monkeypatch.setattr(type(layer.self_attn), "forward", without_arguments)
    with pytest.raises(ConfigError, match="LlamaAttention hands no further arguments on"):
        TextOnly(model.config).attention_layers(model)


def test_a_window_that_only_masks_say_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = text_model("moshi")
    layers = TextOnly(model.config).attention_layers(model)
    assert {layer.window for layer in layers.values()} == {None}  # as transformers' masks have it
    code = sys.modules[type(model).__module__]
    monkeypatch.setattr(code, "create_sliding_window_causal_mask", None, raising=False)
    with pytest.raises(ConfigError, match="MoshiAttention does not hand its sliding window on"):
        TextOnly(model.config).attention_layers(model)


def test_self_attention_that_is_not_causal_is_refused() -> None:
    model = text_model("llama")
    model.get_submodule("model.layers.1.self_attn").is_causal = False  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"model\.layers\.1\.self_attn\.is_causal is False"):
        TextOnly(model.config).attention_layers(model)
