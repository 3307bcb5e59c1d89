"""Adapters: trained under ZeRO like on one rank, resumed, loaded by PEFT into the plain model, merged."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from ds_lvxattn.errors import ConfigError
from ds_lvxattn.training.lora import add_adapters
from ds_lvxattn.training.settings import LoraSettings, finetuning_config
from tests.support.distributed import run
from tests.support.tiny_model import ds_config, loss_of, tiny_batches, tiny_model
from tests.support.training import finetune, metrics_in, mixed_samples, write_config, write_model

STEPS = 4


def arguments(folder: Path, stage: int, output: str, size: int = 2, **lora: Any) -> list[str]:
    config = ds_config(stage, 2, 2, size=size, strategy="lv_xattn")
    lora = {"r": 2, "alpha": 8, "target_modules": r".*cross_attn\.[qkvo]_proj", **lora}
    file = write_config(folder / f"{output}.json", config, eval_examples=0, save_every=2, lora=lora)
    options = {"ds_config": file, "model": folder / "model", "output_dir": folder / output, "steps": STEPS, "seed": 3}
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def loss(model: Any) -> float:
    return loss_of(model.eval(), mixed_samples(4).samples).item()


def fresh(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder / "model")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**tiny_batches(tiny_model()).prepare(mixed_samples(4).samples).inputs).logits


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_trained_resumed_loaded_and_merged(stage: int, tmp_path: Path) -> None:
    """The loss of rank's adapters is that of one rank without sequence parallelism; PEFT and the merged model agree."""
    write_model(tmp_path / "model")
    assert run(2, finetune, arguments(tmp_path, stage, "whole", merge=stage != 2), timeout=300) == ["", ""]
    assert run(1, finetune, arguments(tmp_path, 1, "single", size=1), timeout=300) == [""]
    if stage == 3:
        assert json.loads((tmp_path / "whole" / "plan.json").read_text())[0]["zero"]["keeps_frozen"]
    assert metrics_in(tmp_path / "whole") == pytest.approx(metrics_in(tmp_path / "single"), rel=1e-5)

    plain = fresh(tmp_path)
    untrained = loss(plain)
    tuned: Any = PeftModel.from_pretrained(plain, tmp_path / "whole" / "adapter")
    trained = loss(tuned.get_base_model())
    assert trained != pytest.approx(untrained, rel=1e-4)
    assert (tmp_path / "whole" / "model").exists() == (stage != 2)
    if stage != 2:
        merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole" / "model")
        assert loss(merged) == pytest.approx(trained, rel=1e-5)
        torch.testing.assert_close(logits(merged), logits(tuned.get_base_model()), rtol=1e-4, atol=1e-5)
    alone: Any = PeftModel.from_pretrained(fresh(tmp_path), tmp_path / "single" / "adapter")
    torch.testing.assert_close(logits(tuned.get_base_model()), logits(alone.get_base_model()), rtol=1e-3, atol=1e-4)

    # What a run leaves that ends after step 2: adapters alone are in its checkpoint.
    stopped = tmp_path / "stopped"
    shutil.copytree(tmp_path / "whole" / "checkpoints", stopped / "checkpoints")
    shutil.rmtree(stopped / "checkpoints" / f"step-{STEPS}")
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (stopped / "metrics.jsonl").write_text("".join(lines[:2]))
    assert run(2, finetune, [*arguments(tmp_path, stage, "stopped"), "--resume"], timeout=300) == ["", ""]
    assert metrics_in(stopped) == pytest.approx(metrics_in(tmp_path / "whole"), rel=1e-6)
    size = sum(file.stat().st_size for file in (stopped / "checkpoints" / "step-2").iterdir())
    assert size < (tmp_path / "model" / "model.safetensors").stat().st_size


def test_settings_that_cannot_work(monkeypatch: pytest.MonkeyPatch) -> None:
    for block, message in (
        ({"lora": {"rank": 4}}, "'finetuning.lora.rank' is 4: .*the keys are .*'r', 'alpha'"),
        ({"lora": {"r": 0}}, "'finetuning.lora.r' is 0"),
        ({"lora": {}, "trainable": "all"}, "'finetuning.trainable' is 'all' beside 'finetuning.lora'"),
    ):
        with pytest.raises(ConfigError, match=message):
            finetuning_config({"finetuning": block})
    for settings, stage, message in (
        ({"target_modules": ["no_such"]}, 2, "'finetuning.lora.target_modules' is .'no_such'."),
        ({"target_modules": ["layernorm"]}, 2, "'finetuning.lora.target_modules'"),
        ({"bits": 4}, 3, "ZeRO stage 3 cannot partition"),
        ({"bits": 4, "merge": True}, 2, "'merge' is true"),
    ):
        monkeypatch.setitem(sys.modules, "bitsandbytes", sys)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
        with pytest.raises(ConfigError, match=message):
            add_adapters(tiny_model(), LoraSettings(**settings), "tiny", stage, "cpu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="'finetuning.lora.bits' is 4, which needs bitsandbytes"):
        add_adapters(tiny_model(), LoraSettings(bits=4), "tiny", 2, "cpu")


@pytest.mark.slow
def test_four_bits(tmp_path: Path) -> None:
    """The losses of weights that were rounded to 4 bits beforehand; the adapters' folder does not hold the weights."""
    bitsandbytes: Any = pytest.importorskip("bitsandbytes.functional")
    write_model(tmp_path / "model")
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    assert run(2, finetune, arguments(tmp_path, 2, "small", bits=4), timeout=300) == ["", ""]
    with torch.no_grad():
        assert loss(PeftModel.from_pretrained(plain, tmp_path / "small" / "adapter").get_base_model())
    assert json.loads((tmp_path / "small" / "adapter" / "adapter_config.json").read_text())["r"] == 2
    assert not (tmp_path / "small" / "model").exists()

    rounded = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    for module in rounded.modules():
        if type(module) is torch.nn.Linear and module is not rounded.get_output_embeddings():
            module.weight.data = bitsandbytes.dequantize_4bit(
                *bitsandbytes.quantize_4bit(module.weight.data, compress_statistics=True, quant_type="nf4")
            )
    rounded.save_pretrained(tmp_path / "model")
    assert run(2, finetune, arguments(tmp_path, 2, "rounded"), timeout=300) == ["", ""]
    assert metrics_in(tmp_path / "small") == pytest.approx(metrics_in(tmp_path / "rounded"), rel=1e-4)
