"""A DeepSpeed config checked as a whole, before any process group exists.

The judge is DeepSpeed itself: its reader is handed the config and watched. A key that it never asks for would be
ignored, so it is refused; the type that a key should have is that of DeepSpeed's default or model field; optimizer
and schedule are made once on a dummy parameter. So nothing here repeats DeepSpeed's list of keys.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum
from typing import Any

import torch
from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.ops.lamb import FusedLamb
from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion
from deepspeed.runtime import config as reader
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from deepspeed.utils import logger as deepspeed_log
from deepspeed.utils.logging import log_levels
from pydantic import ValidationError

from ds_lvxattn.config import BLOCK_KEY, CHECKPOINTING_KEY, SIZE_KEY
from ds_lvxattn.errors import ConfigError
from ds_lvxattn.training import settings
from ds_lvxattn.training.ds_config import ACCUMULATION, AUTO, BATCH, MICRO_BATCH, MODEL_SIZES

# Blocks and keys that are checked where they are used.
OURS = (SIZE_KEY, BLOCK_KEY, settings.BLOCK_KEY, CHECKPOINTING_KEY, BATCH, MICRO_BATCH, ACCUMULATION)
# Blocks that the loop reads too, and for which DeepSpeed takes other values from older configs.
OBJECTS = ("zero_optimization", "bf16", "fp16")
# What DeepSpeed knows and this loop does not do: the values that ask for nothing, and what to do instead.
NOT_DONE: dict[str, tuple[tuple[Any, ...], str]] = {
    "autotuning.enabled": ((False,), "the loop does not restart itself; leave the block out"),
    "bfloat16": ((), "name the block 'bf16'"),
    "checkpoint.load_universal": ((False,), "checkpoints are resumed on as many ranks as saved them; leave it out"),
    "checkpoint.use_node_local_storage": ((False,), "the ranks share one --output_dir; leave it out"),
    "checkpoint.writer": ((None,), "checkpoints are written by torch; leave it out"),
    "data_efficiency.enabled": ((False,), "the loop has a data order of its own; leave the block out"),
    "datastates_ckpt": ((None, {}), "checkpoints are written by torch; leave it out"),
    "expert_parallel": (({},), "there are no expert-parallel groups; leave it out"),
    "gradient_allreduce_op": (("mean",), "gradients are averaged over the data-parallel groups; leave it out"),
    "hybrid_engine.enabled": ((False,), "it serves inference; leave the block out"),
    "managed_gradient_accumulation": ((True,), f"set '{ACCUMULATION}' and leave it out"),
    "pipeline": (({},), f"layers are not divided over ranks; set '{SIZE_KEY}' instead"),
    "tensor_parallel.autotp_size": ((0, 1), f"weights are not divided by tensor parallelism; set '{SIZE_KEY}' instead"),
    "weight_quantization": (({},), "it serves inference; leave it out"),
}
# Keys that DeepSpeed or transformers give a meaning of its own to "auto", or that fill_model_sizes fills in.
AUTO_STAYS = {"data_types.keep_in_fp32_modules", *(f"zero_optimization.{key}" for key in MODEL_SIZES)}
# Blocks of free text: names of runs, folders and groups.
FREE_TEXT = ("tensorboard.", "wandb.", "csv_monitor.", "comet.", f"{BLOCK_KEY}.", f"{settings.BLOCK_KEY}.")
# Positive numbers though DeepSpeed says nothing of it: it divides by them.
POSITIVE = ("steps_per_print", "gradient_predivide_factor")
STEPS = ("total_num_steps", "warmup_num_steps")
# Numbers whose default is a tensor, a sequence or None in some optimizer or schedule.
NUMBERS = ("lr", "betas", "eps", "weight_decay", "total_num_steps", "warmup_max_lr", "warmup_min_lr", "momentum")
CLOSE = 0.75  # likeness above which another key is suggested
SCALARS = {bool, int, float, str, type(None)}
WORDS = {"true": "true", "yes": "true", "on": "true", "false": "false", "no": "false", "off": "false"}

OPTIMIZERS: dict[str, tuple[Callable[..., Any], ...]] = {
    "adam": (torch.optim.Adam, FusedAdam, DeepSpeedCPUAdam),
    "adamw": (torch.optim.AdamW, FusedAdam, DeepSpeedCPUAdam),
    "adagrad": (torch.optim.Adagrad, DeepSpeedCPUAdagrad),
    "lamb": (FusedLamb,),
    "lion": (FusedLion, DeepSpeedCPULion),
}
# Read by the engine before it makes an Adam.
ADAM_SWITCHES = ("torch_adam", "adam_w_mode", "fp32_optimizer_states")


def check_ds_config(ds_config: Mapping[str, Any], trains: bool = True) -> None:
    """Check a config that ``resolve_ds_config`` gave. No rank needs another for it, and no device is touched.

    Args:
        trains: whether optimizer and schedule count.

    Raises:
        ConfigError: keys that nothing reads, values that cannot work or that DeepSpeed refuses; one message that
            names each with its value and the remedy.
    """
    block = _Block({key: value for key, value in ds_config.items() if key not in OURS})
    problems = [*_objects(ds_config), *_forms(ds_config), *_not_done(block), *_values(block, "")]
    if not problems:
        problems = _deepspeed_says(block) or [*_unread(block), *_types(block)]
    if not problems and trains:
        problems = [*_optimizer(ds_config), *_scheduler(ds_config)]
    if problems:
        raise ConfigError("; ".join(problems))


class _Block(dict[str, Any]):
    """An object of the config that notes which keys are asked for, and with which default."""

    def __init__(self, values: Mapping[str, Any], path: str = "", trail: list[str] | None = None) -> None:
        self.path, self.asked = path, dict[str, Any]()
        self.trail = [] if trail is None else trail  # paths in the order in which they were asked for
        super().__init__(
            {k: _Block(v, f"{path}{k}.", self.trail) if isinstance(v, dict) else v for k, v in values.items()}
        )

    def _note(self, key: str, default: Any = inspect.Parameter.empty) -> None:
        self.asked.setdefault(key, default)
        if dict.__contains__(self, key):
            self.trail.append(self.path + key)

    def get(self, key: str, default: Any = None) -> Any:
        self._note(key, default)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self._note(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self._note(str(key))
        return super().__contains__(key)

    # Overridden, so that unpacking (**block) goes through __getitem__.
    def __iter__(self) -> Iterator[str]:
        return super().__iter__()

    def keys(self) -> Any:
        return _Keys(self)

    def items(self) -> Any:
        return [(key, self[key]) for key in self]

    def __copy__(self) -> _Block:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> _Block:
        return self


class _Keys:
    """Keys of a block: a question whether one is there is a question for it."""

    def __init__(self, block: _Block) -> None:
        self.block = block

    def __contains__(self, key: object) -> bool:
        return key in self.block

    def __iter__(self) -> Iterator[str]:
        return iter(self.block)


def _leaves(block: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key in block:
        value = dict.__getitem__(block, key) if isinstance(block, dict) else block[key]
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}{key}.")
        elif isinstance(value, list):
            yield from _leaves({f"{key}[{i}]": item for i, item in enumerate(value)}, path)
        else:
            yield path + key, value


def check_names(ds_config: Mapping[str, Any]) -> None:
    """Check the names at the top of a config, before anything is made of the values.

    Raises:
        ConfigError: one is not known.
    """
    known = [*OURS, *_known_names()]
    problems = [_unknown(key, value, known) for key, value in ds_config.items() if key not in known]
    if problems:
        raise ConfigError("; ".join(problems))


@functools.cache
def _known_names() -> tuple[str, ...]:
    """What DeepSpeed's reader asks a config for."""
    block = _Block({MICRO_BATCH: 1})
    reader.DeepSpeedConfig(block, mpu=_Groups())
    return tuple(block.asked)


