"""The runs that are compared: which strategies, and the DeepSpeed config that each trains with."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from ds_lvxattn.config import BLOCK_KEY, SIZE_KEY, sequence_parallel_config
from ds_lvxattn.errors import ConfigError
from ds_lvxattn.plan.modes import strategies
from ds_lvxattn.training.compare.report import SINGLE


@dataclass(frozen=True)
class Variant:
    """What one run trains with. ``strategy`` may be ``single``; ``schedule`` None leaves the config's own."""

    strategy: str
    schedule: str | None = None

    @property
    def name(self) -> str:
        """Name of the run and of its folder."""
        return self.strategy if self.schedule is None else f"{self.strategy}-{self.schedule}"

    def ranks(self, num_gpus: int) -> int:
        return 1 if self.strategy == SINGLE else num_gpus


def parse_variants(text: str) -> list[Variant]:
    """The variants of a list such as ``lv_xattn:ring,ulysses,single``.

    Raises:
        ConfigError: an unknown strategy, one given twice, or a schedule for ``single``.
    """
    accepted = ["auto", *strategies(), SINGLE]
    variants = []
    for item in text.split(","):
        strategy, _, schedule = item.strip().partition(":")
        if strategy not in accepted:
            raise ConfigError(f"--strategies has {strategy!r}; choose from {accepted}")
        if strategy == SINGLE and schedule:
            raise ConfigError(f"--strategies has {item!r}; {SINGLE!r} exchanges nothing and has no schedule")
        variants.append(Variant(strategy, schedule or None))
    if len(set(variants)) < len(variants):
        raise ConfigError(f"--strategies {text} names a strategy twice; name each once")
    return variants


def derive_config(ds_config: dict[str, Any], variant: Variant, num_gpus: int) -> dict[str, Any]:
    """The DeepSpeed config of one run.

    A strategy holds for all layers, so ``layers`` stays only for ``auto``. ``single`` accumulates the
    micro-batches that the data-parallel groups run side by side: the same ones, so the same loss.

    Args:
        ds_config: the config to derive from, for ``num_gpus`` ranks.

    Raises:
        ConfigError: a sequence-parallel setting or a batch size that cannot work.
    """
    size = sequence_parallel_config(ds_config, num_gpus).size
    batch, micro_batch = _batch_sizes(ds_config, num_gpus // size)
    derived = copy.deepcopy(ds_config)
    if variant.strategy == SINGLE:
        size = 1
        derived.pop(SIZE_KEY, None)
        derived.pop(BLOCK_KEY, None)
    else:
        if size == 1:
            raise ConfigError(f"'{SIZE_KEY}' is 1, so there is no strategy to compare; set it to {num_gpus}")
        block = derived.setdefault(BLOCK_KEY, {})
        block["strategy"] = variant.strategy
        if variant.schedule is not None:
            block["schedule"] = variant.schedule
        if variant.strategy != "auto":
            block.pop("layers", None)
        sequence_parallel_config(derived, num_gpus)
    derived["train_batch_size"] = batch
    derived["train_micro_batch_size_per_gpu"] = micro_batch
    derived["gradient_accumulation_steps"] = batch // (micro_batch * (variant.ranks(num_gpus) // size))
    return derived


def _batch_sizes(ds_config: dict[str, Any], data_ranks: int) -> tuple[int, int]:
    """Global batch and micro-batch, which DeepSpeed infers from any that are given."""
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    batch, micro_batch, accumulation = (ds_config.get(key) for key in keys)
    if all(size is None or (type(size) is int and size > 0) for size in (batch, micro_batch, accumulation)):
        if micro_batch is None and batch is not None:
            micro_batch = batch // (data_ranks * (accumulation or 1))
        if batch is None and micro_batch is not None:
            batch = micro_batch * data_ranks * (accumulation or 1)
        if batch and micro_batch:
            steps, rest = divmod(batch, micro_batch * data_ranks)
            if not rest and accumulation in (None, steps):
                return batch, micro_batch
    given = ", ".join(f"'{key}' {ds_config.get(key)!r}" for key in keys)
    raise ConfigError(
        f"{given}: give whole numbers, the first the product of the other two and the {data_ranks} data-parallel ranks"
    )
