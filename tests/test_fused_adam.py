"""The optimizer that a config without further wishes gets: torch's fused Adam, whose checkpoints and numbers are those
of the plain one."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from torch import nn

from ds_lvxattn.training.ds_config import with_fused_adam
from tests.support.distributed import run
from tests.support.tiny_model import ADAMW, ds_config, start_deepspeed

PLAIN = {**ADAMW, "torch_adam": True, "foreach": False}


def engine_of(stage: int, params: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config = ds_config(stage, 2, 1, 1)
    config["optimizer"]["params"] = params
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 1))
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=with_fused_adam(config))
    return engine


def losses_of(engine: Any, steps: int) -> list[float]:
    losses = []
    for step in range(steps):
        loss = engine(torch.linspace(-1, step + 1, 12).view(2, 6)).square().sum()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def resumed(stages: list[int], folder: Path) -> list[list[float]]:
    """Losses behind a checkpoint that each of the two optimizers wrote, of each of them."""
    start_deepspeed()
    found = []
    for stage, before, after in itertools.product(stages, (ADAMW, PLAIN), (ADAMW, PLAIN)):
        engine = engine_of(stage, before)
        adam = engine.optimizer.optimizer
        assert type(adam) is torch.optim.AdamW and bool(adam.param_groups[0]["fused"]) == (before is ADAMW)
        losses_of(engine, 2)
        engine.save_checkpoint(folder / f"{stage}", tag="step")
        engine.destroy()
        engine = engine_of(stage, after)
        engine.load_checkpoint(folder / f"{stage}", tag="step")
        found.append(losses_of(engine, 2))
        engine.destroy()
    return found


def test_checkpoints_of_both_load_into_both(tmp_path: Path) -> None:
    stages = [1, 2, 3]
    found = run(2, resumed, stages, tmp_path)[0]
    for first in range(0, len(found), 4):
        for losses in found[first : first + 4]:
            assert losses == pytest.approx(found[first], rel=1e-6), f"ZeRO-{stages[first // 4]}"


@pytest.mark.parametrize(
    ("name", "params", "zero", "fused"),
    [
        ("AdamW", {"lr": 1e-3}, {"stage": 2}, True),
        ("adam", {"lr": 1e-3, "torch_adam": True}, {"stage": 3}, True),
        ("AdamW", {"lr": 1e-3, "torch_adam": False}, {"stage": 2}, False),
        ("AdamW", {"lr": 1e-3, "torch_adam": True, "foreach": True}, {"stage": 2}, False),
        ("AdamW", {"lr": 1e-3, "bias_correction": False}, {"stage": 2}, False),  # which torch's does not have
        ("AdamW", {"lr": 1e-3}, {"stage": 2, "offload_optimizer": {"device": "cpu"}}, False),
        ("AdamW", {"lr": 1e-3}, {"stage": 0}, False),
        ("Lion", {"lr": 1e-3}, {"stage": 2}, False),
    ],
)
def test_what_the_config_chooses_stays(name: str, params: dict[str, Any], zero: dict[str, Any], fused: bool) -> None:
    config = {"optimizer": {"type": name, "params": params}, "zero_optimization": zero}
    given = with_fused_adam(config)
    want = {**params, "torch_adam": True, "fused": True} if fused else params
    assert given["optimizer"] == {"type": name, "params": want} and config["optimizer"]["params"] == params
