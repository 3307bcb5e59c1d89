"""What a video or an image shows, by files that are made here, and which of its frames are taken."""

from __future__ import annotations

import hashlib
import io
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from ds_lvxattn.data.media import (
    Media,
    MediaError,
    VideoInfo,
    decode_frames,
    probe_image,
    probe_video,
    sample_indices,
    sample_times,
)
from ds_lvxattn.data.media.files import open_film
from ds_lvxattn.data.media.picture import as_shown
from ds_lvxattn.data.media_of_row import open_media
from ds_lvxattn.data.turns import MediaRef
from tests.support.avif import tiled_avif
from tests.support.films import corners, encoded, levels_of, remux, write_film


def sample_frames(info: VideoInfo, max_frames: int, **how: float) -> list[int]:
    """The frames that are shown at the times to look at."""
    return [info.frame_at(time) for time in sample_times(info, max_frames, **how)]


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


# What a player shows


def test_what_is_not_shown_is_decoded_for_what_is(tmp_path: Path) -> None:
    film = write_film(tmp_path / "film.mp4", [20 + 2 * i for i in range(40)], g="30", bf="2")
    shift = 10  # cut in front of frame 10, without decoding: an edit list starts there

    def shifted(packet: av.Packet, number: int) -> None:
        assert packet.pts is not None and packet.dts is not None and packet.duration
        packet.pts -= shift * packet.duration
        packet.dts -= shift * packet.duration

    cut = remux(film, tmp_path / "cut.mp4", shifted)
    info = probe_video(cut)
    assert info.num_frames == 30
    assert levels_of(cut, [*range(30)]) == pytest.approx([20 + 2 * i for i in range(10, 40)], abs=2)


