"""Sequence-parallel cross-attention for video-language models: LV-XAttn beside Ulysses and Ring Attention.

The public names are imported when they are first used, so that the planner (``python -m ds_lvxattn.plan``) starts
without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ds_lvxattn.data.sample import Sample, SampleError
    from ds_lvxattn.errors import ConfigError
    from ds_lvxattn.exchange.attention import sp_attention
    from ds_lvxattn.exchange.interval import KVInterval
    from ds_lvxattn.exchange.merge_attention import merge_attention
    from ds_lvxattn.exchange.shards import SequenceShards, ShardLayout
    from ds_lvxattn.families.family import FrameLimits
    from ds_lvxattn.runtime.adapters import AdapterKeys, shard_adapter
    from ds_lvxattn.training.attach import Attached, attach

_HOMES = {
    "AdapterKeys": "runtime.adapters",
    "Attached": "training.attach",
    "ConfigError": "errors",
    "FrameLimits": "families.family",
    "KVInterval": "exchange.interval",
    "Sample": "data.sample",
    "SampleError": "data.sample",
    "SequenceShards": "exchange.shards",
    "ShardLayout": "exchange.shards",
    "attach": "training.attach",
    "merge_attention": "exchange.merge_attention",
    "shard_adapter": "runtime.adapters",
    "sp_attention": "exchange.attention",
}

__all__ = [
    "AdapterKeys",
    "Attached",
    "ConfigError",
    "FrameLimits",
    "KVInterval",
    "Sample",
    "SampleError",
    "SequenceShards",
    "ShardLayout",
    "attach",
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
