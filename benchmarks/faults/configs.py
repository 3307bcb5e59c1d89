"""Mistakes in a DeepSpeed config, drawn at random, and a judge of what is made of them."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_lvxattn.errors import ConfigError
from ds_lvxattn.training.ds_config import ACCUMULATION, AUTO, AUTO_STEPS, MICRO_BATCH, MODEL_SIZES
from ds_lvxattn.training.run_settings import read_settings

RANKS = 2
CONFIGS = Path(__file__).parents[2] / "ds_configs"
Path_ = tuple[str, ...]

# Where "auto" has a meaning, by the last part of the key.
AUTO_KEYS = {
    MICRO_BATCH, ACCUMULATION, "train_batch_size", "gradient_clipping", "lr", "betas", "eps", "weight_decay",
    "warmup_min_lr", "warmup_max_lr", "strategy", "schedule", "kernel", *AUTO_STEPS, *MODEL_SIZES,
}  # fmt: skip
# Texts that may be any text: other values of them are no mistake that a check could see.
FREE = {"trainable", "eval_data", "media_root", "layers", "target_modules", "push_to_hub", "wandb", "tensorboard"}
# Kinds of which some values are right.
PERHAPS = {"huge number", "zero", "empty"}
# Keys that no config which comes along has.
FURTHER: dict[str, Any] = {
    "gradient_accumulation_steps": 1, "zero_allow_untested_optimizer": True, "wall_clock_breakdown": False,
    "activation_checkpointing": {"partition_activations": False}, "data_types": {"grad_accum_dtype": "fp32"},
    "tensorboard": {"enabled": False, "output_path": "tb", "job_name": "run"},
    "wandb": {"enabled": False, "team": "team", "project": "project", "group": "group"},
    "flops_profiler": {"enabled": False, "profile_step": 2}, "comms_logger": {"enabled": False, "verbose": False},
    "sequence_parallel": {
        "strategy": "lv_xattn", "layers": {"*.0.cross_attn": "ulysses"}, "schedule": "ring", "kernel": "math",
        "recompute": "layer", "placement": "striped",
    },
    "finetuning": {
        "steps": 10, "frames": 8, "image_tiles": 2, "frame_tiles": 1, "frame_padding": False, "max_text_tokens": 512,
        "on_bad_sample": "fail", "max_bad_share": 0.5, "fps": 1.0, "image_pixels": 100_000, "video_pixels": 100_000,
        "image_orientation": "upright", "look_ahead": 2, "decode_workers": 2, "media_root": "media",
        "eval_data": "eval.jsonl", "eval_share": 0.1, "eval_examples": 8, "eval_every": 5, "save_every": 5,
        "timeout_s": 600, "report_to": "none", "keep_last": 2, "keep_best": True, "patience": 3, "eval_new_tokens": 8,
        "lora": {"r": 8, "alpha": 16.0, "dropout": 0.1, "target_modules": ["q_proj", "v_proj"], "merge": True},
    },
}  # fmt: skip


@dataclass(frozen=True)
class Mistake:
    """A mistaken config.

    Attributes:
        kind: of the mistake.
        key: the key that it is about.
        text: the file.
        wrong: whether it must be refused; None: it may be either, but nothing else.
    """

    kind: str
    key: str
    text: str
    wrong: bool | None


def bases() -> list[dict[str, Any]]:
    """Configs without a mistake: those that come along, and one with keys that none of them has."""
    given = [json.loads(path.read_text()) for path in sorted(CONFIGS.glob("*.json"))]
    return [*given, *[{**given[0], **FURTHER}] * 4]


def leaves(block: dict[str, Any], path: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    """Every key of a config with its value; objects come before what is in them."""
    for key, value in block.items():
        yield (*path, key), value
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))


def put(config: dict[str, Any], path: Path_, value: Any) -> dict[str, Any]:
    """A copy with another value."""
    changed = copy.deepcopy(config)
    block = changed
    for key in path[:-1]:
        block = block[key]
    block[path[-1]] = value
    return changed


def renamed(config: dict[str, Any], path: Path_, name: str) -> dict[str, Any]:
    """A copy with another name of a key."""
    changed = copy.deepcopy(config)
    block = changed
    for key in path[:-1]:
        block = block[key]
    block[name] = block.pop(path[-1])
    return changed


def misspelt(draw: random.Random, name: str) -> str:
    """A slip of the fingers: a letter too few, too many, another, or two swapped."""
    if len(name) < 2:
        return name + "x"
    at = draw.randrange(len(name) - 1)
    wrong = draw.choice(
        [
            name[:at] + name[at + 1 :], name[:at] + name[at] + name[at:], name[:at] + "x" + name[at + 1 :],
            name[:at] + name[at + 1] + name[at] + name[at + 2 :],
        ]
    )  # fmt: skip
    return wrong if wrong != name else name + "s"


def _text_of(value: Any) -> str:
    return json.dumps(value).strip('"')


# Kind of a mistake: for which values it can be made, and what the value becomes.
VALUES: dict[str, tuple[Callable[[Any], bool], Callable[[random.Random, Any], Any]]] = {
    "negative number": (lambda v: type(v) in (int, float), lambda draw, v: -abs(v) - draw.choice([1, 0.5, 7])),
    "not a number": (lambda v: type(v) in (int, float), lambda draw, v: float("nan")),
    "infinite": (lambda v: type(v) in (int, float), lambda draw, v: float("inf")),
    "number as text": (lambda v: type(v) in (int, float), lambda draw, v: _text_of(v)),
    "true for a number": (lambda v: type(v) in (int, float), lambda draw, v: True),
    "list for a value": (lambda v: not isinstance(v, (dict, list)), lambda draw, v: [v]),
    "object for a value": (lambda v: not isinstance(v, dict), lambda draw, v: {"value": 1}),
    "truth as text": (lambda v: isinstance(v, bool), lambda draw, v: draw.choice(["false", "true", "False", "no"])),
    "truth as number": (lambda v: isinstance(v, bool), lambda draw, v: draw.choice([0, 1, 2])),
    "huge number": (lambda v: type(v) in (int, float), lambda draw, v: draw.choice([10**30, 1e300])),
    "zero": (lambda v: type(v) in (int, float), lambda draw, v: 0),
    "fraction of a number": (lambda v: type(v) is int, lambda draw, v: v + 0.5),
    "empty": (lambda v: not isinstance(v, bool | int | float), lambda draw, v: draw.choice(["", [], {}, " "])),
    "value for an object": (lambda v: isinstance(v, dict), lambda draw, v: draw.choice([1, True, "on", [1]])),
    "another text": (lambda v: isinstance(v, str), lambda draw, v: misspelt(draw, v)),
}  # fmt: skip


def mistake(draw: random.Random, config: dict[str, Any]) -> Mistake:
    """A mistake in a config that is right."""
    path, value = draw.choice(list(leaves(config)))
    key = ".".join(path)
    inside = any(part in FREE for part in path)
    kinds = [kind for kind, (fits, _) in VALUES.items() if fits(value)]
    kind = draw.choice(
        [*kinds, "misspelt key", "misspelt key", "stray key", "auto", "null", "key twice", "key gone", "torn file"]
    )
    if kind in VALUES:
        changed = VALUES[kind][1](draw, value)
        return Mistake(kind, key, json.dumps(put(config, path, changed)), None if inside or kind in PERHAPS else True)
    if kind == "misspelt key":
        wrong = misspelt(draw, path[-1])
        return Mistake(
            kind, ".".join((*path[:-1], wrong)), json.dumps(renamed(config, path, wrong)), not inside or None
        )
    if kind == "stray key":
        name = draw.choice(["batch", "num_gpus", "learning_rate", "stage", "enable", "comment", "max_steps"])
        where = (*path[:-1], name)
        if where in dict(leaves(config)):
            where = (*path[:-1], "comment")
        return Mistake(kind, ".".join(where), json.dumps(put(config, where, 1)), None if inside else True)
    if kind == "auto":
        wrong_here = None if path[-1] in AUTO_KEYS or inside else True
        return Mistake(kind, key, json.dumps(put(config, path, AUTO)), wrong_here)
    if kind == "null":
        return Mistake(kind, key, json.dumps(put(config, path, None)), None)
    if kind == "key gone":
        gone = put(config, path, None)
        block = gone
        for part in path[:-1]:
            block = block[part]
        del block[path[-1]]
        return Mistake(kind, key, json.dumps(gone), None)
    if kind == "key twice":
        text = json.dumps(config)
        return Mistake(kind, path[0], f"{text[:-1]}, {json.dumps(path[0])}: {json.dumps(config[path[0]])}}}", True)
    text = json.dumps(config)
    return Mistake("torn file", "", text[: draw.randrange(len(text) - 1)], True)


def verdict(mistaken: Mistake, folder: Path) -> str:
    """What becomes of a mistaken config: ``refused``, ``accepted``, or what is wrong with that."""
    file = folder / "ds_config.json"
    file.write_text(mistaken.text)
    try:
        read_settings(file, None, 0, RANKS)
    except ConfigError as error:
        named = mistaken.key.split(".")[-1] or "not valid JSON"
        if mistaken.kind in ("null", "key gone"):
            return "refused"  # the message may name what goes with it
        if mistaken.kind in PERHAPS:
            named = mistaken.key.split(".")[0]  # what contradicts it may be another key of its block
        return "refused" if re.search(re.escape(named), str(error)) else f"unclear: {mistaken.key}: {error}"
    except Exception as error:  # that is what is looked for
        return f"traceback: {mistaken.kind}: {mistaken.key}: {type(error).__name__}: {error}"
    return f"silent: {mistaken.kind}: {mistaken.key}" if mistaken.wrong else "accepted"
