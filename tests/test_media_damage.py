"""Damage of films and pictures is told, and found nowhere else."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from ds_lvxattn.data.media import (
    Media,
    MediaError,
    decode_frames,
    probe_video,
)
from ds_lvxattn.data.media.files import open_film
from ds_lvxattn.data.media.picture import as_shown
from tests.support.films import encoded, remux, write_film


def test_half_a_picture_is_none(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for kind in ("JPEG", "PNG", "WEBP"):
        data = encoded(Image.fromarray(noise), kind)
        (tmp_path / "half").write_bytes(data[: len(data) // 2])
        for source in (str(tmp_path / "half"), data[: len(data) // 2]):
            with pytest.raises(MediaError, match="(half|embedded image).*(cannot be decoded|damaged)"):
                Media("image", (source,), (0,)).decode([0])
    data = encoded(Image.fromarray(noise), "JPEG")
    with pytest.raises(MediaError, match="an image is damaged"):  # the end is there, what is ahead of it is not
        Media("image", (data[: len(data) // 2] + data[-2:],), (0,)).decode([0])


def test_damage_is_told_and_not_concealed(tmp_path: Path) -> None:
    """A flipped byte in a key frame spoils its group, and no other."""
    rng = np.random.default_rng(0)
    film = tmp_path / "film.mp4"
    with av.open(str(film), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"g": "10", "sc_threshold": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(20):
            frame = av.VideoFrame.from_ndarray(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with av.open(str(film)) as container:
        key = next(p for p in container.demux(video=0) if p.is_keyframe and p.pts)
        assert key.pos is not None
        place = key.pos + key.size // 2
    data = bytearray(film.read_bytes())
    data[place] ^= 0xFF
    film.write_bytes(data)
    assert len(decode_frames(film, range(10))) == 10
    for number in (10, 15, 19):
        with pytest.raises(MediaError, match=r"film.mp4: damaged near 1\.\d\d s"):
            decode_frames(film, [number])


@pytest.mark.parametrize(
    ("bframes", "damaged", "refused_from"), [(0, 24, 24), (2, 19, 19)], ids=["in order", "ahead of frames before it"]
)
def test_recovery_points_are_no_damage_and_damage_is(
    tmp_path: Path, bframes: int, damaged: int, refused_from: int
) -> None:
    """With periodic intra refresh, pictures are whole some frames behind the place where decoding starts."""
    rng = np.random.default_rng(0)
    film = tmp_path / "film.mp4"
    params = f"intra-refresh=1:keyint=10:bframes={bframes}:scenecut=0"
    with av.open(str(film), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"x264-params": params})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(45):
            frame = av.VideoFrame.from_ndarray(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with open_film(str(film)) as (container, stream):
        expected = [as_shown(frame, None) for frame in container.decode(stream)]
    with av.open(str(film)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    assert sum(packet.is_keyframe for packet in packets) > 3
    for number, picture in enumerate(expected):
        np.testing.assert_array_equal(decode_frames(film, [number])[0], picture)
    data, packet = bytearray(film.read_bytes()), packets[damaged]
    assert packet.pos is not None
    data[packet.pos + packet.size // 2 : packet.pos + packet.size] = b"\xff" * (packet.size - packet.size // 2)
    film.write_bytes(data)
    refused = []
    for number, picture in enumerate(expected):
        try:
            found = decode_frames(film, [number])[0]
        except MediaError as error:
            assert "damaged near" in str(error)
            refused.append(number)
        else:
            np.testing.assert_array_equal(found, picture)
    # Up to where decoding from the next recovery point has all of the picture, and no further.
    assert refused == [*range(refused_from, refused[-1] + 1)] and damaged < refused[-1] < 40


def test_a_film_that_begins_at_a_recovery_point_is_shown_from_where_it_is_whole(tmp_path: Path) -> None:
    params = "intra-refresh=1:keyint=12:bframes=0"
    film = write_film(tmp_path / "film.mp4", [5 * i for i in range(40)], **{"x264-params": params})
    cut = remux(film, tmp_path / "cut.mkv", lambda packet, number: number >= 12)
    with open_film(str(cut)) as (container, stream):
        shown = [as_shown(frame, None) for frame in container.decode(stream)]
    assert 0 < len(shown) < 28 and probe_video(cut).num_frames == len(shown)
    for number, picture in enumerate(shown):
        np.testing.assert_array_equal(decode_frames(cut, [number])[0], picture)


def test_half_a_film_is_none(tmp_path: Path) -> None:
    film = write_film(tmp_path / "film.mp4", [10 * i for i in range(20)], codec="mpeg4")
    for name, flags in (("half.mp4", "faststart"), ("parts.mp4", "frag_keyframe+empty_moov")):
        with av.open(str(film)) as source, av.open(str(tmp_path / name), "w", options={"movflags": flags}) as copy:
            stream = copy.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.size:
                    packet.stream = stream
                    copy.mux(packet)
        assert probe_video(tmp_path / name).num_frames == 20
    write_film(tmp_path / "film.webm", [10 * i for i in range(20)], codec="libvpx")
    for name in (
        "film.mp4",
        "half.mp4",
        "parts.mp4",
        "film.webm",
    ):  # in MP4 the list of frames is at the end, or at the start
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) * 3 // 4])
        with pytest.raises(MediaError, match=rf"{name}: (cannot decode|damaged: the file is cut off)"):
            probe_video(tmp_path / name)
