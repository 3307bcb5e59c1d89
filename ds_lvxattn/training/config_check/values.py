"""Values that no key can have, and values of another type than their key has for DeepSpeed."""

from __future__ import annotations

import difflib
import functools
import math
import types
import typing
from collections.abc import Iterable, Iterator
from enum import Enum
from typing import Any

from deepspeed.runtime.config import DtypeEnum
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from deepspeed.utils.logging import log_levels

from ds_lvxattn.config import BLOCK_KEY
from ds_lvxattn.training import settings
from ds_lvxattn.training.config_check.block import WatchedBlock, leaves, nodes, value_at
from ds_lvxattn.training.config_check.places import elsewhere
from ds_lvxattn.training.ds_config import AUTO, MODEL_SIZES

# Keys that DeepSpeed or transformers give a meaning of its own to "auto", or that fill_model_sizes fills in.
AUTO_STAYS = {"data_types.keep_in_fp32_modules", *(f"zero_optimization.{key}" for key in MODEL_SIZES)}
# Blocks of free text: names of runs, folders and groups.
FREE_TEXT = ("tensorboard.", "wandb.", "csv_monitor.", "comet.", f"{BLOCK_KEY}.", f"{settings.BLOCK_KEY}.")
# Positive numbers though DeepSpeed says nothing of it: it divides by them.
POSITIVE = ("steps_per_print", "gradient_predivide_factor")
WHOLE = ("steps_per_print",)  # a number of steps, of which it asks only whether one divides it
CLOSE = 0.75  # likeness above which another key is suggested
SCALARS = {bool, int, float, str, type(None)}
WORDS = {"true": "true", "yes": "true", "on": "true", "false": "false", "no": "false", "off": "false"}


def impossible_values(block: WatchedBlock, path: str) -> Iterator[str]:
    """Values that no key can have."""
    for key, value in leaves(block, path):
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


def wrong_types(block: WatchedBlock) -> Iterator[str]:
    """Values whose type is not that of the key, though DeepSpeed would take them: 1 for true, true for 1."""
    for path, value in nodes(block):
        if path.startswith(("optimizer.", "scheduler.")):
            continue
        if value == AUTO and path in AUTO_STAYS:
            continue
        parent, _, key = path.rpartition(".")
        if parent and key in _field_kinds():
            kinds, below = _field_kinds()[key]
        else:
            kinds, below = default_kind(block, path), False
        yield from of_kind(path, value, kinds, below)
        if parent == "data_types" and key.endswith("_dtype"):
            yield from one_of(path, value, [name for kind in DtypeEnum for name in kind._all_values[1:]])
    if block.get("log_level") is not None:
        yield from one_of("log_level", block["log_level"], list(log_levels))


def default_kind(block: WatchedBlock, path: str) -> set[type]:
    """Type of the default that DeepSpeed's reader names for the key at ``path``; ``object`` where it names none."""
    parent, _, key = path.rpartition(".")
    owner = value_at(block, parent)
    default = owner.asked.get(key) if isinstance(owner, WatchedBlock) else None
    return {type(default)} if isinstance(default, (bool, int, float, str)) else {object}


@functools.cache
def _field_kinds() -> dict[str, tuple[set[type], bool]]:
    """Types of every field of DeepSpeed's models, and whether a default is negative."""
    kinds: dict[str, tuple[set[type], bool]] = {}
    for model in models():
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


def models() -> list[type[DeepSpeedConfigModel]]:
    found, todo = list[type[DeepSpeedConfigModel]](), [DeepSpeedConfigModel]
    while todo:
        below = todo.pop().__subclasses__()
        found += below
        todo += below
    return [model for model in found if model.__module__.startswith("deepspeed.")]


def field_names(model: type[DeepSpeedConfigModel]) -> set[str]:
    fields = model.model_fields
    return {*fields, *(field.alias for field in fields.values() if field.alias)}


def of_kind(path: str, value: Any, kinds: set[type], negative: bool) -> Iterator[str]:
    number = type(value) in (int, float)
    if path in POSITIVE and not number:
        yield f"'{path}' is {value!r}; give a number"
        return
    if path in WHOLE and isinstance(value, float) and value % 1:
        yield f"'{path}' is {value!r}; give a whole number"
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
        if isinstance(value, float) and value % 1 and kinds <= {int, type(None)}:  # sizes may be written as 5e8
            yield f"'{path}' is {value!r}; give a whole number"
            return
        if isinstance(value, str) and kinds <= {bool, int, float, type(None)}:
            yield f"'{path}' is {value!r}; give a {'number' if kinds & {int, float} else 'true or false'}"
            return
    if number and ((value < 0 and not negative) or (value <= 0 and path in POSITIVE)):
        yield f"'{path}' is {value!r}; give a number {'above 0' if path in POSITIVE else 'of at least 0'}"


def one_of(path: str, value: Any, accepted: list[str]) -> Iterator[str]:
    if value not in accepted:
        yield f"'{path}' is {value!r}; choose from {accepted}"


def unknown_key(path: str, value: Any, known: Iterable[str]) -> str:
    remedy = meant(path, known) or "leave it out"
    return f"'{path}' (value {value!r}) is not a key of the config and would be ignored; {remedy}"


def meant(path: str, known: Iterable[str]) -> str:
    """What to do about an unknown key beside the keys ``known``; empty where nothing is like it."""
    parent, _, key = path.rpartition(".")
    beside = {name.lower(): name for name in known}
    close = difflib.get_close_matches(key.lower(), list(beside), 1, CLOSE)
    if found := elsewhere(path):
        return found
    return f"did you mean '{f'{parent}.' if parent else ''}{beside[close[0]]}'?" if close else ""
