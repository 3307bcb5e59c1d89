"""Hugging Face's Trainer over divided samples: losses, norms, evaluation, checkpoints, adapters, refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import accelerate
import datasets
import deepspeed
import numpy as np
import peft
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, EvalPrediction, TrainingArguments

from ds_lvxattn import ConfigError
from ds_lvxattn.hf import Rows, SequenceParallelTrainer
from ds_lvxattn.hf.accelerator import use_groups
from ds_lvxattn.hf.rows import as_made
from ds_lvxattn.needle.task import IMAGE, build_tokenizer
from ds_lvxattn.training.loading import LoadedModel
from tests.support.distributed import run
from tests.support.hf import (
    ARGUMENTS,
    Divided,
    clean_state,
    deepspeed_block,
    divided_trainer,
    launched,
    logged,
    optimizer_of,
    plain_trainer,
)
from tests.support.marks import slow
from tests.support.processes import REPOSITORY, launch
from tests.support.rows import write_rows
from tests.support.tiny_model import SIZE, groups_of, loss_of, tiny_model, tiny_processor, tiny_sample
from tests.support.training import mixed_samples, one_rank, write_config, write_model

STEPS, BATCH = 6, 2
JUDGED = ("ItaaIta", "Ita", "Itta")  # text ahead of images sees, in transformers, what pads the batch


def accuracy(judged: EvalPrediction) -> dict[str, float]:
    """Of the token that each row predicts, as compute_metrics of causal language models count it."""
    predictions = judged.predictions
    if predictions.ndim == 3:
        predictions = predictions.argmax(-1)
    right, said = judged.label_ids[:, 1:], predictions[:, :-1]
    counted = right != -100
    return {"accuracy": float((said == right)[counted].mean()), "tokens": int(counted.sum())}


def argmax(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    assert logits.shape[:2] == labels.shape
    return logits.argmax(-1)


def train_and_resume(stage: int, folder: Path) -> dict[str, Any]:
    """A run with evaluations and checkpoints, and one that goes on from the first checkpoint."""
    samples, judged = mixed_samples(STEPS * BATCH).samples, [tiny_sample("IItaaIta", seed) for seed in range(3)]
    how: dict[str, Any] = {
        "per_device_train_batch_size": BATCH, "max_steps": STEPS, "save_strategy": "steps", "save_steps": STEPS // 2,
        "eval_dataset": judged, "compute_metrics": accuracy, "eval_strategy": "steps", "eval_steps": STEPS,
        "per_device_eval_batch_size": 2,
    }  # fmt: skip
    initialize = deepspeed.initialize
    with launched():
        trainer = divided_trainer(folder, deepspeed_block(stage), samples, preprocess_logits_for_metrics=argmax, **how)
        assert trainer.get_total_train_batch_size(trainer.args) == BATCH
        trainer.train()
        assert trainer.model_wrapped.mpu is trainer.attached.groups and deepspeed.initialize is initialize
        trainer.save_model(str(folder / "final"))
        found = {name: logged(trainer, name) for name in ("loss", "grad_norm", "eval_loss", "eval_accuracy")}
        found["flos"] = trainer.state.total_flos
        found["plan"] = json.loads((folder / "plan.json").read_text())
        found["predicted"] = trainer.predict(judged).metrics["test_loss"]
        with pytest.raises(ConfigError, match=r"a second train\(\) of one Trainer .* resume_from_checkpoint"):
            trainer.train()
        trainer.close()
    groups = len(dist.distributed_c10d._world.pg_map)
    with launched():
        # That layers compute again in the backward pass changes nothing.
        again = divided_trainer(folder, deepspeed_block(stage), samples, gradient_checkpointing=True, **how)
        again.train(resume_from_checkpoint=str(folder / f"checkpoint-{STEPS // 2}"))
        found["resumed"] = logged(again, "loss")
        assert again.attached.parallel.recomputation.policy == "layer"
        found["whole logits"] = logged(again, "eval_accuracy")[-1:]
        again.close()
    assert len(dist.distributed_c10d._world.pg_map) == groups
    return found


@pytest.mark.parametrize("stage", [2, slow(3)])
def test_training_evaluation_and_resumption(stage: int, tmp_path: Path) -> None:
    first, second = run(2, train_and_resume, stage, tmp_path, timeout=300)
    assert first == second
    losses, norms = zip(*one_rank(STEPS, BATCH, BATCH), strict=True)
    assert first["loss"] == pytest.approx(losses, rel=1e-4)
    assert first["grad_norm"] == pytest.approx(norms, rel=1e-3)
    assert first["resumed"] == pytest.approx(first["loss"], rel=1e-4)
    assert stage == 3 or first["flos"] > 0  # transformers counts no parameters that are partitioned
    exchanged = [layer for layer in first["plan"] if layer["role"] != "local"]
    assert exchanged and all(set(layer["measured_ms"]) == {"forward", "backward"} for layer in exchanged)

    trained = AutoModelForImageTextToText.from_pretrained(tmp_path / "final")
    judged = [tiny_sample("IItaaIta", seed) for seed in range(3)]
    losses = [loss_of(trained, [sample]).item() for sample in judged]
    assert first["eval_loss"] == pytest.approx([np.mean(losses)], rel=1e-4)
    assert first["predicted"] == first["eval_loss"][-1]
    with clean_state():
        plain = plain_trainer(tmp_path / "plain", judged, trained, compute_metrics=accuracy)
        want = plain.evaluate(judged)["eval_accuracy"]
    assert first["eval_accuracy"] == first["whole logits"] == [want]


def train_packed(folder: Path) -> list[dict[str, Any]]:
    """Rows that samples share, on two ranks and on one, and what is evaluated in them; what else the block may hold."""
    samples, judged, found = mixed_samples(3 * 4).samples, [tiny_sample(pattern, 1) for pattern in JUDGED], []
    for size in (2, 1):
        config = {**deepspeed_block(2), "sequence_parallel_size": size, "finetuning": {"packing": 24}}
        how = {"per_device_train_batch_size": 2 * size, "per_device_eval_batch_size": 2 * size, "max_steps": 3}
        with launched():
            trainer = divided_trainer(
                folder / str(size), config, samples, eval_dataset=judged, compute_metrics=accuracy,
                include_for_metrics=["inputs"], **how,
            )  # fmt: skip
            trainer.train()
            layout = trainer.attached.batches.layout(samples[:4])
            assert layout.rows < 4 and trainer.attached.parallel is not None
            result = trainer.predict(judged)
            found.append({name: logged(trainer, name) for name in ("loss", "grad_norm")})
            found[-1] |= {"loss of judged": result.metrics["test_loss"], "labels": result.label_ids.tolist()}
            found[-1]["predictions"] = result.predictions.tolist()
            trainer.save_model(str(folder / str(size) / "final"))
    with launched(), pytest.raises(ConfigError, match=r"'finetuning.steps' is in the DeepSpeed config, .* 'packing'"):
        divided_trainer(folder, {**config, "finetuning": {"steps": 3}}, samples)
    return found


@pytest.mark.slow
def test_rows_are_packed(tmp_path: Path) -> None:
    """Losses, norms and what is judged are those of rows of their own, on one rank."""
    first, second = run(2, train_packed, tmp_path, timeout=300)
    assert first == second
    losses, norms = zip(*one_rank(3, 4, 4), strict=True)
    judged = [tiny_sample(pattern, 1) for pattern in JUDGED]
    for size, found in zip((2, 1), first, strict=True):
        assert found["loss"] == pytest.approx(losses, rel=1e-4)
        assert found["grad_norm"] == pytest.approx(norms, rel=1e-3)
        trained = AutoModelForImageTextToText.from_pretrained(tmp_path / str(size) / "final")
        with clean_state():
            want = plain_trainer(tmp_path / "plain", judged, trained).predict(judged)
        if size == 2:  # otherwise two batches, whose losses count a row, as in the Trainer
            assert found["loss of judged"] == pytest.approx(want.metrics["test_loss"], rel=1e-4)
        for got, labels, row, sample in zip(
            found["predictions"], found["labels"], want.predictions, judged, strict=True
        ):
            length = len(sample.input_ids)
            np.testing.assert_allclose(np.array(got)[:length], row[:length], rtol=1e-3, atol=1e-4)
            assert labels == sample.labels + [-100] * (len(labels) - length)


def train_and_load_the_best(folder: Path) -> list[dict[str, Any]]:
    """The best is the worst here, of a loss that falls: that of the first checkpoint, which is not the last one."""
    samples, found = mixed_samples(6).samples, []
    how = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    sizes = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 1, "max_steps": 3}
    for stage in (2, 3):
        out = folder / str(stage)
        with launched():
            trainer = divided_trainer(
                out, deepspeed_block(stage), samples, eval_dataset=samples[:4], **how, **best, **sizes
            )
            trainer.train()
            told = {"best": trainer.state.best_model_checkpoint, "losses": logged(trainer, "eval_loss")}
            found.append({**told, "again": trainer.evaluate()["eval_loss"]})
            trainer.save_model(str(out / "final"))
    return found


@pytest.mark.slow
def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path: Path) -> None:
    first, second = run(2, train_and_load_the_best, tmp_path, timeout=300)
    assert first == second
    for stage, found in zip((2, 3), first, strict=True):
        assert found["best"] == str(tmp_path / str(stage) / "checkpoint-1")
        assert found["losses"][0] > found["losses"][-1] and len(found["losses"]) == 3
        assert found["again"] == pytest.approx(found["losses"][0], rel=1e-6)
        saved = AutoModelForImageTextToText.from_pretrained(tmp_path / str(stage) / "final")
        losses = [loss_of(saved, [sample]).item() for sample in mixed_samples(6).samples[:4]]
        assert found["again"] == pytest.approx(np.mean(losses), rel=1e-4)


def train_in_groups(folder: Path, how: dict[str, Any]) -> dict[str, Any]:
    samples = mixed_samples(24).samples
    with launched():
        trainer = divided_trainer(folder, deepspeed_block(2), samples, eval_dataset=samples[:5], **how)
        ahead = trainer.evaluate()["eval_loss"]
        trainer.train()
        return {"ahead": ahead, **{name: logged(trainer, name) for name in ("loss", "grad_norm", "eval_loss")}}


@pytest.mark.slow
def test_groups_and_accumulation_as_one_process_has_them(tmp_path: Path) -> None:
    """Two groups of two, two micro-batches a step: the loss is divided by all tokens of a step, as the Trainer does."""
    how = {"num_train_epochs": 1, "eval_strategy": "epoch"}
    sizes = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}
    with clean_state():
        samples = mixed_samples(24).samples
        plain = plain_trainer(
            tmp_path, samples, gradient_accumulation_steps=4, eval_dataset=samples[:5], **sizes, **how
        )
        ahead = plain.evaluate()["eval_loss"]
        plain.train()
        want = {"ahead": ahead, **{name: logged(plain, name) for name in ("loss", "grad_norm", "eval_loss")}}
    for found in run(4, train_in_groups, tmp_path, {"gradient_accumulation_steps": 2, **sizes, **how}, timeout=300):
        assert found.keys() == want.keys()
        for name, values in want.items():
            assert found[name] == pytest.approx(values, rel=1e-3 if name == "grad_norm" else 1e-4), name


def evaluate_alone(folder: Path) -> tuple[float, str]:
    samples = mixed_samples(6).samples
    with launched():
        trainer = divided_trainer(folder, deepspeed_block(3), samples, per_device_eval_batch_size=1)
        loss = trainer.evaluate(samples)["eval_loss"]
        try:
            trainer.train()
        except ConfigError as error:
            return loss, str(error)
    return loss, ""


@pytest.mark.slow
def test_evaluation_alone_under_zero3(tmp_path: Path) -> None:
    losses = [loss_of(tiny_model(), [sample]).item() for sample in mixed_samples(6).samples]
    for loss, said in run(2, evaluate_alone, tmp_path):
        assert loss == pytest.approx(np.mean(losses), rel=1e-5) and "without optimizer; train first" in said


def with_adapters() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        targets = ["q_proj", "v_proj"]
        config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights="gaussian")
        return peft.get_peft_model(tiny_model(), config)


# All reach every adapter: one without gradient is left alone on one process, and ZeRO's goes on with its momentum.
WITH_FRAMES = [tiny_sample("IItaIta", seed) for seed in range(8)]


def train_adapters(stage: int, folder: Path) -> list[float]:
    samples = WITH_FRAMES
    how = {"per_device_train_batch_size": 1, "max_steps": 8}
    with launched():
        trainer = divided_trainer(folder, deepspeed_block(stage), samples, with_adapters(), **how)
        trainer.train()
        trainer.save_model(str(folder / "adapter"))
        return logged(trainer, "loss")


@pytest.mark.slow
def test_adapters_under_zero3(tmp_path: Path) -> None:
    with clean_state():
        plain = plain_trainer(tmp_path, WITH_FRAMES, with_adapters(), per_device_train_batch_size=1, max_steps=8)
        plain.train()
        want = logged(plain, "loss")
    for losses in run(2, train_adapters, 3, tmp_path, timeout=300):
        assert losses == pytest.approx(want, rel=1e-4)
    loaded = peft.PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter")
    for name, trained in plain.model.named_parameters():
        if "lora_" in name:
            torch.testing.assert_close(loaded.get_parameter(name), trained, rtol=1e-3, atol=1e-5)


def test_one_process_without_deepspeed(tmp_path: Path) -> None:
    """The same script on one process: the unmodified model over the same rows."""
    samples = mixed_samples(4).samples
    how = {"per_device_train_batch_size": 1, "max_steps": 4}
    with clean_state():
        plain = plain_trainer(tmp_path, samples, **how)
        plain.train()
    with clean_state():
        ours = divided_trainer(tmp_path, None, samples, **how)  # type: ignore[arg-type]
        ours.train()
    assert logged(ours, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-6)


@pytest.mark.slow
def test_the_example(tmp_path: Path) -> None:
    """By the launcher, as its text says; shuffled as on one process."""
    model, rows = write_model(tmp_path / "model"), write_rows(tmp_path, 8)
    config = deepspeed_block(3)
    file = write_config(tmp_path / "ds.json", config)
    file.write_text(file.read_text().replace(', "finetuning": {}', ""))
    done = launch(REPOSITORY / "examples" / "trainer.py", model, rows, file, 3, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    losses = re.findall(r"'loss': '?([\d.]+)", done.stdout)
    assert len(losses) == 3 and "'eval_loss'" in done.stdout, done.stdout
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "runs" / "trainer").config.text_config.hidden_size


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "loss": ({"compute_loss_func": max}, {}, "compute_loss_func"),
    "adapters": ({"peft_config": object()}, {}, "give peft.get_peft_model(model, peft_config)"),
    "collator": ({"data_collator": list}, {}, "data_collator"),
    "noise": ({}, {"neftune_noise_alpha": 5.0}, "neftune_noise_alpha is 5.0"),
    "smoothing": ({}, {"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1"),
    "parallelism": ({}, {"include_num_input_tokens_seen": "all"}, "include_num_input_tokens_seen"),
    "sampling": ({}, {"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy"),
    "signals": ({}, {"enable_jit_checkpoint": True}, "enable_jit_checkpoint is True"),
    "liger": ({}, {"use_liger_kernel": True}, "use_liger_kernel is True"),
    "evaluation in bf16": ({}, {"bf16_full_eval": True}, "bf16_full_eval is True"),
    "accumulation": (
        {},
        {"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 2}}},
        "num_steps is 2",
    ),
    "iterable": ({"train_dataset": iter([])}, {}, "without a length"),
    "bad samples": ({"on_bad_sample": "drop"}, {}, "'skip' or 'fail'"),
}


@pytest.mark.parametrize(("given", "arguments", "part"), REFUSED.values(), ids=REFUSED.keys())
def test_what_divided_text_has_no_room_for_is_refused(
    given: dict[str, Any], arguments: dict[str, Any], part: str, tmp_path: Path
) -> None:
    with clean_state(), pytest.raises(ConfigError, match=re.escape(part)):
        args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **arguments)
        SequenceParallelTrainer(tiny_model(), args, **given)


def test_several_gpus_in_one_process_are_refused(tmp_path: Path) -> None:
    with (
        clean_state(),
        pytest.raises(ConfigError, match=r"one process has 2 GPUs, .*; start the script"),
    ):
        args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
        args._n_gpu = 2
        SequenceParallelTrainer(tiny_model(), args)


def test_other_datasets_are_told_from_samples(tmp_path: Path) -> None:
    with clean_state():
        trainer = divided_trainer(tmp_path, None, [{"input_ids": [1]}], max_steps=1)  # type: ignore[arg-type, list-item]
        with pytest.raises(ConfigError, match=r"row 0 of the list is a dict; give Rows\(FILE\)"):
            trainer.train()
        with pytest.raises(ConfigError, match=r"gave a str in a dict; .* \(collate_fn=list\)"):
            as_made({"input_ids": [1]})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="give it to SequenceParallelTrainer"):
        len(Rows("rows.jsonl"))


# As TRL asks of templates: the tokens that the assistant says are marked.
MARKED = (
    "{{ bos_token }} {% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
    "{% for part in m.content %}{{ part.text }} {% endfor %}{{ eos_token }} {% endgeneration %}{% else %}"
    "{% for part in m.content %}{% if part.type == 'image' %}<|image|>{% else %}{{ part.text }} {% endif %}{% endfor %}"
    "{% endif %}{% endfor %}"
)


def vision_rows() -> datasets.Dataset:
    """Conversations about two pictures, as TRL's vision datasets have them."""
    rng = np.random.default_rng(0)
    rows = [
        {
            "messages": [{"role": "user", "content": "which digit ?"}, {"role": "assistant", "content": str(n)}],
            "images": [Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)) for _ in range(2)],
        }
        for n in range(6)
    ]
    turn = {"role": datasets.Value("string"), "content": datasets.Value("string")}
    features = {"messages": datasets.List(turn), "images": datasets.List(datasets.Image())}
    return datasets.Dataset.from_list(rows, features=datasets.Features(features))


