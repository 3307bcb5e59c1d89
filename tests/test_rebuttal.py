"""The rebuttal's figures, recomputed from a profile of its cluster: every one within a quarter."""

from __future__ import annotations

import pytest

from benchmarks.rebuttal import ROWS, Row, recomputed
from ds_lvxattn.plan.profile import load_profile


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.frames} frames")
def test_seconds_and_speed_ups(row: Row) -> None:
    ours = recomputed(row, load_profile("a100-2x3"))
    for name in ("ring_attention", "ring_total", "lv_attention", "lv_total"):
        assert getattr(ours, name) == pytest.approx(getattr(row, name), rel=0.25), name
    for part in ("attention", "total"):
        speed_up = getattr(ours, f"ring_{part}") / getattr(ours, f"lv_{part}")
        assert speed_up == pytest.approx(getattr(row, f"ring_{part}") / getattr(row, f"lv_{part}"), rel=0.25), part
