"""The rebuttal's figures, recomputed from a profile of its cluster: every one within a quarter."""

from __future__ import annotations

import json

import pytest

from benchmarks.rebuttal import GPUS, ROWS, Row, recomputed
from ds_lvxattn.plan.__main__ import main
from ds_lvxattn.plan.profile import load_profile


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.frames} frames")
def test_seconds_and_speed_ups(row: Row) -> None:
    ours = recomputed(row, load_profile("a100-2x3"))
    for name in ("ring_attention", "ring_total", "lv_attention", "lv_total"):
        assert getattr(ours, name) == pytest.approx(getattr(row, name), rel=0.25), name
    for part in ("attention", "total"):
        speed_up = getattr(ours, f"ring_{part}") / getattr(ours, f"lv_{part}")
        assert speed_up == pytest.approx(getattr(row, f"ring_{part}") / getattr(row, f"lv_{part}"), rel=0.25), part


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.frames} frames")
def test_the_command_knows_its_rows_by_name(row: Row, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "Llama-3.2-11B-Vision", "--tiles", "4", "--cluster", "a100-2x3", "--json"]
    sizes = {"--frames": row.frames, "--text": row.text, "--gpus": GPUS}
    assert main([*arguments, *(f"{key}={value}" for key, value in sizes.items())]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["visual_tokens"] == row.frames * 4 * 1601
    # The encoder takes four tiles of a frame, however many are used, and attention grows with their tokens.
    lv, ring = (found["strategies"][name]["layer_ms"]["total"] for name in ("lv_xattn", "ring"))
    assert lv < ring
