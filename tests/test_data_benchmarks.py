"""The benchmarks of decoding and of the wait for data: the film they make, what they count, how a run is followed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from ds_lvxattn.data.media import decode_frames, probe_video

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # as where their scripts are started
import data_wait
import decoding

RUN = """
import json, sys, time
print("12:00:00  loading the model", flush=True)
with open(sys.argv[1], "w") as metrics:
    for step in range(1, 8):
        metrics.write(json.dumps({"step": step, "step_time_s": 2.0, "data_wait_s": 0.5 * (step > 3)}) + "\\n")
        metrics.flush()
    metrics.write('{"step": 8, ')
    metrics.flush()
    time.sleep(1000 if sys.argv[2] == "goes on" else 0)
"""


@pytest.mark.parametrize(("how", "steps", "seconds"), [("goes on", 7, 1e6), ("goes on", 9, 0.0), ("ends", 9, 1e6)])
def test_a_run_is_followed_to_its_last_step_its_end_or_the_limit(
    how: str, steps: int, seconds: float, tmp_path: Path
) -> None:
    metrics = tmp_path / "metrics.jsonl"
    run = data_wait.Run([sys.executable, "-c", RUN, str(metrics), how], metrics)
    noted: list[int] = []
    run.follow(steps, seconds, lambda run: noted.append(len(run.steps)))
    run.end()
    assert run.process.returncode == (0 if how == "ends" else -15)
    if seconds:
        assert [step["step"] for step in run.steps] == [*range(1, 8)] and noted[-1] == 7
        figures = data_wait.figures_of(run.steps)
        assert figures == {"steps": 4, "step_s": 2.0, "longest_wait_s": 0.5, "data_wait": 0.25}
        assert [phase["phase"] for phase in run.phases] == ["loading the model"]
        json.dumps(run.phases)
    assert data_wait.figures_of(run.steps[:3]) == {}


def test_a_film_is_made_of_two_groups_of_pictures_and_each_piece_of_work_counts_its_frames(tmp_path: Path) -> None:
    film = tmp_path / "film.mp4"
    decoding.make_film(film, 11, 3)
    assert probe_video(film).num_frames == 11
    first, second, again = decode_frames(film, [0, 1, 6])
    np.testing.assert_array_equal(first, again)
    assert (first != second).any()
    samples = [[0, 1, 4], [5, 7]]
    works = decoding.of_groups(str(film), samples)
    assert [frames for frames, _ in works] == [2, 1, 1, 1]
    assert [len(work()) for _, work in works] == [2, 1, 1, 1]
    figures = decoding.in_threads(works, 2, 0.1)
    assert figures.rate > 0 and figures.cpu_ms > 0
    # Frames a second of each thread, its seconds of CPU, and its frames; of two seconds.
    assert decoding.Figures.of([(10.0, 1.0, 20), (5.0, 2.0, 10)], 2.0) == decoding.Figures(15.0, 0.75, 100.0)
