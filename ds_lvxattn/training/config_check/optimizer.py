"""Optimizer and schedule of a config, checked by making them once on a dummy parameter."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.ops.lamb import FusedLamb
from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion
from deepspeed.runtime import config as reader
from deepspeed.runtime import lr_schedules
from deepspeed.utils import logger as deepspeed_log

from ds_lvxattn.training.config_check.block import leaves
from ds_lvxattn.training.config_check.values import CLOSE, SCALARS, of_kind, unknown_key

OPTIMIZERS: dict[str, tuple[Callable[..., Any], ...]] = {
    "adam": (torch.optim.Adam, FusedAdam, DeepSpeedCPUAdam),
    "adamw": (torch.optim.AdamW, FusedAdam, DeepSpeedCPUAdam),
    "adagrad": (torch.optim.Adagrad, DeepSpeedCPUAdagrad),
    "lamb": (FusedLamb,),
    "lion": (FusedLion, DeepSpeedCPULion),
}
# Read by the engine before it makes an Adam.
ADAM_SWITCHES = ("torch_adam", "adam_w_mode", "fp32_optimizer_states")
STEPS = ("total_num_steps", "warmup_num_steps")
# Numbers whose default is a tensor, a sequence or None in some optimizer or schedule.
NUMBERS = ("lr", "betas", "eps", "weight_decay", "total_num_steps", "warmup_max_lr", "warmup_min_lr", "momentum")


def forms(ds_config: Mapping[str, Any]) -> Iterator[str]:
    """Blocks that are not a type with its parameters."""
    for key in ("optimizer", "scheduler"):
        if key in ds_config and (problem := _type_and_params(key, ds_config[key])):
            yield problem


def optimizer_problems(ds_config: Mapping[str, Any]) -> Iterator[str]:
    block = ds_config.get("optimizer")
    if block is None:
        yield '\'optimizer\' is missing; give {"type": "AdamW", "params": {"lr": ...}}'
        return
    name, params = block["type"], dict(block.get("params") or {})
    makers: tuple[Callable[..., Any], ...]
    if name.lower() in OPTIMIZERS:
        makers = OPTIMIZERS[name.lower()]
    elif name.lower() in reader.DEEPSPEED_OPTIMIZERS:
        return  # of packages that need not be there; the engine makes them
    elif isinstance(found := getattr(torch.optim, name, None), type) and issubclass(found, torch.optim.Optimizer):
        makers = (found,)
    else:
        known = [*OPTIMIZERS, *(n for n in dir(torch.optim) if n[0].isupper() and n != "Optimizer")]
        close = difflib.get_close_matches(name, known, 1, CLOSE)
        yield f"'optimizer.type' is {name!r}; " + (f"did you mean '{close[0]}'?" if close else f"choose from {known}")
        return
    accepted = [key for maker in makers for key in list(inspect.signature(maker).parameters)[1:]]
    if name.lower() in ("adam", "adamw"):
        accepted += ADAM_SWITCHES
    problems = [
        unknown_key(f"optimizer.params.{key}", value, accepted) for key, value in params.items() if key not in accepted
    ]
    problems += _arguments("optimizer.params", makers, params)
    betas = params.get("betas", (0.9, 0.999))
    if not (isinstance(betas, (list, tuple)) and len(betas) == 2):
        problems.append(f"'optimizer.params.betas' is {betas!r}; give a list of two numbers")
    # torch's AdamW knows the limits of what most optimizers have.
    judge = makers[0] if makers[0].__module__.startswith("torch.") else torch.optim.AdamW
    if not problems:
        problems += _made("optimizer", lambda: _call(judge, params))
    if not problems and name.lower() not in OPTIMIZERS:
        problems += _cannot_step(name, judge, params)
    if name.lower() == "adagrad":
        problems += _adagrad_in_groups(name, ds_config.get("zero_optimization") or {})
    yield from problems


def scheduler_problems(ds_config: Mapping[str, Any]) -> Iterator[str]:
    block = ds_config.get("scheduler")
    if block is None:
        return
    name, params = block["type"], dict(block.get("params") or {})
    maker = getattr(lr_schedules, name, None) if name in lr_schedules.VALID_LR_SCHEDULES else None
    if maker is None and name[:1].isupper():
        maker = getattr(torch.optim.lr_scheduler, name, None)
    if maker is None:
        known = lr_schedules.VALID_LR_SCHEDULES
        close = difflib.get_close_matches(name, known, 1, CLOSE)
        yield f"'scheduler.type' is {name!r}; " + (f"did you mean '{close[0]}'?" if close else f"choose from {known}")
        return
    accepted = list(inspect.signature(maker).parameters)[1:]
    problems = [
        unknown_key(f"scheduler.params.{key}", value, accepted) for key, value in params.items() if key not in accepted
    ]
    problems += _arguments("scheduler.params", (maker,), {k: v for k, v in params.items() if k not in STEPS})
    kinds = (lr_schedules.WARMUP_LOG_RATE, lr_schedules.WARMUP_LINEAR_RATE)
    if params.get("warmup_type", kinds[0]) not in kinds:
        problems.append(f"'scheduler.params.warmup_type' is {params['warmup_type']!r}; choose from {list(kinds)}")
    for key, value in params.items():
        if key.endswith("_ratio") and type(value) in (int, float) and value > 1:
            problems.append(f"'scheduler.params.{key}' is {value!r}; give a share between 0 and 1")
    for key in STEPS:
        value = params.get(key, 1)
        if type(value) is not int or value < 1:
            problems.append(f"'scheduler.params.{key}' is {value!r}; give a whole number of at least 1, or \"auto\"")
    if not problems:
        problems += _made("scheduler", lambda: _tried(maker, params))
    yield from problems


def _cannot_step(name: str, maker: Callable[..., Any], params: Mapping[str, Any]) -> list[str]:
    """An optimizer that does not take dense gradients, or wants the loss computed again inside its step."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    on_cpu = {key: value for key, value in params.items() if key not in ("capturable", "fused")}
    try:
        _call(maker, on_cpu, [parameter]).step()
    except Exception as error:  # steps raise whatever an optimizer asks for
        return [f"'optimizer.type' is {name!r}, which makes no step here: {error}; choose another, such as 'AdamW'"]
    return []


