"""Adapters whose queries every rank has, over features that are divided, against the unmodified module on one rank."""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import (
    AriaConfig,
    Blip2QFormerConfig,
    Blip2QFormerModel,
    InstructBlipQFormerConfig,
    InstructBlipQFormerModel,
    InstructBlipVideoQFormerConfig,
    InstructBlipVideoQFormerModel,
)
from transformers.models.aria.modeling_aria import AriaProjector
from transformers.models.idefics2.configuration_idefics2 import Idefics2PerceiverConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2PerceiverResampler

from ds_lvxattn import AdapterKeys, SequenceShards, shard_adapter
from ds_lvxattn.errors import ConfigError
from ds_lvxattn.exchange.comm import communicator
from ds_lvxattn.training.loading import parameter_groups, partition_over_all_ranks
from tests.support import qwen_vl_resampler
from tests.support.distributed import run
from tests.support.parity import Gradients, losses_of_engine
from tests.support.tiny_model import ADAMW, CLIPPING, ds_config, groups_of

BATCH, TOKENS, WIDTH, HEADS, QUERIES = 2, 4, 16, 2, 4
FRAMES = {2: ((3, 1), (0, 4)), 4: ((2, 0, 1, 1), (0, 1, 0, 3))}  # of each rank
IN_ALL = 4
SEEN = (IN_ALL, 2)  # frames of each sample, where a batch is padded

Q_FORMER: dict[str, Any] = {
    "vocab_size": 11, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": HEADS, "intermediate_size": 24,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "cross_attention_frequency": 2,
    "encoder_hidden_size": WIDTH,
}  # fmt: skip


class QFormer(nn.Module):
    """A Q-Former and its learned queries, which belong to the model around it."""

    def __init__(self, q_former: nn.Module) -> None:
        super().__init__()
        self.adapter, self.queries = q_former, nn.Parameter(torch.randn(1, QUERIES, 16))

    def forward(self, features: Tensor, mask: Tensor | None, **kwargs: Any) -> Tensor:
        if mask is not None:
            kwargs["encoder_attention_mask"] = mask
        if not isinstance(self.adapter, Blip2QFormerModel):  # an instruction, padded
            kwargs |= {"input_ids": torch.tensor([[3, 4, 5], [6, 7, 0]])}
            kwargs |= {"attention_mask": torch.tensor([[1] * (QUERIES + 3), [1] * (QUERIES + 2) + [0]])}
        queries = self.queries.expand(BATCH, -1, -1)
        return self.adapter(query_embeds=queries, encoder_hidden_states=features, **kwargs).last_hidden_state


class Perceiver(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        config = Idefics2PerceiverConfig(
            hidden_size=WIDTH, resampler_n_latents=QUERIES, resampler_depth=2, resampler_n_heads=HEADS,
            resampler_head_dim=8, num_key_value_heads=1,
        )  # fmt: skip
        self.adapter = Idefics2PerceiverResampler(config)

    def forward(self, features: Tensor, mask: Tensor | None, **kwargs: Any) -> Tensor:
        if mask is None and not kwargs:
            mask = torch.ones(features.shape[:2])
        return self.adapter(features, mask, **kwargs)


class Projector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        text = {"model_type": "aria_text", "hidden_size": 12, "num_attention_heads": 2, "num_hidden_layers": 1}
        vision = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "intermediate_size": 8, "num_hidden_layers": 1}
        patches = {IN_ALL * TOKENS: QUERIES, TOKENS: 2}
        self.adapter = AriaProjector(
            AriaConfig(vision_config=vision, text_config=text, projector_patch_to_query_dict=patches)
        )

    def forward(self, features: Tensor, mask: Tensor | None, **kwargs: Any) -> Tensor:
        return self.adapter(features, None if mask is None else ~mask, **kwargs)