def _forms(ds_config: Mapping[str, Any]) -> Iterator[str]:
    for key in ("optimizer", "scheduler"):
        if key in ds_config and (problem := _type_and_params(key, ds_config[key])):
            yield problem


def _objects(ds_config: Mapping[str, Any]) -> Iterator[str]:
    for key in OBJECTS:
        if not isinstance(ds_config.get(key, {}), dict):
            yield f"'{key}' is {ds_config[key]!r}; give an object, or leave it out"


def _nodes(block: _Block) -> Iterator[tuple[str, Any]]:
    """Every key with its value; what is in an object comes after it."""
    for key in block:
        value = dict.__getitem__(block, key)
        yield block.path + key, value
        if isinstance(value, _Block):
            yield from _nodes(value)


def _not_done(block: _Block) -> Iterator[str]:
    for path, (idle, remedy) in NOT_DONE.items():
        value: Any = block
        for key in path.split("."):
            value = dict.get(value, key, idle) if isinstance(value, dict) else idle
        if value is not idle and value not in idle:
            yield f"'{path}' is {value!r}, which this loop does not do: {remedy}"


def _values(block: _Block, path: str) -> Iterator[str]:
    """Values that no key can have."""
    for key, value in _leaves(block, path):
        if isinstance(value, float) and not math.isfinite(value):
            yield f"'{key}' is {value!r}; give a finite number"
        elif isinstance(value, int) and abs(value) >= 1 << 63:
            yield f"'{key}' is a whole number of {len(str(value))} digits; give one of at most 64 bits"
        elif isinstance(value, str) and not (key.startswith(FREE_TEXT) and not key.endswith(".enabled")):
            yield from _text(key, value)


