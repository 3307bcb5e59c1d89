"""Tokens mixed outside attention: exchanged by heads, against the same on one rank."""

from __future__ import annotations

import functools
import types
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import CONFIG_MAPPING

from ds_lvxattn import SequenceShards
from ds_lvxattn.batches.generation import generate
from ds_lvxattn.batches.packing import first_fit
from ds_lvxattn.batches.sequence_parallel import SequenceParallel
from ds_lvxattn.config import SequenceParallelConfig
from ds_lvxattn.errors import ConfigError
from ds_lvxattn.exchange.comm import communicator
from ds_lvxattn.exchange.sequence_mixing import Document, MixedRows, heads_of_all_ranks, mixed_by_heads
from ds_lvxattn.families.mixers import divide, mixers
from ds_lvxattn.plan.head_shards import head_shards
from tests.support.distributed import run
from tests.support.marks import slow
from tests.support.parity import (
    Gradients,
    gradients_of,
    losses_of_steps,
    samples_of,
    sum_over_ranks,
)
from tests.support.sp_attention import EXAMPLES
from tests.support.text_models import CONVOLUTIONS, LINEAR, SIZES, TEXT_MODELS, text_model
from tests.support.tiny_families import tiny
from tests.support.tiny_model import MODES, attach, groups_of, loss_of, tiny_batches