@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
def test_hidden_frames_are_no_frames(tmp_path: Path, codec: str) -> None:
    film = write_film(tmp_path / "film.webm", [10 * i for i in range(12)], codec=codec, g="1")
    hidden = (3, 7)

    def hide(packet: av.Packet, number: int) -> None:
        if number in hidden:
            data = bytearray(bytes(packet))
            data[0] &= ~(0x10 if codec == "libvpx" else 0x02)  # show_frame
            packet.update(data)

    with_hidden = remux(film, tmp_path / "hidden.webm", hide)
    shown = [10 * i for i in range(12) if i not in hidden]
    assert probe_video(with_hidden).num_frames == len(shown)
    assert levels_of(with_hidden, [*range(len(shown))]) == pytest.approx(shown, abs=3)


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("film.mp4", "libx264", {"x264-params": "open-gop=1:keyint=12:bframes=3"}),
        ("refreshed.mp4", "libx264", {"x264-params": "intra-refresh=1:keyint=12"}),
        ("refreshed.ts", "libx264", {"x264-params": "intra-refresh=1:keyint=12:bframes=0"}),
        ("film.mkv", "libx265", {"x265-params": "log-level=none:keyint=12:open-gop=1"}),
        ("film.ts", "mpeg2video", {"bf": "2", "g": "12"}),
        ("film.avi", "mpeg4", {"bf": "2", "g": "12"}),
        ("film.h264", "libx264", {"g": "12"}),
        ("film.webm", "libvpx-vp9", {"g": "12"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_frames_are_those_of_a_sequential_decode(
    tmp_path: Path, name: str, codec: str, options: dict[str, str]
) -> None:
    film = write_film(tmp_path / name, [5 * i for i in range(50)], codec=codec, rate=25, **options)
    with open_film(str(film)) as (container, stream):
        expected = [as_shown(frame, None) for frame in container.decode(stream)]
    assert probe_video(film).num_frames == len(expected) == 50
    order = np.random.default_rng(0).permutation(50).tolist()
    for wanted in (order, order[:4]):
        for number, frame in zip(wanted, decode_frames(film, wanted), strict=True):
            np.testing.assert_array_equal(frame, expected[number])


def picture_film(path: Path, image: np.ndarray, codec: str = "libx264", **attributes: Any) -> Path:
    """Two frames of one picture; attributes of the encoder, or of its frames (``color_range``, ``colorspace``)."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, options={"qp": "0"} if codec == "libx264" else {})
        stream.width, stream.height = image.shape[1], image.shape[0]
        stream.pix_fmt = "yuv444p"
        for key in ("sample_aspect_ratio", "color_range", "colorspace"):
            if key in attributes:
                setattr(stream.codec_context, key, attributes[key])
        if "rotation" in attributes:
            stream.set_display_rotation(attributes["rotation"])
        for number in range(2):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            space, span = attributes.get("colorspace", 5), attributes.get("color_range", 1)
            frame = frame.reformat(format="yuv444p", dst_colorspace=space, dst_color_range=span)
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(("angle", "turns"), [(-90, 3), (90, 1), (180, 2)])
def test_films_are_turned_as_they_say(tmp_path: Path, angle: int, turns: int) -> None:
    film = picture_film(tmp_path / "phone.mp4", corners(), rotation=angle)
    expected = np.rot90(corners(), turns)
    info = probe_video(film)
    assert (info.height, info.width) == expected.shape[:2]
    np.testing.assert_allclose(decode_frames(film, [0])[0].astype(int), expected, atol=3)


def test_pixels_are_square(tmp_path: Path) -> None:
    film = picture_film(tmp_path / "dvd.mp4", corners(), sample_aspect_ratio=Fraction(16, 11))
    info = probe_video(film)
    assert (info.width, info.height) == (93, 48)
    assert decode_frames(film, [0])[0].shape == (48, 93, 3)
    assert decode_frames(film, [0], size=1000)[0].shape == (22, 44, 3)


@pytest.mark.parametrize("space", [1, 5, 9], ids=["BT.709", "BT.601", "BT.2020"])
@pytest.mark.parametrize("span", [1, 2], ids=["limited", "full"])
def test_colours_by_the_space_and_range_of_the_film(tmp_path: Path, space: int, span: int) -> None:
    image = corners() // 2 + 40
    film = picture_film(tmp_path / "film.mp4", image, colorspace=space, color_range=span)
    np.testing.assert_allclose(decode_frames(film, [0])[0].astype(int), image, atol=3)


def test_interlaced_pictures_are_one_picture(tmp_path: Path) -> None:
    """Lines of two moments, a moving bar: woven together they are a comb."""
    path = tmp_path / "interlaced.ts"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg2video", rate=25, options={"flags": "+ildct+ilme", "qscale": "2"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(12):
            image = np.zeros((48, 64, 3), dtype=np.uint8)
            image[0::2, 8:24] = 255
            image[1::2, 32:48] = 255
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    frame = decode_frames(path, [1])[0].astype(int)
    bars = frame[4:-4, 12:20], frame[4:-4, 36:44]
    assert all(np.abs(np.diff(bar.mean(axis=(1, 2)))).max() < 40 for bar in bars)
    dark, bright = sorted(bar.mean() for bar in bars)  # which field is the first, the file says
    assert dark < 50 and bright > 200


# Which stream


def test_cover_art_is_no_film(tmp_path: Path) -> None:
    film = write_film(tmp_path / "film.mp4", [10 * i for i in range(20)])
    cover = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(cover, "JPEG")
    tagged = tmp_path / "tagged.mp4"
    with av.open(str(film)) as source, av.open(str(tagged), "w") as copy:
        picture = copy.add_stream("mjpeg", rate=1)
        picture.width, picture.height, picture.pix_fmt = 32, 32, "yuvj420p"
        picture.disposition = av.stream.Disposition.attached_pic
        stream = copy.add_stream_from_template(source.streams.video[0])
        frame = av.VideoFrame.from_image(Image.open(cover)).reformat(format="yuvj420p")
        frame.pts = 0
        copy.mux(picture.encode(frame))
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                copy.mux(packet)
    info = probe_video(tagged)
    assert (info.num_frames, info.width) == (20, 64)
    assert levels_of(tagged, [0, 19]) == pytest.approx([0, 190], abs=2)


def test_a_song_with_a_cover_is_no_video(tmp_path: Path) -> None:
    song = tmp_path / "song.mp3"
    cover = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(cover, "JPEG")
    with av.open(str(song), "w") as container:
        sound = container.add_stream("mp3", rate=44100)
        picture = container.add_stream("mjpeg", rate=1)
        picture.width, picture.height, picture.pix_fmt = 32, 32, "yuvj420p"
        picture.disposition = av.stream.Disposition.attached_pic
        container.mux(picture.encode(av.VideoFrame.from_image(Image.open(cover)).reformat(format="yuvj420p")))
        samples = av.AudioFrame.from_ndarray(np.zeros((2, 1152), dtype=np.float32), format="fltp", layout="stereo")
        samples.rate = 44100
        container.mux(sound.encode(samples))
        container.mux(sound.encode())
    with pytest.raises(MediaError, match="song.mp3: "):
        probe_video(song)


# Images


def both_ways(tmp_path: Path, data: bytes, **options: Any) -> np.ndarray:
    """The picture of a file and of the same bytes embedded in a row, which are equal."""
    path = tmp_path / "picture"
    path.write_bytes(data)
    by_file, embedded = (Media("image", (s,), (0,), **options).decode([0])[0] for s in (str(path), data))
    np.testing.assert_array_equal(by_file, embedded)
    for source in (str(path), data):
        info = probe_image(source, options.get("upright", True))
        assert (info.height, info.width) == by_file.shape[:2]
    return by_file


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_images_are_upright(tmp_path: Path, orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(corners()), kind, exif=exif)
    reference = data if kind != "TIFF" else encoded(Image.fromarray(corners()), "PNG", exif=exif)  # Pillow turns a TIFF
    with Image.open(io.BytesIO(reference)) as image:
        stored = np.asarray(image.convert("RGB"))
        shown = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    np.testing.assert_array_equal(both_ways(tmp_path, data), shown)
    np.testing.assert_array_equal(Media("image", (data,), (0,), upright=False).decode([0])[0], stored)
    for upright, pixels in ((True, shown), (False, stored)):
        info = probe_image(data, upright)
        assert (info.height, info.width) == pixels.shape[:2]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled(tmp_path: Path, kind: str) -> None:
    ramp = np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)
    shown = both_ways(tmp_path, encoded(Image.fromarray(ramp), kind))
    np.testing.assert_allclose(shown[..., 0], ramp / 257, atol=1)


def test_palettes_and_transparency(tmp_path: Path) -> None:
    colours = Image.fromarray(corners()).quantize(4)
    np.testing.assert_array_equal(both_ways(tmp_path, encoded(colours, "PNG")), corners())
    half = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    half.paste((0, 0, 255, 255), (0, 0, 4, 8))
    shown = both_ways(tmp_path, encoded(half, "PNG"))
    assert shown[0, 0].tolist() == [0, 0, 255] and shown[0, 7].tolist() == [255, 255, 255]


def test_a_long_comment_in_a_picture_is_not_read(tmp_path: Path) -> None:
    comment = PngInfo()
    comment.add_text("prompt", "x" * 2_000_000, zip=True)
    shown = both_ways(tmp_path, encoded(Image.new("RGB", (20, 20), (90, 90, 90)), "PNG", pnginfo=comment))
    assert shown.shape == (20, 20, 3) and (shown == 90).all()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animations_are_all_their_frames_or_refused(tmp_path: Path, kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), (50 * i,) * 3) for i in range(4)]
    path = tmp_path / "moving"
    lossless = {"lossless": True} if kind == "WEBP" else {}
    frames[0].save(path, kind, save_all=True, append_images=frames[1:], duration=[100, 100, 100, 700], **lossless)
    info = probe_video(path)
    assert (info.num_frames, info.seconds) == (4, 1.0)
    assert sample_frames(info, 2) == [2, 3]
    assert levels_of(path, [3, 0, 1]) == pytest.approx([150, 0, 50], abs=2)
    with pytest.raises(MediaError, match="an animation of 4 frames; give it as a video"):
        probe_image(str(path))


def test_avif_is_read_and_heif_is_refused(tmp_path: Path) -> None:
    shown = both_ways(tmp_path, encoded(Image.fromarray(corners(512, 512)), "AVIF"))
    np.testing.assert_allclose(shown[128::256, 128::256].astype(int), corners(2, 2), atol=12)
    (tmp_path / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    with pytest.raises(MediaError, match=r"phone.heic: HEIF images are not read; convert it"):
        probe_video(tmp_path / "phone.heic")
    with pytest.raises(MediaError, match=r"phone.heic"):
        probe_image(str(tmp_path / "phone.heic"))
    # Another brand in front does not make a film of it.
    (tmp_path / "odd.mp4").write_bytes(b"\0\0\0\x18ftypmiaf\0\0\0\0heicmif1\0\0\0\x0cmeta\0\0\0\0" + bytes(100))
    with pytest.raises(MediaError, match=r"odd.mp4: HEIF images are not read; convert it"):
        probe_video(tmp_path / "odd.mp4")


def test_an_avif_of_tiles_is_shown_whole(tmp_path: Path) -> None:
    tiles = [Image.new("RGB", (64, 64), (level, level, level)) for level in (40, 200)]
    shown = both_ways(tmp_path, tiled_avif(tiles))
    assert shown.shape == (64, 128, 3)
    np.testing.assert_allclose(shown[32, [32, 96], 0].astype(int), [40, 200], atol=3)


def test_media_are_compared_with_the_checksums_of_their_rows(tmp_path: Path) -> None:
    path = write_film(tmp_path / "a.webm", [0, 50, 100], codec="libvpx")
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    ref = MediaRef("video", path.name, sha256=(checksum,))
    assert len(open_media([ref], 3, str(tmp_path))[0].frames) == 3
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(1, 1))
    with pytest.raises(MediaError, match=r"a.webm: damaged, or another file: its SHA-256 is .*, and the row has"):
        open_media([ref], 3, str(tmp_path))


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_without_a_range_are_refused(mode: str) -> None:
    with pytest.raises(MediaError, match="no agreed range"):
        Media("image", (encoded(Image.new(mode, (4, 4)), "TIFF"),), (0,)).decode([0])