def _text(key: str, value: str) -> Iterator[str]:
    word = value.strip().lower()
    if word == AUTO and key not in AUTO_STAYS:
        if key in ("bf16.enabled", "fp16.enabled"):
            yield f"'{key}' is 'auto', which the Trainer takes from its command line; give true or false"
        else:
            yield f"'{key}' is 'auto', for which this key has no meaning here; give a value, or leave it out"
    elif word in WORDS:
        yield f"'{key}' is the text {value!r}; write {WORDS[word]} without quotes"
    elif _is_number(word):
        yield f"'{key}' is the text {value!r}; write the number without quotes"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


class _Groups:
    """Stands for the ``mpu``: DeepSpeed asks it for the ranks that divide the batch."""

    def get_data_parallel_world_size(self) -> int:
        return 1


def _deepspeed_says(block: _Block) -> list[str]:
    """What DeepSpeed's reader refuses."""
    block[MICRO_BATCH] = 1  # batch sizes have been checked, and depend on the ranks
    try:
        reader.DeepSpeedConfig(block, mpu=_Groups())
    except ValidationError as error:
        return [_explain(problem, block) for problem in error.errors()]
    except Exception as error:  # assertions and whatever a value of another type leads to
        path = block.trail[-1] if block.trail else "the config"
        value = _at(block, path)
        if isinstance(error, (AttributeError, TypeError)) and not isinstance(value, dict):
            return list(_of_kind(path, value, _default_kind(block, path), False)) or [
                f"'{path}' is {value!r}; give an object"
            ]
        return [f"'{path}' is {value!r}: DeepSpeed says: {error}"]
    finally:
        block.pop(MICRO_BATCH)
    return []


def _explain(problem: Any, block: _Block) -> str:
    """A message for one problem that a model of DeepSpeed's found."""
    location = ".".join(str(part) for part in problem["loc"])
    last = block.trail[-1] if block.trail else ""
    parent = last.rpartition(".")[0]
    # A model of one block names its own keys; the models of the monitors are made together.
    path = location if problem["loc"] and dict.__contains__(block, problem["loc"][0]) else f"{parent}.{location}"
    path = path.strip(".") or last
    if problem["type"] == "extra_forbidden":
        known = _model_keys(path.rpartition(".")[0], block)
        return _unknown(path, problem["input"], known)
    return f"'{path}' is {problem['input']!r}: {problem['msg']}"