def _adagrad_in_groups(name: str, zero: Mapping[str, Any]) -> list[str]:
    """DeepSpeed 0.19.8 makes torch's Adagrad anew with one group of parameters under ZeRO, and asks for each of two."""
    if not zero.get("stage") or (zero.get("offload_optimizer") or {}).get("device", "none") != "none":
        return []
    return [
        f"'optimizer.type' is {name!r}, which DeepSpeed's ZeRO runs with one group of parameters alone, and here those "
        "that decay are one and the others another; choose 'AdamW', or offload the optimizer"
    ]


def _arguments(path: str, makers: Iterable[Callable[..., Any]], params: Mapping[str, Any]) -> list[str]:
    """Arguments whose type is not that of the default, and numbers below 0."""
    problems: list[str] = []
    for key, value in params.items():
        defaults = [
            parameter.default
            for maker in makers
            if (parameter := inspect.signature(maker).parameters.get(key)) is not None
        ]
        kinds = {type(default) for default in defaults if default is not inspect.Parameter.empty}
        if key in ADAM_SWITCHES:
            kinds = {bool}
        if not kinds or type(None) in kinds or not kinds <= {bool, int, float, str}:
            kinds = {object}
        if kinds == {int} and key in NUMBERS:
            kinds = {float}  # a default without a fraction, as LBFGS has for its rate
        below = any(isinstance(default, (int, float)) and default < 0 for default in defaults)
        if isinstance(value, (dict, list)) and kinds <= SCALARS:
            problems += of_kind(f"{path}.{key}", value, kinds, below)
            continue
        for item_path, item in leaves({key: value}, f"{path}."):
            if isinstance(item, bool) and kinds == {object} and key not in ADAM_SWITCHES and key in NUMBERS:
                problems.append(f"'{item_path}' is {item!r}; give a number")
            else:
                problems += of_kind(item_path, item, kinds, below)
    return problems


def _type_and_params(path: str, block: Any) -> str:
    """What is wrong with the form of the optimizer's or scheduler's block; empty when nothing is."""
    if not isinstance(block, dict):
        return f"'{path}' is {block!r}; give an object with the keys 'type' and 'params'"
    if "type" not in block:
        return f"'{path}.type' is missing; the block has the keys {list(block)}"
    if not isinstance(block["type"], str):
        return f"'{path}.type' is {block['type']!r}; give a name"
    if not isinstance(block.get("params", {}), dict):
        return f"'{path}.params' is {block['params']!r}; give an object"
    return ""


def _call(maker: Callable[..., Any], params: Mapping[str, Any], *first: Any) -> Any:
    """``maker`` of a dummy parameter with those of ``params`` that it takes."""
    names = list(inspect.signature(maker).parameters)[1:]
    start = first or ([torch.nn.Parameter(torch.zeros(1))],)
    return maker(*start, **{key: value for key, value in params.items() if key in names})


def _tried(maker: Callable[..., Any], params: Mapping[str, Any]) -> None:
    """Make a schedule and ask it for a rate."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    optimizer.step()
    scheduler = maker(optimizer, **params)
    if maker.__module__ == lr_schedules.__name__:
        for step in (0, params.get("warmup_num_steps", 1), params.get("total_num_steps", 1)):
            scheduler.step(step)
    if not all(math.isfinite(group["lr"]) for group in optimizer.param_groups):
        raise ValueError("the rate is not finite")


def _made(block: str, make: Callable[[], Any]) -> list[str]:
    """What is wrong with the parameters of a block, by making what it describes."""
    silent, deepspeed_log.disabled = deepspeed_log.disabled, True  # it warns of a schedule that has not begun
    try:
        make()
    except Exception as error:  # constructors raise whatever a value leads to
        return [f"'{block}.params' does not make the {block}: {error}; change what it names"]
    finally:
        deepspeed_log.disabled = silent
    return []
