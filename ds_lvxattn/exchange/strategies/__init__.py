"""The sequence-parallel strategies, one file (or, with several schedules, one folder) each."""

from __future__ import annotations

from ds_lvxattn.exchange.base import Exchange, Strategy
from ds_lvxattn.exchange.strategies.kv_ring import RingAttention
from ds_lvxattn.exchange.strategies.lv_xattn import LVXAttn
from ds_lvxattn.exchange.strategies.ulysses import Ulysses

STRATEGIES: dict[str, Strategy] = {s.name: s for s in (LVXAttn(), Ulysses(), RingAttention())}

__all__ = ["STRATEGIES", "Exchange", "Strategy", "strategy_named"]


def strategy_named(name: str) -> Strategy:
    """The strategy called ``name``.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in STRATEGIES:
        raise ValueError(f"strategy is '{name}'; choose one of {sorted(STRATEGIES)}")
    return STRATEGIES[name]
