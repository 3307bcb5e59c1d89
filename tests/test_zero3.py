"""ZeRO-3 with what is frozen gathered as a whole, or once for the run, and what trains once a step: the same losses,
and fewer gathers and hooks, whatever the batches are."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.checkpoint.ds_to_universal import main as convert
from deepspeed.runtime.zero.linear import LinearFunctionForZeroStage3, zero3_linear_wrap
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.utils import z3_leaf_module
from torch import nn

from ds_lvxattn.data.sample import Sample
from ds_lvxattn.plan.zero import gradient_bucket
from ds_lvxattn.runtime import gathers as gathers_module
from ds_lvxattn.runtime.gathers import Gathers
from ds_lvxattn.runtime.kept_parameters import KeptParameters
from ds_lvxattn.training.loading import parameter_groups, partition_over_all_ranks, select_trainable
from ds_lvxattn.training.zero3 import LIVE, PREFETCH, REDUCE, take_as_wholes
from tests.support.distributed import run
from tests.support.marks import slow
from tests.support.parity import losses_of_batches, samples_of
from tests.support.tiny_families import tiny
from tests.support.tiny_model import (
    MODES,
    attach,
    ds_config,
    frames_in_portions,
    groups_of,
    tiny_config,
    tiny_model,
)

# One portion of the encoder's frames, then three, then one frame on one rank.
STEPS = (("tIIta",), ("IItaItIIItta",), ("tItta",), ("tIIta",), ("IItaItIIItta",), ("tIIta",))
LARGE = 2000  # elements of a parameter that is gathered by itself: matrices of the feed-forward parts
GATHER = "_PartitionedParameterCoordinator__all_gather_params_"


def made(family: str) -> torch.nn.Module:
    model = tiny_model() if family == "mllama" else tiny(family, torch.float32)
    select_trainable(model, "pretrained", "default")
    return model.train()


@dataclass
class Steps:
    """What steps under ZeRO-3 were like, on a rank.

    Attributes:
        losses, norms: of gradients, before clipping.
        counts: for each step the ``gathers``, the ``elements`` in them, and the ``hooks`` of ZeRO-3 that ran.
        wholes: modules that are taken as a whole.
        kept: elements that stayed gathered; ``trained``, those that train.
        large: parameters that train and are gathered by themselves where they are kept.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    counts: list[collections.Counter[str]] = field(default_factory=list)
    wholes: int = 0
    kept: int = 0
    trained: int = 0
    large: int = 0

    def of_steps(self, what: str) -> list[int]:
        return [counts[what] for counts in self.counts]


@contextlib.contextmanager
def counting() -> Iterator[collections.Counter[str]]:
    counts: collections.Counter[str] = collections.Counter()
    coordinator = PartitionedParameterCoordinator
    gather, fetch, release = (getattr(coordinator, n) for n in (GATHER, "fetch_sub_module", "release_sub_module"))

    def gathers(self: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        counts["gathers"] += 1
        counts["elements"] += sum(p.ds_numel for p in params if p.ds_status is ZeroParamStatus.NOT_AVAILABLE)
        return gather(self, params, *args, **kwargs)

    start = Gathers.start

    def starts(self: Any, parameters: Sequence[Any]) -> None:
        missing = [p for p in parameters if p.ds_status is ZeroParamStatus.NOT_AVAILABLE]
        alone = sum(p.ds_numel >= LARGE for p in missing)
        counts["gathers"] += alone + (alone < len(missing))
        counts["elements"] += sum(p.ds_numel for p in missing)
        start(self, parameters)

    def hooked(function: Any) -> Any:
        def hooks(*args: Any, **kwargs: Any) -> Any:
            counts["hooks"] += 1
            return function(*args, **kwargs)

        return hooks

    product = LinearFunctionForZeroStage3.apply

    def products(x: Any, weight: Any, *bias: Any) -> Any:
        counts["products of frozen weights"] += not weight.requires_grad
        return product(x, weight, *bias)

    changes = {GATHER: gathers, "fetch_sub_module": hooked(fetch), "release_sub_module": hooked(release)}
    with (
        mock.patch.multiple(coordinator, **changes),
        mock.patch.object(Gathers, "start", starts),
        mock.patch.object(gathers_module, "LARGE", LARGE),
        mock.patch.object(LinearFunctionForZeroStage3, "apply", products),
        mock.patch.object(nn.functional, "linear", zero3_linear_wrap),  # as within ``deepspeed.zero.Init``
    ):
        yield counts


def on_ranks(cases: Sequence[tuple[Any, ...]]) -> list[Steps]:
    return [of_family(*case) for case in cases]


def engine_of(family: str, policy: str, **others: Any) -> tuple[Any, Any]:
    """The engine of a rank, of a config with ``others``, and what makes its batches."""
    ranks = dist.get_world_size()
    model, config = made(family), {**ds_config(3, 1, 1, ranks), **others}
    batches = attach(model, ranks, MODES[0], samples_of(STEPS[0]), recompute=policy)
    partition_over_all_ranks(model, config, groups_of(ranks))
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=parameter_groups(model), config=config, mpu=groups_of(ranks)
    )
    return engine, batches