@dataclass(frozen=True)
class Case:
    """A sequence and heads; tensors are drawn from ``seed`` on every rank."""

    shards: SequenceShards
    keys: int
    values: int
    batch: int
    documents: tuple[Document, ...] | None
    seed: int

    def tensors(self) -> list[Tensor]:
        """Queries, keys, and values of every token, and a gradient of each result."""
        generator = torch.Generator().manual_seed(self.seed)
        sizes = ((self.keys, 3), (self.keys, 3), (self.values, 2), (self.values, 2))
        shapes = [(self.batch, heads, self.shards.total, size) for heads, size in sizes]
        return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def recurrence(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``[B, heads, S, size]``: a state that decays, by what is read of it before it is written."""
    group = v.shape[1] // k.shape[1]
    q, k = (x.repeat_interleave(group, dim=1) for x in (q, k))
    state, out = v.new_zeros(*v.shape[:2], 3, 2), []
    for place in range(v.shape[2]):
        state = 0.7 * state + (k[:, :, place, :, None] * v[:, :, place, None]).tanh()
        out.append((q[:, :, place, :, None] * state).sum(2))
    return torch.stack(out, dim=2)


def mixed(case: Case, rank: int, ranks: int, apart: bool = True) -> list[Tensor]:
    """Of the rank's tokens the result and the gradients."""
    comm = communicator(dist.group.WORLD if ranks > 1 else None)
    shares = head_shards(case.values, case.keys, ranks)
    keys, values = tuple(x.keys for x in shares), tuple(x.queries for x in shares)
    own = case.shards.index(rank) if ranks > 1 else slice(None)
    *inputs, gradient = (x[:, :, own] for x in case.tensors())
    inputs = [x.contiguous().requires_grad_() for x in inputs]
    shards = case.shards if ranks > 1 else SequenceShards((case.shards.total,))
    parts = shares[rank].parts

    def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        runs = zip(
            *(x.split([run[place] for run in parts], dim=1) for x, place in ((q, 1), (k, 1), (v, 0))), strict=True
        )
        return torch.cat([recurrence(*run) for run in runs], dim=1)

    rows = MixedRows(comm, shards, case.documents)
    out = mixed_by_heads(inputs, (keys, keys, values), (values, 2), rows, mix)
    out.backward(gradient)
    return [out.detach(), *(x.grad for x in inputs if x.grad is not None)]


@st.composite
def cases(draw: st.DrawFn, ranks: int) -> Case:
    kind = draw(st.sampled_from(["uneven", "striped", "balanced"]))
    total, batch, keys = draw(st.integers(1, 24)), draw(st.integers(1, 2)), draw(st.integers(1, 4))
    if kind == "uneven":
        shards = SequenceShards((*(draw(st.integers(0, 7)) for _ in range(ranks - 1)), total))
    else:
        striped = kind == "striped"
        shards = SequenceShards.striped(total, ranks, 2) if striped else SequenceShards.balanced(total, ranks)
    documents = None
    if draw(st.booleans()):
        lengths = draw(st.lists(st.integers(0, max(shards.total // 2, 1)), min_size=1, max_size=4))
        spans = [span for span in first_fit(lengths, shards.total) if span.row < batch and span.stop <= shards.total]
        documents = tuple(sorted((span.row, span.start, span.stop) for span in spans))
    group = draw(st.integers(-(-ranks // keys), 4))
    return Case(shards, keys, keys * group, batch, documents, draw(st.integers(0, 2**31)))


def on_all_ranks(case: Case) -> list[Tensor]:
    return mixed(case, dist.get_rank(), dist.get_world_size())


@pytest.mark.parametrize("ranks", [slow(3), 4])
def test_results_and_gradients_are_those_of_one_rank(ranks: int) -> None:
    @settings(max_examples=EXAMPLES or 15, derandomize=not EXAMPLES, deadline=None, database=None)
    @given(cases(ranks))
    def holds(case: Case) -> None:
        want = mixed(case, 0, 1)
        for rank, of_rank in enumerate(run(ranks, on_all_ranks, case)):
            for got, whole in zip(of_rank, want, strict=True):
                torch.testing.assert_close(got, whole[:, :, case.shards.index(rank)], rtol=1e-12, atol=1e-12)

    holds()


def received(case: Case) -> dict[str, int]:
    comm = communicator(dist.group.WORLD)
    comm.reset()
    mixed(case, dist.get_rank(), dist.get_world_size())
    return dict(comm.received)


def test_bytes_are_a_share_of_the_heads_of_others_tokens() -> None:
    """float64; queries and keys of 3, values and results of 2, forth and, as gradients, back."""
    case = Case(SequenceShards((4, 6)), 2, 4, 1, None, 0)
    for rank, found in enumerate(run(2, received, case)):
        tokens, own = case.shards.lengths[1 - rank], case.shards.lengths[rank]
        to_heads, to_tokens = (8 * rows * (2 * 1 * 3 + 2 * 2) for rows in (tokens, own))
        assert found == {"mixer inputs": to_heads + to_tokens, "mixer outputs": 8 * 2 * 2 * (tokens + own)}


def gathered(heads: tuple[range, ...], whole: Tensor) -> Tensor:
    own = heads[dist.get_rank()]
    return heads_of_all_ranks(whole[:, own.start : own.stop], heads, communicator(dist.group.WORLD))


def test_heads_of_all_ranks() -> None:
    whole = torch.randn(2, 5, 3)
    heads = (range(2), range(1, 3), range(2, 3), range(3, 5))
    assert all(torch.equal(got, whole) for got in run(4, gathered, heads, whole))


# The modules

KINDS = {
    "qwen3_next": "Qwen3NextGatedDeltaNet", "qwen3_5_text": "Qwen3_5GatedDeltaNet",
    "qwen3_5_moe_text": "Qwen3_5MoeGatedDeltaNet", "olmo_hybrid": "OlmoHybridGatedDeltaNet", "lfm2": "Lfm2ShortConv",
    "lfm2_moe": "Lfm2MoeShortConv", "lfm3": "Lfm3ShortConv", "nemotron_h": "NemotronHMamba2Mixer",
    "kimi_linear": "KimiLinearDeltaAttention", "bamba": "BambaMixer", "granitemoehybrid": "GraniteMoeHybridMambaLayer",
}  # fmt: skip
# On three ranks: heads that divide, a key head that two ranks read, a rank whose runs of value heads differ.
HEADS = ((3, 6), (2, 4), (3, 12), (2, 8))


def module_of(kind: str, heads: tuple[int, int]) -> Any:
    """A module that mixes tokens, in float32, as which it computes whatever it is given."""
    keys, values = heads
    size = 16 if values == 6 else 8  # of a head in Bamba, whose inner width is a multiple of the model's
    more: dict[str, Any] = {**LINEAR, "linear_num_key_heads": keys, "linear_num_value_heads": values}
    if kind in ("qwen3_5_moe_text", "qwen3_next"):
        more |= {"num_experts": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
    elif kind == "kimi_linear":
        more = {"linear_num_heads": values}
    elif kind.startswith("lfm"):
        more = CONVOLUTIONS
    elif kind == "nemotron_h":
        more = {"mamba_num_heads": values, "n_groups": keys}
    elif kind in ("bamba", "granitemoehybrid"):
        expand = values * size // SIZES["hidden_size"]
        more = {"mamba_n_heads": values, "mamba_n_groups": keys, "mamba_d_head": size, "mamba_expand": expand}
    model = text_model(kind, **more)
    return next(module for module in model.modules() if type(module).__name__ == KINDS[kind])


def through_module(kind: str, heads: tuple[int, int], shards: SequenceShards) -> tuple[Tensor, Gradients]:
    """Of the rank's tokens what the module makes, and its gradients; on one rank, of all tokens by its own forward."""
    module = module_of(kind, heads)
    hidden = torch.randn(2, shards.total, SIZES["hidden_size"], generator=torch.Generator().manual_seed(1))
    more: dict[str, Any] = {}
    if dist.is_initialized():
        divide(module)
        comm = communicator(dist.group.WORLD)
        hidden = hidden[:, shards.index(comm.rank)]
        more["sequence_parallel"] = SimpleNamespace(
            brings_frames=True, mixes_at_once=False, comm=comm, states=None, mixed_rows=MixedRows(comm, shards)
        )
    hidden.requires_grad_()
    out = module(hidden, **more)
    out.square().sum().backward()
    assert hidden.grad is not None
    return out.detach(), {**gradients_of(module), "hidden states": hidden.grad.double()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_gives_what_it_gives_undivided(kind: str) -> None:
    if kind not in CONFIG_MAPPING or (kind.startswith("lfm") and kind not in TEXT_MODELS):
        pytest.skip(f"this release of transformers has no {kind}, or hands its layers' arguments on to no convolution")
    for heads, shards in zip(HEADS, (SequenceShards((70, 3, 8)), *[SequenceShards.striped(80, 3, 7)] * 3), strict=True):
        want, of_whole = through_module(kind, heads, shards)
        results = run(3, through_module, kind, heads, shards)
        for rank, (got, gradients) in enumerate(results):
            own = shards.index(rank)
            torch.testing.assert_close(got, want[:, own], rtol=1e-4, atol=1e-5)
            of_hidden = of_whole["hidden states"]
            error = (gradients.pop("hidden states") - of_hidden[:, own]).abs().max() / of_hidden.abs().max()
            assert error < 1e-5, (heads, error)
        for name in results[0][1]:
            total = torch.stack([gradients[name] for _, gradients in results]).sum(0)
            error = (total - of_whole[name]).abs().max() / of_whole[name].abs().max()
            assert error < 1e-5, (heads, name, error)


class Qwen3NextGatedDeltaNet(nn.Module):
    """Of a release that writes it in another way."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


def test_code_that_is_not_known_is_not_divided() -> None:
    known = module_of("qwen3_next", (2, 4))
    assert {module: layer.heads for module, layer in mixers(known).items()} == {known: 4}
    other = Qwen3NextGatedDeltaNet()
    assert not mixers(other)
    for name, value in vars(known).items():
        vars(other)[name] = value
    assert not mixers(other)  # it has all parts, and does something else with them


# Models


def too_few_heads() -> str:
    config = SequenceParallelConfig(size=dist.get_world_size())
    try:
        SequenceParallel(text_model("qwen3_next", linear_num_value_heads=2), config, groups_of(dist.get_world_size()))  # type: ignore[arg-type]
    except ConfigError as error:
        return str(error)
    return ""


def test_fewer_heads_than_ranks_are_refused() -> None:
    [message, *_] = run(4, too_few_heads)
    assert "layers.0.linear_attn (Qwen3NextGatedDeltaNet) has 2 heads" in message
    assert "set it to 2 or less" in message


def with_another_forward() -> str:
    samples, model = samples_of(("tttatta",)), text_model("qwen3_next")
    batches = attach(model, dist.get_world_size(), MODES[1], samples)
    loss_of(model, samples, batches)
    module: Any = model.get_submodule("model.layers.2.linear_attn")
    own = module.forward
    module.forward = functools.wraps(own)(lambda *args, **kwargs: own(*args, **kwargs))  # as accelerate does
    loss_of(model, samples, batches)
    module.forward = types.MethodType(type(module).forward, module)  # as kernels of the hub are taken back
    try:
        loss_of(model, samples, batches)
    except ValueError as error:
        return str(error)
    return ""


def test_a_forward_that_was_put_in_the_place_of_a_divided_one_is_refused() -> None:
    for message in run(2, with_another_forward):
        assert message.startswith("the forward of model.layers.2.linear_attn (Qwen3NextGatedDeltaNet) was replaced")


def sizes_counted() -> list[tuple[str, int, int]]:
    samples = samples_of(("tIItaIItta", "ta"))
    batches = attach(tiny("qwen3.5"), dist.get_world_size(), MODES[1], samples)
    layers = batches.planner.layer_sizes(batches.collator.sizes(batches.collator.layout(samples)).shapes())
    return [(layer.strategy, layer.heads, layer.kv_heads) for layer in layers]


def test_memory_is_planned_for_all_layers() -> None:
    assert run(2, sizes_counted)[0] == [(MODES[1][0], 4, 2), ("ulysses", 4, 2), ("ulysses", 4, 2)]


def by_policy(policies: tuple[str, ...]) -> list[tuple[tuple[float, Gradients], int]]:
    results = []
    for policy in policies:
        samples, model = samples_of(("tIItaIItta", "ta")), tiny("qwen3.5").train()
        batches = attach(model, 2, MODES[1], samples, recompute=policy)
        layers = batches.parallel.decoder_layers
        assert len(layers) == 3 and all(x.gradient_checkpointing == (policy == "layer") for x in layers)
        batches.parallel.comm.reset()
        loss = loss_of(model, samples, batches)
        loss.backward()
        received = batches.parallel.comm.received["mixer inputs"]
        results.append((sum_over_ranks(loss, gradients_of(model)), received))
    return results


def test_layers_of_linear_attention_are_computed_again_and_exchange_again() -> None:
    (none, once), (kv, again), (layer, thrice) = run(2, by_policy, ("none", "kv", "layer"))[0]
    for got in (kv, layer):
        assert got[0] == none[0] and all(torch.equal(got[1][name], x) for name, x in none[1].items())
    assert once == again and 1.4 * once < thrice < 1.6 * once  # forth, back, and forth again, of uneven shares


def train(recompute: str) -> list[float]:
    model, samples = tiny("qwen3.5"), samples_of(("tIItaIItta", "ta"))
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    batches = attach(model, ranks, MODES[1], samples, recompute=recompute) if ranks > 1 else None
    return losses_of_steps(model, samples, ranks, 3, batches)


@pytest.mark.slow
def test_losses_under_zero3_with_recomputation() -> None:
    assert run(2, train, "layer")[0] == pytest.approx(train("none"), rel=1e-4)


def answers(kind: str, ranks: int) -> Tensor:
    """Tokens behind prompts of one token, of as many as the convolution reaches back, and of more."""
    model, prompts = text_model(kind), samples_of(("t", "tttt", "ttttttt"))
    batches = attach(model, ranks, MODES[1], prompts) if ranks else tiny_batches(model)
    return generate(model, batches, prompts, max_new_tokens=4, do_sample=False, eos_token_id=10_000)


@pytest.mark.parametrize("kind", ["qwen3_next", "nemotron_h", "lfm2"])
def test_answers_to_prompts_shorter_than_a_convolution(kind: str) -> None:
    if kind not in TEXT_MODELS:
        pytest.skip(f"this release of transformers hands no arguments on to the convolutions of {kind}")
    want = answers(kind, 0).tolist()
    assert run(1, answers, kind, 1)[0].tolist() == run(2, answers, kind, 2)[0].tolist() == want
