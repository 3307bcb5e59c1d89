"""Every way for attention to cross the ranks: one file a mode, one line here. No torch.

A package of one's own adds its modes by ``register``, before a config that names them is read.
"""

from __future__ import annotations

from ds_lvxattn.plan.modes.gather import GATHER
from ds_lvxattn.plan.modes.hybrid import HYBRID_GATHER, HYBRID_KV_GATHER, HYBRID_KV_RING, HYBRID_RING, HYBRID_ROUTED
from ds_lvxattn.plan.modes.kv_ring import KV_RING
from ds_lvxattn.plan.modes.local import LOCAL
from ds_lvxattn.plan.modes.mode import Mode, ModeKey
from ds_lvxattn.plan.modes.query_ring import QUERY_RING
from ds_lvxattn.plan.modes.replicated import REPLICATED
from ds_lvxattn.plan.modes.routed import ROUTED
from ds_lvxattn.plan.modes.two_level import TWO_LEVEL
from ds_lvxattn.plan.modes.ulysses import ULYSSES

__all__ = [
    "LOCAL", "REPLICATED", "Mode", "ModeKey", "eligible_modes", "mode_named", "mode_of", "modes", "register",
    "schedules", "strategies", "unregister",
]  # fmt: skip

# Of each strategy, its first mode is what schedule ``auto`` of ``sp_attention`` takes.
_MODES: list[Mode] = [
    LOCAL,
    GATHER,
    QUERY_RING,
    ROUTED,
    TWO_LEVEL,
    REPLICATED,
    ULYSSES,
    KV_RING,
    HYBRID_GATHER,
    HYBRID_KV_GATHER,
    HYBRID_KV_RING,
    HYBRID_RING,
    HYBRID_ROUTED,
]


def register(mode: Mode) -> None:
    """Make ``mode`` known.

    Raises:
        ValueError: there is one of that strategy and schedule.
    """
    if mode.key in (known.key for known in _MODES):
        raise ValueError(f"mode '{mode.name}' is registered already")
    _MODES.append(mode)


def unregister(mode: Mode) -> None:
    """Forget a mode that ``register`` added."""
    _MODES.remove(mode)


def modes() -> tuple[Mode, ...]:
    """All of them."""
    return tuple(_MODES)


def eligible_modes() -> tuple[Mode, ...]:
    """Those that a config may name and the planner may choose."""
    return tuple(mode for mode in _MODES if mode.eligible)


def strategies() -> tuple[str, ...]:
    """Names of the strategies that a config may name."""
    return tuple(dict.fromkeys(mode.strategy for mode in eligible_modes()))


def schedules(strategy: str | None = None) -> tuple[str, ...]:
    """Schedules that a config may name, of one strategy or of all, besides ``auto``."""
    found = (mode.schedule for mode in eligible_modes() if strategy in (None, mode.strategy))
    return tuple(dict.fromkeys(schedule for schedule in found if schedule != "auto"))


def mode_of(key: ModeKey) -> Mode:
    """The mode with this strategy and schedule, as a plan has it."""
    return next(mode for mode in _MODES if mode.key == key)


def mode_named(strategy: str, schedule: str = "auto", queries: str = "sharded") -> Mode:
    """The mode of a strategy and schedule; for schedule ``auto`` the strategy's first.

    Raises:
        ValueError: there is none; the message names those that there are.
    """
    own = [mode for mode in _MODES if mode.strategy == strategy]
    if not own:
        raise ValueError(f"strategy is '{strategy}'; choose one of {sorted(strategies())}")
    if schedule not in ("auto", *(mode.schedule for mode in own if mode.queries == "sharded")):
        raise ValueError(f"schedule is '{schedule}'; strategy '{strategy}' has {('auto', *schedules(strategy))}")
    if queries == "replicated":
        own = [mode for mode in own if mode.queries == queries]
        if not own:
            raise ValueError(
                f"strategy '{strategy}' cannot run this attention: it shards the queries; use lv_xattn for replicated "
                "queries"
            )
        return own[0]
    return next(mode for mode in own if mode.queries == queries and schedule in ("auto", mode.schedule))