class QwenResampler(nn.Module):
    """The unmodified module knows one image: here it gets the positions of several."""

    def __init__(self) -> None:
        super().__init__()
        self.adapter = qwen_vl_resampler.Resampler(2, 16, HEADS, WIDTH)

    def forward(self, features: Tensor, mask: Tensor | None, **kwargs: Any) -> Tensor:
        if kwargs:
            return self.adapter(features.unflatten(1, (features.shape[1] // TOKENS, TOKENS)), mask, **kwargs)
        if mask is not None:
            mask = ~mask.repeat_interleave(HEADS, 0)[:, None].expand(-1, QUERIES, -1)
        of_image = qwen_vl_resampler.get_abs_pos(self.adapter.pos_embed, TOKENS)
        with mock.patch.object(qwen_vl_resampler, "get_abs_pos", lambda _, n: of_image.repeat(n // TOKENS, 1)):
            return self.adapter(features, mask)


ADAPTERS = {
    "BLIP-2": lambda: QFormer(Blip2QFormerModel(Blip2QFormerConfig(**Q_FORMER))),
    "InstructBLIP": lambda: QFormer(InstructBlipQFormerModel(InstructBlipQFormerConfig(**Q_FORMER))),
    "InstructBLIP video": lambda: QFormer(InstructBlipVideoQFormerModel(InstructBlipVideoQFormerConfig(**Q_FORMER))),
    "Idefics2": Perceiver,
    "Aria": Projector,
    "Qwen-VL": QwenResampler,
}
LAYERS = {"Idefics2": 2, "Aria": 1, "Qwen-VL": 1}  # of cross-attention; 2 in the Q-Formers


def build(name: str) -> nn.Module:
    """The adapter in float64, the same weights at every call; biases and norms at random too."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(3)
        model = ADAPTERS[name]()
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.double().train()


def features_of_all() -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(BATCH, IN_ALL * TOKENS, WIDTH, dtype=torch.float64, generator=generator)


def part_of_loss(out: Tensor, rank: int) -> Tensor:
    """Each rank uses the output in its own way."""
    weight = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(rank))
    return (out * weight).sum()


def gradients_of(model: nn.Module) -> Gradients:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def sharded(frames: tuple[int, ...]) -> dict[tuple[str, bool], tuple[Tensor, Tensor, Gradients, Counter[str]]]:
    """Of each adapter, without and with padding: output, gradients of the own features and of the parameters, bytes."""
    comm = communicator(dist.group.WORLD)
    shards = SequenceShards(tuple(TOKENS * n for n in frames))
    own = slice(shards.offset(comm.rank), shards.offset(comm.rank) + shards.lengths[comm.rank])
    results = {}
    for name in ADAPTERS:
        for padded in (False, True):
            model: Any = build(name)
            shard_adapter(model.adapter)
            visible = torch.tensor(SEEN, dtype=torch.int32) * TOKENS if padded else None
            features = features_of_all()[:, own].clone().requires_grad_()
            comm.reset()
            out = model(features, None, sequence_parallel=AdapterKeys(comm.group, shards, visible))
            part_of_loss(out, comm.rank).backward()
            assert features.grad is not None
            results[name, padded] = out.detach(), features.grad, gradients_of(model), Counter(comm.received)
    return results


@pytest.mark.slow
@pytest.mark.parametrize("ranks", FRAMES)
def test_output_and_gradients_are_those_of_one_rank(ranks: int) -> None:
    for frames in FRAMES[ranks]:
        of_ranks = run(ranks, sharded, frames)
        for name, padded in of_ranks[0]:
            model, features = build(name), features_of_all().requires_grad_()
            seen = torch.arange(IN_ALL)[None] < torch.tensor(SEEN)[:, None]
            want = model(features, seen.repeat_interleave(TOKENS, 1) if padded else None)
            torch.stack([part_of_loss(want, rank) for rank in range(ranks)]).sum().backward()
            # Idefics2's norms compute in float32.
            close = {"rtol": 1e-4, "atol": 1e-5} if name == "Idefics2" else {"rtol": 1e-10, "atol": 1e-11}
            outs, features_grads, gradients, traffic = zip(*(r[name, padded] for r in of_ranks), strict=True)
            for out, received in zip(outs, traffic, strict=True):
                assert torch.equal(out, outs[0])
                torch.testing.assert_close(out, want.detach(), **close)
                assert received == expected_traffic(name, ranks)
            torch.testing.assert_close(torch.cat(features_grads, 1), features.grad, **close)
            for key, gradient in gradients_of(model).items():
                total = torch.stack([of_rank[key] for of_rank in gradients]).sum(0)
                torch.testing.assert_close(total, gradient, **close)


def expected_traffic(name: str, ranks: int) -> dict[str, int]:
    """Outputs with their log-sum-exps, and the sum of their gradients, whatever the number of features."""
    rows, width = LAYERS.get(name, 2) * BATCH * HEADS * QUERIES, 8 * 8
    with_lse = 8 if name == "Idefics2" else 0  # merged with the attention among its queries
    return {
        "outputs": (ranks - 1) * rows * (width + 8),
        "output gradients": 2 * (ranks - 1) * rows * (width + with_lse) // ranks,
    }


# Under ZeRO-3, where each module's parameters are gathered when it is called

STEPS = 3


class AllAdapters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({name: build(name) for name in ADAPTERS})

    def forward(self, features: Tensor, **kwargs: Any) -> list[Tensor]:
        return [part(features, None, **kwargs) for part in self.parts.values()]


def train(frames: tuple[int, ...]) -> list[float]:
    """Losses of a few steps: with ZeRO-3 on several ranks, with torch's AdamW on one."""
    ranks, model = len(frames), AllAdapters().float()
    if ranks == 1:
        optimizer = torch.optim.AdamW(parameter_groups(model), **ADAMW)
        losses = []
        for _ in range(STEPS):
            outs = model(features_of_all().float())
            loss = torch.stack([part_of_loss(out, rank) for out in outs for rank in range(2)]).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIPPING)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses
    for part in model.parts.values():
        shard_adapter(part.get_submodule("adapter"))
    config, groups = ds_config(3, 1, 1, ranks), groups_of(ranks)
    partition_over_all_ranks(model, config, groups)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=parameter_groups(model), config=config, mpu=groups)
    shards, rank = SequenceShards(tuple(TOKENS * n for n in frames)), dist.get_rank()
    own = slice(shards.offset(rank), shards.offset(rank) + shards.lengths[rank])
    keys = AdapterKeys(groups.get_sequence_parallel_group(), shards)

    def part() -> Tensor:
        outs = engine(features_of_all()[:, own].float(), sequence_parallel=keys)
        return torch.stack([part_of_loss(out, rank) for out in outs]).mean() / ranks

    return losses_of_engine(engine, part, STEPS)


@pytest.mark.slow
def test_losses_under_zero3() -> None:
    want, got = train((IN_ALL,)), run(2, train, (IN_ALL, 0))[0]
    assert want[-1] < want[0]
    assert got == pytest.approx(want, rel=1e-4)


# Errors


def keys(tokens: int = IN_ALL * TOKENS) -> AdapterKeys:
    return AdapterKeys(None, SequenceShards((tokens,)))


def test_other_modules_and_dropout_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"Linear is no adapter.*Blip2QFormerModel.*AriaProjector"):
        shard_adapter(nn.Linear(1, 1))
    q_former = Blip2QFormerModel(Blip2QFormerConfig(**Q_FORMER | {"attention_probs_dropout_prob": 0.1}))
    with pytest.raises(ConfigError, match=r"drops out with probability 0.1 in encoder.layer.0"):
        shard_adapter(q_former)
    other: Any = qwen_vl_resampler.Resampler(2, 16, HEADS, WIDTH)
    other.ln_post = nn.LayerNorm(16)
    with pytest.raises(ConfigError, match="is not Qwen-VL's: it has the parts .*ln_post"):
        shard_adapter(other)


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_call_without_keys_or_with_a_mask_is_refused(name: str) -> None:
    model: Any = build(name)
    shard_adapter(model.adapter)
    with pytest.raises(ValueError, match=r"sequence_parallel=AdapterKeys\(group, shards\)"):
        model(features_of_all(), None)
    mask = torch.ones(BATCH, IN_ALL * TOKENS, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"AdapterKeys\(visible=...\)"):
        model(features_of_all(), mask, sequence_parallel=keys())


def test_arguments_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="2 lengths for the 1 ranks"):
        AdapterKeys(None, SequenceShards((1, 2)))
    with pytest.raises(ValueError, match=r"visible is torch.int64 \(2,\); give int32 \[B\]"):
        AdapterKeys(None, SequenceShards((4,)), torch.tensor([1, 2]))
    model: Any = build("Aria")
    shard_adapter(model.adapter)
    with pytest.raises(ValueError, match=r"for 5 visual tokens: patch_to_query_dict knows \[4, 16\]"):
        model(features_of_all()[:, :5], None, sequence_parallel=keys(5))
    model = build("Qwen-VL")
    shard_adapter(model.adapter)
    with pytest.raises(ValueError, match=r"give \[B, own frames, tokens of a frame, d\]"):
        model.adapter(features_of_all(), sequence_parallel=keys())
