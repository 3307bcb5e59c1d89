"""What a video or an image shows, by files that are made here, and which of its frames are taken."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from ds_lvxattn.data.media import decode_frames, probe_video, sample_frames, sample_indices, sample_times


def write_film(
    path: Path,
    levels: list[int],
    *,
    codec: str = "libx264",
    rate: int = 10,
    times: list[int] | None = None,
    **options: str,
) -> Path:
    """Grey frames of 64 x 48; ``times`` in thousandths of a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for number, level in enumerate(levels):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), level, dtype=np.uint8), format="rgb24")
            frame.pts = times[number] if times else number * 1000 // rate
            frame.time_base = Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def levels_of(path: Path, numbers: list[int]) -> list[int]:
    return [round(float(frame.mean())) for frame in decode_frames(path, numbers)]


# Sampling by time


@pytest.mark.parametrize("budget", [1, 3, 8, 19, 20, 64])
def test_frames_of_a_constant_rate_are_the_midpoints_of_equal_parts(tmp_path: Path, budget: int) -> None:
    info = probe_video(write_film(tmp_path / "film.mp4", [10 * i for i in range(20)]))
    assert (info.num_frames, info.seconds, info.fps) == (20, 2.0, 10.0)
    assert sample_frames(info, budget) == sample_indices(20, budget)


def test_frames_of_a_variable_rate_are_at_equal_parts_of_the_length(tmp_path: Path) -> None:
    times = [*range(0, 2000, 10), *range(2000, 100_001, 2000)]  # 200 frames in two seconds, then one every two
    film = write_film(tmp_path / "screen.mp4", [time // 400 for time in times], times=times)
    info = probe_video(film)
    assert info.num_frames == len(times)
    assert [round(float(time)) for time in sample_times(info, 10)] == pytest.approx([*range(5, 100, 10)], abs=1)
    assert levels_of(film, sample_frames(info, 10)) == pytest.approx(
        [10, 35, 60, 85, 110, 135, 160, 185, 210, 235], abs=3
    )


def test_frames_a_second_and_ranges(tmp_path: Path) -> None:
    info = probe_video(write_film(tmp_path / "film.mp4", [10 * i for i in range(20)]))
    assert sample_frames(info, 64, fps=2) == [2, 7, 12, 17]
    assert sample_frames(info, 2, fps=5) == [5, 15]
    assert sample_frames(info, 64, start=0.5, end=1.0) == [5, 6, 7, 8, 9]
    assert sample_frames(info, 1, start=1.0) == [15]
    assert sample_frames(info, 64, start=1.95) == [19]
    with pytest.raises(ValueError, match=r"starts at 2.5 s, but the video is 2.000 s long"):
        sample_frames(info, 8, start=2.5)
    with pytest.raises(ValueError, match="is empty"):
        sample_frames(info, 8, start=1, end=1)
    with pytest.raises(ValueError, match="'start' is -1"):
        sample_frames(info, 8, start=-1)
