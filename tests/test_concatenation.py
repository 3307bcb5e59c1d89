"""Visual tokens in the text: where they come from, what travels, and how evenly causal work lies on the ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

from ds_lvxattn import SequenceShards
from ds_lvxattn.batches.layout import BatchLayout, lay_out
from ds_lvxattn.data.sample import IGNORE
from ds_lvxattn.errors import ConfigError
from ds_lvxattn.exchange.comm import communicator
from ds_lvxattn.exchange.routes import visible_work
from ds_lvxattn.families import family as encoding
from ds_lvxattn.families import family_of, family_of_config
from ds_lvxattn.families.concatenation import embed_rows
from ds_lvxattn.families.family import ANY_SIZE, VisualFamily
from ds_lvxattn.families.image_features import ImageFeatures
from ds_lvxattn.families.llava import Llava
from ds_lvxattn.families.qwen2_5_vl import Qwen25VL
from ds_lvxattn.runtime.visual_rows import VisualRows
from ds_lvxattn.training.loading import select_trainable
from tests.support.distributed import device, run
from tests.support.parity import Gradients, gradients_of, largest_differences, samples_of, sum_over_ranks
from tests.support.text_models import LIGHTNING, SIZES
from tests.support.tiny_families import tiny
from tests.support.tiny_model import IMAGE_TOKEN, TINY, attach, loss_of
from tests.support.traffic import measured

BATCH = ("tItIItttaaItaIIIta", "ttIa", "ttatta")
PER_FRAME = 4


def layout_of(patterns: tuple[str, ...], ranks: int, placement: str) -> BatchLayout:
    model: Any = tiny("llava")
    return layout(patterns, Llava(model.config), ranks, placement)


def layout(patterns: tuple[str, ...], family: VisualFamily, ranks: int, placement: str) -> BatchLayout:
    samples, shape = samples_of(patterns), family.shape_of(None, None, ANY_SIZE)
    shapes = [[shape] * sample.num_frames for sample in samples]
    return lay_out(samples, shapes, family, ranks, placement, 0, IMAGE_TOKEN)


def test_a_frame_has_a_row_for_each_of_its_visual_tokens() -> None:
    layout = layout_of(("tIIta", "ta"), 2, "contiguous")
    [sample, other] = samples_of(("tIIta", "ta"))
    text, *_, answer = sample.input_ids
    assert layout.input_ids[0].tolist() == [text, *[IMAGE_TOKEN] * 8, sample.input_ids[3], answer]
    assert layout.visual.tolist() == [[-1, *range(8), -1, -1], [-1] * 11]
    assert layout.shift_labels[0].tolist() == [*[IGNORE] * 9, answer, IGNORE]
    assert layout.input_ids[1].tolist() == [*other.input_ids, *[0] * 9]
    start, stop = layout.ranges_of("self")
    assert not start.any()
    # What pads a sample, or a shard, sees nothing.
    assert stop.transpose(0, 1).flatten(1).tolist() == [[*range(1, 12), 0], [1, 2, *[0] * 10]]
    assert list(layout.roles) == ["self"]


def error_of_fewer_tokens() -> str:
    with mock.patch.object(Llava, "frame_tokens", lambda self: PER_FRAME - 1):
        model, samples = tiny("llava"), samples_of(("tIIta",))
        batches = attach(model, 1, ("lv_xattn", "gather", "contiguous"), samples)
        with pytest.raises(ValueError) as error:
            loss_of(model, samples, batches)
    return str(error.value)


def test_an_encoder_must_make_the_tokens_that_its_family_promises() -> None:
    [said] = run(1, error_of_fewer_tokens)
    assert "Llava.encode made 8 visual tokens of 2 frames" in said and "promise 6" in said


@pytest.mark.parametrize("pattern", ["ttItItttIa", "Ita", "tta"])
def test_positions_of_qwen_are_those_of_the_model(pattern: str) -> None:
    model: Any = tiny("qwen2.5-vl")
    rows = layout((pattern,), Qwen25VL(model.config), 1, "contiguous")
    ids = torch.from_numpy(rows.input_ids)
    grid = torch.tensor([[1, 4, 4]] * pattern.count("I")).reshape(-1, 3)
    want, _ = model.model.get_rope_index(ids, (ids == IMAGE_TOKEN).int(), grid)
    got = Qwen25VL(model.config).positions(rows.visual[0], rows.shapes[0])
    assert got.tolist() == want[:, 0].tolist()


def test_adjacent_frames_of_qwen_come_one_after_another() -> None:
    """The model's own function takes them for one image; published prompts have tokens between them."""
    model: Any = tiny("qwen2.5-vl")
    rows = layout(("tIIt",), Qwen25VL(model.config), 1, "contiguous")
    time, row, column = Qwen25VL(model.config).positions(rows.visual[0], rows.shapes[0]).tolist()
    assert time == [0, 1, 1, 1, 1, 3, 3, 3, 3, 5]
    assert row == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
    assert column == [0, 1, 2, 1, 2, 3, 4, 3, 4, 5]