def _model_keys(path: str, block: _Block) -> list[str]:
    """Keys of the models that share most keys with the block at ``path``."""
    given = set(dict.keys(_at(block, path) or {}))
    best = max(_models(), key=lambda model: (len(given & _names(model)), -len(_names(model))))
    return sorted(_names(best))


def _names(model: type[DeepSpeedConfigModel]) -> set[str]:
    fields = model.model_fields
    return {*fields, *(field.alias for field in fields.values() if field.alias)}


def _models() -> list[type[DeepSpeedConfigModel]]:
    found, todo = list[type[DeepSpeedConfigModel]](), [DeepSpeedConfigModel]
    while todo:
        below = todo.pop().__subclasses__()
        found += below
        todo += below
    return [model for model in found if model.__module__.startswith("deepspeed.")]


def _at(block: Mapping[str, Any], path: str) -> Any:
    value: Any = block
    for key in filter(None, path.split(".")):
        value = dict.get(value, key) if isinstance(value, dict) else None
    return value


def _unknown(path: str, value: Any, known: Iterable[str]) -> str:
    parent, _, key = path.rpartition(".")
    close = difflib.get_close_matches(key, list(known), 1, CLOSE)
    remedy = f"did you mean '{f'{parent}.' if parent else ''}{close[0]}'?" if close else "leave it out"
    return f"'{path}' (value {value!r}) is not a key of the config and would be ignored; {remedy}"


def _unread(block: _Block) -> Iterator[str]:
    """Keys that the reader never asked for."""
    known = [*OURS, *(key for key in block.asked if key not in NOT_DONE)]
    for key in block:
        value = dict.__getitem__(block, key)
        if key not in block.asked:
            yield _unknown(key, value, known)
        elif isinstance(value, _Block) and value.asked:
            for inner in value:
                if inner not in value.asked:
                    yield _unknown(f"{key}.{inner}", dict.__getitem__(value, inner), value.asked)


@functools.cache
def _field_kinds() -> dict[str, tuple[set[type], bool]]:
    """Types of every field of DeepSpeed's models, and whether a default is negative."""
    kinds: dict[str, tuple[set[type], bool]] = {}
    for model in _models():
        for name, field in model.model_fields.items():
            negative = isinstance(field.default, (int, float)) and field.default < 0
            for key in filter(None, (name, field.alias)):
                types_of, below = kinds.get(key, (set(), False))
                kinds[key] = types_of | _kinds(field.annotation), below or negative
    return kinds


def _kinds(annotation: Any) -> set[type]:
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return set().union(*(_kinds(part) for part in typing.get_args(annotation)))
    if origin is not None:
        return {type(value) for value in typing.get_args(annotation)} if origin is typing.Literal else {origin}
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return {int} if issubclass(annotation, int) else {str}
    return {annotation} if isinstance(annotation, type) else {object}


def _types(block: _Block) -> Iterator[str]:
    """Values whose type is not that of the key, though DeepSpeed would take them: 1 for true, true for 1."""
    for path, value in _nodes(block):
        if path.startswith(("optimizer.", "scheduler.")):
            continue
        if value == AUTO and path in AUTO_STAYS:
            continue
        parent, _, key = path.rpartition(".")
        if parent and key in _field_kinds():
            kinds, below = _field_kinds()[key]
        else:
            kinds, below = _default_kind(block, path), False
        yield from _of_kind(path, value, kinds, below)
        if parent == "data_types" and key.endswith("_dtype"):
            yield from _one_of(path, value, [name for kind in reader.DtypeEnum for name in kind._all_values[1:]])
    if block.get("log_level") is not None:
        yield from _one_of("log_level", block["log_level"], list(log_levels))


