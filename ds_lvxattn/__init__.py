"""Sequence-parallel cross-attention for video-language models: LV-XAttn beside Ulysses and Ring Attention.

The public names are imported when they are first used, so that the planner (``python -m ds_lvxattn.plan``) starts
without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ds_lvxattn.attention import sp_attention
    from ds_lvxattn.interval import KVInterval
    from ds_lvxattn.merge import merge_attention
    from ds_lvxattn.models.adapters import AdapterKeys, shard_adapter
    from ds_lvxattn.shards import SequenceShards, ShardLayout

_HOMES = {
    "AdapterKeys": "models.adapters",
    "KVInterval": "interval",
    "SequenceShards": "shards",
    "ShardLayout": "shards",
    "merge_attention": "merge",
    "shard_adapter": "models.adapters",
    "sp_attention": "attention",
}

__all__ = [
    "AdapterKeys",
    "KVInterval",
    "SequenceShards",
    "ShardLayout",
    "merge_attention",
    "shard_adapter",
    "sp_attention",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
