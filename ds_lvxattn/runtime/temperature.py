"""Scores whose temperature follows from the place of a row, where a module counts its rows itself (Llama 4).

Llama 4's layers without rotary positions multiply a query by a factor of its place in the text, which they count from
the first row that they are given: on a rank that of its own part. Beside a batch they leave the factor out, and
``exchanged_attention`` multiplies by that of the batch's positions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def set_temperature_apart(modules: Iterable[nn.Module]) -> None:
    """Let those of ``modules`` that count their rows leave the factor out wherever ``sequence_parallel`` is given."""
    for module in modules:
        if _counts_rows(module):
            module.register_forward_pre_hook(_switch, with_kwargs=True)


def with_temperature(module: Any, query: Tensor, position_ids: Tensor | None) -> Tensor:
    """``query [B, H, s, D]`` of such a module times the factor of its ``position_ids [B, s]``; of others as it is.

    Raises:
        ValueError: there are no positions.
    """
    if not _counts_rows(module):
        return query
    if position_ids is None:
        raise ValueError(f"{type(module).__name__} has temperatures by position, and the batch has no position_ids")
    steps = torch.floor((position_ids.float() + 1.0) / module.floor_scale)
    factor = torch.log1p(steps) * module.attn_scale + 1.0
    return (query * factor[:, None, :, None]).to(query.dtype)


def _counts_rows(module: Any) -> bool:
    """Whether a module is one of those; what its config says, as its own attribute is switched."""
    tuned = getattr(getattr(module, "config", None), "attn_temperature_tuning", False)
    return bool(tuned) and hasattr(module, "floor_scale") and not getattr(module, "use_rope", True)


def _switch(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    alone = kwargs.get("sequence_parallel") is None
    if module.attn_temperature_tuning != alone:
        module.attn_temperature_tuning = alone
