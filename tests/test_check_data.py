"""The command that checks data: what is bad and why, what is shown and sampled, and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ds_lvxattn.training.check_data import main
from tests.support.conversations import write_video
from tests.support.training import write_model


def row(**media: object) -> dict[str, object]:
    return {**media, "conversations": [{"from": "human", "value": "what ?"}, {"from": "gpt", "value": "red"}]}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Rows about a video of 4 s at 5 frames a second, an image, text, and three that are bad."""
    write_video(tmp_path / "a.mp4", 20)
    Image.new("RGB", (8, 6), (255, 0, 0)).save(tmp_path / "red.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "red.png").read_bytes()[:40])
    path = tmp_path / "rows.jsonl"
    rows = [
        row(video="a.mp4", nframes=4),
        row(image="red.png", colour="red"),
        row(image="half.png"),
        row(),
        {"messages": []},
    ]
    path.write_text("\n".join([*map(json.dumps, rows), "not json"]))
    return path


def test_json_names_rows_media_and_reasons(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(data), "--json", "--frames", "4", "--save", str(data.parent / "seen")]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["good"]) == (6, 3)
    assert [bad["row"] for bad in found["bad"]] == [2, 4, 5]
    assert "half.png" in found["bad"][0]["reason"] and "not JSON" in found["bad"][2]["reason"]
    video, image = found["media"]
    assert video == {
        "row": 0, "path": str(data.parent / "a.mp4"), "frames": 20, "width": 32, "height": 32,
        "sampled_s": [0.5, 1.5, 2.5, 3.5],
    }  # fmt: skip
    assert (image["row"], image["frames"], image["width"], image["height"], image["sampled_s"]) == (1, 1, 8, 6, [])
    saved = sorted(path.name for path in (data.parent / "seen").iterdir())
    assert saved == ["0-0-0.png", "0-0-1.png", "0-0-2.png", "0-0-3.png", "1-0-0.png"]
    assert np.asarray(Image.open(data.parent / "seen" / "0-0-1.png")).mean() == pytest.approx(8 * 7, abs=2)


def test_the_report_counts_tokens_by_a_model(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_model(data.parent / "model")
    assert main([str(data), "--model", str(model), "--limit", "2"]) == 0
    said = capsys.readouterr().out
    assert "2 rows, 2 good, 0 bad" in said and "1 videos, 1 images" in said and "tokens a row: " in said
    assert "key 'colour' is not read (first in row 1)" in said


def test_rows_that_a_run_would_skip_are_bad(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row(), {"prompt": "what ?", "completion": "<|image|> red"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main([str(tmp_path / "rows.jsonl"), "--model", str(write_model(tmp_path / "model"))]) == 1
    assert "row 1: 1 image tokens for 0 frames; the text holds '<|image|>' outside" in capsys.readouterr().out


def test_what_cannot_be_read_ends_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere.jsonl")]) == 2
    assert "nowhere.jsonl: no such file" in capsys.readouterr().err
    (tmp_path / "rows.jsonl").write_text(json.dumps(row()))
    assert main([str(tmp_path / "rows.jsonl"), "--model", str(tmp_path)]) == 2
