"""Parameters of which a quick run of the tests takes a few."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """One set of a test's parameters, left out by ``launch/test.sh --quick``."""
    return pytest.param(*values, marks=pytest.mark.slow)


def slow_but(every: Iterable[Any], *quick: Any) -> list[Any]:
    """``every`` value of a test's one parameter, marked slow unless it is among ``quick``."""
    every = list(every)
    assert set(quick) <= set(every), "a quick one that is not there"
    return [value if value in quick else slow(value) for value in every]
