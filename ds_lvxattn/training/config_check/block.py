"""A block of a config that notes what is asked of it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any


class WatchedBlock(dict[str, Any]):
    """An object of the config that notes which keys are asked for, and with which default."""

    def __init__(self, values: Mapping[str, Any], path: str = "", trail: list[str] | None = None) -> None:
        self.path, self.asked = path, dict[str, Any]()
        self.trail = [] if trail is None else trail  # paths in the order in which they were asked for
        super().__init__(
            {k: WatchedBlock(v, f"{path}{k}.", self.trail) if isinstance(v, dict) else v for k, v in values.items()}
        )

    def _note(self, key: str, default: Any = inspect.Parameter.empty) -> None:
        self.asked.setdefault(key, default)
        if dict.__contains__(self, key):
            self.trail.append(self.path + key)

    def get(self, key: str, default: Any = None) -> Any:
        self._note(key, default)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self._note(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self._note(str(key))
        return super().__contains__(key)

    # Overridden, so that unpacking (**block) goes through __getitem__.
    def __iter__(self) -> Iterator[str]:
        return super().__iter__()

    def keys(self) -> Any:
        return _Keys(self)

    def items(self) -> Any:
        return [(key, self[key]) for key in self]

    def __copy__(self) -> WatchedBlock:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> WatchedBlock:
        return self


class _Keys:
    """Keys of a block: a question whether one is there is a question for it."""

    def __init__(self, block: WatchedBlock) -> None:
        self.block = block

    def __contains__(self, key: object) -> bool:
        return key in self.block

    def __iter__(self) -> Iterator[str]:
        return iter(self.block)


def leaves(block: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key in block:
        value = dict.__getitem__(block, key) if isinstance(block, dict) else block[key]
        if isinstance(value, dict):
            yield from leaves(value, f"{path}{key}.")
        elif isinstance(value, list):
            yield from leaves({f"{key}[{i}]": item for i, item in enumerate(value)}, path)
        else:
            yield path + key, value


def nodes(block: WatchedBlock) -> Iterator[tuple[str, Any]]:
    """Every key with its value; what is in an object comes after it."""
    for key in block:
        value = dict.__getitem__(block, key)
        yield block.path + key, value
        if isinstance(value, WatchedBlock):
            yield from nodes(value)


def value_at(block: Mapping[str, Any], path: str) -> Any:
    value: Any = block
    for key in filter(None, path.split(".")):
        value = dict.get(value, key) if isinstance(value, dict) else None
    return value
