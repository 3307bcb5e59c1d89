"""Damage of films and pictures is told, and found nowhere else."""

from __future__ import annotations

import errno
import gzip
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from ds_lvxattn.data.media import (
    Media,
    MediaError,
    decode_frames,
    probe_image,
    probe_video,
)
from ds_lvxattn.data.media.complete import is_cut_off
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


def data_of_box(kind: bytes, content: bytes) -> bytes:
    return (8 + len(content)).to_bytes(4, "big") + kind + content


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
    write_film(tmp_path / "film.avi", [10 * i for i in range(20)], codec="mpeg4")
    write_film(tmp_path / "film.wmv", [10 * i for i in range(20)], codec="wmv2")
    # In MP4 the list of frames is at the end, or at the start; without it FFmpeg knows a film by its name alone.
    for name in ("film.mp4", "half.mp4", "parts.mp4", "film.webm", "film.avi", "film.wmv"):
        data = (tmp_path / name).read_bytes()
        assert not is_cut_off(str(tmp_path / name))
        for quarters in (3, 1):
            (tmp_path / name).write_bytes(data[: len(data) * quarters // 4])
            with pytest.raises(MediaError, match=rf"{name}: damaged: the file is cut off"):
                probe_video(tmp_path / name)
    unfinished = data_of_box(b"ftyp", b"isom") + (0).to_bytes(4, "big") + b"mdat" + bytes(500)  # its writer was killed
    (tmp_path / "unfinished.mp4").write_bytes(unfinished)
    with pytest.raises(MediaError, match="the file is cut off"):
        probe_video(tmp_path / "unfinished.mp4")


# Of formats that tell no size of the whole: the codec of a film in it, and whether something may stand behind it.
IN_UNITS = {
    "ts": ("libx264", True), "m2ts": ("libx264", True), "mpg": ("mpeg2video", True), "vob": ("mpeg2video", True),
    "flv": ("flv", True), "ogg": ("libvpx", False), "ivf": ("libvpx", False), "mxf": ("mpeg2video", False),
    "y4m": ("rawvideo", False),
}  # fmt: skip


def write_noise(path: Path, codec: str, frames: int = 20) -> bytes:
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(frames):
            frame = av.VideoFrame.from_ndarray(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path.read_bytes()


@pytest.mark.parametrize("kind", IN_UNITS)
def test_a_film_that_ends_inside_a_unit_is_cut_off(kind: str, tmp_path: Path) -> None:
    codec, anything_behind = IN_UNITS[kind]
    film = tmp_path / f"film.{kind}"
    data = write_noise(film, codec)
    assert probe_video(film).num_frames == 20 and not is_cut_off(str(film))
    if anything_behind:
        film.write_bytes(data + bytes(50))
        assert not is_cut_off(str(film))
    for end in (len(data) - 5, len(data) * 3 // 4 + 3, len(data) // 2 + 3):
        film.write_bytes(data[:end])
        with pytest.raises(MediaError, match=rf"film.{kind}: damaged: the file is cut off"):
            probe_video(film)
    between = 0
    for end in range(len(data) // 2, len(data) // 2 + 400):
        film.write_bytes(data[:end])
        between += not is_cut_off(str(film))
    assert between <= 10


def test_a_recording_may_end_between_units(tmp_path: Path) -> None:
    film = tmp_path / "film.ts"
    film.write_bytes(write_noise(film, "mpeg2video")[: 188 * 100])
    assert 0 < probe_video(film).num_frames < 20
    film = tmp_path / "film.flv"
    film.write_bytes(write_noise(film, "flv")[:-4])  # of the last tag, the size behind it
    assert probe_video(film).num_frames == 20


@pytest.mark.parametrize(
    "pixels", ["yuv420p", "yuv411p", "yuv422p", "yuv444p", "yuva444p", "gray", "yuv420p10le", "gray16le"]
)
def test_frames_of_y4m_are_of_its_colour_space(pixels: str, tmp_path: Path) -> None:
    film = tmp_path / "film.y4m"
    with av.open(str(film), "w", options={"strict": "-1"}) as container:
        stream = container.add_stream("rawvideo", rate=10)
        stream.width, stream.height, stream.pix_fmt = 63, 47, pixels
        for level in (10, 100, 200):
            frame = av.VideoFrame.from_ndarray(np.full((47, 63, 3), level, dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(frame.reformat(format=pixels)))
        container.mux(stream.encode())
    data = film.read_bytes()
    assert not is_cut_off(str(film)) and probe_video(film).num_frames == 3
    for end in (len(data) - 1, len(data) // 2):
        film.write_bytes(data[:end])
        assert is_cut_off(str(film))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><title>404</title>", "web page"),
        (b'{"error": "expired"}', "web page or a message"),
        (gzip.compress(bytes(99), mtime=0), "gzip; unpack it"),
        (bytes(5000), "zeros alone"),
        (encoded(Image.new("RGB", (64, 64)), "WEBP", lossless=True)[:-20], "the file is cut off"),
    ],
)
def test_a_file_that_is_something_else_is_called_that(tmp_path: Path, data: bytes, said: str) -> None:
    (tmp_path / "a.mp4").write_bytes(data)
    with pytest.raises(MediaError, match=said):
        decode_frames(tmp_path / "a.mp4", [0])
    with pytest.raises(MediaError, match=said):
        Media("image", (str(tmp_path / "a.mp4"),), (0,)).decode([0])


def test_a_film_among_images_is_called_that(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="it is a video; give it under 'video'"):
        probe_image(str(write_film(tmp_path / "film.mp4", [0, 50])))


def test_too_many_open_files_are_told_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    (tmp_path / "a.png").write_bytes(encoded(Image.new("RGB", (8, 8)), "PNG"))
    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(MediaError, match=r"Too many open files.*ulimit -n"):
        Media("image", (str(tmp_path / "a.png"),), (0,)).decode([0])