def _default_kind(block: _Block, path: str) -> set[type]:
    """Type of the default that DeepSpeed's reader names for the key at ``path``; ``object`` where it names none."""
    parent, _, key = path.rpartition(".")
    owner = _at(block, parent)
    default = owner.asked.get(key) if isinstance(owner, _Block) else None
    return {type(default)} if isinstance(default, (bool, int, float, str)) else {object}


def _one_of(path: str, value: Any, accepted: list[str]) -> Iterator[str]:
    if value not in accepted:
        yield f"'{path}' is {value!r}; choose from {accepted}"


def _of_kind(path: str, value: Any, kinds: set[type], negative: bool) -> Iterator[str]:
    number = type(value) in (int, float)
    if path in POSITIVE and not number:
        yield f"'{path}' is {value!r}; give a number"
        return
    if object not in kinds:
        if isinstance(value, (dict, list)) and kinds <= SCALARS:
            what = "number" if kinds & {int, float} else "text" if str in kinds else "true or false"
            yield f"'{path}' is {value!r}; give {'' if what.startswith('true') else 'a '}{what}"
            return
        if number and kinds <= {str, type(None)}:
            yield f"'{path}' is {value!r}; give a text"
            return
        if isinstance(value, bool) and bool not in kinds and kinds & {int, float, str}:
            yield f"'{path}' is {value!r}; give a {'number' if kinds & {int, float} else 'text'}"
            return
        if number and bool in kinds and not kinds & {int, float}:
            yield f"'{path}' is {value!r}; give true or false"
            return
        if isinstance(value, str) and kinds <= {bool, int, float, type(None)}:
            yield f"'{path}' is {value!r}; give a {'number' if kinds & {int, float} else 'true or false'}"
            return
    if number and ((value < 0 and not negative) or (value <= 0 and path in POSITIVE)):
        yield f"'{path}' is {value!r}; give a number {'above 0' if path in POSITIVE else 'of at least 0'}"


def _optimizer(ds_config: Mapping[str, Any]) -> Iterator[str]:
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
        _unknown(f"optimizer.params.{key}", value, accepted) for key, value in params.items() if key not in accepted
    ]
    problems += _arguments("optimizer.params", makers, params)
    betas = params.get("betas", (0.9, 0.999))
    if not (isinstance(betas, (list, tuple)) and len(betas) == 2):
        problems.append(f"'optimizer.params.betas' is {betas!r}; give a list of two numbers")
    # torch's AdamW knows the limits of what most optimizers have.
    judge = makers[0] if makers[0].__module__.startswith("torch.") else torch.optim.AdamW
    if not problems:
        problems += _made("optimizer", lambda: _call(judge, params))
    yield from problems


def _call(maker: Callable[..., Any], params: Mapping[str, Any], *first: Any) -> Any:
    """``maker`` of a dummy parameter with those of ``params`` that it takes."""
    names = list(inspect.signature(maker).parameters)[1:]
    start = first or ([torch.nn.Parameter(torch.zeros(1))],)
    return maker(*start, **{key: value for key, value in params.items() if key in names})


def _scheduler(ds_config: Mapping[str, Any]) -> Iterator[str]:
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
        _unknown(f"scheduler.params.{key}", value, accepted) for key, value in params.items() if key not in accepted
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


def _arguments(path: str, makers: Iterable[Callable[..., Any]], params: Mapping[str, Any]) -> list[str]:
    """Arguments whose type is not that of the default, and numbers below 0."""
    problems = []
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
        below = any(isinstance(default, (int, float)) and default < 0 for default in defaults)
        if isinstance(value, (dict, list)) and kinds <= SCALARS:
            problems += _of_kind(f"{path}.{key}", value, kinds, below)
            continue
        for item_path, item in _leaves({key: value}, f"{path}."):
            if isinstance(item, bool) and kinds == {object} and key not in ADAM_SWITCHES and key in NUMBERS:
                problems.append(f"'{item_path}' is {item!r}; give a number")
            else:
                problems += _of_kind(item_path, item, kinds, below)
    return problems