def sft_config(folder: Path, **how: Any) -> Any:
    from trl import SFTConfig

    off = {"bf16": False, "gradient_checkpointing": False}
    sizes = {"per_device_train_batch_size": 2, "max_steps": 3}
    return SFTConfig(str(folder), **{**ARGUMENTS, **off, **sizes, "assistant_only_loss": True, **how})


def train_with_sft_config(folder: Path, model: Path) -> list[float]:
    with launched():
        model, processor = AutoModelForImageTextToText.from_pretrained(model), AutoProcessor.from_pretrained(model)
        args = sft_config(folder, deepspeed=deepspeed_block(2))
        trainer = Divided(model, args, train_dataset=vision_rows(), processing_class=processor)
        trainer.train()
        return logged(trainer, "loss")


@pytest.mark.slow
def test_a_script_for_trl_trains_as_there(tmp_path: Path) -> None:
    """The rows, the arguments and the losses of ``SFTTrainer``; a class that inherits from it is refused."""
    trl = pytest.importorskip("trl")
    words = build_tokenizer()
    words.chat_template = MARKED
    loaded = LoadedModel(tiny_model(), words, tiny_processor(), IMAGE)
    loaded.save(tmp_path / "model", dict(loaded.model.named_parameters()))
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    with clean_state():
        optimizers = optimizer_of(loaded.model), None
        theirs = trl.SFTTrainer(
            loaded.model, sft_config(tmp_path), train_dataset=vision_rows(), processing_class=processor,
            optimizers=optimizers,
        )  # fmt: skip
        theirs.train()
    for losses in run(2, train_with_sft_config, tmp_path, tmp_path / "model"):
        assert losses == pytest.approx(logged(theirs, "loss"), rel=1e-4)

    with pytest.raises(ConfigError, match="is a SFTTrainer, which tokenises its dataset"):
        type("Mine", (SequenceParallelTrainer, trl.SFTTrainer), {})
    for given, part in (
        ({"packing": True}, "SFTConfig.packing is True"),
        ({"loss_type": "dft"}, "SFTConfig.loss_type is 'dft'"),
        ({"assistant_only_loss": False}, "SFTConfig.assistant_only_loss is False, and loss is taken on answers"),
    ):
        with clean_state(), pytest.raises(ConfigError, match=part):
            SequenceParallelTrainer(tiny_model(), sft_config(tmp_path, **given), train_dataset=vision_rows())


def replaced_methods() -> str:
    """What is said when Accelerate makes an engine in another way; the class stays as it was."""
    methods = accelerate.Accelerator.prepare_data_loader, accelerate.Accelerator._prepare_deepspeed
    with launched():
        accelerator = accelerate.Accelerator(cpu=True)
        accelerator._prepare_deepspeed = lambda *args: args  # type: ignore[method-assign]
        use_groups(accelerator, groups_of(2), lambda model: None)
        assert accelerator._prepare_deepspeed(1) == (1,)  # no model, no engine
        try:
            accelerator._prepare_deepspeed(nn.Linear(1, 1))
        except RuntimeError as error:
            said = str(error)
    assert methods == (accelerate.Accelerator.prepare_data_loader, accelerate.Accelerator._prepare_deepspeed)
    return said


def test_an_accelerate_that_makes_engines_in_another_way_is_found_out() -> None:
    assert all("made an engine without deepspeed.initialize" in said for said in run(2, replaced_methods))