def of_family(family: str, policy: str, keeps: bool, portions: int | None = None, trained: bool = True) -> Steps:
    engine, batches = engine_of(family, policy)
    model = engine.module
    found = Steps(wholes=sum(map(z3_leaf_module, model.modules())))
    sizes = [p.ds_numel for p in model.parameters() if p.requires_grad]  # type: ignore[attr-defined]
    found.trained, found.large = sum(sizes), sum(size >= LARGE for size in sizes)
    with counting() as counts, frames_in_portions(1, tiny_config()):
        if keeps:
            kept = KeptParameters(model, trained)
            kept.keep(portions)
            found.kept = kept.numel
        for patterns in STEPS:
            counts.clear()
            found.losses.append(step(engine, batches, samples_of(patterns)))
            found.norms.append(float(engine.get_global_grad_norm()))
            found.counts.append(counts.copy())
    engine.destroy()
    return found


def step(engine: Any, batches: Any, samples: Sequence[Sample]) -> float:
    layout = batches.collator.layout(samples)
    loss = engine(**batches.prepare(batches.load(samples, layout)).inputs).loss
    engine.backward(loss)
    engine.step()
    whole = loss.detach().clone()
    dist.all_reduce(whole)
    return whole.item()


@pytest.mark.parametrize(("family", "policy"), [("mllama", "layer"), slow("mllama", "kv"), slow("llava", "none")])
def test_losses_and_gathers(family: str, policy: str) -> None:
    cases = [(family, policy, False), (family, policy, True), (family, policy, True, 1)]
    cases += [(family, policy, True, None, False)] * (policy == "layer")
    plain, kept, for_a_while, *frozen_alone = run(2, on_ranks, cases)[0]
    for found in (plain, kept, for_a_while, *frozen_alone):
        assert found.losses == pytest.approx(losses_of_batches(made(family), STEPS), rel=1e-5)
        assert found.norms == pytest.approx(plain.norms, rel=1e-5)
    assert plain.wholes == (3 if family == "mllama" else 1), "the encoder, and the layers without cross-attention"
    # DeepSpeed knows the order of the modules from the first step, whatever the number of portions.
    gathers = plain.of_steps("gathers")
    assert len(set(gathers[1:])) == 1 and gathers[1] < gathers[0] / 2, gathers

    assert kept.kept == sum(p.numel() for p in made(family).parameters()) - kept.trained
    # What trains is gathered as a step begins, and by no hook of a module: only the model itself has some.
    assert kept.of_steps("elements") == [0, *[kept.trained] * (len(STEPS) - 1)], "keeping gathered for the first step"
    assert set(kept.of_steps("gathers")[1:]) == {kept.large + 1} and kept.large > 3
    assert set(kept.of_steps("hooks")) == {3} and min(plain.of_steps("hooks")) > 100
    for what in ("elements", "hooks", "products of frozen weights"):
        assert max(kept.of_steps(what)[1:]) < min(plain.of_steps(what)[1:]), what
    assert set(kept.of_steps("products of frozen weights")) == {0}
    for found in frozen_alone:  # modules that train have their hooks
        assert 3 < min(found.of_steps("hooks")) <= max(found.of_steps("hooks")) < min(plain.of_steps("hooks"))
        assert set(found.of_steps("elements")[1:]) == {found.trained} and found.kept == kept.kept
        assert set(found.of_steps("products of frozen weights")) == {0}
    # The second step has more portions than fit beside it.
    assert for_a_while.of_steps("hooks")[0] == kept.of_steps("hooks")[0]
    assert for_a_while.of_steps("gathers")[3:] == gathers[3:]
    for what in ("hooks", "products of frozen weights"):
        assert for_a_while.of_steps(what)[3:] == plain.of_steps(what)[3:], what


