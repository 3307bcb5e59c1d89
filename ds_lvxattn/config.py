"""The ``sequence_parallel`` block of a DeepSpeed config, read and checked before ``deepspeed.initialize``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from pydantic import AfterValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from ds_lvxattn.errors import ConfigError
from ds_lvxattn.kernels.dispatch import INTERVAL_KERNELS
from ds_lvxattn.plan.modes import schedules, strategies

SIZE_KEY = "sequence_parallel_size"
BLOCK_KEY = "sequence_parallel"
CHECKPOINTING_KEY = "activation_checkpointing"
# Keys of that block which choose what DeepSpeed's own checkpointing does, and their values that change nothing.
INACTIVE = {
    "partition_activations": (False,),
    "contiguous_memory_optimization": (False,),
    "number_checkpoints": (None,),
    "synchronize_checkpoint_boundary": (False,),
    "profile": (False,),
}
BESIDE = {"size": f"set '{SIZE_KEY}' beside the block", "offload": f"set '{CHECKPOINTING_KEY}.cpu_checkpointing'"}


def _one_of(names: Callable[[], Sequence[str]]) -> AfterValidator:
    """Accept one of the names that are registered when the config is read."""

    def check(value: Any) -> Any:
        accepted = names()
        if value in accepted:
            return value
        *most, last = map(repr, accepted)
        # As pydantic says it of a Literal.
        raise PydanticCustomError("literal_error", "choose {expected}", {"expected": f"{', '.join(most)} or {last}"})

    return AfterValidator(check)


StrategyName = Annotated[Any, _one_of(strategies)]
StrategyChoice = Annotated[Any, _one_of(lambda: ("auto", *strategies()))]
ScheduleChoice = Annotated[Any, _one_of(lambda: ("auto", *schedules()))]
KernelChoice = Annotated[Any, _one_of(lambda: ("auto", *INTERVAL_KERNELS))]


def _count_of_tiles(value: Any) -> Any:
    if value in ("auto", None) or (type(value) is int and value >= 1):
        return value
    raise PydanticCustomError("literal_error", "choose {expected}", {"expected": "'auto', null or a number >= 1"})


TileCount = Annotated[Any, AfterValidator(_count_of_tiles)]


class SequenceParallelConfig(DeepSpeedConfigModel):
    """Keys of the ``sequence_parallel`` block.

    Attributes:
        strategy: how attention crosses ranks; ``auto`` chooses per layer by predicted time.
        layers: module-name patterns (``fnmatch``) to a strategy, over ``strategy``; the first match counts.
        schedule: schedule of query exchange.
        kernel: local attention kernel, of those that take intervals: every layer of a run has them.
        recompute: what the backward pass computes again instead of storing: ``none``; ``kv``, the projections and
            norms of K and V in cross-attention layers; ``layer``, every text layer but its attention operator.
            ``layer`` where the DeepSpeed config has a block ``activation_checkpointing`` and the key is left out.
        placement: how frames lie on the ranks.
        inner_size: consecutive ranks of a group that share a node, for ``hybrid`` and what else tells nodes apart; None
            goes by the hosts of the ranks.
        text: whether text is ``divided`` over the ranks or, ``replicated``, on every rank, where only the frames are
            divided: then self-attention exchanges nothing, and cross-attention merges partial results.
        compile: ``torch.compile`` for each layer of the language model and the vision encoder, around its attention.
        keep_frozen: whether ZeRO-3 leaves parameters that do not train gathered for the whole run, and gathers those
            that train once a step; ``auto``: where the memory plan says that all of them fit.
        tiled_mlp, tiled_logits: parts of the rows that the feed-forward part of a text layer, or the output layer and
            the loss, takes one after the other, and again in the backward pass; ``auto``: by sizes; None: all at once.
        size: ranks of a sequence-parallel group, from ``sequence_parallel_size`` beside the block.
        offload: keep on the CPU what layers that recompute keep, from ``activation_checkpointing.cpu_checkpointing``.
    """

    model_config = ConfigDict(strict=True)

    strategy: StrategyChoice = "auto"
    layers: dict[str, StrategyName] = Field(default_factory=dict)
    schedule: ScheduleChoice = "auto"
    kernel: KernelChoice = "auto"
    recompute: Literal["none", "kv", "layer"] = "kv"
    placement: Literal["contiguous", "striped"] = "contiguous"
    inner_size: int | None = Field(None, ge=1, strict=True)
    text: Literal["auto", "divided", "replicated"] = "auto"
    compile: bool = False
    keep_frozen: bool | Literal["auto"] = "auto"
    tiled_mlp: TileCount = None
    tiled_logits: TileCount = None
    size: int = Field(1, ge=1)
    offload: bool = False

    def __init__(self, **data: Any) -> None:
        # DeepSpeed's models drop the value "auto" unless told not to; here it is a value like others.
        super().__init__(strict=True, **data)


def load_ds_config(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A DeepSpeed config file, JSON or YAML by its name, as a dict.

    Args:
        overrides: settings that replace those of the file, as ``key=value`` with dots between the keys.

    Raises:
        ConfigError: the file is missing, is not one object, or names a key twice; an override that cannot be set.
    """
    kind = "YAML" if Path(path).suffix.lower() in (".yaml", ".yml") else "JSON"
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        config = _read_yaml(text) if kind == "YAML" else json.loads(text, object_pairs_hook=_unique)
    except OSError as error:
        raise ConfigError(f"--ds_config {path}: cannot be read ({error.strerror})") from error
    except ConfigError as error:
        raise ConfigError(f"--ds_config {path}: {error}") from None
    except (ValueError, RecursionError) as error:  # also bytes that are no UTF-8, and a NUL in the path
        raise ConfigError(f"--ds_config {path}: not valid {kind} ({error})") from error
    if not isinstance(config, dict):
        raise ConfigError(f"--ds_config {path}: holds a {type(config).__name__}, not an object")
    for override in overrides:
        _override(config, override)
    return config


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ConfigError(
                f"'{key}' stands twice in one object, with {found[key]!r} and {value!r}; leave one of them"
            )
        found[key] = value
    return found


