"""What scripts build around the Trainer: their own losses, adapters in turn, decisions of one rank, launchers."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import peft
import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy, log_softmax
from transformers import AutoModelForImageTextToText, Trainer, TrainerCallback, TrainingArguments

from ds_lvxattn import ConfigError
from ds_lvxattn.hf import SequenceParallelTrainer
from ds_lvxattn.hf.checkpoints import check_resumable
from ds_lvxattn.training.loading import partition_over_all_ranks
from tests.support import hf
from tests.support.distributed import run
from tests.support.hf import clean_state, deepspeed_block, divided_trainer, launched, logged, plain_trainer
from tests.support.tiny_model import ds_config, groups_of, loss_of, tiny_model, tiny_sample

SAMPLES = [tiny_sample("IItaIta", seed) for seed in range(12)]
NAMES = ["default", "second"]
HOW: dict[str, Any] = {"per_device_train_batch_size": 2, "max_steps": 6}
STOPS_AT = 4


def two_adapters() -> Any:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(2)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
        model: Any = peft.get_peft_model(tiny_model(), config)
        model.add_adapter(NAMES[1], config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


class OwnLoss:
    """Smoothed labels, and how far the adapters have moved the answers from those of the model without them."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        with torch.no_grad(), self.model.disable_adapter():  # type: ignore[attr-defined]
            before = log_softmax(model(**inputs).logits, -1)
        self.model.set_requires_grad(NAMES, True)  # type: ignore[attr-defined]
        outputs, labels = model(**inputs), inputs["shift_labels"]
        now = log_softmax(outputs.logits, -1)
        moved = (now.exp() * (now - before)).sum(-1)[labels != -100].sum()
        loss = cross_entropy(now.flatten(0, 1), labels.flatten(), reduction="sum", label_smoothing=0.1) + 0.1 * moved
        loss = loss / inputs.get("num_items_in_batch", num_items_in_batch)
        whole = getattr(self, "whole_loss", None)
        loss = loss if whole is None else whole(loss, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Without momentum, by which ZeRO goes on for parameters that a step does not reach."""
        if not getattr(self, "optimizer", None):
            trained = [p for p in self.model.parameters() if p.requires_grad]  # type: ignore[attr-defined]
            self.optimizer = torch.optim.SGD(trained, lr=3e-3)
        return self.optimizer


class InTurn(TrainerCallback):
    """Another adapter each step; the last rank alone has enough after a few."""

    def __init__(self, gradients: bool) -> None:
        self.gradients = gradients

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        model.set_adapter(NAMES[state.global_step % 2])
        if self.gradients:
            model.set_requires_grad(NAMES, True)

    def on_log(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step == STOPS_AT and args.process_index == args.world_size - 1:
            control.should_training_stop = True


class Ours(OwnLoss, SequenceParallelTrainer):
    pass


class Theirs(OwnLoss, Trainer):
    pass


class PartAsWhole(SequenceParallelTrainer):
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **others: Any) -> Any:
        return model(**inputs).loss


def exported(folder: Path) -> dict[str, float]:
    """Losses of adapters that trained under ZeRO-3: beside the weights, off, merged, taken out again; an export."""
    with launched():
        trainer = divided_trainer(folder, deepspeed_block(3), SAMPLES, two_adapters(), **{**HOW, "max_steps": 2})
        trainer.train()
        model: Any = trainer.model

        def loss() -> float:
            return trainer.evaluate(SAMPLES[:4])["eval_loss"]

        found = {"beside": loss()}
        with model.disable_adapter():
            found["off"] = loss()
        model.merge_adapter()
        found["merged"] = loss()
        model.unmerge_adapter()
        found["taken out"] = loss()
        model.merge_and_unload().save_pretrained(folder / "merged", is_main_process=trainer.is_world_process_zero())
        dist.barrier()
        trainer.close()
    return found


def trained(stage: int, folder: Path, gradients: bool = True, kind: type = Ours) -> SequenceParallelTrainer:
    config = {**deepspeed_block(stage), "zero_allow_untested_optimizer": True}
    model = two_adapters()
    if gradients:
        model.set_requires_grad(NAMES, True)
    with launched(), mock.patch.object(hf, "Divided", kind):
        trainer = divided_trainer(folder, config, SAMPLES, model, **HOW)
        trainer.add_callback(InTurn(gradients))
        trainer.train()
        trainer.evaluate(SAMPLES[:4])
        trainer.close()
    return trainer


def of_two_ranks(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for stage in (2, 3):
        trainer = trained(stage, folder)
        found[str(stage)] = [logged(trainer, name) for name in ("loss", "grad_norm", "eval_loss")]
    found["export"] = exported(folder)
    for name, how in (("turn", {"gradients": False, "kind": SequenceParallelTrainer}), ("part", {"kind": PartAsWhole})):
        with pytest.raises(ConfigError) as error:
            trained(2, folder, **how)  # type: ignore[arg-type]
        found[name] = str(error.value)
    with launched(), pytest.raises(ConfigError, match="nothing would train; .* is_trainable=True"):
        divided_trainer(folder, deepspeed_block(2), SAMPLES, tiny_model().requires_grad_(False), **HOW).train()
    # A model in float32 in a run in bf16: adapters and all, as DeepSpeed casts in its other stages.
    model = tiny_model()
    partition_over_all_ranks(model, {**ds_config(3, 1, 1), "bf16": {"enabled": True}}, groups_of(2))
    found["dtypes"] = {str(parameter.dtype) for parameter in model.parameters()}
    return found


def test_own_losses_adapters_in_turn_and_decisions_of_one_rank(tmp_path: Path) -> None:
    """As on one process, where a callback stops the one rank; and what would be wrong in silence is refused."""
    with clean_state(), mock.patch.object(hf, "Trainer", Theirs):
        model = two_adapters()
        model.set_requires_grad(NAMES, True)
        plain = plain_trainer(tmp_path, SAMPLES, model, **HOW)
        plain.optimizer = None
        plain.add_callback(InTurn(gradients=True))
        plain.train()
        plain.evaluate(SAMPLES[:4])
    first, second = run(2, of_two_ranks, tmp_path)
    assert first == second
    for stage in ("2", "3"):
        losses, norms, judged = first[stage]
        assert len(losses) == STOPS_AT
        assert losses == pytest.approx(logged(plain, "loss"), rel=1e-4)
        assert judged == pytest.approx(logged(plain, "eval_loss"), rel=1e-4)
        assert norms == pytest.approx(logged(plain, "grad_norm"), rel=1e-3)
    losses = first["export"]
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    for name in ("merged", "taken out"):
        assert losses[name] == pytest.approx(losses["beside"], rel=1e-5)
    assert np.mean([loss_of(again, [sample]).item() for sample in SAMPLES[:4]]) == pytest.approx(
        losses["beside"], rel=1e-5
    )
    assert abs(losses["off"] - losses["beside"]) > 0.1
    assert "lora_A.default.weight no longer requires a gradient" in first["turn"]
    assert "model.set_requires_grad(NAMES)" in first["turn"]
    assert "compute_loss of PartAsWhole returned the loss of this rank's rows" in first["part"]
    assert first["dtypes"] == {"torch.bfloat16"}


def checkpoint(folder: Path, stage: int, ranks: int) -> str:
    """The names of the files of a checkpoint of the Trainer."""
    states = folder / "global_step2"
    states.mkdir(parents=True)
    (folder / "latest").write_text(states.name)
    for rank in range(ranks):
        (states / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
        if stage == 3:
            (states / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt").touch()
    return str(folder)


def test_what_deepspeed_cannot_resume_is_refused(tmp_path: Path) -> None:
    """It fails in an assertion without a word, or says that it adjusts nothing."""
    with clean_state():
        args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
        this = {"args": args, "ds_config": {"zero_optimization": {"stage": 2}}}
        check_resumable(checkpoint(tmp_path / "same", 2, 1), **this)
        for name, (stage, ranks) in {"stage": (3, 1), "ranks": (2, 2)}.items():
            with pytest.raises(ConfigError, match=r"are those of ZeRO stage .* ranks, and this run has stage 2 on 1;"):
                check_resumable(checkpoint(tmp_path / name, stage, ranks), **this)
        (tmp_path / "checkpoint-2").mkdir()  # the last one, without states
        with pytest.raises(ConfigError, match="has no optimizer states"):
            check_resumable(True, **this)


def test_a_config_that_accelerate_passes_by_is_refused(tmp_path: Path) -> None:
    with (
        clean_state(),
        mock.patch.dict("os.environ", ACCELERATE_USE_CPU="true"),
        pytest.raises(ConfigError, match="Accelerate passes it by, .* accelerate launch --use_deepspeed"),
    ):
        divided_trainer(tmp_path, deepspeed_block(2), SAMPLES, **HOW)


def test_a_step_of_prediction_that_nobody_would_call_is_refused() -> None:
    with pytest.raises(ConfigError, match="Mine has a prediction_step, .* override compute_loss"):
        type("Mine", (SequenceParallelTrainer,), {"prediction_step": print})
