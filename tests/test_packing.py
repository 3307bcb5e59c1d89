"""Samples that share a row: apart in every layer, so that losses and gradients are those of rows of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

from ds_lvxattn.batches.generation import generate
from ds_lvxattn.batches.packing import first_fit
from ds_lvxattn.data.sample import IGNORE
from tests.support.distributed import run
from tests.support.marks import slow, slow_but
from tests.support.parity import (
    Gradients,
    batches_of,
    gradients_of,
    largest_differences,
    limits_of,
    loss_and_gradients,
    on_one_rank,
    samples_of,
    sum_over_ranks,
)
from tests.support.text_models import TEXT_MODELS, text_model
from tests.support.tiny_families import FAMILIES, tiny
from tests.support.tiny_model import MODES, attach, loss_of, loss_of_each_alone, tiny_model
from tests.support.training import Case, metrics_in, one_rank, train

MLLAMA = "mllama"
ONE_ROW = 1000
# Of a Llama Vision model: text ahead of images, between them, and alone; 11, 6, 5 and 3 tokens.
PATTERNS = ("tItaItIItta", "ttIIta", "ttata", "Ita")
# Ranks of a group, tokens of a row, and how attention crosses the ranks; most families the first way alone.
WAYS = ((2, 16, MODES[4]), (2, ONE_ROW, MODES[0]), (2, ONE_ROW, MODES[2]), (1, ONE_ROW, MODES[5]))
EVERY_WAY = (MLLAMA, "llava", "qwen2.5-vl", "qwen3.5", "text only")


def patterns_of(family: str) -> tuple[str, ...]:
    return PATTERNS if family == MLLAMA else batches_of(family)[4]


def model_of(family: str) -> nn.Module:
    return tiny_model(dtype=torch.float64) if family == MLLAMA else tiny(family, torch.float64)


@given(st.lists(st.integers(0, 12), min_size=1, max_size=12), st.integers(2, 16))
def test_each_sample_lies_in_the_first_row_with_room(lengths: list[int], budget: int) -> None:
    spans = first_fit(lengths, budget)
    filled: dict[int, int] = {}
    for length, span in zip(lengths, spans, strict=True):
        assert (span.start, span.stop) == (filled.get(span.row, 0), filled.get(span.row, 0) + length)
        assert all(filled[row] + length > budget for row in range(span.row))
        assert span.row in filled or span.row == len(filled)
        filled[span.row] = span.stop
        assert filled[span.row] <= budget or span.start == 0
    assert [span.row for span in first_fit(lengths, None)] == list(range(len(lengths)))


def ways_of(family: str) -> tuple[tuple[int, int, tuple[str, str, str]], ...]:
    return WAYS if family in EVERY_WAY else WAYS[:1]


def packed(family: str) -> list[tuple[float, Gradients]]:
    """Loss and gradients in each way of the family, those of a group (on rank 0)."""
    found = []
    for size, packing, mode in ways_of(family):
        samples, model = samples_of(patterns_of(family)), model_of(family).train()
        batches = attach(model, size, mode, samples, packing)
        layout = batches.collator.layout(samples, packing)
        assert layout.rows == (1 if packing == ONE_ROW else 2) or layout.keys_in_text
        loss = loss_of(model, samples, batches, layout)
        loss.backward()
        found.append(sum_over_ranks(loss * size / 2, {n: g * size / 2 for n, g in gradients_of(model).items()}))
    return found


def alone(family: str) -> tuple[float, Gradients]:
    if family != MLLAMA:
        return on_one_rank(family, patterns_of(family), torch.float64)
    model = model_of(family)
    loss = loss_of_each_alone(model, samples_of(PATTERNS))
    loss.backward()
    return loss.item(), gradients_of(model)


@pytest.mark.parametrize("family", [MLLAMA, *slow_but(FAMILIES, "llava")])
def test_loss_and_gradients_are_those_of_rows_of_their_own(family: str) -> None:
    want, limits = alone(family), limits_of(family)
    for way, got in zip(ways_of(family), run(2, packed, family)[0], strict=True):
        loss, gradient = largest_differences(got, want)
        assert loss < limits[0] and gradient < limits[1], (way, loss, gradient)


def packed_text(kinds: tuple[str, ...]) -> list[tuple[float, Gradients]]:
    results = []
    for kind in kinds:
        samples, model = samples_of(batches_of("text only")[4]), text_model(kind, torch.float64).train()
        batches = attach(model, dist.get_world_size(), MODES[0], samples, ONE_ROW)
        loss = loss_of(model, samples, batches, batches.layout(samples))
        loss.backward()
        results.append(sum_over_ranks(loss, gradients_of(model)))
    return results


def packed_by_transformers(kind: str) -> tuple[float, Gradients]:
    """One row of all samples, which transformers tells apart by positions that begin anew."""
    samples, model = samples_of(batches_of("text only")[4]), text_model(kind, torch.float64)
    ids = torch.tensor([[token for sample in samples for token in sample.input_ids]])
    positions = torch.tensor([[place for sample in samples for place in range(len(sample.input_ids))]])
    labels = torch.tensor([label for s in samples for label in (*s.labels[1:], IGNORE)])
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
    loss = cross_entropy(logits, labels, ignore_index=IGNORE)
    loss.backward()
    return loss.item(), gradients_of(model)


def test_text_is_as_transformers_packs_it() -> None:
    # transformers would count chunks from the start of the row, and keeps apart no documents of these here.
    others = [kind for kind in ("llama4_text", "qwen3_next", "lfm2", "nemotron_h") if kind in TEXT_MODELS]
    kinds = ("llama", "mistral", "qwen3", "gpt2", *others)  # sliding windows, learned positions
    for kind, got in zip(kinds, run(2, packed_text, kinds)[0], strict=True):
        by_rows = kind in others
        model, patterns = text_model(kind, torch.float64), batches_of("text only")[4]
        want = loss_and_gradients(model, patterns) if by_rows else packed_by_transformers(kind)
        limits = (1e-7, 1e-5) if by_rows else (1e-12, 1e-10)
        loss, gradient = largest_differences(got, want)
        assert loss < limits[0] and gradient < limits[1], (kind, loss, gradient)


@pytest.mark.parametrize(("size", "stage"), [slow(2, 3), (1, 2)])
def test_the_loop_trains_on_packed_rows(size: int, stage: int, tmp_path: Path) -> None:
    case = Case(2, size, stage, MODES[0], steps=3, micro_batch=2 * size, recompute="kv")
    run(2, train_packed, case, tmp_path)
    losses, norms = zip(*one_rank(case.steps, case.batch, case.micro_batch), strict=True)
    assert metrics_in(tmp_path) == pytest.approx(losses, rel=1e-5)
    assert metrics_in(tmp_path, "grad_norm") == pytest.approx(norms, rel=1e-3)


def train_packed(case: Case, folder: Path) -> None:
    train(case, folder, packing=24)


def answers(packing: int | None) -> torch.Tensor:
    samples = samples_of(PATTERNS[:2])
    model = tiny_model()
    return generate(model, attach(model, 1, MODES[5], samples, packing), samples, max_new_tokens=3, do_sample=False)


def test_prompts_are_not_packed() -> None:
    """Of a model that is attached on one rank, too."""
    want = run(2, answers, None)[0]
    torch.testing.assert_close(run(2, answers, ONE_ROW)[0], want)