def places_on_one_rank() -> list[tuple[int, int]]:
    model, config = made("mllama"), ds_config(3, 1, 1, 1)
    partition_over_all_ranks(model, config, groups_of(1))
    engine, *_ = deepspeed.initialize(model=model, model_parameters=parameter_groups(model), config=config)
    KeptParameters(model).keep()
    found = [(p.data_ptr(), p.ds_tensor.data_ptr()) for p in model.parameters()]  # type: ignore[attr-defined]
    engine.destroy()
    return found


@pytest.mark.slow
def test_what_one_rank_keeps_is_its_partitions() -> None:
    [places] = run(1, places_on_one_rank)
    assert places and all(whole == part for whole, part in places)


def loaded_from_a_universal_checkpoint(folder: Path) -> list[list[float]]:
    """Losses of a run with everything kept behind its checkpoint; and of engines that load it as a universal one."""
    engine, batches = engine_of("mllama", "layer")
    KeptParameters(engine.module).keep()
    steps = [samples_of(patterns) for patterns in STEPS[:4]]
    for samples in steps[:2]:
        step(engine, batches, samples)
    engine.save_checkpoint(folder, "plain")
    found = [[step(engine, batches, samples) for samples in steps[2:]]]
    engine.destroy()
    if dist.get_rank() == 0:
        convert(
            SimpleNamespace(
                input_folder=str(folder / "plain"), output_folder=str(folder / "universal"), num_extract_workers=1,
                num_merge_workers=1, keep_temp_folder=False, strict=True, inject_missing_state=False,
            )
        )  # fmt: skip
    dist.barrier()
    for keeps in (False, True):
        engine, batches = engine_of("mllama", "layer", checkpoint={"load_universal": True})
        if keeps:
            KeptParameters(engine.module).keep()
        step(engine, batches, samples_of(STEPS[5]))  # so that everything is there, and another
        engine.load_checkpoint(folder, "universal")
        found.append([step(engine, batches, samples) for samples in steps[2:]])
        engine.destroy()
    return found


@pytest.mark.slow
def test_a_universal_checkpoint_is_what_it_is_without_kept_parameters(tmp_path: Path) -> None:
    went_on, plain, kept = run(2, loaded_from_a_universal_checkpoint, tmp_path)[0]
    assert kept == pytest.approx(plain, rel=1e-6)
    assert kept[0] == pytest.approx(went_on[0], rel=1e-6)
    assert kept == pytest.approx(went_on, rel=1e-3)  # DeepSpeed's own conversion is not exact


def test_sizes_that_the_config_has_stay() -> None:
    model = made("mllama")
    given = {PREFETCH: 7, REDUCE: 9}
    assert given.items() <= take_as_wholes(model, {"stage": 3, **given}).items()
    sizes = take_as_wholes(model, {"stage": 3})
    assert sizes[LIVE] > 1_000_000_000
    assert sizes[REDUCE] == sum(p.numel() for p in model.parameters() if p.requires_grad), "all in one, of little"
    assert gradient_bucket(218e6, 1.8e9) == 218e6 and gradient_bucket(9e6, 1e9) == 50e6
    assert gradient_bucket(1e9, 2e9) == 5e8 and gradient_bucket(1e6, 4e7) == 4e7
