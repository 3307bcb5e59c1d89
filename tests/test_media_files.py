"""Which files are opened, how much of them is decoded, and what is kept of them on disk."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ds_lvxattn.data.media import (
    Media,
    MediaError,
    index,
    probe_image,
    probe_video,
    store,
)
from tests.support.films import corners, encoded, levels_of, write_film


def test_names_are_taken_as_they_are(tmp_path: Path) -> None:
    for name in ("a%03d.mp4", "b[1]*?.mp4", "concat:c|d.mp4", "http:e.mp4", "-i.mp4", "é\udcff.mp4"):
        film = write_film(tmp_path / "plain.mp4", [0, 50])
        film.rename(tmp_path / name)
        assert levels_of(tmp_path / name, [1]) == pytest.approx([50], abs=2)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty.mp4").touch()
    refused = {
        str(tmp_path): "not a regular file", str(tmp_path / "pipe"): "not a regular file",
        "/dev/zero": "not a regular file", str(tmp_path / "a\0.mp4"): "not a path",
        str(tmp_path / "\ud83d.mp4"): "not a path", str(tmp_path / "empty.mp4"): "is empty",
        str(tmp_path / "none.mp4"): "No such file or directory$", "http://127.0.0.1/a.mp4": "No such file",
        f"{tmp_path}/a\\b.mp4": "separated by /", f"{tmp_path}/~/a.mp4": "~ and variables are not replaced",
        f"{tmp_path}/ a.mp4": "white space", "A" * 5000: "an embedded medium begins with data:",
    }  # fmt: skip
    for path, message in refused.items():
        for read in (probe_video, probe_image):
            with pytest.raises(MediaError, match=message):
                read(path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{film}\n#EXT-X-ENDLIST\n"),
        ("list.mp4", "ffconcat version 1.0\nfile '{film}'\n"),
        ("list.sdp", "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n"),
        ("list.mpd", '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"></MPD>'),
    ],
)
def test_no_second_file_is_opened(tmp_path: Path, name: str, text: str) -> None:
    film = write_film(tmp_path / "film.mp4", [0, 50])
    (tmp_path / name).write_text(text.format(film=film))
    with pytest.raises(MediaError, match="cannot decode"):
        probe_video(tmp_path / name)


def test_pictures_of_too_many_pixels_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    bomb = bytearray(encoded(Image.new("1", (8, 8)), "PNG"))
    bomb[16:24] = struct.pack(">II", 12_000, 10_000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    (tmp_path / "bomb.png").write_bytes(bomb)
    for source in (bytes(bomb), str(tmp_path / "bomb.png")):
        with pytest.raises(MediaError, match="pixels"):
            probe_image(source)
    with pytest.raises(MediaError, match="pixels"):
        probe_video(tmp_path / "bomb.png")


def test_large_pictures_are_scaled(tmp_path: Path) -> None:
    shown = Media("image", (encoded(Image.fromarray(corners(480, 640)), "JPEG"),), (0,), size=20_000).decode([0])[0]
    assert shown.shape == (122, 163, 3)
    np.testing.assert_allclose(shown[40::60, 40::80].astype(int), corners(2, 2), atol=12)


# Indices kept on disk


def test_an_index_is_read_from_disk_the_second_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "WORTH_KEEPING", 0)
    film = write_film(tmp_path / "film.mp4", [5 * i for i in range(40)], g="10")
    first = index.film_index(str(film))
    index.remembered_index.cache_clear()
    monkeypatch.setattr(index, "_build", lambda path: pytest.fail("the film was read again"))
    again = index.film_index(str(film))
    for name in ("stamps", "key_of", "keys"):
        np.testing.assert_array_equal(getattr(again, name), getattr(first, name))
    assert (again.info.length, again.info.unit, again.info.width) == (first.info.length, first.info.unit, 64)
    index.remembered_index.cache_clear()
    os.utime(film, (1, 1))  # another file by the same name
    with pytest.raises(pytest.fail.Exception):
        index.film_index(str(film))