# Tokens to their rows


def place(placement: str) -> None:
    """Every rank encodes numbered tokens; each arrives in its row, and its gradient comes back."""
    comm = communicator(dist.group.WORLD)
    layout = layout_of(BATCH, comm.ranks, placement)
    width, batch = 3, len(BATCH)
    holder, token = layout.visual_sources()
    rows = VisualRows.build(holder, token, layout.text, comm.rank, device())
    own = [sample * 100 + frame for sample in range(batch) for frame in layout.own_frames(sample, comm.rank)]
    numbers = torch.tensor(own or [-1])[:, None] * PER_FRAME + torch.arange(PER_FRAME)  # -1: a blank frame
    visual = (numbers[..., None] + torch.zeros(width)).to(device()).requires_grad_()
    mine = layout.text.index(comm.rank)
    text = torch.full((batch, layout.text.lengths[comm.rank], width), -7.0, device=device(), requires_grad=True)
    comm.reset()
    with measured() as forward:
        placed = rows.place(text, visual, comm)
    taken = torch.from_numpy(layout.visual[:, mine]).to(device())
    want = torch.where(taken >= 0, taken + 100 * PER_FRAME * torch.arange(batch, device=device())[:, None], -7)
    assert torch.equal(placed, want[..., None].expand_as(placed).float())
    # The gradient of a token is that of its row: the row's number in the batch, plus one.
    numbered = np.arange(1, layout.visual.size + 1).reshape(layout.visual.shape)
    with measured() as backward:
        placed.backward(torch.from_numpy(numbered[:, mine]).to(device())[..., None].expand_as(placed).float())
    assert visual.grad is not None and text.grad is not None
    got = visual.grad[..., 0].flatten().tolist()
    here = {int(token[at]): float(numbered[at]) for at in zip(*np.nonzero(holder == comm.rank), strict=True)}
    assert got == [here.get(number, 0.0) for number in range(len(got))]
    assert torch.equal(text.grad[..., 0] != 0, taken < 0)
    # Bytes: the width of each token that lies elsewhere than its row.
    shard = np.zeros(layout.text.total, dtype=int)
    for rank in range(comm.ranks):
        shard[layout.text.index(rank)] = rank
    arriving = ((shard == comm.rank) & (holder >= 0) & (holder != comm.rank)).sum() * width * text.element_size()
    leaving = ((shard != comm.rank) & (holder == comm.rank)).sum() * width * text.element_size()
    assert comm.received == {"visual rows": arriving, "visual row gradients": leaving}
    assert (forward.total(), backward.total()) == (arriving, leaving)


@pytest.mark.parametrize(("ranks", "placement"), [(2, "contiguous"), (4, "striped")])
def test_visual_tokens_come_to_their_rows(ranks: int, placement: str) -> None:
    run(ranks, place, placement)


