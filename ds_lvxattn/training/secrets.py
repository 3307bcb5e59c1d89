"""Secrets that a config may hold, which go no further than where they are used."""

from __future__ import annotations

import re
from typing import Any

SECRET = re.compile(r"(^|_)(key|api_?key|token|secret|passw(or)?d|credentials?)$", re.IGNORECASE)
IN_ADDRESS = re.compile(r"(?<=://)[^/@\s]+@")
HIDDEN = "(left out)"


def without_secrets(value: Any, key: str = "") -> Any:
    """A copy of a config without keys, tokens and passwords, for what others may read: logs, trackers, checkpoints.

    By name (``api_key``, ``token``), and in addresses (``https://user:password@host``).
    """
    if isinstance(value, dict):
        return {name: without_secrets(inner, str(name)) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_secrets(inner, key) for inner in value]
    if isinstance(value, str):
        return HIDDEN if value and SECRET.search(key) else IN_ADDRESS.sub(f"{HIDDEN}@", value)
    return value