def _read_yaml(text: str) -> Any:
    """YAML as JSON would have it: no key twice, and ``1e-5`` is a number, which YAML 1.1 takes for a text."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            _unique((key.value, value.value) for key, value in node.value)  # before what "<<" merges comes to it
            return super().construct_mapping(node, deep)

    number = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, [*"-+0123456789"])
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(error) from error


def _override(config: dict[str, Any], override: str) -> None:
    """Set what ``key.key=value`` says; the value as in JSON, or else a text."""
    path, equals, text = override.partition("=")
    *outer, last = path.split(".")
    if not equals or not all((*outer, last)):
        raise ConfigError(f"{override!r} is not a setting; give key=value, such as sequence_parallel.strategy=ring")
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    block = config
    for key in outer:
        block = block.setdefault(key, {})
        if not isinstance(block, dict):
            raise ConfigError(f"{override!r}: '{key}' is {block!r} in the config, which has no keys inside")
    block[last] = value


def sequence_parallel_config(ds_config: dict[str, Any], world_size: int) -> SequenceParallelConfig:
    """The checked sequence-parallel settings of a DeepSpeed config.

    A config without the block, or with size 1, trains as plain DeepSpeed.

    Args:
        ds_config: the whole DeepSpeed config.
        world_size: ranks of the run.

    Raises:
        ConfigError: an unknown key or value, or a size that does not divide the world size.
    """
    block = ds_config.get(BLOCK_KEY, {})
    size = ds_config.get(SIZE_KEY, 1)
    if not isinstance(block, dict):
        raise ConfigError(f"'{BLOCK_KEY}' is {block!r}; give an object with the keys {_accepted_keys()}")
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ConfigError(f"'{SIZE_KEY}' is {size!r}; give a whole number of at least 1")
    for key, instead in BESIDE.items():
        if key in block:
            raise ConfigError(f"'{BLOCK_KEY}.{key}' is not a key; {instead}")
    if world_size % size:
        raise ConfigError(
            f"'{SIZE_KEY}' is {size}, which does not divide the {world_size} ranks of this run; "
            f"choose one of {[n for n in range(1, world_size + 1) if world_size % n == 0]}"
        )
    beside: dict[str, Any] = {"size": size}
    if CHECKPOINTING_KEY in ds_config:
        beside["offload"] = _checkpoints_on_cpu(ds_config[CHECKPOINTING_KEY])
        block = {"recompute": "layer", **block}
    try:
        config = SequenceParallelConfig(**beside, **block)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(problem) for problem in error.errors())) from None
    if config.text == "replicated" and (config.strategy not in ("auto", "lv_xattn") or config.layers):
        raise ConfigError(
            f"'{BLOCK_KEY}.text' is 'replicated', where partial results of the queries are merged and nothing else "
            f"travels, and the strategy is {config.strategy!r} (layers {config.layers}): set 'text' to 'divided', or "
            "'strategy' to 'auto' without 'layers'"
        )
    if config.offload and config.recompute == "none":
        raise ConfigError(
            f"'{CHECKPOINTING_KEY}.cpu_checkpointing' is true and '{BLOCK_KEY}.recompute' is 'none': only what "
            "recomputation keeps goes to the CPU; set 'recompute' to 'kv' or 'layer'"
        )
    if config.inner_size is not None and size % config.inner_size:
        raise ConfigError(
            f"'{BLOCK_KEY}.inner_size' is {config.inner_size}, which does not divide '{SIZE_KEY}' {size}; choose one "
            f"of {[n for n in range(1, size + 1) if size % n == 0]}, or leave it out to go by the hosts of the ranks"
        )
    return config


def _accepted_keys() -> list[str]:
    return [name for name in SequenceParallelConfig.model_fields if name not in BESIDE]


def _checkpoints_on_cpu(block: Any) -> bool:
    """``cpu_checkpointing`` of DeepSpeed's block ``activation_checkpointing``.

    Raises:
        ConfigError: the block asks for what recomputation here does not do.
    """
    keys = ["cpu_checkpointing", *INACTIVE]
    if not isinstance(block, dict):
        raise ConfigError(f"'{CHECKPOINTING_KEY}' is {block!r}; give an object with the keys {keys}")
    for key, value in block.items():
        if key not in keys:
            raise ConfigError(f"'{CHECKPOINTING_KEY}.{key}' (value {value!r}) is not a key; the keys are {keys}")
        if key in INACTIVE and value not in INACTIVE[key]:
            raise ConfigError(
                f"'{CHECKPOINTING_KEY}.{key}' is {value!r}, which sequence parallelism does not do: it checkpoints by "
                f"'{BLOCK_KEY}.recompute', and activations are divided over the ranks already; leave the key out"
            )
    on_cpu = block.get("cpu_checkpointing", False)
    if not isinstance(on_cpu, bool):
        raise ConfigError(f"'{CHECKPOINTING_KEY}.cpu_checkpointing' is {on_cpu!r}; give true or false")
    return on_cpu


def _explain(problem: Any) -> str:
    key = ".".join([BLOCK_KEY, *map(str, problem["loc"])])
    if problem["type"] == "extra_forbidden":
        return f"'{key}' (value {problem['input']!r}) is not a key; the keys are {_accepted_keys()}"
    if problem["type"] == "literal_error":
        return f"'{key}' is {problem['input']!r}; choose {problem['ctx']['expected']}"
    return f"'{key}' is {problem['input']!r}: {problem['msg']}"
