"""Low-rank adapters (LoRA) in place of whole weights: put in, trained under any ZeRO stage, saved, merged.

The adapters are PEFT's. They are put into the model's own modules, so its class, its hooks and its family stay as they
are; the folder ``adapter`` that a run writes is what ``PeftModel.from_pretrained`` reads.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ds_lvxattn.errors import ConfigError
from ds_lvxattn.training.settings import LoraSettings

ADAPTER = "default"  # PEFT's name of the one adapter
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of the parameter names in an adapter's file


def add_adapters(model: PreTrainedModel, settings: LoraSettings, name: str, zero_stage: int, device: Any) -> None:
    """Put adapters beside the target modules, in place; they alone train.

    Args:
        name: of the model that they belong to, as it was loaded.
        zero_stage: of the run.
        device: of this rank, where 4-bit weights lie.

    Raises:
        ConfigError: targets that are not in the model or are no linear layers; 4 bits where they cannot be.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if settings.bits is not None:
        _quantize(model, settings, zero_stage, device)
    targets = settings.target_modules
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=list(targets) if not isinstance(targets, str) else targets,
        base_model_name_or_path=name,
    )
    try:
        # Drawn from the seed alone: how many numbers loading drew differs between ZeRO stages.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch.initial_seed())
            inject_adapter_in_model(config, model, ADAPTER)
    except (ValueError, re.error) as error:
        raise ConfigError(f"'finetuning.lora.target_modules' is {targets!r}: {error}") from error
    for module_name, module in model.named_modules():
        if hasattr(module, "lora_A") and not isinstance(module.get_base_layer(), nn.Linear):
            kind = type(module.get_base_layer()).__name__
            raise ConfigError(
                f"'finetuning.lora.target_modules' is {targets!r}, which matches {module_name}, a {kind}; name linear "
                "layers"
            )
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in parameter_name)
    vars(model)["_lora"] = config  # what the export needs to know


def has_adapters(model: nn.Module) -> bool:
    """Whether ``add_adapters`` was here."""
    return hasattr(model, "_lora")


def save_adapter(model: nn.Module, state: dict[str, Tensor], folder: Path) -> None:
    """Write the folder that PEFT reads. ``state`` has the adapters' parameters, by their names in the model."""
    config: Any = model._lora
    tensors = {
        PREFIX + name.replace(f".{ADAPTER}.", "."): tensor.contiguous()
        for name, tensor in state.items()
        if "lora_" in name
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config.inference_mode = True
    config.save_pretrained(folder)


def merged(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of the model without adapters, of which each is added to its weight."""
    scaling = {name: m.scaling[ADAPTER] for name, m in model.named_modules() if hasattr(m, "lora_A")}
    result = {}
    for name, tensor in state.items():
        module, _, rest = name.partition(".base_layer.")
        if rest == "weight":
            a, b = (state[f"{module}.lora_{side}.{ADAPTER}.weight"].float() for side in "AB")
            tensor = (tensor.float() + scaling[module] * (b @ a)).to(tensor.dtype)
        if "lora_" not in name:
            result[f"{module}.{rest}" if rest else name] = tensor
    return result


def _quantize(model: nn.Module, settings: LoraSettings, zero_stage: int, device: Any) -> None:
    """Hold the weights of all linear layers but the last one in 4 bits (QLoRA: NF4)."""
    given = f"'finetuning.lora.bits' is {settings.bits}"
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"{given}, which needs bitsandbytes; install it, or leave 'bits' out")
    if zero_stage == 3:
        raise ConfigError(f"{given}, and ZeRO stage 3 cannot partition 4-bit weights; choose stage 1 or 2")
    if settings.merge:
        raise ConfigError(f"{given} and 'merge' is true: 4-bit weights take no adapter without a loss; leave one out")
    from bitsandbytes.nn import Linear4bit, Params4bit

    output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    layers = {n: m for n, m in model.named_modules() if type(m) is nn.Linear and m is not output}
    for name, layer in layers.items():
        small = Linear4bit(
            layer.in_features, layer.out_features, layer.bias is not None,
            compute_dtype=layer.weight.dtype, quant_type="nf4", device="meta",
        )  # fmt: skip
        small.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=small)
        small.bias = layer.bias
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, small.to(device))
    vars(model)["is_loaded_in_4bit"] = True  # PEFT asks for it
