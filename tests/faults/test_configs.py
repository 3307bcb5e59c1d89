"""Configs that cannot work: one message that names the key, never a traceback, and nothing taken in silence."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from benchmarks.faults.configs import bases, mistake, put, verdict
from ds_lvxattn.errors import ConfigError
from ds_lvxattn.training.ds_config import fill_model_sizes
from ds_lvxattn.training.run_settings import RunSettings, read_settings
from tests.support.tiny_model import tiny_config

CONFIGS = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))
BASE = json.loads((Path(__file__).parents[2] / "ds_configs" / "zero3_offload.json").read_text())


def read(folder: Path, config: Any, **how: Any) -> RunSettings:
    file = folder / "ds.json"
    file.write_text(config if isinstance(config, str) else json.dumps(config))
    return read_settings(file, **{"steps": None, "seed": 0, "ranks": 2, **how})


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_the_configs_that_come_along(file: Path) -> None:
    settings = read_settings(file, 10, 0, 2)
    assert settings.steps == 10 and settings.length == settings.finetuning.steps


@pytest.mark.parametrize(
    ("path", "value", "parts"),
    [
        ("sequence_parallel_sise", 2, ("did you mean 'sequence_parallel_size'",)),
        ("finetunning", {}, ("did you mean 'finetuning'",)),
        ("zero_optimisation", {}, ("did you mean 'zero_optimization'",)),
        ("strategy", "ring", ("did you mean 'sequence_parallel.strategy'",)),
        ("sequence_parallel.steps", 5, ("did you mean 'finetuning.steps'",)),
        ("sequence_parallel.Kernel", "math", ("did you mean 'sequence_parallel.kernel'",)),
        ("finetuning.frame", 5, ("did you mean 'finetuning.frames'",)),
        ("finetuning.sequence_parallel_size", 2, ("did you mean 'sequence_parallel_size'",)),
        ("finetuning.lora", {"lora_alpha": 8}, ("did you mean 'finetuning.lora.alpha'",)),
        ("finetuning.colour", "red", ("'finetuning.colour' is 'red'", "the keys are")),
        ("learning_rate", 1e-5, ("did you mean 'optimizer.params.lr'",)),
        ("gradient_checkpointing", True, ("did you mean 'sequence_parallel.recompute'",)),
        ("output_dir", "runs", ("on the command line, as --output_dir",)),
        ("data_parallel_size", 2, ("'data_parallel_size'", "would be ignored")),
        ("zero_optimization.stages", 3, ("did you mean 'zero_optimization.stage'",)),
        ("zero_optimization.offload_param.devise", "cpu", ("did you mean 'zero_optimization.offload_param.device'",)),
        ("optimizer.params.lrr", 1e-3, ("did you mean 'optimizer.params.lr'",)),
        ("optimizer.lr", 1e-3, ("'optimizer.lr'", "would be ignored")),
        ("scheduler.params.warmup_steps", 3, ("'scheduler.params.warmup_steps'",)),
        ("checkpoint.tag", 1, ("'checkpoint.tag'",)),
        ("aio.blok", 1, ("'aio.blok'",)),
        ("optimizer.type", "AdamX", ("'AdamX'", "did you mean")),
        ("optimizer", {"type": "SparseAdam", "params": {"lr": 1e-3}}, ("'SparseAdam', which makes no step", "'AdamW'")),
        ("optimizer", {"type": "LBFGS", "params": {"lr": 1e-3}}, ("'LBFGS', which makes no step", "closure")),
        ("scheduler.type", "WarmupCosinLR", ("did you mean 'WarmupCosineLR'",)),
        ("bf16.enabled", "false", ("'bf16.enabled' is the text 'false'", "write false without quotes")),
        ("bf16.enabled", 1, ("'bf16.enabled' is 1; give true or false",)),
        ("bf16", None, ("'bf16' is None; give an object",)),
        ("bf16.enabled", "auto", ("give true or false",)),
        ("fp16", {"enabled": True}, ("bfloat16 and fp16",)),
        ("gradient_clipping", -1.0, ("'gradient_clipping' is -1.0; give a number of at least 0",)),
        ("gradient_clipping", True, ("'gradient_clipping' is True; give a number",)),
        ("gradient_clipping", [1.0], ("'gradient_clipping' is [1.0]; give a number",)),
        ("gradient_clipping", float("nan"), ("give a finite number",)),
        ("zero_optimization.sub_group_size", 10**30, ("64 bits",)),
        ("zero_optimization", True, ("'zero_optimization' is True; give an object",)),
        ("zero_optimization.stage", 5, ("'zero_optimization.stage' is 5", "0, 1, 2")),
        ("zero_optimization.stage", True, ("'zero_optimization.stage' is True; give a number",)),
        ("zero_optimization.offload_optimizer", {"device": "nvme"}, ("offload_optimizer.nvme_path' is not set",)),
        ("zero_optimization.overlap_comm", "auto", ("'zero_optimization.overlap_comm' is 'auto'",)),
        ("optimizer.params.lr", "1e-5", ("without quotes",)),
        ("optimizer.params.lr", -1, ("'optimizer.params.lr' is -1",)),
        ("optimizer.params.betas", [0.9], ("'optimizer.params.betas'", "two numbers")),
        ("optimizer.params.betas", [0.9, 1.5], ("1.5",)),
        ("optimizer.params.weight_decay", {}, ("'optimizer.params.weight_decay'",)),
        ("optimizer", "AdamW", ("'optimizer' is 'AdamW'",)),
        ("scheduler.params.warmup_type", "linar", ("['log', 'linear']",)),
        ("scheduler.params.cos_min_ratio", 3, ("between 0 and 1",)),
        ("scheduler.params.total_num_steps", 0, ("at least 1",)),
        ("steps_per_print", 0, ("above 0",)),
        ("communication_data_type", "fp8", ("'communication_data_type' is 'fp8'",)),
        ("data_types.grad_accum_dtype", "fp99", ("'data_types.grad_accum_dtype' is 'fp99'",)),
        ("log_level", "loud", ("'log_level' is 'loud'",)),
        ("pipeline", {"stages": 2}, ("'pipeline'", "sequence_parallel_size")),
        ("tensor_parallel.autotp_size", 4, ("'tensor_parallel.autotp_size' is 4",)),
        ("checkpoint.load_universal", True, ("'checkpoint.load_universal' is True",)),
        ("amp", {}, ("'amp'",)),
        ("gradient_accumulation_steps", 3, ("'train_batch_size' is 8, which is not", "3 x 1 data-parallel")),
        ("train_batch_size", "8", ("'train_batch_size' is '8'",)),
        ("finetuning.steps", "5", ("'finetuning.steps'",)),
        ("finetuning.eval_every", True, ("'finetuning.eval_every'",)),
        ("finetuning.fps", float("inf"), ("'finetuning.fps' is inf", "finite")),
        ("finetuning.timeout_s", 10**12, ("'finetuning.timeout_s' is 1000000000000",)),
        ("finetuning.lora", {"merge": "false"}, ("'finetuning.lora.merge' is 'false'",)),
        ("finetuning.lora", {"dropout": "auto"}, ("'finetuning.lora.dropout' is 'auto'",)),
        ("finetuning.lora", {"alpha": float("inf")}, ("'finetuning.lora.alpha' is inf",)),
        ("steps_per_print", 10.5, ("'steps_per_print' is 10.5; give a whole number",)),
    ],
    ids=str,
)
def test_what_is_refused_and_how(path: str, value: Any, parts: tuple[str, ...], tmp_path: Path) -> None:
    *outer, _ = path.split(".")
    config, block = BASE, BASE
    for depth, key in enumerate(outer):
        if key not in block:
            config = put(config, tuple(outer[: depth + 1]), {})
            block = {}
        block = block.get(key, {})
    with pytest.raises(ConfigError) as error:
        read(tmp_path, put(config, tuple(path.split(".")), value))
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_optimizers_that_zero_cannot_divide(tmp_path: Path) -> None:
    config = {**BASE, "optimizer": {"type": "Adagrad", "params": {"lr": 1e-3}}}
    assert read(tmp_path, config).ds_config["optimizer"]["type"] == "Adagrad"  # offloaded
    with pytest.raises(ConfigError, match="'Adagrad', which .* one group of parameters alone.* offload the optimizer"):
        read(tmp_path, {**config, "zero_optimization": {"stage": 2}})


@pytest.mark.parametrize("steps_and_seed", [(0, 0), (5, -1), (5, 1 << 40)])
def test_arguments(steps_and_seed: tuple[int, int], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--steps|--seed"):
        read(tmp_path, BASE, steps=steps_and_seed[0], seed=steps_and_seed[1])


def test_the_same_message_on_any_number_of_ranks(tmp_path: Path) -> None:
    messages = set()
    for ranks in (2, 4, 8):
        with pytest.raises(ConfigError) as error:
            read(tmp_path, put(BASE, ("gradient_cliping",), 1.0), ranks=ranks)
        messages.add(str(error.value))
    assert len(messages) == 1


def test_a_key_that_stands_twice(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'stage' stands twice in one object, with 2 and 3"):
        read(tmp_path, '{"zero_optimization": {"stage": 2, "stage": 3}}')


def test_auto_is_what_the_trainer_of_transformers_makes_of_it(tmp_path: Path) -> None:
    config = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
        },
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
        },
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {
                "warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto", "total_num_steps": "auto",
            },
        },
        "sequence_parallel_size": 2,
    }  # fmt: skip
    found = read(tmp_path, config, ranks=4).ds_config
    assert (found["train_batch_size"], found["gradient_accumulation_steps"]) == (4, 1)
    assert found["gradient_clipping"] == 1.0
    assert found["optimizer"]["params"] == {"lr": 5e-5, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
    assert found["scheduler"]["params"] == {
        "warmup_min_lr": 0.0, "warmup_max_lr": 5e-5, "warmup_num_steps": 10, "total_num_steps": 200,
    }  # fmt: skip
    model = tiny_config()
    fill_model_sizes(found, model)
    hidden = model.text_config.hidden_size
    assert found["zero_optimization"] == {
        "stage": 3, "reduce_bucket_size": hidden**2, "stage3_prefetch_bucket_size": int(0.9 * hidden**2),
        "stage3_param_persistence_threshold": 10 * hidden,
    }  # fmt: skip
    config["train_micro_batch_size_per_gpu"] = "auto"
    with pytest.raises(ConfigError, match="'train_micro_batch_size_per_gpu' is 'auto'"):
        read(tmp_path, config)


def test_a_thousand_mistakes(tmp_path: Path) -> None:
    draw = random.Random(1)
    right = bases()
    for config in right:
        read(tmp_path, config)
    found = {verdict(mistake(draw, draw.choice(right)), tmp_path) for _ in range(1000)}
    assert found <= {"refused", "accepted"}, sorted(found - {"refused", "accepted"})[:5]