# Portions of frames, and parts that do not train

TRAINABLE = (("*",), ("*multi_modal_projector.*",), ("*language_model.*", "*lm_head.*"))


def loss_and_gradients(parallel: bool) -> list[tuple[float, Gradients]]:
    """For each choice of what trains; a frame a portion, so a rank with fewer frames encodes one of them again."""
    results = []
    samples, usual = samples_of(BATCH), encoding.TOKENS_AT_ONCE
    for trainable in TRAINABLE:
        model = tiny("llava", torch.float64).train()
        select_trainable(model, "llava", trainable)
        try:
            encoding.TOKENS_AT_ONCE = 1 if parallel else usual
            ranks = dist.get_world_size() if parallel else 1
            mode = ("lv_xattn", "gather", "striped")
            loss = loss_of(model, samples, attach(model, ranks, mode, samples) if parallel else None)
            loss.backward()
        finally:
            encoding.TOKENS_AT_ONCE = usual
        gradients = gradients_of(model)
        results.append(sum_over_ranks(loss, gradients) if parallel else (loss.item(), gradients))
    return results


def test_portions_and_frozen_parts() -> None:
    got, want = run(2, loss_and_gradients, True)[0], loss_and_gradients(False)
    for trainable, ours, theirs in zip(TRAINABLE, got, want, strict=True):
        loss, gradient = largest_differences(ours, theirs)
        assert loss < 1e-12 and gradient < 1e-11, (trainable, loss, gradient)


# Balance


@given(st.integers(1, 3000), st.integers(1, 9))
def test_balanced_shards_share_causal_work(total: int, ranks: int) -> None:
    shards = SequenceShards.balanced(total, ranks)
    assert shards.total == total
    assert min(shards.lengths) > 0 or total < ranks
    stop = torch.arange(1, total + 1, dtype=torch.int32)
    work = visible_work(torch.zeros_like(stop), stop, shards)
    # Rounding to units of up to ``TILE`` tokens, there and back, costs less than a unit of one rank.
    assert max(work) * ranks <= sum(work) + ranks * shards.stripe * total
    if total % (2 * ranks) == 0 and total <= 256 * ranks:
        assert max(work) == min(work)


# Errors


def test_a_tower_without_a_fixed_number_of_tokens_is_of_the_general_family() -> None:
    model: Any = tiny("llava")
    assert type(family_of(model)) is type(family_of_config(model.config)) is Llava
    model.config.vision_config.model_type = "pixtral"
    assert type(family_of(model)) is type(family_of_config(model.config)) is ImageFeatures


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("doge", "DogeAttention makes a dense mask itself"),
        ("minimax", r"layers of the types \['linear_attention'\]"),
    ],
)
def test_a_text_that_would_be_wrong_is_refused_beside_images_too(kind: str, reason: str) -> None:
    others = LIGHTNING if kind == "minimax" else {}
    text, vision = CONFIG_MAPPING[kind](**{**SIZES, **others}), CLIPVisionConfig(**TINY.vision)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision))
    family = family_of(model)
    assert isinstance(family, Llava)
    with pytest.raises(ConfigError, match=reason):
        family.attention_layers(model)


def test_frames_that_do_not_divide_into_tokens_are_refused() -> None:
    model: Any = tiny("qwen2.5-vl")
    model.config.vision_config.image_size = 30
    with pytest.raises(ConfigError, match="30 pixels do not divide into tokens of 14; set 'image_size'"):
        Qwen25VL(model.config).frame_tokens()


def test_embeddings_in_the_place_of_token_ids_are_refused_by_name() -> None:
    model: Any = tiny("llava")
    batch: Any = SimpleNamespace(brings_frames=True)
    arguments = {"sequence_parallel": batch, "inputs_embeds": torch.zeros(1, 2, 32), "pixel_values": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"\['input_ids'\] are missing beside sequence_parallel: LLaVA puts"):
        embed_rows(Llava(model.config), batch, model.model, (), arguments)
