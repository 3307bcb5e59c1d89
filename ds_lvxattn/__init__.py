"""Sequence-parallel cross-attention for video-language models: LV-XAttn beside Ulysses and Ring Attention."""

from ds_lvxattn.attention import sp_attention
from ds_lvxattn.interval import KVInterval
from ds_lvxattn.merge import merge_attention
from ds_lvxattn.shards import SequenceShards, ShardLayout

__all__ = ["KVInterval", "SequenceShards", "ShardLayout", "merge_attention", "sp_attention"]
