"""Exact attention over the shards of a group: what a rank holds, what travels, how partial results are merged."""
